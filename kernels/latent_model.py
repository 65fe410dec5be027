"""The conditional laws of a latent Gaussian model, as log densities of its function and of its parameters.

They are frozen dataclasses, equal for equal functions of the user, so that what is compiled for one sweep serves all.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from bayesinf.captured import original
from bayesinf.kernels.elliptical_slice import EllipticalSlice
from bayesinf.kernels.latent_forms import FORMS, LatentGaussian, as_latent
from bayesinf.target import Target

__all__ = ["GivenForm", "GivenParameters", "LatentModel", "SliceOf", "takes_theta"]


@dataclass(frozen=True)
class LatentModel:
    """The functions of a model; equal for equal functions, so that it compiles once."""

    build: Callable[[PyTree], Any]
    log_likelihood: Callable[..., Any]

    def latent(self, theta: PyTree, variance: Any) -> LatentGaussian:
        return as_latent(self.build(theta), variance(theta) if callable(variance) else variance)

    def log_likelihood_of(self, f: Array, theta: PyTree, data: PyTree) -> Any:
        arguments = (f,) if data is None else (f, data)
        return self.log_likelihood(*arguments, *((theta,) if takes_theta(self.log_likelihood) else ()))


@dataclass(frozen=True)
class GivenForm:
    """Log p(theta | what the form holds fixed, y), NaN where K has no factor: such a move is undone and counted."""

    model: LatentModel
    form: str

    def __call__(self, theta: PyTree, data: tuple[Any, Any, PyTree, PyTree]) -> Array:
        prior, variance, observed, fixed = data
        values = prior.constrain(theta)
        latent = self.model.latent(values, variance)
        f, log_density = FORMS[self.form].place(latent, fixed)
        log_density = log_density + self.model.log_likelihood_of(f, values, observed)
        return prior.log_density(theta) + jnp.where(latent.is_ok, log_density, jnp.nan)


@dataclass(frozen=True)
class GivenParameters:
    """Log p(z | theta, y), for f = m + L z."""

    model: LatentModel

    def __call__(self, z: Array, data: tuple[PyTree, LatentGaussian, PyTree]) -> Array:
        return self.log_likelihood(z, data) - 0.5 * jnp.sum(z**2)

    def log_likelihood(self, z: Array, data: tuple[PyTree, LatentGaussian, PyTree]) -> Array:
        theta, latent, observed = data
        return jnp.asarray(self.model.log_likelihood_of(latent.color(z), theta, observed))


@dataclass(frozen=True)
class SliceOf:
    """Elliptical slice sampling of z."""

    size: int

    def __call__(self, target: Target) -> EllipticalSlice:
        return EllipticalSlice(_log_likelihood_of, 0.0, jnp.ones(self.size), target)


def _log_likelihood_of(z: Array, target: Target) -> Array:
    given: Any = target.logdensity_fn
    return given.log_likelihood(z, target.data)


def takes_theta(log_likelihood: Any) -> bool:
    """Whether a log likelihood asks for the parameters."""
    try:
        return "theta" in inspect.signature(original(log_likelihood)).parameters
    except (TypeError, ValueError):  # of another language: it does not tell
        return False
