"""The score of a state-space model by Fisher's identity, and its observed information by Louis's.

    grad log p(y)      = E[ S(x) | y ],    S(x) = grad_theta log p_theta(x_{0:T-1}, y_{0:T-1})
    -grad^2 log p(y)   = E[ -grad_theta S(x) | y ] - Cov( S(x) | y )

S is additive, so that every smoother of additive functionals estimates the score: nothing is differentiated but the
densities of the model, at states that are held fixed. The gradient of a particle filter's log evidence itself is
biased, as it does not pass through the choice of ancestors.

References:
    Cappe, Moulines and Ryden (2005), doi:10.1007/0-387-28982-8, section 10.1.6 (Fisher's identity).
    Louis (1982), doi:10.1111/j.2517-6161.1982.tb01203.x.
    Poyiadjis, Doucet and Singh (2011), doi:10.1093/biomet/asq062 (by particles).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.kernels.additive import AdditiveFunctional
from bayesinf.kernels.backward import backward_sample
from bayesinf.kernels.particle_filter import particle_filter
from bayesinf.models.state_space import StateSpaceModel, log_joint, log_prob, observation_log_prob

__all__ = ["InformationResult", "check_law", "observed_information", "score_functional"]

LAWS = ("model", "proposal")


class _FirstScore(eqx.Module):
    """grad_theta of log p_theta(x_0, y_0), or of the log density of the initial proposal."""

    build: Callable[[PyTree], StateSpaceModel] = eqx.field(converter=as_pytree)
    of: str = eqx.field(static=True)
    theta: PyTree

    def __call__(self, x: PyTree, y: PyTree) -> PyTree:
        return jax.grad(self._log_density)(self.theta, x, y)

    def _log_density(self, theta: PyTree, x: PyTree, y: PyTree) -> Float[Array, ""]:
        model: Any = self.build(theta)
        if self.of == "model":
            return log_prob(model.initial(), x) + observation_log_prob(model, x, y, jnp.zeros((), jnp.int32))
        return log_prob(model.initial_proposal(y), x) if hasattr(model, "initial_proposal") else jnp.zeros(())


class _Score(eqx.Module):
    """grad_theta of log p_theta(x_t, y_t | x_{t-1}), or of the log density of the proposal."""

    build: Callable[[PyTree], StateSpaceModel] = eqx.field(converter=as_pytree)
    of: str = eqx.field(static=True)
    theta: PyTree

    def __call__(self, x_prev: PyTree, x: PyTree, y: PyTree, t: Int[Array, ""]) -> PyTree:
        return jax.grad(self._log_density)(self.theta, x_prev, x, y, t)

    def _log_density(self, theta: PyTree, x_prev: PyTree, x: PyTree, y: PyTree, t: Int[Array, ""]) -> Float[Array, ""]:
        model: Any = self.build(theta)
        if self.of == "model":
            return log_prob(model.transition(x_prev, t), x) + observation_log_prob(model, x, y, t)
        return log_prob(model.proposal(x_prev, y, t), x)


def score_functional(
    build: Callable[[PyTree], StateSpaceModel], theta: PyTree, *, of: str = "model"
) -> AdditiveFunctional:
    """The gradient in theta of the log density of path and data, as an additive functional.

        h_0 = grad log p(x_0) + grad log p(y_0 | x_0),    h_t = grad log p(x_t | x_{t-1}) + grad log p(y_t | x_t)

    Its smoothed expectation is the score grad log p_theta(y_{0:T-1}). With `of="proposal"` it is the gradient of
    sum_t log q_theta(x_t | x_{t-1}, y_t), whose smoothed expectation vanishes where the proposal is as close as it can
    be to the smoothing law in the inclusive Kullback-Leibler divergence.

    Args:
        build: `build(theta)` returns the StateSpaceModel.
        theta: parameters, a pytree of floating point arrays.
        of: "model", or "proposal" for its proposal and initial proposal.

    Returns:
        An AdditiveFunctional that is given the data, of the structure of theta.

    Raises:
        ValueError: `theta` is not floating point, `of` is neither, or the model lacks the proposal asked for.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def build(theta):
        ...     return bi.models.LinearGaussian.scalar(theta, 0.5, initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build(0.9), num_steps=30)
        >>> score = bi.kernels.score_functional(build, 0.5)
        >>> bi.kernels.paris(1, build(0.5), ys, score, num_particles=200).estimate.shape
        ()

    References:
        Poyiadjis, Doucet and Singh (2011), doi:10.1093/biomet/asq062.
    """
    errors.check_arguments("build", build, "theta")
    theta = errors.as_arrays("theta", theta)
    errors.check_floating("theta", theta)
    check_law(of, build, theta)
    return AdditiveFunctional(_FirstScore(build, of, theta), _Score(build, of, theta), is_given_data=True)


def check_law(of: str, build: Callable[[PyTree], StateSpaceModel], theta: PyTree) -> None:
    """A known law, and one that the model at theta has."""
    errors.check_choice("of", of, LAWS)
    if of == "proposal" and not hasattr(model := build(theta), "proposal"):
        raise ValueError(
            f"of='proposal' needs a method proposal(x_prev, y, t) of the model {type(model).__name__}, which has none; "
            "define it, or use of='model'"
        )


class InformationResult(NamedTuple):
    """What `observed_information` finds; theta is laid out as `ravel_pytree` lays it out, of size p.

    Attributes:
        score: grad log p_theta(y), of theta's structure.
        information: -grad^2 log p_theta(y), shape (p, p). At the maximum its inverse is the asymptotic covariance of
            the maximum likelihood estimator; a noisy estimate need not be positive definite.
        log_evidence: log Zhat of the filter.
    """

    score: PyTree
    information: Float[Array, "p p"]
    log_evidence: Float[Array, ""]


def observed_information(
    key: errors.KeyLike,
    build: Callable[[PyTree], StateSpaceModel],
    theta: PyTree,
    ys: PyTree,
    *,
    num_particles: int,
    num_paths: int,
    method: str = "auto",
    proposal: str = "bootstrap",
) -> InformationResult:
    """The score and the observed information at theta, from paths drawn by backward sampling.

        score = mean_k S_k,   information = -mean_k grad^2 log p_theta(x^k, y) - Cov_k(S_k),   S_k = grad log p(x^k, y)

    The covariance over paths has an error of relative order num_paths^{-1/2}: for standard errors at the maximum a few
    hundred paths do.

    Args:
        key: PRNG key or seed.
        build: `build(theta)` returns the StateSpaceModel.
        theta: parameters, a pytree of floating point arrays.
        ys: observations with leading axis T; NaN where missing.
        num_particles: N of the filter.
        num_paths: K >= 2 paths.
        method: how backward draws are made; see `backward_sample`.
        proposal: "bootstrap", or "guided" by the model's own proposals.

    Returns:
        An InformationResult.

    Raises:
        DegenerateWeightsError: the filter lost all its weights.
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def build(log_scale):
        ...     return bi.models.LinearGaussian.scalar(0.9, jnp.exp(log_scale), initial_scale=1.0)
        >>> _, ys = bi.models.simulate(0, build(-0.5), num_steps=100)
        >>> found = bi.kernels.observed_information(1, build, -0.5, ys, num_particles=200, num_paths=200)
        >>> bool(found.information[0, 0] > 0)
        True

    References:
        Louis (1982), doi:10.1111/j.2517-6161.1982.tb01203.x.
    """
    errors.check_count("num_paths", num_paths, minimum=2)
    errors.check_arguments("build", build, "theta")
    theta = errors.as_arrays("theta", theta)
    errors.check_floating("theta", theta)
    key_filter, key_back = jax.random.split(errors.as_key(key))
    model = build(theta)
    filtered = particle_filter(key_filter, model, ys, num_particles=num_particles, proposal=proposal, store="full")
    paths = backward_sample(key_back, model, filtered, num_paths, method)
    return _by_louis(as_pytree(build), theta, jax.tree.map(jnp.asarray, ys), paths, filtered.log_evidence)


@jax.jit
def _by_louis(build, theta, ys, paths, log_evidence) -> InformationResult:
    flat, unravel = ravel_pytree(theta)

    def log_density(flat, path):
        return log_joint(build(unravel(flat)), path, ys)

    scores = jax.vmap(jax.grad(log_density), (None, 0))(flat, paths)
    # one path at a time: a matrix for each of them is not kept
    curvature = jax.lax.map(lambda path: jax.hessian(log_density)(flat, path), paths, batch_size=32)
    covariance = jnp.cov(scores, rowvar=False).reshape(flat.size, flat.size)
    return InformationResult(unravel(jnp.mean(scores, 0)), -jnp.mean(curvature, 0) - covariance, log_evidence)
