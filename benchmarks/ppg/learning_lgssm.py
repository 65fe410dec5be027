"""Learning a linear Gaussian state-space model in three dimensions, against its exact maximum likelihood estimate.

    x_0 ~ N(0, I),   x_t = A x_{t-1} + diag(exp(q)) e_t,   y_t = C x_t + diag(exp(r)) z_t,   theta = (A, q, r), C known

15 parameters, T = 100 observations simulated at a theta of its own. The maximum is found by BFGS on the exact Kalman
likelihood. Score ascent with each of four estimators of the score starts from the same theta, takes the same steps of
Adam, and has the same budget: `budget` particles a time step and iteration, as sweeps times particles (`common.sizes`).

    distance = |theta_l - theta_MLE|,   gap = log p(y; theta_MLE) - log p(y; theta)

the gap by the exact likelihood, of the average over the last half of the iterations.

    python -m benchmarks.ppg.learning_lgssm            # minutes; --full: five states, T = 500, hours

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
import scipy.optimize
from jax.flatten_util import ravel_pytree

import bayesinf as bi
from bayesinf.kernels.learning import ESTIMATORS
from benchmarks.ppg.common import COLORS, LABELS, MARKERS, SHORT, arguments, half_width, learn, save

LOG_SCALE = -0.5  # of all noises of the model that data are simulated from


class IndependentNoises(bi.models.LinearGaussian):
    """A linear Gaussian model with diagonal factors, of which the laws make use: without triangular solves."""

    def transition(self, x_prev, t):
        return dist.Normal(self.transition_matrix @ x_prev, jnp.diag(self.transition_tril)).to_event(1)

    def observation(self, x, t):
        return dist.Normal(self.observation_matrix @ x, jnp.diag(self.observation_tril)).to_event(1)


def build(theta: dict[str, jax.Array]) -> IndependentNoises:
    """The model above; C has ones on its diagonal and halves beside it."""
    d = theta["q"].shape[0]
    Q, R = (jnp.diag(jnp.exp(theta[name])) for name in "qr")
    return IndependentNoises(jnp.zeros(d), jnp.eye(d), theta["A"], Q, jnp.eye(d) + 0.5 * jnp.eye(d, k=1), R)


def simulate(num_states: int, num_steps: int) -> jax.Array:
    """Observations of a model whose A turns and shrinks."""
    d = num_states
    A = 0.8 * jnp.eye(d) + 0.25 * (jnp.eye(d, k=1) - jnp.eye(d, k=-1))
    theta = {"A": A, "q": jnp.full(d, LOG_SCALE), "r": jnp.full(d, LOG_SCALE)}
    return bi.models.simulate(7, build(theta), num_steps=num_steps)[1]


def beginning(num_states: int) -> dict[str, jax.Array]:
    """Where every run starts: no interaction, and noises that are too large."""
    zeros = jnp.zeros(num_states)
    return {"A": 0.5 * jnp.eye(num_states), "q": zeros, "r": zeros}


def maximize(start: dict[str, jax.Array], ys: jax.Array) -> tuple[Any, np.ndarray]:
    """The log likelihood of a flat theta, and where it is largest."""
    flat, unravel = ravel_pytree(start)
    log_likelihood = jax.jit(lambda theta: bi.models.kalman_filter(build(unravel(theta)), ys).log_evidence)
    slope = jax.jit(jax.value_and_grad(lambda theta: -log_likelihood(theta)))

    def minus(theta):
        value, gradient = slope(jnp.asarray(theta, flat.dtype))
        return float(value), np.asarray(gradient, np.float64)

    found = scipy.optimize.minimize(
        minus, np.asarray(flat, np.float64), jac=True, method="BFGS", options={"gtol": 0.01}
    )
    if np.max(np.abs(found.jac)) > 0.1:
        raise RuntimeError(f"the likelihood was not maximised: {found.message}")
    return log_likelihood, found.x


def main(
    folder: Path,
    estimators: Sequence[str] = ESTIMATORS,
    num_states: int = 3,
    num_steps: int = 100,
    budget: int = 32,
    num_iterations: int = 1000,
    num_runs: int = 8,
    step_size: float = 0.05,
) -> list[dict]:
    """Runs everything, writes learning_lgssm.png and .csv, and returns the rows of the table."""
    ys, start = simulate(num_states, num_steps), beginning(num_states)
    log_likelihood, maximum = maximize(start, ys)
    rows, distances, gaps = [], {}, {}
    for estimator in estimators:
        trace, theta = learn(
            build,
            start,
            ys,
            estimator=estimator,
            budget=budget,
            num_iterations=num_iterations,
            num_runs=num_runs,
            step_size=step_size,
        )
        last = np.stack([ravel_pytree(jax.tree.map(lambda leaf, i=i: leaf[i], theta))[0] for i in range(num_runs)])
        distances[estimator] = np.linalg.norm(trace - maximum, axis=2)
        values = jax.vmap(log_likelihood)(jnp.asarray(last))
        gaps[estimator] = float(log_likelihood(jnp.asarray(maximum, last.dtype))) - np.asarray(values, np.float64)
        error = np.linalg.norm(last - maximum, axis=1)
        rows.append(
            {
                "estimator": estimator,
                "budget": budget,
                "num_runs": num_runs,
                "distance": error.mean(),
                "distance_half_width": half_width(error),
                "distance_of_mean": np.linalg.norm(last.mean(0) - maximum),
                "gap": gaps[estimator].mean(),
                "gap_half_width": half_width(gaps[estimator]),
            }
        )
        print(rows[-1], flush=True)
    save(folder, "learning_lgssm", draw(distances, gaps), rows)
    return rows


def draw(distances: dict[str, np.ndarray], gaps: dict[str, np.ndarray]):
    """The distance over the iterations with 95% bands, and the gap of each run with 95% intervals."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=(2, 1), layout="constrained")
    for i, name in enumerate(gaps):
        iterations = 1 + np.arange(distances[name].shape[1])
        mean, half = distances[name].mean(0), half_width(distances[name])
        every = max(len(iterations) // 10, 1)
        left.plot(iterations, mean, color=COLORS[name], marker=MARKERS[name], markevery=every, ms=5, label=LABELS[name])
        left.fill_between(iterations, mean - half, mean + half, color=COLORS[name], alpha=0.2, lw=0)
        spread = i + np.linspace(-0.2, 0.2, len(gaps[name]))
        right.plot(spread, gaps[name], color=COLORS[name], marker=MARKERS[name], ls="", ms=4, alpha=0.4)
        right.errorbar(
            i, gaps[name].mean(), half_width(gaps[name]), color=COLORS[name], marker=MARKERS[name], ms=7, capsize=4
        )
    left.set(xlabel="iteration", ylabel=r"$|\theta - \hat\theta_{\mathrm{MLE}}|$", yscale="log")
    left.set_title("distance to the maximum likelihood estimate")
    right.set(ylabel="log likelihood below the maximum, nats", yscale="log")
    right.set_xticks(range(len(gaps)), [SHORT[name] for name in gaps])
    right.set_title("what was learnt")
    for axis in (left, right):
        axis.grid(alpha=0.25, lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    given = arguments(__doc__)
    larger = {"num_states": 5, "num_steps": 500, "budget": 256, "num_iterations": 5000, "num_runs": 20}
    main(given.results, **(larger if given.full else {}))
