"""A state-space model whose states carry parameters that walk: what iterated filtering filters.

    theta_0 = theta + s_0 sigma_0 xi,     x_0 ~ p_{theta_0}(x_0)
    theta_t = theta_{t-1} + s_t sigma xi,     x_t ~ p_{theta_t}(x_t | x_{t-1}),     y_t ~ p_{theta_t}(y_t | x_t)

with s_t = exp(log_cooling (time + t)). Densities of its laws are those of x_t given theta_t: the density of the walk
is in proposal and transition alike, and cancels wherever the two are compared.

References:
    Ionides, Nguyen, Atchadé, Stoev and King (2015), doi:10.1073/pnas.1410597112.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree

from bayesinf.kernels.filter_steps import initial_law
from bayesinf.kernels.learning import Freely
from bayesinf.kernels.vectors import normals
from bayesinf.models.state_space import StateSpaceModel, log_prob, sample

__all__ = ["PerturbedModel"]


class PerturbedModel(StateSpaceModel):
    """The model of states (theta_t, x_t), theta unconstrained.

    It has no law of theta_0 to draw from: `first` perturbs a parameter that is there.

    Attributes:
        build: of unconstrained parameters.
        perturbation, initial_perturbation: sigma and sigma_0, pytrees like theta.
        log_cooling: of the perturbations, per unit of time.
        time: of t = 0, since the perturbations began to cool.
    """

    build: Freely
    perturbation: PyTree
    initial_perturbation: PyTree
    log_cooling: Float[Array, ""]
    time: Float[Array, ""]

    def walk(self, key: Key[Array, ""], theta: PyTree, sigma: PyTree, t: Any) -> PyTree:
        """A perturbation of the parameters before time t."""
        scale = jnp.exp(self.log_cooling * (self.time + t))
        (noise,) = normals(key, theta, 1)
        return jax.tree.map(lambda leaf, s, xi: leaf + (scale * s).astype(leaf.dtype) * xi, theta, sigma, noise)

    def first(self, key: Key[Array, ""], theta: PyTree, y: PyTree, proposal: str) -> tuple[PyTree, PyTree]:
        """A draw of (theta_0, x_0)."""
        key_walk, key_state = jax.random.split(key)
        theta = self.walk(key_walk, theta, self.initial_perturbation, 0)
        return theta, sample(key_state, initial_law(self.build(theta), y, proposal))

    def initial(self) -> Any:
        return None, lambda z: log_prob(self.build(z[0]).initial(), z[1])

    def initial_proposal(self, y: PyTree) -> Any:
        return None, lambda z: log_prob(initial_law(self.build(z[0]), y, "guided"), z[1])

    def transition(self, x_prev: tuple[PyTree, PyTree], t: Int[Array, ""]) -> Any:
        return self._move(x_prev, t, lambda model, x: model.transition(x, t))

    def proposal(self, x_prev: tuple[PyTree, PyTree], y: PyTree, t: Int[Array, ""]) -> Any:
        return self._move(x_prev, t, lambda model, x: model.proposal(x, y, t))

    def observation(self, x: tuple[PyTree, PyTree], t: Int[Array, ""]) -> Any:
        return self.build(x[0]).observation(x[1], t)

    def _move(self, before: tuple[PyTree, PyTree], t: Array, law_of: Callable[[Any, PyTree], Any]) -> Any:
        """The law of (theta_t, x_t): the parameters walk, and the state moves by the new ones."""

        def draw(key: Key[Array, ""]) -> tuple[PyTree, PyTree]:
            key_walk, key_state = jax.random.split(key)
            theta = self.walk(key_walk, before[0], self.perturbation, t)
            return theta, sample(key_state, law_of(self.build(theta), before[1]))

        return draw, lambda z: log_prob(law_of(self.build(z[0]), before[1]), z[1])
