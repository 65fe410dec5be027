"""The ladder of a replica exchange: how well it conducts, a better one, and the evidence on the way.

With r_k the rate at which the neighbours k, k + 1 of a ladder refuse to exchange,

    Lambda = sum_k r_k                      the barrier between pi and the reference, nearly the same on any fine ladder
    Lambda(beta_k) = sum_{l < k} r_l        its part down to beta_k; the best ladder cuts it into equal parts
    round trips per step = 1 / (2 + 2 sum_k r_k / (1 - r_k))

so that about 2 Lambda replicas are needed, and more hardly pay. With a normalised reference, such as a prior,

    Z = int pi = prod_k E_{k+1}[exp((beta_k - beta_{k+1}) V)],      V = log pi - log rho

of which the mean of a run is an estimate ("stepping stone"): consistent, but not unbiased, as the draws are dependent.

References:
    Syed, Bouchard-Cote, Deligiannidis and Doucet (2022), doi:10.1111/rssb.12464, arXiv:1905.02939 (barrier, ladder).
    Xie, Lewis, Fan, Kuo and Chen (2011), doi:10.1093/sysbio/syq085 (stepping stones).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bayesinf import errors

__all__ = ["Ladder", "stepping_stone", "suggest_betas"]


class Ladder(NamedTuple):
    """What the swap rates of a run say; see the module.

    Attributes:
        betas: inverse temperatures between which neighbours are expected to refuse equally often.
        barrier: Lambda.
        round_trip_rate: of the ladder of the run, per step, between its ends.
    """

    betas: Float[Array, " n"]
    barrier: Float[Array, ""]
    round_trip_rate: Float[Array, ""]


def suggest_betas(swap_rates: Any, betas: Any, num_replicas: int | None = None) -> Ladder:
    """A ladder of equal refusals, from the swap rates of a run on another one.

    Lambda(beta) is interpolated monotonically between the betas of the run, and cut into equal parts. Where swap rates
    of the run are near 0 the barrier is not resolved: take more replicas, and ask again after the next run.

    Args:
        swap_rates: of each pair of neighbours, such as `draws.stats["swap_rates"]`; shape (..., K - 1), averaged over
            all axes but the last.
        betas: of the run, shape (K,), strictly falling.
        num_replicas: how many are wanted; as many as there are by default.

    Returns:
        A Ladder; `ReplicaExchange(kernel, ladder.betas, ...)` runs on it.

    Raises:
        ValueError: the shapes do not fit, or the rates are not probabilities.

    Example:
        >>> from bayesinf import kernels
        >>> ladder = kernels.suggest_betas([0.9, 0.5, 0.1], [1.0, 0.5, 0.2, 0.1])
        >>> round(float(ladder.barrier), 2), bool(ladder.betas[2] < 0.2)
        (1.5, True)
    """
    from scipy.interpolate import PchipInterpolator  # not needed by anything else, and slow to import

    betas = np.asarray(betas, float)
    rates = np.asarray(swap_rates, float)
    num = betas.size if num_replicas is None else errors.check_count("num_replicas", num_replicas, minimum=2)
    if betas.ndim != 1 or betas.size < 2 or np.any(np.diff(betas) >= 0):
        raise ValueError(f"betas must be a vector that falls strictly, got {betas}")
    if rates.ndim == 0 or rates.shape[-1] != betas.size - 1:
        raise ValueError(f"swap_rates must have shape (..., {betas.size - 1}), one for each pair, got {rates.shape}")
    rates = np.mean(rates.reshape(-1, betas.size - 1), axis=0)
    if not np.all((rates >= 0) & (rates <= 1)):
        raise ValueError(f"swap_rates must be probabilities, got {rates}")

    refusals = 1.0 - rates
    barrier = np.sum(refusals)
    # pairs that never refuse stand between one and the same part of the barrier; a little keeps them apart
    parts = np.maximum(refusals, 1e-6 * max(barrier, 1.0))
    passed = np.concatenate([[0.0], np.cumsum(parts)])
    found = PchipInterpolator(passed, betas)(np.linspace(0.0, passed[-1], num))
    found[0], found[-1] = betas[0], betas[-1]
    with np.errstate(divide="ignore"):
        round_trip_rate = 1.0 / (2.0 + 2.0 * np.sum(refusals / rates))
    return Ladder(jnp.asarray(found), jnp.asarray(barrier), jnp.asarray(round_trip_rate))


def stepping_stone(log_ratios: Any, betas: Any) -> Float[Array, ""]:
    """The estimate of log Z from the log ratios V of a run with a normalised reference.

    Args:
        log_ratios: V of every replica, shape (..., K), such as `draws.stats["log_ratios"]`; all draws count equally.
        betas: of the run, shape (K,), from 1 to 0.

    Returns:
        The estimate: log evidence, where the target is prior times likelihood and the reference is the prior.

    Raises:
        ValueError: the shapes do not fit, or betas does not end with 0.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf import kernels
        >>> float(kernels.stepping_stone(jnp.full((4, 10, 3), -2.0), [1.0, 0.5, 0.0]))  # a constant likelihood
        -2.0
    """
    betas, log_ratios = jnp.asarray(betas), jnp.asarray(log_ratios)
    if betas.ndim != 1 or log_ratios.ndim == 0 or log_ratios.shape[-1:] != betas.shape:
        raise ValueError(f"log_ratios must have shape (..., k) for k betas, got {log_ratios.shape} and {betas.shape}")
    if errors.is_concrete(betas) and betas[-1] != 0:
        raise ValueError(f"betas must end with 0, the normalised reference, got {np.asarray(betas)}")
    steps = (betas[:-1] - betas[1:]) * jnp.reshape(log_ratios, (-1, betas.size))[:, 1:]
    return jnp.sum(jax.nn.logsumexp(steps, axis=0) - jnp.log(steps.shape[0]))
