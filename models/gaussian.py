"""What models with Gaussian noise share: their fields, and their laws."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bayesinf import errors

__all__ = ["as_floating", "check_fields", "gaussian"]


def as_floating(name: str) -> Callable[[Any], Any]:
    """A converter for the field `name`: to an array of floating point."""
    return errors.as_array(name, is_floating=True)


def check_fields(model: Any, expected: Mapping[str, tuple[tuple[int, ...], ...]], origin: str) -> None:
    """That fields are finite and of one of the expected shapes, and those named `*_tril` Cholesky factors.

    Args:
        model: whose attributes are checked.
        expected: the shapes that each attribute may have.
        origin: which fields these shapes come from.

    Raises:
        ValueError: one is not.
    """
    for name, shapes in expected.items():
        value = getattr(model, name)
        if value.shape not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]}, from {origin}, got {value.shape}")
        if errors.is_concrete(value) and not np.all(np.isfinite(np.asarray(value))):
            raise ValueError(f"{name} must be finite, got {np.asarray(value)}")
        if name.endswith("_tril") and errors.is_concrete(value):
            tril = np.asarray(value)
            if np.any(np.triu(tril, 1)) or np.any(np.diag(tril) < 0):
                raise ValueError(
                    f"{name} must be lower triangular with a diagonal that is not negative; pass "
                    "jnp.linalg.cholesky(covariance)"
                )


def gaussian(mean: Float[Array, " d"], tril: Float[Array, "d d"]) -> dist.Distribution:
    """N(mean, tril tril^T)."""
    if mean.shape[-1] == 1:  # no triangular solve for every particle
        return dist.Normal(mean, tril[..., 0]).to_event(1)
    return dist.MultivariateNormal(mean, scale_tril=tril)
