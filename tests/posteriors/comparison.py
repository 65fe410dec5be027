"""Every kernel on every posterior, and its moments against the reference.

The chains are many and independent but for what warm-up has learnt from all of them, so that the means of each chain
are independent replicates: their spread is the Monte Carlo error, whatever the autocorrelation. Compared are the mean
of every scalar, and its mean squared deviation from the reference's mean, whose expectation is the variance:

    z = (ours - reference) / sqrt(s^2 / C + error of the reference^2)

with s the standard deviation over C chains, compared with Student's t; its degrees of freedom are Satterthwaite's.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats

import bayesinf as bi
from bayesinf import kernels
from bayesinf.adaptation import Window
from bayesinf.conformance import Report
from posteriors.models import POSTERIORS

__all__ = ["KERNELS", "adjusted", "compare", "judge", "reference", "target_of"]

NUM_CHAINS, NUM_WARMUP = 64, 600
NUM_POPULATIONS, NUM_PARTICLES = 32, 500
BIAS = 0.01  # relative, of the variances; what the unadjusted kernel is tuned for


@functools.cache
def reference() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("reference.json").read_text())


def target_of(name: str, model: Callable[..., None] | None = None) -> bi.Target:
    """The target of a posterior, or of another model of the same data."""
    data = {key: np.asarray(value) for key, value in reference()[name]["data"].items()}
    return bi.Target.from_numpyro(model or POSTERIORS[name].model, **data)


def chains_of(kernel: bi.Kernel, target: bi.Target, num_samples: int) -> bi.Draws:
    """Draws of chains that start near the origin of the unconstrained space and learn one dense metric."""
    warmup = Window(NUM_WARMUP, kernel.target_acceptance, is_dense=True, is_pooled=True)
    initial = target.init(1, NUM_CHAINS, radius=0.5)
    return bi.sample(2, kernel, initial, num_samples=num_samples, num_warmup=NUM_WARMUP, warmup=warmup, progress=False)


def adjusted(build: Callable[[bi.Target], bi.Kernel], num_samples: int) -> Callable[[bi.Target], dict[str, np.ndarray]]:
    """Draws by site of the kernel that `build` makes of a target."""
    return lambda target: chains_of(build(target), target, num_samples).variables


def unadjusted(target: bi.Target) -> dict[str, np.ndarray]:
    """BAOAB in the metric that MALA has learnt, with the step size that is to bias variances by BIAS."""
    learnt = chains_of(kernels.Precondition(kernels.MALA(target, 0.1)), target, 1)
    scale = jnp.linalg.cholesky(learnt.tuned.inverse_mass_matrix[0])
    kernel = kernels.Precondition(kernels.Splitting("BAOAB", target, 0.1), scale)
    warmup = kernels.EnergyError(NUM_WARMUP, BIAS, is_pooled=True, metric="given")
    initial = learnt.final_state.position
    return bi.sample(
        3, kernel, initial, num_samples=2_000, num_warmup=NUM_WARMUP, warmup=warmup, progress=False
    ).variables


def populations(target: bi.Target) -> dict[str, np.ndarray]:
    """Independent SMC samplers from the prior, as if each were a chain."""
    mutation = kernels.Precondition(kernels.MALT(target, 0.1, num_steps=4))

    def run(key):
        return kernels.smc_sampler(key, target, None, mutation, num_particles=NUM_PARTICLES, num_moves=6).particles

    return jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(4), NUM_POPULATIONS))


KERNELS: dict[str, Callable[[bi.Target], dict[str, np.ndarray]]] = {
    "MALA": adjusted(lambda target: kernels.Precondition(kernels.MALA(target, 0.1)), 2_000),
    "Barker": adjusted(lambda target: kernels.Precondition(kernels.Barker(target, 0.1)), 2_000),
    "GHMC": adjusted(lambda target: kernels.Precondition(kernels.GHMC(target, 0.1)), 2_000),
    "MALT": adjusted(lambda target: kernels.Precondition(kernels.MALT(target, 0.1, num_steps=4)), 500),
    "HMC": adjusted(lambda target: kernels.HMC(target, 0.1, num_integration_steps=3), 500),
    "NUTS": adjusted(lambda target: kernels.NUTS(target, 0.1), 200),
    "BAOAB": unadjusted,
    "SMC": populations,
}


def compare(kernel: str, posterior: str) -> Report:
    """P-values of the hypothesis that a kernel on a posterior has the moments of the reference."""
    target = target_of(posterior)
    dim = sum(leaf.size for leaf in jax.tree.leaves(target.model.template(target.data)))  # type: ignore[union-attr]
    # off Gaussians there is no bound: what is allowed is the most that one direction of a Gaussian may have of it
    allowed = BIAS * dim ** (1 / 3) if kernel == "BAOAB" else 0.0
    return judge(f"{kernel} on {posterior}", posterior, KERNELS[kernel](target), allowed)


def judge(test: str, posterior: str, draws: dict[str, np.ndarray], allowed: float = 0.0) -> Report:
    """Holds draws (chain, draw, ...) by site against the reference.

    Args:
        test: what is said to be tested.
        posterior: its name.
        draws: of independent chains.
        allowed: the bias that is no error, in standard deviations of the mean, and as a share of the variance.

    Returns:
        A report with the notes "largest z", what is allowed left out of account, and "resolution": the largest
        standard error, in standard deviations for means, and as a share for variances.
    """
    p_values, largest_z, resolution = {}, 0.0, 0.0
    for site, moments in reference()[posterior]["moments"].items():
        known = {word: np.asarray(value) for word, value in moments.items()}
        values = np.asarray(draws[site], np.float64)
        squares = (values - known["mean"]) ** 2
        for word, statistic, unit in (
            ("mean", values, np.sqrt(known["variance"])),
            ("variance", squares, known["variance"]),
        ):
            by_chain = statistic.mean(axis=1)
            num = len(by_chain)
            own = by_chain.std(axis=0, ddof=1) / np.sqrt(num)
            error = np.hypot(own, known[f"{word}_error"])
            gap = np.abs(by_chain.mean(axis=0) - known[word])
            excess = np.maximum(gap - allowed * unit, 0.0) / error
            p = 2 * scipy.stats.t.sf(excess, (num - 1) * (error / own) ** 4)
            p_values |= {f"{word} of {site}{list(i) or ''}": float(p[i]) for i in np.ndindex(np.shape(p))}
            largest_z = max(largest_z, float(np.max(gap / error)))
            resolution = max(resolution, float(np.max(error / unit)))
    return Report(test, p_values, {"largest z": largest_z, "resolution": resolution})
