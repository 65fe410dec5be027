"""Models of two layers, of which the inner one can be integrated out given the outer one.

    x_t = (u_t, z_t):    p(z_t | u_{0:t}, y_{0:t-1}),  p(y_t | u_{0:t}, y_{0:t-1})  and  p(u_t | u_{0:t-1}, y_{0:t-1})

are known for every outer path u, by a Kalman filter or by that of a hidden Markov chain. A particle filter then needs
to draw the outer states alone (`Marginalized`), and its estimates vary less than those of particles of both.
"""

import abc
from typing import NamedTuple

from jaxtyping import Array, Float, Int, PyTree

from bayesinf.models.state_space import Law, StateSpaceModel

__all__ = ["Nested", "NestedModel"]


class Nested(NamedTuple):
    """A state of two layers: `outer` u_t, of any structure, and `inner` z_t."""

    outer: PyTree
    inner: PyTree


class NestedModel(StateSpaceModel):
    """A state-space model on `Nested` states with what it takes to integrate the inner one out.

    A belief is what there is to say of z_t given u_{0:t} and observations: a pytree of arrays of one structure. Users
    derive from `ConditionallyLinearGaussian` or `ConditionallyDiscrete`, which define all of this.
    """

    @abc.abstractmethod
    def predict_outer_initial(self) -> Law:
        """The law of u_0."""

    @abc.abstractmethod
    def predict_outer(self, u_prev: PyTree, belief: PyTree, t: Int[Array, ""]) -> Law:
        """The law of u_t given u_{0:t-1} and y_{0:t-1}, where z_{t-1} has the law `belief`."""

    @abc.abstractmethod
    def believe_initial(self, u: PyTree) -> PyTree:
        """The law of z_0 given u_0."""

    @abc.abstractmethod
    def believe(self, u_prev: PyTree, belief: PyTree, u: PyTree, t: Int[Array, ""]) -> PyTree:
        """The law of z_t given u_{0:t} and y_{0:t-1}, where z_{t-1} had the law `belief`."""

    @abc.abstractmethod
    def predict_observation(self, u: PyTree, belief: PyTree, t: Int[Array, ""]) -> Law:
        """The law of y_t where z_t has the law `belief`."""

    @abc.abstractmethod
    def update(self, u: PyTree, belief: PyTree, y: PyTree, t: Int[Array, ""]) -> PyTree:
        """The law of z_t given y_t too; what is NaN in y_t is missing."""

    @abc.abstractmethod
    def draw_inner(self, key: Array, belief: PyTree) -> PyTree:
        """A draw of z_t by its law."""

    @abc.abstractmethod
    def average(self, log_weights: Float[Array, " n"], beliefs: PyTree) -> PyTree:
        """What there is to say of z_t by weighted beliefs, with a leading axis n: an estimate of a filter."""
