"""Digits with noise that was not trained on: does a heavy-tailed process know better what it does not know?

A network's Gaussian process sees 200 clean digits of scikit-learn (8 x 8 pixels) and predicts others, clean or with
normal noise on every pixel, of a standard deviation that is a multiple of that of all pixels. Its scale s is 1, learnt,
or integrated out, which makes the process heavy-tailed: given s it is Gaussian, and all inputs have s in common.

    regression       one process for each class on codes -.1 and .9, with normal noise; the class is the largest output.
                     By Bayes' rule in closed form; s ~ IG(a, b) is a Student-t process
    classification   ten latent functions f_c = sqrt(s) L z_c behind a softmax, and one s for all; z and log s by NUTS

"s learnt" is the s of highest marginal likelihood in the regression, and in the classification exp(E log s) of the
posterior under IG(2, 2), with which the sampler is run again: what differs from IG(2, 2) is the tails alone, and what
differs from s = 1 is the scale. The network and the noise of the regression are those of the highest marginal
likelihood with s learnt, of relu or erf, 1 or 4 hidden layers, and nine noises; all methods share them.

Probabilities of classes are means over draws: of which output is the largest, or of the softmax. ECE is the expected
calibration error in ten bins of equal width.

    pip install scikit-learn
    python -m benchmarks.gp.digits                      # minutes

References:
    Lee, Yun, Yang, Kim and Lee (2022), https://arxiv.org/abs/2107.01408 (robustness as the case for heavy tails).
    Shah, Wilson and Ghahramani (2014), https://arxiv.org/abs/1402.4306.
    Guo, Pleiss, Sun and Weinberger (2017), https://arxiv.org/abs/1706.04599 (ECE).
"""

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist

import bayesinf as bi
from bayesinf.models import gp, nngp
from benchmarks.gp.computed import Computed
from benchmarks.ppg.common import save

RESULTS = Path(__file__).parent / "results"
LEVELS = (0.0, 0.5, 1.0, 2.0, 4.0)
NOISES = tuple(float(2.0**-k) for k in range(9))  # of the regression, relative to the scale
DUALS = {"relu": nngp.relu, "erf": nngp.erf}
LAWS = {"IG(2,2)": (2.0, 2.0), "IG(.5,.5)": (0.5, 0.5)}
PROBLEMS = ("regression", "classification")
METHODS = ("s = 1", "s learnt", *LAWS)
NUM_CLASSES, NUM_TRAIN, NUM_TEST, NUM_DRAWS = 10, 200, 400, 1_000

Data = tuple[np.ndarray, np.ndarray]


