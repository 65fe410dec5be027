"""Simulation-based calibration: is a posterior sampler right on average over data sets from its own model?"""

from collections.abc import Callable

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.conformance.batches import batch_size
from bayesinf.conformance.comparison import columns, pairs, uniform_p_values
from bayesinf.conformance.report import Report
from bayesinf.errors import KeyLike

__all__ = ["simulation_based_calibration"]

BATCH = 200


def simulation_based_calibration(
    key: KeyLike,
    prior_sampler: Callable[[Key[Array, ""]], PyTree],
    simulator: Callable[[Key[Array, ""], PyTree], PyTree],
    posterior_sampler: Callable[[Key[Array, ""], PyTree, int], PyTree],
    *,
    num_simulations: int = 1_000,
    num_draws: int = 100,
    quantities: Callable[[PyTree, PyTree], PyTree] | None = None,
) -> Report:
    """Tests that posterior ranks of the parameters that made the data are uniform.

        theta ~ p(theta),   y ~ p(y | theta),   theta_1, ..., theta_L ~ p(theta | y) independent
        implies   #{l: f(theta_l, y) < f(theta, y)} uniform on {0, ..., L}    for every f

    Ranked are all coordinates of theta; products of two centred coordinates and of their squares, which see wrong
    dependence; and coordinates times the deviation of the mean of y, which see a posterior that ignores its data
    (coordinates alone do not). Add the log likelihood by `quantities`: it is the sharpest test of how parameters and
    data belong together.

    The draws must be close to independent: run a chain, drop the burn-in, thin it by about its autocorrelation time.
    Autocorrelated draws from the right posterior are rejected. Where that is too dear, test the transition itself by
    `geweke_joint`.

    Args:
        key: PRNG key or seed.
        prior_sampler: `prior_sampler(key)` draws theta.
        simulator: `simulator(key, theta)` draws y.
        posterior_sampler: `posterior_sampler(key, y, num_draws)` returns draws of theta with leading axis num_draws;
            compiled and vectorised over data sets.
        num_simulations: data sets, S.
        num_draws: L.
        quantities: `quantities(theta, y)`, a pytree of scalars to be ranked as well.

    Returns:
        A Report over the ranked quantities.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf import conformance
        >>> def prior(key):
        ...     return jax.random.normal(key)
        >>> def simulate(key, theta):
        ...     return theta + jax.random.normal(key)
        >>> def posterior(key, y, num_draws):
        ...     return y / 2 + jnp.sqrt(0.5) * jax.random.normal(key, (num_draws,))
        >>> report = conformance.simulation_based_calibration(0, prior, simulate, posterior)
        >>> report.p_value > conformance.FALSE_ALARM
        True

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), arXiv:1804.06788.
        Modrák, Moon, Kim, Bürkner, Huurre, Faltejsková, Gelman, Vehtari (2023), doi:10.1214/23-BA1404.
    """
    errors.check_count("num_simulations", num_simulations, minimum=50)
    errors.check_count("num_draws", num_draws)
    key = errors.as_key(key)
    truths, draws, data, extra = _simulate(
        prior_sampler, simulator, posterior_sampler, quantities, jax.random.split(key, num_simulations), num_draws
    )
    values = _pooled(truths, draws, num_simulations, num_draws)
    ranked = dict(values)
    names = list(values)
    centred = {name: value - value.mean(axis=1, keepdims=True) for name, value in values.items()}
    for i, j in pairs(len(names)):
        a, b = centred[names[i]], centred[names[j]]
        ranked[f"{names[i]} x {names[j]}"] = a * b
        ranked[f"{names[i]}^2 x {names[j]}"] = a**2 * b
        ranked[f"{names[i]} x {names[j]}^2"] = a * b**2
    level = _level(data)
    for name, value in values.items():
        ranked[f"{name} x level of y"] = value * level[:, None]
    if extra is not None:
        ranked |= _pooled(*extra, num_simulations, num_draws)  # type: ignore[call-arg]

    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel())
    p_values: dict[str, float] = {}
    for name, value in ranked.items():
        p_values |= uniform_p_values(f"rank of {name}", _ranks(rng, value))
    return Report("simulation_based_calibration", p_values)


@eqx.filter_jit
def _simulate(prior_sampler, simulator, posterior_sampler, quantities, keys, num_draws):
    def simulation(key):
        key_prior, key_data, key_posterior = jax.random.split(key, 3)
        truth = prior_sampler(key_prior)
        y = simulator(key_data, truth)
        draws = posterior_sampler(key_posterior, y, num_draws)
        extra = None
        if quantities is not None:
            extra = quantities(truth, y), jax.vmap(lambda theta: quantities(theta, y))(draws)
        return truth, draws, y, extra

    return jax.lax.map(simulation, keys, batch_size=batch_size(keys.size, BATCH))


def _pooled(truths: PyTree, draws: PyTree, num_simulations: int, num_draws: int) -> dict[str, Float[np.ndarray, "s l"]]:
    """By scalar component: the true value, then the draws, one row a simulation."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(draws):
        if leaf.shape[:2] != (num_simulations, num_draws):
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"posterior_sampler must return num_draws = {num_draws} draws along the leading axis, got shape "
                f"{leaf.shape[1:]}{f' at {name}' if name else ''}"
            )
    rows = jax.tree.map(lambda leaf: np.reshape(np.asarray(leaf), (-1, *leaf.shape[2:])), draws)
    true = columns(truths)
    return {
        name or "theta": np.concatenate([true[name][:, None], column.reshape(num_simulations, num_draws)], axis=1)
        for name, column in columns(rows).items()
    }


def _level(data: PyTree) -> Float[np.ndarray, " s"]:
    """The mean of each data set's observations, centred over data sets.

    Ranks are uniform given all data sets, so any function of these may weigh them.
    """
    rows = [np.reshape(np.asarray(leaf, np.float64), (leaf.shape[0], -1)) for leaf in jax.tree.leaves(data)]
    means = np.nanmean(np.concatenate(rows, axis=1), axis=1)
    return means - np.median(means)


def _ranks(rng: np.random.Generator, pooled: Float[np.ndarray, "s l"]) -> Float[np.ndarray, " s"]:
    """Ranks of the first column within each row, spread over [0, 1]; ties, and the step itself, broken at random."""
    truth, draws = pooled[:, :1], pooled[:, 1:]
    below, ties = np.sum(draws < truth, axis=1), np.sum(draws == truth, axis=1)
    ranks = (below + rng.random(len(pooled)) * (ties + 1)) / (draws.shape[1] + 1)
    return np.where(np.isfinite(pooled).all(axis=1), ranks, np.nan)
