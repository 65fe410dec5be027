"""A posterior taken apart: draws from the prior, its log density, and the log likelihood, on an unconstrained space.

    pi_a(z)  proportional to  p(x) |dx / dz| prod_k p_k(x)^a_k,     x = constrain(z),   0 <= a_k <= 1

is the law between prior (a = 0) and posterior (a = 1) that samplers of sequences of laws go through: one exponent for
all terms of the likelihood tempers it, exponents of 0 and 1 bring in the data term by term. The exponents are leaves of
the target's data, as are the user's data and the parameters of the prior, so that none of them ever recompiles.

A prior is one of

    a NumPyro distribution, or a pytree of them     values have the structure of the pytree
    (sample, log_prob)                              two functions on an unconstrained space; log_prob may be a `Target`
    Target.from_numpyro(model, ...)                 values are dicts; observed sites, if any, are the likelihood
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float, Key, PyTree
from numpyro import handlers
from numpyro.infer import util

from bayesinf import errors
from bayesinf.captured import captured
from bayesinf.kernel import is_finite
from bayesinf.target import Target, as_target

__all__ = ["Model", "Posterior", "as_posterior", "as_prior", "check_proper", "constrain_beside", "powered"]


class Laws(eqx.Module):
    """Independent NumPyro distributions, each moved to the real line by the bijection of its support."""

    laws: PyTree

    def draw(self, key: Key[Array, ""]) -> PyTree:
        laws, treedef = jax.tree.flatten(self.laws, is_leaf=_is_law)
        keys = jax.random.split(key, len(laws))
        drawn = [_bijection(law).inv(law.sample(k)) for law, k in zip(laws, keys, strict=True)]
        return jax.tree.unflatten(treedef, drawn)

    def constrain(self, position: PyTree) -> PyTree:
        return jax.tree.map(lambda law, z: _bijection(law)(z), self.laws, position, is_leaf=_is_law)

    def log_density(self, position: PyTree) -> Float[Array, ""]:
        def one(law: Any, z: Array) -> Array:
            bijection = _bijection(law)
            x = bijection(z)
            return jnp.sum(law.log_prob(x)) + jnp.sum(bijection.log_abs_det_jacobian(z, x))

        return sum(jax.tree.leaves(jax.tree.map(one, self.laws, position, is_leaf=_is_law)))  # type: ignore[return-value]


class Pair(eqx.Module):
    """A sampler and a log density, both of unconstrained positions."""

    sample: Callable[..., PyTree] = eqx.field(static=True, converter=captured)
    target: Target

    def draw(self, key: Key[Array, ""]) -> PyTree:
        return jax.tree.map(jnp.asarray, self.sample(key))

    def constrain(self, position: PyTree) -> PyTree:
        return position

    def log_density(self, position: PyTree) -> Float[Array, ""]:
        return self.target.logdensity(position)


class Model(eqx.Module):
    """The latent sites of a NumPyro model; its observed sites and factors are the likelihood."""

    target: Target
    observed: tuple[str, ...] = eqx.field(static=True)

    def draw(self, key: Key[Array, ""]) -> PyTree:
        args, kwargs = self._call()
        trace = handlers.trace(handlers.seed(self.target.model.model, key)).get_trace(*args, **kwargs)  # type: ignore[union-attr]
        return self.target.unconstrain({name: site["value"] for name, site in trace.items()})

    def constrain(self, position: PyTree) -> PyTree:
        return self.target.constrain(position)

    def log_density(self, position: PyTree) -> Float[Array, ""]:
        args, kwargs = self._call()
        prior = handlers.block(self.target.model.model, hide=list(self.observed))  # type: ignore[union-attr]
        return jnp.asarray(-util.potential_energy(prior, args, kwargs, position))

    def log_likelihood(self, position: PyTree) -> Float[Array, " t"]:
        args, kwargs = self._call()
        model = self.target.model.model  # type: ignore[union-attr]
        values = util.constrain_fn(model, args, kwargs, position)
        sites, _ = util.compute_log_probs(model, args, kwargs, values, sum_log_prob=False)
        return jnp.concatenate([jnp.ravel(sites[name]) for name in self.observed])

    def _call(self) -> tuple[tuple, dict]:
        return self.target.model.call(self.target.data)  # type: ignore[union-attr]


class Posterior(eqx.Module):
    """A prior and the terms of a log likelihood; made by `as_posterior`.

    Attributes:
        prior: draws positions, knows their log density and the values they stand for.
        likelihood: of values, or of values and data; None where the prior is a model with observed sites. Static.
        data: of the likelihood, or None.
    """

    prior: Laws | Pair | Model
    likelihood: Callable[..., Any] | None = eqx.field(static=True, converter=captured)
    data: PyTree

    def log_likelihood(self, position: PyTree) -> Float[Array, " t"]:
        """The terms of the log likelihood; NaN where the position is not finite, as draws at the edge of a support."""
        if self.likelihood is None:
            terms = self.prior.log_likelihood(position)  # type: ignore[union-attr]
        else:
            values = self.prior.constrain(position)
            told = self.likelihood(values) if self.data is None else self.likelihood(values, self.data)
            try:
                terms = jnp.atleast_1d(jnp.asarray(told))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"log_likelihood must return a scalar, or a vector with one term for each observation; got {told!r}"
                ) from error
        return jnp.where(is_finite(position), terms, jnp.nan)

    def powered(self, exponents: Float[Array, "..."]) -> Target:
        """The target pi_a for the exponents a, one for all terms or one for each."""
        return Target(powered, (self, exponents))


def powered(position: PyTree, data: tuple[Posterior, Array]) -> Float[Array, ""]:
    """Log pi_a(position) up to a constant, for data = (posterior, a); terms of exponent 0 are left out."""
    posterior, exponents = data
    terms = posterior.log_likelihood(position)
    exponents = jnp.asarray(exponents, terms.dtype)
    log_likelihood = jnp.sum(jnp.where(exponents > 0, exponents * terms, 0.0))
    log_prior = posterior.prior.log_density(position)
    return log_prior + jnp.asarray(log_likelihood, log_prior.dtype)


def as_posterior(prior: Any, log_likelihood: Callable[..., Any] | None, data: PyTree) -> Posterior:
    """A Posterior from what the user gave.

    Raises:
        ValueError: the prior is none of the three kinds, has discrete parts or cannot be sampled, or the likelihood is
            missing, given twice, takes other arguments, or is not a scalar or vector of floating point.
    """
    checked = as_prior(prior)
    has_observed = isinstance(checked, Model) and bool(checked.observed)
    if has_observed and log_likelihood is not None:
        raise ValueError(
            f"log_likelihood must be None, since the model of the prior observes {list(checked.observed)}: they are "  # type: ignore[union-attr]
            "the likelihood; or take a model without observed sites as prior"
        )
    if not has_observed and not callable(log_likelihood):
        raise ValueError(
            f"log_likelihood must be a function of one draw from the prior, got {log_likelihood!r}; it may be None "
            "only where the prior is Target.from_numpyro of a model with observed sites"
        )
    if log_likelihood is not None:
        errors.check_arguments("log_likelihood", log_likelihood, "values" if data is None else "values, data")
    posterior = Posterior(checked, log_likelihood, errors.as_arrays("data", data))
    position = check_proper(posterior.prior)
    terms = jax.eval_shape(lambda position: posterior.log_likelihood(position), position)
    if terms.ndim != 1 or terms.shape[0] == 0 or not jnp.issubdtype(terms.dtype, jnp.floating):
        raise ValueError(
            "log_likelihood must return a scalar, or a vector with one term for each observation, of floating point; "
            f"got {terms.dtype} of shape {terms.shape}"
        )
    return posterior


def as_prior(prior: Any) -> Laws | Pair | Model:
    """What draws from a prior and knows its density, from what the user gave.

    Raises:
        ValueError: the prior is none of the three kinds, or has discrete parts.
    """
    if isinstance(prior, Laws | Pair | Model):
        return prior
    laws = jax.tree.leaves(prior, is_leaf=_is_law)
    if laws and all(map(_is_law, laws)):
        discrete = [type(law).__name__ for law in laws if law.support.is_discrete]
        if discrete:
            raise ValueError(f"prior must be continuous, got {discrete}; sum discrete parameters out of the likelihood")
        return Laws(prior)
    if isinstance(prior, Target) and prior.model is not None:
        return Model(prior, tuple(prior.model.observed(prior.data)))
    if (
        isinstance(prior, tuple)
        and len(prior) == 2
        and all(map(callable, (prior[0], getattr(prior[1], "logdensity", prior[1]))))
    ):
        return Pair(prior[0], as_target(prior[1]))
    raise ValueError(
        "prior must be a NumPyro distribution or a pytree of them, a pair (sample, log_prob), or "
        f"Target.from_numpyro(model, ...); got {type(prior).__name__}"
        + (", which cannot be sampled: pass (sample, target)" if isinstance(prior, Target) else "")
    )


def check_proper(prior: Laws | Pair | Model) -> PyTree:
    """That particles can start from draws of the prior; the shapes and dtypes of one.

    Raises:
        ValueError: it cannot be sampled, or not on a space of floating point.
    """
    # by a function, not a method: JAX compares what it traces, and a prior may hold traced parameters
    try:
        position = jax.eval_shape(lambda key: prior.draw(key), jax.random.key(0))
    except NotImplementedError as error:
        raise ValueError("prior must be proper and have a sampler, since particles start from its draws") from error
    errors.check_floating("prior", position)
    return position


def constrain_beside(prior: Any, position: PyTree, name: str, meaning: str) -> PyTree:
    """The parameters by name as users know them, and position[name]; {"theta", name} where they have no names."""
    theta = prior.constrain(position["theta"])
    if not isinstance(theta, dict):
        return {"theta": theta, name: position[name]}
    if name in theta:
        raise ValueError(f'the prior must not have a parameter named "{name}": that is the name of {meaning}')
    return {**theta, name: position[name]}


def _is_law(leaf: Any) -> bool:
    return isinstance(leaf, dist.Distribution)


def _bijection(law: Any) -> Any:
    return dist.biject_to(law.support)