def load() -> Data:
    """Pixels (n, 64), centred and divided by the standard deviation of all, and labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise SystemExit(f"{error}: the digits come with scikit-learn, pip install scikit-learn") from error
    X, labels = load_digits(return_X_y=True)
    return (X - X.mean()) / X.std(), labels


def choose(X: jax.Array, codes: jax.Array) -> tuple[nngp.NNGP, float, float, str]:
    """The network, noise and scale of highest marginal likelihood; with codes of shape (classes, n)."""
    best: tuple = (-np.inf,)
    for (name, dual), depth in itertools.product(DUALS.items(), (1, 4)):
        kernel = nngp.NNGP(dual(), depth, 2.0, 0.1)
        evidence, scales = (np.asarray(part) for part in evidences(kernel(X), jnp.asarray(NOISES), codes))
        at = int(np.argmax(evidence))
        if evidence[at] > best[0]:
            choice = f"{name}, {depth} hidden, noise {NOISES[at]:.3g}, s = {scales[at]:.3g}"
            best = evidence[at], kernel, NOISES[at], float(scales[at]), choice
    return best[1:]


@jax.jit
def evidences(matrix: jax.Array, noises: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of every noise: the log marginal likelihood, at the scale where it is highest, and that scale."""

    def at(noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        kernel = Computed(matrix)
        X, _ = kernel.rows(n)
        process = gp.GP(kernel, X, noise=noise)
        scale = 2.0 * jnp.mean(process.log_prob(jnp.zeros(n)) - process.log_prob(codes)) / n
        return jnp.mean(process.log_prob(codes / jnp.sqrt(scale))) - 0.5 * n * jnp.log(scale), scale

    n = len(matrix)
    return jax.vmap(at)(noises)


def regression(key: Any, X: jax.Array, labels: np.ndarray, X_new: jax.Array) -> dict[str, np.ndarray]:
    """Probabilities of classes at new inputs, (inputs, classes), by method."""
    codes = jax.nn.one_hot(labels, NUM_CLASSES).T - 0.1
    kernel, noise, scale, choice = choose(X, codes)
    print("regression:", choice, flush=True)
    found = answer(key, kernel, X, codes, X_new, jnp.asarray(noise), jnp.asarray(scale))
    return {name: np.asarray(probabilities) for name, probabilities in found.items()}


@jax.jit
def answer(
    key: Any, kernel: nngp.NNGP, X: jax.Array, codes: jax.Array, X_new: jax.Array, noise: jax.Array, scale: jax.Array
) -> dict[str, jax.Array]:
    """How often each class has the largest of a thousand draws of new codes."""
    processes: dict[str, tuple[Any, Any]] = {
        "s = 1": (gp.GP(kernel, X, noise=noise), noise),
        "s learnt": (gp.GP(gp.Product(scale, kernel), X, noise=scale * noise), scale * noise),
    }
    processes |= {name: (gp.StudentTProcess(a, b, kernel, X, noise=noise), noise) for name, (a, b) in LAWS.items()}
    found = {}
    for name, (process, new_noise) in processes.items():
        draws = process.condition(codes, X_new, noise=new_noise).sample(key, (NUM_DRAWS,))
        counts = jnp.sum(jax.nn.one_hot(jnp.argmax(draws, axis=1), NUM_CLASSES), axis=0)
        found[name] = (counts + 0.5) / (NUM_DRAWS + 0.5 * NUM_CLASSES)
    return found


def log_posterior(position: dict[str, jax.Array], data: Any) -> jax.Array:
    """Of z and, where it is not fixed, u = log s."""
    latent, one_hot, law, fixed = data
    u = position.get("u", fixed)
    f = jnp.exp(0.5 * u) * latent.to_function(position["z"])
    log_prior = -0.5 * jnp.sum(position["z"] ** 2)
    if "u" in position:
        log_prior = log_prior + law.log_prob(jnp.exp(u)) + u
    return log_prior + jnp.sum(one_hot * jax.nn.log_softmax(f, axis=0))


def classification(
    seed: int, kernel: nngp.NNGP, X: jax.Array, labels: np.ndarray, X_new: jax.Array, num_samples: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Probabilities of classes by method, and the posterior of log s: its mean and standard deviation."""
    one_hot = jax.nn.one_hot(labels, NUM_CLASSES).T
    latent = gp.latent_target(kernel, X, lambda f: jnp.sum(f))  # of it the prior alone is used
    process, found, scales = gp.GP(kernel, X), {}, {}

    def run(name: str, law: tuple[float, float] | None, fixed: float) -> None:
        data = (latent, one_hot, dist.InverseGamma(*(law or (1.0, 1.0))), jnp.asarray(fixed))
        key_z, key_new = jax.random.split(jax.random.key(seed))
        start = {"z": 0.1 * jax.random.normal(key_z, (2, NUM_CLASSES, latent.dim))}
        start |= {} if law is None else {"u": jnp.array([0.0, 1.0])}
        kernel = bi.kernels.NUTS(bi.Target(log_posterior, data), step_size=0.1)
        draws = bi.sample(seed, kernel, start, num_samples=num_samples, num_warmup=num_samples, progress=False)
        z = jnp.asarray(draws["z"]).reshape(-1, NUM_CLASSES, latent.dim)
        u = jnp.asarray(draws["u"]).reshape(-1) if law else jnp.full(len(z), fixed)
        if law:
            each = np.asarray(draws["u"])
            scales[name] = {"mean": float(u.mean()), "sd": float(u.std()), "chains": each.mean(axis=1).round(2)}
        found[name] = np.asarray(predict(key_new, process, latent, z, u, X_new))

    for name, law in LAWS.items():
        run(name, law, 0.0)
    run("s = 1", None, 0.0)
    run("s learnt", None, scales["IG(2,2)"]["mean"])
    return found, scales


@jax.jit
def predict(key: Any, process: gp.GP, latent: Any, z: jax.Array, u: jax.Array, X_new: jax.Array) -> jax.Array:
    """The mean of the softmax over draws of s and of the functions at new inputs."""

    def one(given: tuple) -> jax.Array:
        key, z, u = given
        law = process.condition(latent.to_function(z), X_new)  # at s = 1
        return jax.nn.softmax(jnp.exp(0.5 * u) * law.sample(key), axis=0)

    return jnp.mean(jax.lax.map(one, (jax.random.split(key, len(z)), z, u)), axis=0).T


def measure(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Negative log likelihood, accuracy, mean confidence and expected calibration error."""
    own = probabilities[np.arange(len(labels)), labels]
    confidence, is_right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    bins = np.minimum((10 * confidence).astype(int), 9)
    gaps = [abs(np.sum(confidence[bins == i] - is_right[bins == i])) for i in range(10)]
    return {
        "nll": float(-np.mean(np.log(own))),
        "accuracy": float(np.mean(is_right)),
        "confidence": float(np.mean(confidence)),
        "ece": float(np.sum(gaps) / len(labels)),
    }


def main(
    folder: Path,
    data: Data | None = None,
    num_splits: int = 3,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
    num_samples: int = 200,
    problems: Sequence[str] = PROBLEMS,
) -> list[dict]:
    """Runs both problems, writes digits.png and digits.csv, and returns the rows of the table."""
    X, labels = load() if data is None else data
    rows = []
    for problem, split in itertools.product(problems, range(num_splits)):
        started = time.perf_counter()
        rng = np.random.default_rng(split)
        order = rng.permutation(len(labels))
        train, test = order[:num_train], order[num_train : num_train + num_test]
        noise = rng.standard_normal((num_test, X.shape[1]))
        X_train = jnp.asarray(X[train], float)
        X_new = jnp.concatenate([jnp.asarray(X[test] + level * noise, float) for level in LEVELS])
        if problem == "regression":
            found = regression(jax.random.key(split), X_train, labels[train], X_new)
        else:
            kernel = choose(X_train, jax.nn.one_hot(labels[train], NUM_CLASSES).T - 0.1)[0]
            found, scales = classification(split, kernel, X_train, labels[train], X_new, num_samples)
            print("classification, log s:", scales)
        for method in METHODS:
            for level, part in zip(LEVELS, np.split(found[method], len(LEVELS)), strict=True):
                about = {"problem": problem, "split": split, "method": method, "level": level}
                rows.append(about | measure(part, labels[test]))
        print(f"{problem}, split {split}: {time.perf_counter() - started:.0f} s", flush=True)
        save(folder, "digits", draw(rows), rows)  # the next may take long
    return rows


def means(rows: list[dict], problem: str, method: str, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Over splits, of every level; and standard errors."""
    own = [row for row in rows if (row["problem"], row["method"]) == (problem, method)]
    table = np.array([[row[key] for row in own if row["level"] == level] for level in LEVELS])
    error = table.std(axis=1, ddof=1) / np.sqrt(table.shape[1]) if table.shape[1] > 1 else np.full(len(table), np.nan)
    return table.mean(axis=1), error


def markdown(rows: list[dict]) -> str:
    """The tables of README.md."""
    lines: list[str] = []
    for problem in dict.fromkeys(row["problem"] for row in rows):
        lines += ["", f"| {problem}, noise | {' | '.join(f'{level:g}' for level in LEVELS)} |", "|---" * 6 + "|"]
        for key, method in itertools.product(("nll", "ece", "accuracy", "confidence"), METHODS):
            if key == "accuracy" and method != METHODS[0] and problem == "regression":
                continue  # of the same means
            cells = [f"{m:.3f} +- {e:.3f}" for m, e in zip(*means(rows, problem, method, key), strict=True)]
            lines.append(f"| {key}, {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict]):
    """NLL and ECE against the level of the noise."""
    problems = list(dict.fromkeys(row["problem"] for row in rows))
    shape = (1, 2 * len(problems))
    figure, axes = plt.subplots(*shape, figsize=(3.4 * shape[1], 3), layout="constrained", squeeze=False)
    for axis, (problem, key) in zip(axes[0], itertools.product(problems, ("nll", "ece")), strict=True):
        for method, color, marker in zip(METHODS, ("#999999", "#000000", "#0072B2", "#D55E00"), "osd^", strict=True):
            mean, error = means(rows, problem, method, key)
            axis.errorbar(range(len(LEVELS)), mean, error, color=color, marker=marker, ms=4, lw=1, label=method)
        axis.set_xticks(range(len(LEVELS)), [f"{level:g}" for level in LEVELS])
        axis.set(title=f"{problem}: {key.upper()}", xlabel="noise, in sd of pixels", ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Digits with noise, by Gaussian and heavy-tailed processes.")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the figure and the table go")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200, help="of each of two chains, after as many to warm up")
    parser.add_argument("--problems", nargs="+", default=PROBLEMS, choices=PROBLEMS)
    given = parser.parse_args()
    started = time.perf_counter()
    print(markdown(main(given.results, None, given.splits, num_samples=given.samples, problems=given.problems)))
    print(f"{time.perf_counter() - started:.0f} s")
