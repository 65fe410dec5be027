"""Emissions of any NumPyro law, learnt by gradients.

The M-step climbs the weighted log density by a few steps of L-BFGS in the unconstrained space of the parameters, from
where they are, and keeps them where that does not raise it: EM never goes down.

References:
    Dempster, Laird and Rubin (1977), doi:10.1111/j.2517-6161.1977.tb01600.x (generalised EM).
"""

from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import optax
import optax.tree
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import Emission

__all__ = ["NumPyroEmission"]


class NumPyroEmission(Emission):
    """Emissions of any law of NumPyro.

    Attributes:
        build: build(parameters) -> law with batch shape (K,), or build(parameters, covariates) -> law with batch shape
            (T, K) where covariates are given.
        parameters: a dict of arrays, each with a leading axis of states.
        constraints: of the parameters that are not real, by name, as NumPyro's constraints.
        num_steps: of L-BFGS in one M-step.
        spread: standard deviation of the noise that makes one start differ from another, in unconstrained space.

    Raises:
        ValueError: build is no function, or a constraint is of no parameter.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from bayesinf.models import hmm
        >>> emission = hmm.NumPyroEmission(
        ...     lambda p: dist.Laplace(p["loc"], p["scale"]),
        ...     {"loc": jnp.array([-1.0, 1.0]), "scale": jnp.ones(2)},
        ...     {"scale": dist.constraints.positive},
        ... )
        >>> emission.num_states, emission.log_prob(jnp.zeros(3)).shape
        (2, (3, 2))
    """

    build: Callable[..., dist.Distribution] = eqx.field(static=True)
    parameters: dict[str, Array]
    constraints: tuple[tuple[str, Any], ...] = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)
    spread: float = eqx.field(static=True)

    def __init__(
        self,
        build: Callable[..., dist.Distribution],
        parameters: Mapping[str, Any],
        constraints: Mapping[str, Any] | tuple[tuple[str, Any], ...] = (),
        *,
        num_steps: int = 5,
        spread: float = 0.5,
    ):
        if not callable(build):
            raise ValueError(f"build must be a function build(parameters), got {type(build).__name__}")
        self.build = build
        self.parameters = {
            name: errors.as_array(f"parameters[{name!r}]", is_floating=True)(value)
            for name, value in parameters.items()
        }
        self.constraints = tuple(dict(constraints).items())
        if unknown := {name for name, _ in self.constraints} - set(self.parameters):
            raise ValueError(f"constraints must be of {sorted(self.parameters)}, got one of {sorted(unknown)}")
        self.num_steps = errors.check_count("num_steps", num_steps)
        self.spread = spread

    @property
    def num_states(self) -> int:
        return next(iter(self.parameters.values())).shape[0]

    @property
    def event_ndim(self) -> int:
        return 0 if self._takes_covariates() else self.law().event_dim

    @property
    def needs_covariates(self) -> bool:
        return self._takes_covariates()

    def law(self, covariates: Array | None = None) -> dist.Distribution:
        return self.build(self.parameters) if covariates is None else self.build(self.parameters, covariates)

    def maximize(self, ys: Array, weights: Float[Array, "t k"], covariates: Array | None = None) -> "NumPyroEmission":
        def loss(free: dict[str, Array]) -> Array:
            log_lik = self._with(self._constrained(free)).log_prob(ys, covariates)
            # a row without weight may have a density of zero
            return -jnp.sum(jnp.where(weights > 0, weights * jnp.where(weights > 0, log_lik, 0.0), 0.0))

        optimizer = optax.lbfgs()
        value_and_grad = optax.value_and_grad_from_state(loss)

        def step(_: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            free, state = carry
            value, grad = value_and_grad(free, state=state)
            updates, state = optimizer.update(grad, state, free, value=value, grad=grad, value_fn=loss)
            return optax.apply_updates(free, updates), state

        start = self._free()
        end, _ = jax.lax.fori_loop(0, self.num_steps, step, (start, optimizer.init(start)))
        is_better = loss(end) < loss(start)
        kept = jax.tree.map(lambda new, old: jnp.where(is_better, new, old), end, start)
        return self._with(self._constrained(kept))

    def guess(
        self, key: Key[Array, ""], ys: Array, is_seen: Array, covariates: Array | None = None
    ) -> "NumPyroEmission":
        noise = optax.tree.random_like(key, self._free(), jax.random.normal)
        return self._with(self._constrained(optax.tree.add_scale(self._free(), self.spread, noise)))

    def _takes_covariates(self) -> bool:
        try:
            errors.check_arguments("build", self.build, "parameters")
        except ValueError:
            return True
        return False

    def _transforms(self) -> dict[str, Any]:
        return {name: dist.biject_to(constraint) for name, constraint in self.constraints}

    def _free(self) -> dict[str, Array]:
        transforms = self._transforms()
        return {name: transforms[name].inv(p) if name in transforms else p for name, p in self.parameters.items()}

    def _constrained(self, free: dict[str, Array]) -> dict[str, Array]:
        transforms = self._transforms()
        return {name: transforms[name](p) if name in transforms else p for name, p in free.items()}

    def _with(self, parameters: dict[str, Array]) -> "NumPyroEmission":
        return eqx.tree_at(lambda emission: emission.parameters, self, parameters)
