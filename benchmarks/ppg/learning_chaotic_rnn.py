"""Learning the coupling and the noises of a chaotic recurrent neural network, and the likelihood of what was learnt.

    x_t = x_{t-1} + (Delta / tau) (gamma W tanh(x_{t-1}) - x_{t-1}) + N(0, q^2 I),   y_t = x_t + r e_t,   e_t of t_2
    theta = (W, log q, log r),   Delta = .001,  tau = .025,  gamma = 2.5,  five rates,  q = r = 0.1 where data come from

Score ascent with each of four estimators of the score starts from W = 0 and q = r = 0.2, takes the same steps of Adam,
and has the same budget: `budget` particles a time step and iteration, as sweeps times particles (`common.sizes`), of
guided filters. The likelihood of the average over the last half of the iterations is then estimated by guided filters
with many more particles: log of the mean of S independent estimates of the likelihood, whose standard error by the
delta method is the relative standard error of that mean.

    python -m benchmarks.ppg.learning_chaotic_rnn      # minutes; --full: T = 500 and more particles, hours

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
    Campbell, Shi, Rainforth and Doucet (2021), https://arxiv.org/abs/2110.13549 (the values of the parameters).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import bayesinf as bi
from bayesinf.kernels import particle_filter
from bayesinf.kernels.learning import ESTIMATORS
from benchmarks.ppg.common import COLORS, LABELS, MARKERS, SHORT, arguments, half_width, learn, save

NUM_STATES = 5


def build(theta: dict[str, jax.Array]) -> bi.models.ChaoticRNN:
    return bi.models.ChaoticRNN(theta["W"], transition_scale=jnp.exp(theta["q"]), observation_scale=jnp.exp(theta["r"]))


def truth() -> dict[str, jax.Array]:
    """Where the data come from."""
    log_scale = jnp.log(0.1)
    return {"W": bi.models.ChaoticRNN.random(0, NUM_STATES).coupling, "q": log_scale, "r": log_scale}


def beginning() -> dict[str, jax.Array]:
    """Where every run starts."""
    log_scale = jnp.log(0.2)
    return {"W": jnp.zeros((NUM_STATES, NUM_STATES)), "q": log_scale, "r": log_scale}


def log_likelihoods(thetas: Any, ys: jax.Array, num_particles: int, num_filters: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each theta, the leading axis of all leaves; and their standard errors."""

    @jax.jit
    def evaluate(thetas):
        def one(row):
            theta, key = row
            options = {"num_particles": num_particles, "proposal": "guided", "store": "none", "throw": False}
            return particle_filter(key, build(theta), ys, **options).log_evidence

        keys = jax.random.split(jax.random.key(99), num_filters)
        return jax.lax.map(lambda theta: jax.vmap(lambda key: one((theta, key)))(keys), thetas)

    found = np.asarray(evaluate(thetas), np.float64)
    largest = found.max(axis=1, keepdims=True)
    likelihood = np.exp(found - largest)
    error = likelihood.std(axis=1, ddof=1) / np.sqrt(num_filters) / likelihood.mean(axis=1)
    return largest[:, 0] + np.log(likelihood.mean(axis=1)), error


def main(
    folder: Path,
    estimators: Sequence[str] = ESTIMATORS,
    num_steps: int = 150,
    budget: int = 16,
    num_iterations: int = 200,
    num_runs: int = 6,
    step_size: float = 0.05,
    num_particles: int = 4000,
    num_filters: int = 20,
) -> list[dict]:
    """Runs everything, writes learning_chaotic_rnn.png and .csv, and returns the rows of the table."""
    _, ys = bi.models.simulate(1, build(truth()), num_steps=num_steps)
    marks = jax.tree.map(lambda *leaves: jnp.stack(leaves), beginning(), truth())
    marks_at, marks_error = log_likelihoods(marks, ys, num_particles, num_filters)
    rows = [
        {
            "estimator": name,
            "budget": "",
            "num_runs": 1,
            "log_likelihood": value,
            "half_width": 1.96 * error,
            "filter_error": error,
            "q": float(jnp.exp(theta["q"])),
            "r": float(jnp.exp(theta["r"])),
        }
        for name, theta, value, error in zip(
            ("start", "truth"), (beginning(), truth()), marks_at, marks_error, strict=True
        )
    ]
    found, scales = {}, {}
    for estimator in estimators:
        trace, thetas = learn(
            build,
            beginning(),
            ys,
            estimator=estimator,
            budget=budget,
            num_iterations=num_iterations,
            num_runs=num_runs,
            step_size=step_size,
            proposal="guided",
        )
        values, errors = log_likelihoods(thetas, ys, num_particles, num_filters)
        found[estimator], scales[estimator] = (values, errors), np.exp(trace[:, :, -2:])
        rows.append(
            {
                "estimator": estimator,
                "budget": budget,
                "num_runs": num_runs,
                "log_likelihood": values.mean(),
                "half_width": half_width(values),
                "filter_error": errors.max(),
                "q": float(jnp.exp(thetas["q"]).mean()),
                "r": float(jnp.exp(thetas["r"]).mean()),
            }
        )
        print(rows[-1], flush=True)
    save(folder, "learning_chaotic_rnn", draw(found, scales), rows)
    return rows


def draw(found: dict, scales: dict):
    """The two scales over the iterations with 95% bands, and the log likelihood of each run with 95% intervals."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    for i, name in enumerate(found):
        iterations = 1 + np.arange(scales[name].shape[1])
        every = max(len(iterations) // 10, 1)
        for j, axis in enumerate((left, middle)):
            mean, half = scales[name][:, :, j].mean(0), half_width(scales[name][:, :, j])
            label = LABELS[name] if j == 0 else None
            axis.plot(iterations, mean, color=COLORS[name], marker=MARKERS[name], markevery=every, ms=5, label=label)
            axis.fill_between(iterations, mean - half, mean + half, color=COLORS[name], alpha=0.2, lw=0)
        values, errors = found[name]
        spread = i + np.linspace(-0.25, 0.25, len(values))
        right.errorbar(spread, values, 1.96 * errors, color=COLORS[name], marker=MARKERS[name], ls="", ms=4, alpha=0.4)
        right.errorbar(i, values.mean(), half_width(values), color=COLORS[name], marker=MARKERS[name], ms=7, capsize=4)
    for axis, symbol, what in ((left, "q", "transition"), (middle, "r", "observation")):
        axis.axhline(0.1, color="0.3", ls=":", lw=1.2, label="of the data" if axis is left else None)
        axis.set(xlabel="iteration", ylabel=f"${symbol}$", title=f"scale of the {what} noise")
    right.set_xticks(range(len(found)), [SHORT[name] for name in found])
    right.set(ylabel="log likelihood, nats", title="what was learnt")
    for axis in (left, middle, right):
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    return figure


if __name__ == "__main__":
    given = arguments(__doc__)
    larger = {"num_steps": 500, "budget": 256, "num_iterations": 2000, "num_runs": 10, "num_particles": 10_000}
    main(given.results, **(larger if given.full else {}))
