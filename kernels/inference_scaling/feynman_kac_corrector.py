"""Feynman-Kac correctors: products and powers of diffusion models, sampled as what they are.

Noise is added by dx = f(x, t) dt + sigma(t) dW, which gives the data of model i the law q_t^i with score s_i. What is
wanted at every t is, up to its constant Z_t,

    p_t(x)  proportional to  prod_i q_t^i(x)^{beta_i} exp(R(x, t)),      S = sum_i beta_i s_i,  B = sum_i beta_i

and the usual recipe, to put S in place of the score, does not sample it: these p_t do not solve the equation of that
process. Backwards in time, by steps h,

    x'       = x + h (-f + sigma^2 (S + grad R / 2)) + sigma sqrt(h) xi
    log w'   = log w + h [ (B - 1) div f + sigma^2 / 2 (|S|^2 - sum_i beta_i |s_i|^2)
                           - dR/dt + <grad R, sigma^2 S / 2 - f> ]

particles do follow p_t in their weights, and the mean weight estimates Z_0 / Z_1. It comes from the Fokker-Planck
equation, in which each d log q^i / dt = -div f - f s_i + sigma^2 / 2 (div s_i + |s_i|^2) enters with its beta_i: the
divergences of the scores cancel, and what remains is g, with d log Z_t = E_{p_t}[g]. Its cases are

    annealed, one model     (beta - 1) div f + sigma^2 / 2 beta (beta - 1) |s|^2
    product of two          div f + sigma^2 <s_1, s_2>
    guidance, betas 1-w, w  sigma^2 / 2 w (w - 1) |s_1 - s_2|^2
    reward, R = lambda_t r  -lambda_t' r + lambda_t <grad r, sigma^2 s / 2 - f>

The exponents are constant: if they moved, the weights would need the log densities of the models, which a score does
not tell. Particles are resampled as in the particle filter. The steps are those of Euler and Maruyama: their error is
of order h, in log Z too, where few steps show sooner than in the particles. Halve the steps to see it. Their weights
have a finite variance only where the steps are short beside the scale of the law: for one normal of variance v to
the power beta > 1, where h sigma^2 (beta - 1) < v / 2. Near the data, where v is small, that asks for shorter steps.

References:
    Skreta, Akhound-Sadegh, Ohanesian et al. (2025), ICML, arXiv:2503.02819.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from bayesinf import errors, weights
from bayesinf.captured import as_pytree, current
from bayesinf.kernels.filter_steps import check_threshold, choose_ancestors, reweigh, warn_of_invalid
from bayesinf.kernels.inference_scaling.noising import check_times
from bayesinf.kernels.lineage import descend, found, relative_variance
from bayesinf.kernels.particle_filter import History
from bayesinf.models.state_space import sample_many
from bayesinf.resampling import SCHEMES, gather

__all__ = ["CorrectorResult", "feynman_kac_corrector"]


class CorrectorResult(NamedTuple):
    """What a corrector found in K steps with N particles.

    Attributes:
        particles: at the last time, leading axis N.
        log_weights: their normalised log weights; -inf if all weights vanished.
        log_evidence: estimate of log Z at the last time less log Z at the first; with `initial_log_weight`, which may
            be normalised as one likes, of log Z itself.
        log_evidence_variance: estimate of its variance, to first order (see `lineage`); NaN where particles were
            resampled by another scheme than "multinomial".
        log_evidence_increments: log mean weights: of the initial particles, then of every step.
        ess: effective sample size of the weights, likewise.
        is_resampled: whether the particles were resampled before the step; never before the first.
        num_invalid: how many log weights were NaN or +inf; they count as weights of zero, and the particle stays where
            it was.
        history: of all times for store="full", else None.
    """

    particles: PyTree
    log_weights: Float[Array, " n"]
    log_evidence: Float[Array, ""]
    log_evidence_variance: Float[Array, ""]
    log_evidence_increments: Float[Array, " t"]
    ess: Float[Array, " t"]
    is_resampled: Bool[Array, " t"]
    num_invalid: Int[Array, " t"]
    history: History | None


def feynman_kac_corrector(
    key: errors.KeyLike,
    score_fns: Callable[..., PyTree] | Sequence[Callable[..., PyTree]],
    exponents: Any,
    *,
    drift: Callable[..., PyTree],
    diffusion: Callable[..., Any],
    times: Float[ArrayLike, " t"],
    initial: Any,
    num_particles: int,
    divergence: Callable[..., Any] | None = None,
    log_tilt: Callable[..., Any] | None = None,
    initial_log_weight: Callable[..., Any] | None = None,
    resampling: str = "multinomial",
    ess_threshold: Float[Array, ""] | float = 0.5,
    store: str = "summary",
    throw: bool = True,
) -> CorrectorResult:
    """Draws from a product of powers of diffusion models, and the evidence of it.

    Runs one compiled scan; new exponents, times and thresholds of the same shape compile nothing, and neither do new
    parameters of functions that are equinox modules or their methods. It may be jitted, and vmapped over keys.

    Args:
        key: PRNG key or seed.
        score_fns: s_i(x, t) of one x, any pytree; one function or several.
        exponents: beta_i, as many, of positive sum. Guidance of weight w: 1 - w for the unconditional model and w for
            the conditional one.
        drift: f(x, t) of the noising process, a pytree like x; that of a `Noising`, or another.
        diffusion: sigma(t) >= 0, a scalar.
        times: t from noise to data, falling; a step from each to the next.
        initial: what the particles at times[0] are drawn from: a law of numpyro, or a pair (sample, log_prob), of which
            `sample(key)` alone is used.
        num_particles: N.
        divergence: div f(x, t), a scalar, such as that of a `Noising`. By default it is computed from the drift, at the
            cost of d derivatives in d dimensions. Where the exponents add up to 1 its factor is 0: there
            `lambda x, t: 0.0` will do.
        log_tilt: R(x, t), differentiable in both; none by default. Not zero at times[0] it is in the initial weights.
        initial_log_weight: of one x: the log of prod_i q^i(x)^{beta_i} at times[0], over the density of `initial`.
            None where the particles are drawn from that product.
        resampling: one of `bayesinf.resampling.SCHEMES`. Only "multinomial" has a variance estimate; "systematic" has a
            little less variance.
        ess_threshold: resample where ess <= ess_threshold * N; 1 means always, 0 never.
        store: "summary", or "full" for the history too, K + 1 times the particles.
        throw: whether to raise when no weight is left.

    Returns:
        A CorrectorResult.

    Raises:
        DegenerateWeightsError: all weights vanished (not while traced); its `result` is the CorrectorResult.
        ValueError: an argument is out of its range, or a function returns what it should not.

    Example:
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> from bayesinf.kernels.inference_scaling import VariancePreserving, feynman_kac_corrector
        >>> noising = VariancePreserving()
        >>> def score(x, t):                             # of data from N(1, 1), whose noised law is N(alpha_t, 1)
        ...     return jnp.exp(noising.log_scale(t)) - x
        >>> result = feynman_kac_corrector(              # their density squared: N(1, 1/2)
        ...     0, score, 2.0, drift=noising.drift, divergence=noising.divergence, diffusion=noising.diffusion,
        ...     times=jnp.linspace(1.0, 0.0, 201), initial=dist.Normal(0.0, 0.5**0.5), num_particles=2_000)
        >>> bool(abs(jnp.average(result.particles, weights=jnp.exp(result.log_weights)) - 1.0) < 0.1)
        True

    References:
        Skreta et al. (2025), arXiv:2503.02819, propositions 3.1 to 3.3 and D.6.
    """
    key = errors.as_key(key)
    score_fns = (score_fns,) if callable(score_fns) else tuple(score_fns)
    for i, score in enumerate(score_fns):
        errors.check_arguments(f"score_fns[{i}]", score, "x, t")
    errors.check_arguments("drift", drift, "x, t")
    errors.check_arguments("diffusion", diffusion, "t")
    for name, function in (("divergence", divergence), ("log_tilt", log_tilt)):
        if function is not None:
            errors.check_arguments(name, function, "x, t")
    if initial_log_weight is not None:
        errors.check_arguments("initial_log_weight", initial_log_weight, "x")
    exponents = _check_exponents(exponents, len(score_fns))
    times = check_times(times)
    num_particles = errors.check_count("num_particles", num_particles)
    errors.check_choice("resampling", resampling, tuple(SCHEMES))
    errors.check_choice("store", store, ("summary", "full"))
    check_threshold(ess_threshold)
    if not (isinstance(initial, tuple) or callable(getattr(initial, "sample", None))):
        raise ValueError(f"initial must be a law of numpyro or a pair (sample, log_prob), got {type(initial).__name__}")
    if isinstance(initial, tuple):
        initial = tuple(as_pytree(part) for part in initial)
    functions = (score_fns, drift, diffusion, divergence, log_tilt, initial_log_weight)
    functions = jax.tree.map(as_pytree, functions, is_leaf=callable)
    options = (num_particles, resampling, store == "full")
    result = _run(key, functions, exponents, times, current(initial), jnp.asarray(ess_threshold), options)
    if throw and errors.is_concrete(result):
        _raise_if_degenerate(result, num_particles)
    return result


@partial(jax.jit, static_argnums=(6,))
def _run(
    key: Array, functions: Any, exponents: Array, times: Array, initial: Any, ess_threshold: Array, options: Any
) -> CorrectorResult:
    num_particles, resampling, is_stored = options
    score_fns, drift, diffusion, divergence, log_tilt, initial_log_weight = functions
    key_initial, key_steps = jax.random.split(key)
    particles = sample_many(key_initial, initial, num_particles)
    errors.check_floating("initial", particles)
    _, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], particles))
    particles = jax.vmap(lambda x: ravel_pytree(x)[0])(particles)  # a particle is a vector from here on
    dtype = particles.dtype
    exponents, times = exponents.astype(dtype), times.astype(dtype)
    total = jnp.sum(exponents)

    def field(name: str, function: Any) -> Any:
        def evaluate(x: Array, t: Array) -> Array:
            value = ravel_pytree(function(unravel(x), t))[0]
            if value.shape != x.shape:
                raise ValueError(f"{name} must return a pytree like x, of {x.size} numbers, got {value.size}")
            return value.astype(dtype)

        return evaluate

    drift_of = field("drift", drift)
    scores_of = [field(f"score_fns[{i}]", score) for i, score in enumerate(score_fns)]

    def tilt_of(x: Array, t: Array) -> Array:
        return _scalar("log_tilt", log_tilt(unravel(x), t))

    def evaluate(x: Array, t: Array, sigma: Array) -> tuple[Array, Array]:
        """The velocity backwards in time, and g."""
        f = drift_of(x, t)
        scores = jnp.stack([score(x, t) for score in scores_of])
        score = exponents @ scores
        # |S|^2 - sum beta |s|^2, without the difference of two large numbers where the scores are nearly equal
        about_mean = jnp.sum((scores - score / total) ** 2, axis=1)
        g = 0.5 * sigma**2 * ((1.0 - 1.0 / total) * score @ score - exponents @ about_mean)
        if divergence is None:
            spread = jnp.trace(jax.jacfwd(drift_of)(x, t))
        else:
            spread = _scalar("divergence", divergence(unravel(x), t))
        g += (total - 1.0) * spread
        velocity = -f + sigma**2 * score
        if log_tilt is not None:
            pull, rate = jax.grad(tilt_of, argnums=(0, 1))(x, t)
            velocity += 0.5 * sigma**2 * pull
            g += -rate + pull @ (0.5 * sigma**2 * score - f)
        return velocity.astype(dtype), g.astype(dtype)

    def step(carry, row):
        particles, log_weights, lineage = carry
        key, t, h = row
        key_ancestors, key_noise = jax.random.split(key)
        ancestors, log_carried, is_resampled = choose_ancestors(
            key_ancestors, log_weights, ess_threshold=ess_threshold, resampling=resampling
        )
        lineage = jax.lax.cond(is_resampled, lambda: descend(lineage, ancestors, resampling), lambda: lineage)
        parents = gather(particles, ancestors)
        sigma = _scalar("diffusion", diffusion(t)).astype(dtype)
        velocity, g = jax.vmap(evaluate, (0, None, None))(parents, t, sigma)
        noise = jax.random.normal(key_noise, parents.shape, dtype)
        moved = parents + h * velocity + sigma * jnp.sqrt(h) * noise
        g = jnp.where(jnp.all(jnp.isfinite(moved), axis=1), g, jnp.nan)
        particles = jnp.where(jnp.isfinite(g)[:, None], moved, parents)
        log_weights, increment, num_invalid = reweigh(log_carried, h * g)
        record = increment, weights.ess(log_weights), is_resampled, num_invalid
        kept = (particles, log_weights, ancestors) if is_stored else None
        return (particles, log_weights, lineage), (record, kept)

    log_first = jnp.zeros(num_particles, dtype)
    if initial_log_weight is not None:
        log_first += jax.vmap(lambda x: _scalar("initial_log_weight", initial_log_weight(unravel(x))))(particles)
    if log_tilt is not None:
        log_first += jax.vmap(tilt_of, (0, None))(particles, times[0])
    log_weights, increment, num_invalid = reweigh(jnp.full_like(log_first, -jnp.log(num_particles)), log_first)
    first = (increment, weights.ess(log_weights), jnp.zeros((), bool), num_invalid)
    own = jnp.arange(num_particles, dtype=jnp.int32)
    kept_first = (particles, log_weights, own) if is_stored else None

    start = (particles, log_weights, found(num_particles, dtype))
    rows = (jax.random.split(key_steps, times.size - 1), times[:-1], times[:-1] - times[1:])
    (particles, log_weights, lineage), rest = jax.lax.scan(step, start, rows)
    (increments, ess, is_resampled, num_invalid), kept = jax.tree.map(
        lambda a, b: jnp.concatenate([a[None], b]), (first, kept_first), rest
    )
    log_evidence = weights.compensated_sum(increments)
    is_lost = weights.is_degenerate(log_weights)
    return CorrectorResult(
        particles=jax.vmap(unravel)(particles),
        log_weights=log_weights,
        log_evidence=log_evidence,
        log_evidence_variance=jnp.where(is_lost, jnp.nan, relative_variance(lineage, log_weights)),
        log_evidence_increments=increments,
        ess=ess,
        is_resampled=is_resampled,
        num_invalid=num_invalid,
        history=History(jax.vmap(jax.vmap(unravel))(kept[0]), *kept[1:]) if is_stored else None,
    )


def _scalar(name: str, value: Any) -> Array:
    value = jnp.asarray(value)
    if value.shape != ():
        raise ValueError(f"{name} must return a scalar, got shape {value.shape}")
    return value


def _check_exponents(exponents: Any, num_models: int) -> Array:
    if callable(exponents):
        raise ValueError(
            "exponents must be numbers, got a function: exponents that change with time need the log densities of the "
            "models in the weights, which their scores do not tell"
        )
    exponents = jnp.atleast_1d(errors.as_array("exponents", is_floating=True)(exponents))
    if exponents.shape != (num_models,):
        raise ValueError(f"exponents must hold one number for each of {num_models} score_fns, got {exponents.shape}")
    if errors.is_concrete(exponents) and not (np.all(np.isfinite(exponents)) and np.sum(exponents) > 0):
        raise ValueError(f"exponents must be finite and of positive sum, for there is no other law, got {exponents}")
    return exponents


def _raise_if_degenerate(result: CorrectorResult, num_particles: int) -> None:
    is_lost = np.isneginf(np.asarray(result.log_evidence_increments))
    if is_lost.any():
        k = int(np.argmax(is_lost))
        raise errors.DegenerateWeightsError(
            f"At times[{k}] all weights of {num_particles} particles were zero, {int(result.num_invalid[k])} of them "
            "NaN or +inf: the scores, the tilt or the step are too large there; take smaller steps, or end before "
            "t = 0. throw=False returns log_evidence = -inf.",
            result,
        )
    warn_of_invalid(np.asarray(result.num_invalid), "times")
