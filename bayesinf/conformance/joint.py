"""Geweke's test of the joint law: does alternating a transition and the simulator leave p(theta, y) alone?"""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Key, PyTree

from bayesinf import errors
from bayesinf.conformance.batches import batch_size
from bayesinf.conformance.comparison import law_has_moved
from bayesinf.conformance.report import Report
from bayesinf.errors import KeyLike

__all__ = ["geweke_joint"]

BATCH = 5_000


def geweke_joint(
    key: KeyLike,
    prior_sampler: Callable[[Key[Array, ""]], PyTree],
    simulator: Callable[[Key[Array, ""], PyTree], PyTree],
    transition: Callable[[Key[Array, ""], PyTree, PyTree], PyTree],
    *,
    num_chains: int = 20_000,
    num_rounds: int = 10,
) -> Report:
    """Tests a posterior kernel with no exact posterior at hand: model, data and kernel must agree on one joint law.

        theta_0 ~ p(theta),    y_k ~ p(y | theta_{k-1}),   theta_k ~ K_{y_k}(theta_{k-1}, .)
        implies   (theta_n, y_n) ~ p(theta) p(y | theta)

    Geweke ran one long chain of the alternation and compared its moments with those of exact draws. Here many short
    chains start from exact draws, which gives a p-value without estimates of autocorrelation. Compared are the
    coordinates of theta and y, products of pairs and random projections, each in location, scale, skewness and tails.
    The law is looked at after the transition: after the simulator, one that ignores its data would pass. Latent
    variables belong to theta. A kernel and a simulator that share one error pass; and an error whose sign depends on
    the data may average out, so where the posterior can be drawn from, `exact_start_invariance` on one data set is
    sharper.

    Args:
        key: PRNG key or seed.
        prior_sampler: `prior_sampler(key)` draws theta.
        simulator: `simulator(key, theta)` draws y.
        transition: `transition(key, theta, y)` returns the next theta; for a kernel
            `kernel_on(y).step(key, kernel_on(y).init(theta))[0].position`.
        num_chains: independent chains.
        num_rounds: alternations a chain; errors accumulate over the rounds.

    Returns:
        A Report.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf import conformance
        >>> def prior(key):
        ...     return jax.random.normal(key)
        >>> def simulate(key, theta):
        ...     return theta + jax.random.normal(key)
        >>> def transition(key, theta, y):
        ...     target = bi.Target(lambda x, y: -0.5 * x**2 - 0.5 * (y - x) ** 2, y)
        ...     kernel = bi.kernels.MALA(target, step_size=0.5)
        ...     return kernel.step(key, kernel.init(theta))[0].position
        >>> conformance.geweke_joint(0, prior, simulate, transition).p_value > conformance.FALSE_ALARM
        True

    References:
        Geweke (2004), doi:10.1198/016214504000001132.
        Gandy and Scott (2020), arXiv:2001.06465.
    """
    errors.check_count("num_chains", num_chains, minimum=100)
    errors.check_count("num_rounds", num_rounds)
    keys = jax.random.split(errors.as_key(key), num_chains)
    return Report("geweke_joint", law_has_moved(*_alternate(prior_sampler, simulator, transition, keys, num_rounds)))


@eqx.filter_jit
def _alternate(prior_sampler, simulator, transition, keys, num_rounds):
    """The exact joint starts, what became of them, and fresh exact joint draws."""

    def draw(key):
        key_prior, key_data = jax.random.split(key)
        theta = prior_sampler(key_prior)
        return {"theta": theta, "y": simulator(key_data, theta)}

    def chain(key):
        key_draws, key_rounds = jax.random.split(key)
        draws = jax.vmap(draw)(jax.random.split(key_draws))
        start, fresh = (jax.tree.map(lambda leaf: leaf[i], draws) for i in (0, 1))  # noqa: B023

        def alternate(t, joint):
            key_theta, key_y = jax.random.split(jax.random.fold_in(key_rounds, t))
            y = simulator(key_y, joint["theta"])
            return {"theta": transition(key_theta, joint["theta"], y), "y": y}

        return start, jax.lax.fori_loop(0, num_rounds, alternate, start), fresh

    return jax.lax.map(chain, keys, batch_size=batch_size(keys.size, BATCH))
