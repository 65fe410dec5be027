"""What a prediction set promises, and what for: carried by every result, so that nobody has to guess."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import ArrayLike, Int, Real

__all__ = ["Guarantee", "explain_infinite"]


@dataclass(frozen=True)
class Guarantee:
    """What a prediction set promises.

    It is hashable, and a static field of results, which therefore pass through `jit` and `vmap` unchanged.

    Attributes:
        kind: "exact", at every finite sample size; "asymptotic", in the limit of a long calibration; "long-run", of the
            average over time, for every sequence of data.
        statement: the inequality, in words or symbols.
        assumes: what it is conditional on; "nothing" where that is so.

    Example:
        >>> from bayesinf.models.conformal import Guarantee
        >>> print(Guarantee("exact", "P(y in set) >= 1 - alpha", "calibration and test scores exchangeable"))
        exact: P(y in set) >= 1 - alpha, if calibration and test scores exchangeable
    """

    kind: Literal["exact", "asymptotic", "long-run"]
    statement: str
    assumes: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.statement}, if {self.assumes}"


def explain_infinite(
    bound: Real[ArrayLike, "..."],
    num_scores: Int[ArrayLike, "..."],
    num_needed: Int[ArrayLike, "..."],
    otherwise: str = "a calibration score that the bound is made of is infinite itself",
) -> str:
    """What results say when asked `why_infinite`: empty where none is, and of several the first that is.

    Args:
        bound: what may be infinite.
        num_scores, num_needed: how many calibration scores there were, and how many it takes; broadcast with it.
        otherwise: the reason where there were enough.
    """
    is_infinite = np.isinf(np.asarray(bound, float))
    if not is_infinite.any():
        return ""
    given, needed = (int(np.broadcast_to(x, is_infinite.shape)[is_infinite].flat[0]) for x in (num_scores, num_needed))
    return f"it takes {needed} calibration scores, got {given}" if given < needed else otherwise
