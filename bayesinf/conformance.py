"""What proves a kernel right, for anyone's kernel."""

import numpy as np
import scipy.stats
from jaxtyping import ArrayLike

__all__ = ["FALSE_ALARM", "mean_p_value"]

FALSE_ALARM = 1e-6
"""Chance with which one assertion of a statistical test fails although the code is right; a test passes if p > this."""


def mean_p_value(samples: ArrayLike, truth: ArrayLike) -> float:
    """The two-sided p-value of a t-test that independent replicates have mean `truth`.

    Args:
        samples: shape (n, ...), n independent replicates; every trailing component is tested.
        truth: the exact mean, of the trailing shape or broadcast to it.

    Returns:
        The smallest p-value over the components, times their number (Bonferroni), at most 1.
    """
    values = np.asarray(samples, np.float64)
    p_values = np.atleast_1d(scipy.stats.ttest_1samp(values, np.asarray(truth, np.float64), axis=0).pvalue)
    if np.any(np.isnan(p_values)):
        return 0.0
    return float(min(1.0, p_values.min() * p_values.size))
