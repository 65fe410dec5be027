"""What a prediction set promises, and what for: carried by every result, so that nobody has to guess."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Guarantee"]


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
