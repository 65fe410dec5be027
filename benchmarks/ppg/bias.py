"""Bias and standard deviation of Parisian particle Gibbs, beside PaRIS of the same budget of particles.

    x_0 ~ N(0, q^2 / (1 - a^2)),   x_t = a x_{t-1} + q e_t,   y_t = b x_t + r z_t,   (a, q, b, r) = (.97, .60, .54, .33)

with data without random numbers, T = 51, and the functionals sum_t x_t^2 and sum_t x_{t-1} x_t, whose smoothed
expectations are known from the Kalman filter and the Rauch-Tung-Striebel smoother. R independent runs of k sweeps of N
particles give the roll-outs

    Pi_{k0, k} = (k - k0)^{-1} sum_{l = k0 + 1}^{k} estimate_l,   k0 = k - 1 and k0 = floor(k / 2)

for every k at once. Their budget is N k particles a time step: that of one run of PaRIS of N k particles. Not counted
is the one filter of N particles that draws the first path: it carries no statistics, and resamples systematically when
the effective sample size is below N / 2.

    python -m benchmarks.ppg.bias            # minutes; --full: T = 1001 and more particles, hours

References:
    Cardoso, Janati El Idrissi, Le Corff, Moulines and Olsson (2023), https://arxiv.org/abs/2301.00900.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

import bayesinf as bi
from bayesinf.kernels import AdditiveFunctional, paris, ppg
from benchmarks.ppg.common import COLORS, arguments, half_width, save

MODEL = bi.models.LinearGaussian.scalar(0.97, 0.60, 0.54, 0.33)
FUNCTIONALS = {"squares": r"$\sum_t x_t^2$", "products": r"$\sum_t x_{t-1} x_t$"}
SUMS = AdditiveFunctional(
    lambda x: jnp.stack([x[0] ** 2, jnp.zeros_like(x[0])]),
    lambda x_prev, x, t: jnp.stack([x[0] ** 2, x_prev[0] * x[0]]),
)
BURN_INS = {"k-1": lambda k: k - 1, "k/2": lambda k: k // 2}
SHADES = ("#56B4E9", "#0072B2", "#003A5C")  # of the fewest particles to the most


def series(num_steps: int) -> jax.Array:
    """Observations, the same in every run."""
    t = np.arange(num_steps)
    return jnp.asarray(1.2 * np.sin(0.35 * t) + 0.6 * np.cos(1.7 * t + 0.4) + 0.3 * np.sin(0.11 * t**2))[:, None]


def truth(ys: jax.Array) -> np.ndarray:
    """E[sum x_t^2 | y] and E[sum x_{t-1} x_t | y]."""
    means, covariances, crosses = (np.asarray(leaf).squeeze() for leaf in bi.models.rts_smoother(MODEL, ys))
    return np.array([np.sum(means**2 + covariances), np.sum(means[:-1] * means[1:] + crosses)])


@partial(jax.jit, static_argnums=(2, 3))
def sweeps(keys: jax.Array, ys: jax.Array, num_particles: int, num_sweeps: int) -> jax.Array:
    """The estimates of all sweeps of independent runs, shape (runs, sweeps, 2)."""

    def run(key):
        options = {"num_particles": num_particles, "num_sweeps": num_sweeps, "burn_in": 0}
        return ppg(key, MODEL, ys, SUMS, **options, method="exact", throw=False).estimates

    return jax.lax.map(run, keys, batch_size=100)


@partial(jax.jit, static_argnums=2)
def filters(keys: jax.Array, ys: jax.Array, num_particles: int) -> jax.Array:
    """The estimates of independent runs of PaRIS, shape (runs, 2)."""

    def run(key):
        return paris(key, MODEL, ys, SUMS, num_particles=num_particles, method="reject", throw=False).estimate

    return jax.lax.map(run, keys, batch_size=100)


def describe(errors: np.ndarray, **about) -> list[dict]:
    """One row for each functional, of errors of independent runs, shape (runs, 2)."""
    sd = np.std(errors, axis=0, ddof=1)
    # of a standard deviation by the delta method, from the fourth moments
    sd_half_width = half_width((errors - errors.mean(0)) ** 2) / (2 * sd)
    columns = (np.mean(errors, axis=0), half_width(errors), sd, sd_half_width, np.sqrt(np.mean(errors**2, axis=0)))
    names = ("bias", "bias_half_width", "sd", "sd_half_width", "rmse")
    return [
        {"functional": functional, **about, "num_runs": len(errors), **dict(zip(names, values, strict=True))}
        for functional, values in zip(FUNCTIONALS, np.transpose(columns), strict=True)
    ]


def main(
    folder: Path,
    num_steps: int = 51,
    num_particles: Sequence[int] = (10, 20, 40),
    num_particles_paris: Sequence[int] = (10, 20, 40, 80, 160, 320, 640),
    budget: int = 640,
    max_sweeps: int = 32,
    num_runs: int = 4000,
) -> list[dict]:
    """Runs everything, writes bias.png and bias.csv, and returns the rows of the table."""
    ys = series(num_steps)
    exact = truth(ys)
    rows: list[dict] = []
    for n in num_particles:
        num_sweeps = min(max_sweeps, budget // n)
        keys = jax.random.split(jax.random.key(n), num_runs)
        errors = np.asarray(sweeps(keys, ys, n, num_sweeps), np.float64) - exact
        for rule, burn_in in BURN_INS.items():
            for k in 2 ** np.arange(int(np.log2(num_sweeps)) + 1):
                about = {"estimator": "ppg", "budget": n * k, "num_particles": n, "num_sweeps": k}
                rows += describe(errors[:, burn_in(k) : k].mean(axis=1), **about, rule=rule, burn_in=burn_in(k))
    for n in num_particles_paris:
        keys = jax.random.split(jax.random.key(1000 + n), num_runs // 4)  # as its bias is seen with fewer
        about = {"estimator": "paris", "budget": n, "num_particles": n, "num_sweeps": 1, "rule": "", "burn_in": 0}
        rows += describe(np.asarray(filters(keys, ys, n), np.float64) - exact, **about)
    save(folder, "bias", draw(rows, num_particles), rows)
    return rows


def draw(rows: list[dict], num_particles: Sequence[int]):
    """|bias| of both rules for the burn-in, and standard deviations, against the budget; a row for each functional."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.4), sharex=True, layout="constrained")
    curves = [("paris", "", None, COLORS["paris"], "s", "PaRIS of $Nk$ particles")]
    for n, color, marker in zip(num_particles, SHADES, "ov^", strict=False):
        curves += [("ppg", rule, n, color, marker, f"Parisian particle Gibbs, $N={n}$") for rule in BURN_INS]
    for row_of_axes, (functional, symbol) in zip(axes, FUNCTIONALS.items(), strict=True):
        for estimator, rule, n, color, marker, label in curves:
            chosen = [
                row
                for row in rows
                if (row["functional"], row["estimator"], row["rule"]) == (functional, estimator, rule)
                and n in (None, row["num_particles"])
            ]
            budget, bias, half, sd, sd_half = (
                np.array([row[name] for row in chosen])
                for name in ("budget", "bias", "bias_half_width", "sd", "sd_half_width")
            )
            for axis, wanted in zip(row_of_axes, BURN_INS, strict=False):
                if rule in ("", wanted):
                    _draw_bias(axis, budget, bias, half, color, marker, label)
            if rule in ("", "k/2"):
                row_of_axes[2].errorbar(budget, sd, sd_half, color=color, marker=marker, ms=5, lw=1.4, capsize=2)
        row_of_axes[0].set_ylabel(f"|bias| of {symbol}")
        row_of_axes[1].sharey(row_of_axes[0])
        row_of_axes[0].set_ylim(bottom=0.5 * min(row["bias_half_width"] for row in rows))
        row_of_axes[2].set_ylabel(f"standard deviation of {symbol}")
        for axis in row_of_axes:
            axis.set(xscale="log", yscale="log")
            axis.grid(alpha=0.25, which="major", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        row_of_axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row_of_axes[2].yaxis.set_major_formatter(ScalarFormatter())
        row_of_axes[2].yaxis.set_minor_formatter(NullFormatter())
    axes[0, 0].set_title(r"bias, $k_0 = k - 1$")
    axes[0, 1].set_title(r"bias, $k_0 = \lfloor k/2 \rfloor$")
    axes[0, 2].set_title(r"one run, $k_0 = \lfloor k/2 \rfloor$")
    budgets = [row["budget"] for row in rows]
    axes[0, 0].set_xlim(0.8 * min(budgets), 1.25 * max(budgets))
    for axis in axes[1]:
        axis.set_xlabel("budget $Nk$, particles a time step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    hollow = plt.Line2D([], [], color="0.4", marker="o", mfc="white", ls="", label="0 in the 95% interval: its end")
    figure.legend(
        [*handles, hollow],
        [*labels, hollow.get_label()],
        loc="outside lower center",
        ncols=5,
        frameon=False,
        fontsize=9,
    )
    return figure


def _draw_bias(axis, budget, bias, half, color, marker, label) -> None:
    """|bias| with its 95% interval; where that holds 0, its upper end, hollow."""
    size = np.abs(bias)
    is_seen = size > half
    height = np.where(is_seen, size, size + half)
    style = {"color": color, "marker": marker, "ms": 5}
    axis.plot(budget, height, color=color, lw=1.2, alpha=0.7)
    axis.errorbar(budget[is_seen], size[is_seen], half[is_seen], **style, ls="", capsize=2, lw=1, label=label)
    hollow = {"mfc": "white", "ls": "", "lw": 1, "uplims": True}
    axis.errorbar(budget[~is_seen], height[~is_seen], 0.4 * height[~is_seen], **style, **hollow)


if __name__ == "__main__":
    given = arguments(__doc__)
    larger: dict = {
        "num_steps": 1001,
        "num_particles": (50, 100, 200),
        "num_particles_paris": (50, 100, 200, 400, 800, 1600, 3200),
        "budget": 3200,
    }
    main(given.results, **(larger if given.full else {}))
