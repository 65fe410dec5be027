"""What the methods that learn parameters by smoothing share: how an expectation is smoothed, and what is returned.

Each of `score_ascent` and `saem` needs, at every iteration, an estimate of E[h(x_{0:T-1}) | y] under the parameters of
the moment. By estimator:

    "ppg"        sweeps of Parisian particle Gibbs; the path is handed on from one iteration to the next, so that the
                 bias is forgotten as the iterations go on, at any number of particles
    "gibbs"      sweeps of conditional SMC and h of the path that each leaves: as "ppg", without the averages over
                 particles, and so with a larger variance
    "paris"      a PaRIS filter of its own at every iteration; biased by O(1/N)
    "backward"   a filter and N paths by backward sampling; biased by O(1/N), memory O(NT)

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900, section 4.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.kernels.additive import AdditiveFunctional
from bayesinf.kernels.backward import BACKWARD_METHODS, backward_sample
from bayesinf.kernels.conditional_smc import ConditionalSMC
from bayesinf.kernels.filter_steps import PROPOSALS
from bayesinf.kernels.paris import paris
from bayesinf.kernels.parisian_gibbs import ParisianGibbs
from bayesinf.kernels.particle_filter import particle_filter
from bayesinf.kernels.path_kernel import PathState, check_path, first_paths
from bayesinf.kernels.vectors import strong
from bayesinf.models.state_space import StateSpaceModel, check_series

__all__ = [
    "ESTIMATORS",
    "Freely",
    "LearningResult",
    "Smoothed",
    "Smoother",
    "check_maximize",
    "check_optimizer",
    "select_finite",
    "settle",
]

ESTIMATORS = ("ppg", "paris", "backward", "gibbs")


class Smoothed(NamedTuple):
    """An estimate of E[h | y], the path that the next iteration starts from, and log Zhat."""

    estimate: PyTree
    path: PyTree
    log_evidence: Float[Array, ""]


class Smoother(eqx.Module):
    """Estimates smoothed expectations of one series under changing models.

    Attributes:
        ys: observations with leading axis T; NaN where missing.
        estimator: one of `ESTIMATORS`.
        num_particles, num_backward, method, proposal: as of `ppg` and `paris`.
        num_sweeps, burn_in: sweeps an iteration of "ppg" and "gibbs", and how many of them are not averaged.
    """

    ys: PyTree = eqx.field(converter=check_series)
    estimator: str = eqx.field(static=True)
    num_particles: int = eqx.field(static=True)
    num_sweeps: int = eqx.field(static=True)
    burn_in: int = eqx.field(static=True)
    num_backward: int = eqx.field(static=True)
    method: str = eqx.field(static=True)
    proposal: str = eqx.field(static=True)

    def __check_init__(self):
        errors.check_choice("estimator", self.estimator, ESTIMATORS)
        errors.check_choice("method", self.method, BACKWARD_METHODS)
        errors.check_choice("proposal", self.proposal, PROPOSALS)
        errors.check_count("num_particles", self.num_particles, minimum=2)
        errors.check_count("num_sweeps", self.num_sweeps)
        errors.check_count("num_backward", self.num_backward)
        errors.check_count("burn_in", self.burn_in, minimum=0)
        if self.burn_in >= self.num_sweeps:
            raise ValueError(f"burn_in must be less than num_sweeps={self.num_sweeps}, got {self.burn_in}")

    def start(self, key: Key[Array, ""], model: StateSpaceModel, given: PyTree) -> PyTree:
        """The path that the first iteration starts from: the one given, or by backward sampling."""
        if given is not None:
            return check_path(model, self.ys, given)
        kernel = ConditionalSMC(model, self.ys, self.num_particles, proposal=self.proposal)
        return jax.tree.map(lambda leaf: leaf[0], first_paths(kernel, key, 1, throw=False))

    def __call__(
        self, key: Key[Array, ""], model: StateSpaceModel, functional: AdditiveFunctional, path: PyTree
    ) -> Smoothed:
        """One iteration's estimate; NaN where all weights vanished."""
        options: dict[str, Any] = {"num_particles": self.num_particles, "proposal": self.proposal}
        if self.estimator == "paris":
            options |= {"num_backward": self.num_backward, "method": self.method, "throw": False}
            found = paris(key, model, self.ys, functional, **options)
            return Smoothed(found.estimate, path, found.log_evidence)
        if self.estimator == "backward":
            key_filter, key_back = jax.random.split(key)
            filtered = particle_filter(key_filter, model, self.ys, store="full", throw=False, **options)
            paths = backward_sample(key_back, model, filtered, self.num_particles, self.method, throw=False)
            terms = jax.vmap(lambda path: functional.of_path(path, self.ys))(paths)
            is_ok = jnp.isfinite(filtered.log_evidence)
            estimate = jax.tree.map(lambda leaf: jnp.where(is_ok, jnp.mean(leaf, 0), jnp.nan), terms)
            return Smoothed(estimate, path, filtered.log_evidence)

        if self.estimator == "ppg":
            kernel: Any = ParisianGibbs(
                model, self.ys, functional, num_backward=self.num_backward, method=self.method, **options
            )
        else:
            kernel = ConditionalSMC(model, self.ys, refresh="backward", **options)

        def sweep(state, i):
            state, info = kernel.step(jax.random.fold_in(key, i), state)
            if self.estimator == "ppg":
                return state, (info.estimate, info.log_evidence)
            value = functional.of_path(state.position, self.ys)
            value = jax.tree.map(lambda leaf: jnp.where(info.is_divergent, jnp.nan, leaf), value)
            return state, (value, info.log_evidence)

        state, (estimates, log_evidence) = jax.lax.scan(sweep, PathState(path), jnp.arange(self.num_sweeps))
        estimate = jax.tree.map(lambda leaf: jnp.mean(leaf[self.burn_in :], axis=0), estimates)
        return Smoothed(estimate, state.position, log_evidence[-1])


