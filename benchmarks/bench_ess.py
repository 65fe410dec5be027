"""Effective draws a second: six posteriors, our kernels beside NUTS of BlackJAX and NumPyro.

Each sampler warms up by its own means, outside the clock; the clock runs while `NUM_SAMPLES` draws of every chain are
made by a compiled program that has run before. ESS is the smallest over the quantities q and q^2, by ArviZ. What an
unadjusted kernel gains it may pay for with bias: the largest error of a mean, in posterior standard deviations, and the
relative error of the standard deviations, on average, stand beside, against the pooled draws of the exact samplers.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from arviz_stats.base import array_stats
from bench_langevin import logdensity as logistic
from bench_langevin import make_data
from conftest import has
from numpyro.infer import MCMC
from numpyro.infer import NUTS as NumPyroNUTS

import bayesinf as bi
from bayesinf import datasets, kernels

NUM_WARMUP = 500


class Problem(NamedTuple):
    """A posterior, what is asked of it, and the kernels of ours that run on it.

    Attributes:
        target: on an unconstrained space.
        position: one position, for the structure.
        ours: kernels by name; those without a target acceptance keep their step size.
        num_chains: of every sampler.
        num_samples: draws of each chain.
        quantities: what ESS is about, a vector of a position.
    """

    target: bi.Target
    position: Any
    ours: dict[str, Any]
    num_chains: int
    num_samples: int
    quantities: Callable[[Any], jax.Array] = lambda position: jax.flatten_util.ravel_pytree(position)[0]


def of_model(model: Callable, *data: Any) -> tuple[bi.Target, Any]:
    target = bi.Target.from_numpyro(model, *data)
    return target, jax.tree.map(lambda leaf: leaf[0], target.init(0, 1))


def jittered_hmc(target: bi.Target, num_steps: int) -> kernels.Jitter:
    return kernels.Jitter(kernels.HMC(target, step_size=0.1, num_integration_steps=num_steps))


# ---- the posteriors ----


def logistic_regression() -> Problem:
    target = bi.Target(logistic, make_data())
    ours = {
        "BAOAB": kernels.Splitting("BAOAB", target, step_size=0.16, friction=2.0),
        "HMC, 8 steps, jittered": jittered_hmc(target, 8),
        "MALA": kernels.MALA(target, step_size=0.01),
    }
    return Problem(target, jnp.zeros(100), ours, 128, 400)


def eight_schools() -> Problem:
    y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y, sigma):
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("school", 8):
            effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * effect, sigma), obs=y)

    target, position = of_model(model, y, sigma)
    return Problem(target, position, {"HMC, 5 steps, jittered": jittered_hmc(target, 5)}, 64, 1_000)


def ill_conditioned_gaussian() -> Problem:
    variances = jnp.logspace(-4.0, 0.0, 1_000)
    target = bi.Target(lambda x, variances: -0.5 * jnp.sum(x**2 / variances), variances)
    return Problem(target, jnp.zeros(1_000), {"HMC, 8 steps, jittered": jittered_hmc(target, 8)}, 16, 300)


def stochastic_volatility() -> Problem:
    returns = datasets.wti_crude_oil().returns[:300]

    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 2.0))
        persistence = numpyro.sample("persistence", dist.Beta(20.0, 1.5))
        scale = numpyro.sample("scale", dist.HalfNormal(0.5))
        with numpyro.plate("day", y.shape[0]):
            noise = numpyro.sample("noise", dist.Normal(0.0, 1.0))

        def move(x, z):
            x = persistence * x + scale * z
            return x, x

        first = scale / jnp.sqrt(1 - persistence**2) * noise[0]
        _, rest = jax.lax.scan(move, first, noise[1:])
        numpyro.sample("y", dist.Normal(0.0, jnp.exp(0.5 * (mean + jnp.append(first, rest)))), obs=y)

    target, position = of_model(model, jnp.asarray(returns - returns.mean()))
    return Problem(target, position, {"HMC, 32 steps, jittered": jittered_hmc(target, 32)}, 16, 300)


def sparse_regression() -> Problem:
    rng = np.random.default_rng(3)
    features = jnp.asarray(rng.normal(size=(200, 20)), jnp.float32)
    weights = np.zeros(20)
    weights[:3] = 2.0, -1.5, 1.0
    labels = jnp.asarray(rng.uniform(size=200) < 1 / (1 + np.exp(-features @ weights)), jnp.float32)

    def model(features, labels):
        overall = numpyro.sample("overall", dist.Gamma(0.5, 0.5))
        with numpyro.plate("feature", features.shape[1]):
            local = numpyro.sample("local", dist.Gamma(0.5, 0.5))
            raw = numpyro.sample("raw", dist.Normal(0.0, 1.0))
        weights = numpyro.deterministic("weights", raw * local * overall)
        numpyro.sample("labels", dist.Bernoulli(logits=features @ weights), obs=labels)

    target, position = of_model(model, features, labels)

    def weights_of(z):
        return z["raw"] * jnp.exp(z["local"] + z["overall"])

    return Problem(target, position, {"HMC, 16 steps, jittered": jittered_hmc(target, 16)}, 2_000, 100, weights_of)


def neural_network() -> Problem:
    rng = np.random.default_rng(4)
    x = jnp.asarray(rng.uniform(-2.0, 2.0, size=(100, 2)), jnp.float32)
    y = jnp.asarray(np.sin(2 * x[:, 0]) * x[:, 1] + 0.2 * rng.normal(size=100), jnp.float32)
    x_new = jnp.asarray(rng.uniform(-2.0, 2.0, size=(10, 2)), jnp.float32)

    def network(z, x):
        hidden = jnp.tanh(x @ z["first"] + z["shift"])
        return hidden @ z["second"] / jnp.sqrt(10.0)

    def logdensity(z, data):
        x, y = data
        prior = sum(-0.5 * jnp.sum(leaf**2) for leaf in jax.tree.leaves(z))
        return prior - 0.5 * jnp.sum((y - 2 * network(z, x)) ** 2) / 0.2**2

    position = {"first": jnp.zeros((2, 10)), "shift": jnp.zeros(10), "second": jnp.zeros(10)}
    target = bi.Target(logdensity, (x, y))
    malt = kernels.MALT(target, step_size=0.02, num_steps=16, friction=0.5)
    return Problem(target, position, {"MALT": malt}, 32, 300, lambda z: network(z, x_new))


PROBLEMS = {
    "logistic regression, n=1000, d=100": logistic_regression,
    "eight schools": eight_schools,
    "Gaussian, d=1000, condition number 1e4": ill_conditioned_gaussian,
    "stochastic volatility, T=300": stochastic_volatility,
    "sparse regression, 2000 chains": sparse_regression,
    "Bayesian neural network": neural_network,
}


# ---- the samplers: each returns run(seed) -> (seconds, quantities (chain, draw, q), gradients) ----


def run_ours(problem: Problem, kernel: Any, starts: Any) -> Callable:
    is_tuned = getattr(kernel, "target_acceptance", None) is not None
    collect = functools.partial(_collect, problem.quantities)

    def run(seed: int) -> tuple[float, np.ndarray, float]:
        draws = bi.sample(
            seed,
            kernel,
            starts,
            num_samples=problem.num_samples,
            num_warmup=NUM_WARMUP if is_tuned else 2 * NUM_WARMUP,
            collect=collect,
            progress=False,
            throw=False,
        )
        return draws.seconds["sampling"], draws["x"], float(draws.stats["num_gradients"].sum())

    return run


def _collect(quantities: Callable, state: Any) -> jax.Array:
    return quantities(state.position)


def run_blackjax(problem: Problem, starts: Any) -> Callable:
    import blackjax

    target = problem.target

    @jax.jit
    def warm_up(target, keys, starts):
        def one(key, start):
            adaptation = blackjax.window_adaptation(blackjax.nuts, target.logdensity)
            (state, parameters), _ = adaptation.run(key, start, NUM_WARMUP)
            return state, parameters

        return jax.vmap(one)(keys, starts)

    @jax.jit
    def draw(target, keys, states, parameters):
        kernel = blackjax.nuts.build_kernel()

        def one(key, state, parameters):
            def step(state, t):
                state, info = kernel(jax.random.fold_in(key, t), state, target.logdensity, **parameters)
                return state, (problem.quantities(state.position), info.num_integration_steps)

            return jax.lax.scan(step, state, jnp.arange(problem.num_samples))[1]

        return jax.vmap(one)(keys, states, parameters)

    warmed = warm_up(target, jax.random.split(jax.random.key(0), problem.num_chains), starts)

    def run(seed: int) -> tuple[float, np.ndarray, float]:
        keys = jax.random.split(jax.random.key(seed), problem.num_chains)
        began = time.perf_counter()
        values, counts = jax.block_until_ready(draw(target, keys, *warmed))
        return time.perf_counter() - began, np.asarray(values), float(counts.sum())

    return run


def run_numpyro(problem: Problem, starts: Any) -> Callable:
    kernel = NumPyroNUTS(potential_fn=lambda position: -problem.target.logdensity(position))
    options = {"num_chains": problem.num_chains, "chain_method": "vectorized", "progress_bar": False}
    mcmc = MCMC(kernel, num_warmup=NUM_WARMUP, num_samples=problem.num_samples, **options)
    mcmc.warmup(jax.random.key(0), init_params=starts, extra_fields=("num_steps",))
    quantities = jax.jit(jax.vmap(jax.vmap(problem.quantities)))

    def once(seed: int) -> tuple[float, np.ndarray, float]:
        began = time.perf_counter()
        mcmc.run(jax.random.key(seed), extra_fields=("num_steps",))
        jax.block_until_ready(mcmc.get_samples())
        seconds = time.perf_counter() - began
        values = np.asarray(quantities(mcmc.get_samples(group_by_chain=True)))
        return seconds, values, float(mcmc.get_extra_fields()["num_steps"].sum())

    def run(seed: int) -> tuple[float, np.ndarray, float]:
        mcmc.post_warmup_state = mcmc.last_state
        return once(seed)

    return run


# ---- what is shown ----


def smallest_ess(values: np.ndarray) -> float:
    """Over the quantities and their squares."""
    both = np.moveaxis(np.concatenate([values, values**2], axis=2), 2, 0)
    return float(min(array_stats.ess(one, chain_axis=0, draw_axis=1, method="mean") for one in both))


@pytest.mark.parametrize("name", PROBLEMS)
def bench_ess(compare, name):
    problem = PROBLEMS[name]()
    starts = problem.target.init(1, problem.num_chains, template=problem.position, radius=0.1)
    samplers = {f"bayesinf {ours}": run_ours(problem, kernel, starts) for ours, kernel in problem.ours.items()}
    if has("blackjax"):
        samplers["blackjax NUTS"] = run_blackjax(problem, starts)
    samplers["numpyro NUTS"] = run_numpyro(problem, starts)
    found: dict[str, list[tuple[np.ndarray, float]]] = {sampler: [] for sampler in samplers}

    def call(sampler: str) -> float:
        seconds, values, gradients = samplers[sampler](len(found[sampler]) + 10)
        found[sampler].append((values, gradients))
        return seconds

    def note(sampler: str, medians: dict[str, float]) -> str:
        values, gradients = found[sampler][-1]
        exact = [runs[-1][0] for rival, runs in found.items() if "BAOAB" not in rival]
        pooled = np.concatenate([run.reshape(-1, run.shape[-1]) for run in exact])
        scale = pooled.std(axis=0)
        flat = values.reshape(-1, values.shape[-1])
        ess = smallest_ess(values)
        off_mean = np.max(np.abs(flat.mean(axis=0) - pooled.mean(axis=0)) / scale)
        off_sd = np.mean(flat.std(axis=0) / scale - 1)
        return (
            f"{ess / medians[sampler]:.3g} ESS/s, {1e3 * ess / gradients:.3g} ESS per 1000 gradients, "
            f"means off by at most {off_mean:.2f} sd, sd by {off_sd:+.1%}"
        )

    compare(
        f"{name}, {problem.num_chains} chains of {problem.num_samples} draws",
        {sampler: functools.partial(call, sampler) for sampler in samplers},
        rounds=3,
        note=note,
    )
