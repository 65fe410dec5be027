"""What a statistical test found, and the one threshold it is judged by."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import scipy.stats
from jaxtyping import ArrayLike

__all__ = ["FALSE_ALARM", "Report", "mean_p_value"]

FALSE_ALARM = 1e-6
"""Chance with which one assertion of a statistical test fails although the code is right; a test passes if p > this."""


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The outcome of a test that made several comparisons.

        p = min(1, number of comparisons x smallest p-value)          (Bonferroni)

    so that, if the code is right, p falls below any alpha with probability at most alpha, however the comparisons
    depend on each other. A comparison that is NaN counts as p = 0: nothing passes by being undefined.

    Attributes:
        test: what was tested.
        p_values: the p-value of each comparison, by name.
        notes: measured quantities that help to read the outcome; no part of the judgement.

    Example:
        >>> from bayesinf.conformance import Report
        >>> report = Report("a test", {"mean": 0.4, "variance": 0.01})
        >>> report
        a test: p = 0.02 from 2 comparisons; smallest: variance 0.01, mean 0.4
        >>> report.worst
        'variance'
        >>> report.raise_if_rejected() is report
        True
    """

    test: str
    p_values: Mapping[str, float]
    notes: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.p_values:
            raise ValueError(f"{self.test} made no comparison: there was nothing to compare")

    @property
    def p_value(self) -> float:
        """The p-value of all comparisons together."""
        return min(1.0, len(self.p_values) * self._ranked()[0][1])

    @property
    def worst(self) -> str:
        """The name of the comparison with the smallest p-value."""
        return self._ranked()[0][0]

    def raise_if_rejected(self, false_alarm: float = FALSE_ALARM) -> "Report":
        """The report itself, unless p <= false_alarm.

        Raises:
            AssertionError: the test rejects; the message is the report.
        """
        if self.p_value <= false_alarm:
            raise AssertionError(f"rejected at {false_alarm:g}: {self!r}")
        return self

    def _ranked(self) -> list[tuple[str, float]]:
        judged = {name: 0.0 if math.isnan(p) else float(p) for name, p in self.p_values.items()}
        return sorted(judged.items(), key=lambda item: item[1])

    def __repr__(self) -> str:
        smallest = ", ".join(f"{name} {p:.2g}" for name, p in self._ranked()[:3])
        notes = "".join(f"; {name} {value:.4g}" for name, value in self.notes.items())
        num = len(self.p_values)
        plural = "s" if num > 1 else ""
        return f"{self.test}: p = {self.p_value:.2g} from {num} comparison{plural}; smallest: {smallest}{notes}"


def mean_p_value(samples: ArrayLike, truth: ArrayLike) -> float:
    """The two-sided p-value of a t-test that independent replicates have mean `truth`.

        t = (mean - truth) / (sd / sqrt(n)),    compared with Student's t of n - 1 degrees of freedom

    Exact for Gaussian replicates, and for others as n grows. Replicates that do not vary count as p = 0, equal to the
    truth or not: nothing passes by being undefined.

    Args:
        samples: shape (n, ...), n independent replicates; every trailing component is tested.
        truth: the exact mean, of the trailing shape or broadcast to it.

    Returns:
        The smallest p-value over the components, times their number (Bonferroni), at most 1.

    Example:
        >>> import numpy as np
        >>> from bayesinf.conformance import FALSE_ALARM, mean_p_value
        >>> samples = np.random.default_rng(0).exponential(size=(1_000, 2))
        >>> mean_p_value(samples, 1.0) > FALSE_ALARM, mean_p_value(samples, np.array([1.0, 1.3])) > FALSE_ALARM
        (True, False)
    """
    values = np.asarray(samples, np.float64)
    p_values = np.atleast_1d(scipy.stats.ttest_1samp(values, np.asarray(truth, np.float64), axis=0).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    if np.any(np.isnan(p_values)):
        return 0.0
    return float(min(1.0, p_values.min() * p_values.size))
