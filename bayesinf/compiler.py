"""Releases of the compiler that compute something else than what was written."""

import os
import warnings

import jaxlib

__all__ = ["warn_of_wrong_sums"]

WRONG_SUMS = ("0.10.2",)
CURE = "xla_cpu_experimental_ynn_fusion_type"


def warn_of_wrong_sums() -> None:
    """Say so if this jaxlib adds products up wrongly on a CPU, unless a flag keeps it from doing so.

    Under `jit` and `vmap`, `sum((M @ x) ** 2)` of jaxlib 0.10.2 is wrong for every row after number 16,384 in float64,
    or 32,768 in float32, where there are some tens of thousands of rows: particles, or chains. There is no error and no
    NaN. The requirements of this package exclude that release; this is for installations which disregard them.

    References:
        https://github.com/jax-ml/jax/issues/39103.
    """
    if jaxlib.__version__ in WRONG_SUMS and CURE not in os.environ.get("XLA_FLAGS", ""):
        warnings.warn(
            f"jaxlib {jaxlib.__version__} adds products up wrongly on CPUs (jax issue 39103), where vmap makes tens of "
            "thousands of rows: install another, pip install 'jaxlib!=0.10.2', or set the environment variable "
            f"XLA_FLAGS=--{CURE}=-reduce before jax is imported",
            RuntimeWarning,
            stacklevel=3,
        )