class Freely(eqx.Module):
    """`build` of parameters where they are not constrained.

    Attributes:
        build: a function of the parameters, that returns a StateSpaceModel or a law.
        constraints: by name, of parameters that are a dict; one for all leaves; or None.
    """

    build: Callable[[PyTree], Any] = eqx.field(converter=as_pytree)
    constraints: Any

    def __call__(self, free: PyTree) -> Any:
        return self.build(self.constrain(free))

    def constrain(self, free: PyTree) -> PyTree:
        """The parameters that `build` is given."""
        return self._map(lambda bijector, leaf: bijector(leaf), free)

    def free(self, theta: PyTree) -> PyTree:
        """What is optimised.

        Raises:
            ValueError: theta is not floating point, lacks a name, or violates a constraint.
        """
        errors.check_floating("theta", theta)
        if isinstance(self.constraints, dict) and not (isinstance(theta, dict) and set(self.constraints) <= set(theta)):
            names = sorted(theta) if isinstance(theta, dict) else type(theta).__name__
            raise ValueError(f"constraints must be of names in theta, {names}, got {sorted(self.constraints)}")
        free = self._map(lambda bijector, leaf: bijector.inv(leaf), errors.as_arrays("theta", theta))
        if errors.is_concrete(free) and not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(free)):
            raise ValueError(f"theta must lie inside its constraints, got {theta}")
        return jax.tree.map(strong, free)

    def _map(self, apply: Callable[[Any, Any], Any], tree: PyTree) -> PyTree:
        from numpyro.distributions import biject_to

        if self.constraints is None:
            return tree
        if not isinstance(self.constraints, dict):
            return jax.tree.map(partial(apply, biject_to(self.constraints)), tree)
        bijectors = {name: biject_to(constraint) for name, constraint in self.constraints.items()}
        return {
            name: jax.tree.map(partial(apply, bijectors[name]), leaf) if name in bijectors else leaf
            for name, leaf in tree.items()
        }


class LearningResult(NamedTuple):
    """What `score_ascent` and `saem` return.

    Attributes:
        theta: the average of the parameters over the last half of the iterations, where they are not constrained.
        trace: the parameters after every iteration; leading axis of iterations.
        log_evidence: log Zhat at every iteration; of a conditional filter for "ppg" and "gibbs".
        path: the last path, with which a further run may go on.
        num_failed: iterations at which all weights vanished; they changed nothing.
    """

    theta: PyTree
    trace: PyTree
    log_evidence: Float[Array, " l"]
    path: PyTree
    num_failed: int | Array


def check_maximize(maximize: Callable[[PyTree], PyTree], sums: PyTree, theta: PyTree) -> None:
    """That it returns parameters."""
    found = jax.eval_shape(maximize, sums)
    if jax.tree.map(jnp.shape, found) != jax.tree.map(jnp.shape, theta):
        raise ValueError(
            f"maximize must return parameters like theta, of shapes {jax.tree.map(jnp.shape, theta)}, got "
            f"{jax.tree.map(jnp.shape, found)}"
        )


def check_optimizer(optimizer: Any) -> None:
    """One of optax."""
    if not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(f"optimizer must be one of optax, such as optax.adam(0.01), got {type(optimizer).__name__}")


def select_finite(estimate: PyTree, new: Any, old: Any) -> tuple[Any, Bool[Array, ""]]:
    """`new` where the estimate is finite, else `old`; and whether it is not."""
    is_ok = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(estimate)]))
    return jax.tree.map(lambda a, b: jnp.where(is_ok, a, b), new, old), ~is_ok


def settle(
    build: Freely, free: PyTree, log_evidence: Array, is_failed: Array, path: PyTree, *, throw: bool
) -> LearningResult:
    """The result of a run whose parameters where they are not constrained were `free` after every iteration.

    Raises:
        DegenerateWeightsError: at some iteration all weights vanished; its `result` is the LearningResult.
    """
    half = log_evidence.shape[0] // 2
    theta = build.constrain(jax.tree.map(lambda leaf: jnp.mean(leaf[half:], axis=0), free))
    trace = jax.vmap(build.constrain)(free)
    result = LearningResult(theta, trace, log_evidence, path, jnp.sum(is_failed))
    if throw and errors.is_concrete(is_failed) and np.any(is_failed):
        first = int(np.argmax(np.asarray(is_failed)))
        at = jax.tree.map(lambda leaf: np.asarray(leaf[first]).tolist(), trace)
        raise errors.DegenerateWeightsError(
            f"In {int(np.sum(is_failed))} of {log_evidence.shape[0]} iterations all weights vanished, or what was "
            f"smoothed was not finite, first in iteration {first + 1} at theta = {at}. Try more particles, smaller "
            "steps, or an observation law with heavier tails; throw=False returns what there is, in which these "
            "iterations changed nothing.",
            result,
        )
    return result
