"""Invariance from exact draws: does a kernel leave the law alone that it claims to sample?"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Key, PyTree

from bayesinf import errors
from bayesinf.conformance.batches import batch_size
from bayesinf.conformance.comparison import law_has_moved
from bayesinf.conformance.report import Report
from bayesinf.errors import KeyLike

__all__ = ["exact_start_invariance"]

BATCH = 20_000  # chains advanced at once: bounds the memory of any kernel


def exact_start_invariance(
    key: KeyLike,
    kernel: Any,
    exact_sampler: Callable[[Key[Array, ""]], PyTree],
    *,
    num_chains: int = 100_000,
    num_steps: int = 20,
    prepare: Callable[[Key[Array, ""], Any], Any] | None = None,
    statistics: Callable[[Any], PyTree] | None = None,
) -> Report:
    """Tests that a kernel leaves a law invariant, from exact draws of it.

        x_0 ~ pi,   x_t ~ K(x_{t-1}, .)   implies   x_n ~ pi

    Many short chains, no burn-in, no effective sample size: the chains are independent, so the p-value is one. The law
    of x_n is compared with that of x_0 in every coordinate, in products of coordinates, in random projections and in
    the log density where the kernel has a target; paired with the starts and against fresh draws. It finds errors of a
    few percent in an acceptance rate, which diagnostics of convergence do not see. A kernel that never moves passes:
    `notes["moved"]` is the share of chains that did.

    Args:
        key: PRNG key or seed.
        kernel: anything with `init(position) -> state` and `step(key, state) -> (state, info)`, states having a
            `.position`; ours or BlackJAX's.
        exact_sampler: `exact_sampler(key)` draws one position from pi. Take a law that is skewed, correlated and not
            Gaussian: symmetric ones hide errors.
        num_chains: n; an error of relative size e in a probability shows from n of about 100 / e^2 on.
        num_steps: steps a chain.
        prepare: `prepare(key, state) -> state`, draws what of the state is not the position from its law, such as the
            velocity of a kinetic kernel (their `refresh`).
        statistics: `statistics(state)`, a pytree of further scalars to compare, such as a velocity's energy.

    Returns:
        A Report; reject if `p_value` is small.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf import conformance
        >>> target = bi.Target(lambda x: jnp.sum(3.0 * x - jnp.exp(x)))
        >>> kernel = bi.kernels.MALA(target, step_size=0.5)
        >>> def exact_sampler(key):
        ...     return jax.random.loggamma(key, 3.0, (2,))
        >>> report = conformance.exact_start_invariance(0, kernel, exact_sampler, num_chains=10_000)
        >>> report.p_value > conformance.FALSE_ALARM
        True

    References:
        Gandy and Scott (2020), arXiv:2001.06465.
        Geweke (2004), doi:10.1198/016214504000001132.
    """
    errors.check_count("num_chains", num_chains, minimum=100)
    errors.check_count("num_steps", num_steps)
    before, after, fresh = _run(errors.as_key(key), kernel, exact_sampler, num_chains, num_steps, prepare, statistics)
    moved = np.zeros(num_chains, bool)
    for old, new in zip(jax.tree.leaves(before["position"]), jax.tree.leaves(after["position"]), strict=True):
        moved |= np.any(np.reshape(np.asarray(old) != np.asarray(new), (num_chains, -1)), axis=1)
    return Report(
        f"exact_start_invariance of {type(kernel).__name__}",
        law_has_moved(before, after, fresh),
        {"moved": float(moved.mean())},
    )


@eqx.filter_jit
def _run(key, kernel, exact_sampler, num_chains, num_steps, prepare, statistics):
    """What is observed of the exact starts, of the ends of their chains, and of fresh exact draws."""
    target = getattr(kernel, "target", None)

    def start(key):
        key_position, key_prepare = jax.random.split(key)
        state = kernel.init(exact_sampler(key_position))
        return state if prepare is None else prepare(key_prepare, state)

    def observe(state):
        observed = {"position": state.position}
        if callable(getattr(target, "logdensity", None)):
            observed["log density"] = target.logdensity(state.position)  # type: ignore[union-attr]
        if statistics is not None:
            observed["statistic"] = statistics(state)
        return observed

    def chain(key):
        key_starts, key_steps = jax.random.split(key)
        states = jax.vmap(start)(jax.random.split(key_starts))  # the start of the chain, and a fresh draw
        observed = jax.vmap(observe)(states)

        def move(t, state):
            return kernel.step(jax.random.fold_in(key_steps, t), state)[0]

        last = jax.lax.fori_loop(0, num_steps, move, jax.tree.map(lambda leaf: leaf[0], states))
        before, fresh = (jax.tree.map(lambda leaf: leaf[i], observed) for i in (0, 1))  # noqa: B023
        return before, observe(last), fresh

    return jax.lax.map(chain, jax.random.split(key, num_chains), batch_size=batch_size(num_chains, BATCH))
