"""Embedded hidden Markov models: a kernel on paths that needs no filter, and may run in parallel over time.

Around the present path x_{0:T-1} every time draws N candidates, the present state among them,

    u_t ~ N(x_t, (delta/2) I),    x_t^0 = x_t,    x_t^i ~ N(u_t, (delta/2) I),   i = 1..N-1,

and the new path is an exact draw from the hidden Markov model on the N^T paths that lead through them,

    P(B_{0:T-1} = b_{0:T-1})  proportional to  prod_{t=0}^{T-1} m_t(x_{t-1}^{b_{t-1}}, x_t^{b_t}) g_t(x_t^{b_t}),

with m_0(x_0^{b_0}) the initial law, m_t the transition density and g_t that of the observation.

A Gaussian is symmetric, N(u; x, delta/2) = N(x; u, delta/2): given u_t all N candidates, the present one too, are draws
of one law, whose density cancels in the ratio of any two paths. So p(x_{0:T-1} | y_{0:T-1}) is invariant for every
N >= 2 and delta > 0. (Around x_t itself the others would not be draws of the same law as x_t.) The path is drawn from

    log alpha_t(i) = log g_t(x_t^i) + log sum_j alpha_{t-1}(j) m_t(x_{t-1}^j, x_t^i),
    B_{T-1} ~ Cat(alpha_{T-1}),    B_t = J_t(B_{t+1}),    J_t(i) ~ Cat(alpha_t(j) m_{t+1}(x_t^j, x_{t+1}^i)),

either step by step, or in O(log T) steps: alpha by an associative scan of products of N x N matrices, B by one of
compositions of the random maps J_t. Both take the same random numbers and give the same path, up to rounding.

References:
    Neal, Beal and Roweis (2003), Inferring state sequences for non-linear systems with embedded hidden Markov models,
        NeurIPS 16.
    Corenflos and Särkkä (2023), https://arxiv.org/abs/2303.00301 (the auxiliary u_t; in parallel).
    Corenflos, Chopin and Särkkä (2022), https://arxiv.org/abs/2202.02264 (conditional SMC in parallel).
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax.tree as ot
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import select
from bayesinf.kernels.conditional_smc import ConditionalSMC
from bayesinf.kernels.path_kernel import PathKernel, PathState
from bayesinf.models.state_space import (
    StateSpaceModel,
    log_prob,
    observation_log_prob,
    sample,
)
from bayesinf.resampling import gather
from bayesinf.weights import clean, is_degenerate, normalize, num_invalid

__all__ = ["EMBEDDED_METHODS", "EmbeddedHMM", "EmbeddedInfo", "draw_candidates", "draw_indices"]

EMBEDDED_METHODS = ("auto", "sequential", "parallel")

_AUTO_DENSITIES = 2**26  # transition densities that "auto" holds in memory at once
_NUM_FILTERED = 256  # particles of the filter from which the first paths are drawn


class EmbeddedInfo(NamedTuple):
    """What one step tells.

    Attributes:
        acceptance_rate: share of the time steps at which the path moved to another candidate.
        is_accepted: whether it moved anywhere.
        is_divergent: whether no path through the candidates had a positive density; the path was then kept.
        num_gradients: 0.
        is_updated: at which steps the path moved; its mean over steps should be well above 0 for all t.
        acceptance_rates: the same as numbers, by which warm-up tunes a step size of every time; else None.
        num_invalid: how many log densities were NaN or +inf; they count as densities of zero.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    is_updated: Bool[Array, " t"]
    acceptance_rates: Float[Array, " t"] | None
    num_invalid: Int[Array, ""]


class EmbeddedHMM(PathKernel):
    """The embedded hidden Markov model on paths: leaves p(x_{0:T-1} | y_{0:T-1}) invariant.

    Attributes:
        model: the state-space model; its states are real, and its initial and transition laws have densities.
        ys: observations with leading axis T; NaN where missing.
        num_particles: N >= 2 candidates at every time, the present state among them.
        step_size: delta > 0, a squared distance of states, for all times or of shape (T,); warm-up tunes it, or each
            of them, until a share of 1 - N^(-1/3) of the times moves.
        method: "sequential", T steps of N^2 densities, memory of order T N; "parallel", O(log T) steps, work of order
            T N^3 and memory of order T N^2; or "auto": parallel, except on a CPU or where T N^2 is beyond 2^26.

    Example:
        >>> import jax
        >>> import bayesinf as bi
        >>> model = bi.models.StochasticVolatility(mean=-1.0, persistence=0.9, scale=0.3)
        >>> _, ys = bi.models.simulate(jax.random.key(0), model, num_steps=50)
        >>> kernel = bi.kernels.EmbeddedHMM(model, ys, num_particles=8, step_size=0.5)
        >>> paths = kernel.initial(jax.random.key(1), num_chains=4)
        >>> state, info = kernel.step(jax.random.key(2), kernel.init(paths[0]))
        >>> state.position.shape, info.is_updated.shape
        ((50,), (50,))
    """

    num_particles: int = eqx.field(static=True, default=16)
    step_size: Float[Array, "..."] = eqx.field(converter=errors.as_array("step_size", is_floating=True), default=1.0)
    method: str = eqx.field(static=True, default="auto")

    def _check_rest(self):
        errors.check_count("num_particles", self.num_particles, minimum=2)
        errors.check_positive("step_size", self.step_size)
        errors.check_choice("method", self.method, EMBEDDED_METHODS)
        _check_states(self.model)
        num_steps = jax.tree.leaves(self.ys)[0].shape[0]
        if self.step_size.shape not in ((), (num_steps,)):
            raise ValueError(
                f"step_size must be a scalar, or have one number for each of the {num_steps} rows of ys, got shape "
                f"{self.step_size.shape}"
            )

    @property
    def target_acceptance(self) -> float:  # type: ignore[override]
        # On Gaussians of dimension 2 the expected squared jump is largest at this rate to within 0.05, for N = 2 to 64;
        # in dimension 1 it is at rates up to 0.16 higher and in dimension 20 up to 0.19 lower, and no less than 0.86 of
        # it is left at this one. It is below (N - 1) / N, to which the rate tends as the step size vanishes.
        return 1.0 - self.num_particles ** (-1.0 / 3.0)

    def initial(self, key: errors.KeyLike, num_chains: int = 4) -> PyTree:
        """Starting paths, with a leading chain axis: backward draws from one particle filter of 256 particles.

        Raises:
            DegenerateWeightsError: all weights of the filter vanished; begin with paths of your own.
        """
        return ConditionalSMC(self.model, self.ys, _NUM_FILTERED).initial(key, num_chains)

    def step(self, key: Key[Array, ""], state: PathState) -> tuple[PathState, EmbeddedInfo]:
        key_candidates, key_indices = jax.random.split(key)
        candidates = draw_candidates(key_candidates, state.position, self.num_particles, self.step_size)
        indices, is_ok, num_invalid = draw_indices(key_indices, self.model, self.ys, candidates, self.method)

        is_updated = (indices != 0) & is_ok
        rates = is_updated.astype(self.step_size.dtype)
        info = EmbeddedInfo(
            acceptance_rate=jnp.mean(rates),
            is_accepted=jnp.any(is_updated),
            is_divergent=~is_ok,
            num_gradients=jnp.zeros((), jnp.int32),
            is_updated=is_updated,
            acceptance_rates=rates if self.step_size.ndim else None,
            num_invalid=num_invalid,
        )
        return PathState(select(is_ok, jax.vmap(gather)(candidates, indices), state.position)), info


def draw_candidates(key: Key[Array, ""], path: PyTree, num_particles: int, step_size: Float[Array, "..."]) -> PyTree:
    """The path in slot 0, and N - 1 draws around u_t ~ N(x_t, (delta/2) I); leaves have leading axes (T, N)."""
    key_centres, key_free = jax.random.split(key)
    centres = _perturb(key_centres, path, step_size)
    repeated = jax.tree.map(lambda u: jnp.repeat(u[:, None], num_particles - 1, axis=1), centres)
    free = _perturb(key_free, repeated, step_size)
    return jax.tree.map(lambda x, xs: jnp.concatenate([x[:, None], xs], axis=1), path, free)


def draw_indices(
    key: Key[Array, ""], model: StateSpaceModel, ys: PyTree, candidates: PyTree, method: str = "auto"
) -> tuple[Int[Array, " t"], Bool[Array, ""], Int[Array, ""]]:
    """A path B_{0:T-1} of the hidden Markov model on the candidates; whether there is any; how many densities are none.

    Args:
        key: PRNG key.
        model: the state-space model.
        ys: observations with leading axis T.
        candidates: states with leading axes (T, N).
        method: "sequential", "parallel" or "auto"; with one key, one path.

    Returns:
        (indices, is_ok, num_invalid).
    """
    log_local = _log_local(model, ys, candidates)
    num_steps, num_particles = log_local.shape
    # one variable for each candidate serves all J_t(i), of which the path takes but one
    gumbels = jax.random.gumbel(key, log_local.shape, log_local.dtype)
    if method == "auto":
        is_small = num_steps * num_particles**2 <= _AUTO_DENSITIES
        method = "parallel" if is_small and jax.default_backend() != "cpu" else "sequential"
    draw = _draw_parallel if method == "parallel" else _draw_sequential
    indices, log_filtered, num_invalid_moves = draw(model, candidates, clean(log_local), gumbels)
    is_ok = ~jnp.any(is_degenerate(log_filtered))
    return indices, is_ok, num_invalid(log_local.ravel()) + num_invalid_moves


def _draw_sequential(
    model: StateSpaceModel, candidates: PyTree, log_local: Float[Array, "t N"], gumbels: Float[Array, "t N"]
) -> tuple[Int[Array, " t"], Float[Array, "t N"], Int[Array, ""]]:
    """Forward filtering, backward sampling: (B, log alpha, how many transition densities were none)."""
    ts = jnp.arange(1, log_local.shape[0])
    before, after = _pairs(candidates)

    def forward(log_prev, row):
        t, xs_prev, xs, log_now = row
        log_moves = _log_moves(model, xs_prev, xs, t).astype(log_now.dtype)
        log_predicted = logsumexp(log_prev[:, None] + clean(log_moves), axis=0)
        log_filtered, _ = normalize(log_predicted + log_now)
        return log_filtered, (log_filtered, num_invalid(log_moves.ravel()))

    first, _ = normalize(log_local[0])
    last, (log_filtered, num_invalid_moves) = jax.lax.scan(forward, first, (ts, before, after, log_local[1:]))

    def backward(index, row):
        t, xs_prev, xs, log_prev, gumbel = row
        log_moves = _log_moves(model, xs_prev, gather(xs, index[None]), t)[:, 0]
        index = jnp.argmax(log_prev + clean(log_moves) + gumbel).astype(jnp.int32)
        return index, index

    log_filtered = jnp.concatenate([first[None], log_filtered])
    end = jnp.argmax(last + gumbels[-1]).astype(jnp.int32)
    _, indices = jax.lax.scan(backward, end, (ts, before, after, log_filtered[:-1], gumbels[:-1]), reverse=True)
    return jnp.concatenate([indices, end[None]]), log_filtered, jnp.sum(num_invalid_moves, dtype=jnp.int32)


def _draw_parallel(
    model: StateSpaceModel, candidates: PyTree, log_local: Float[Array, "t N"], gumbels: Float[Array, "t N"]
) -> tuple[Int[Array, " t"], Float[Array, "t N"], Int[Array, ""]]:
    """The same by two associative scans."""
    num_steps, num = log_local.shape
    log_moves = jax.vmap(lambda t, xs_prev, xs: _log_moves(model, xs_prev, xs, t))(
        jnp.arange(1, num_steps), *_pairs(candidates)
    ).astype(log_local.dtype)
    num_invalid_moves = num_invalid(log_moves.ravel())
    log_moves = clean(log_moves)

    # all rows of the first matrix are alpha_0, and so all rows of the products up to t are alpha_t
    matrices = jnp.concatenate([jnp.zeros((1, num, num), log_local.dtype), log_moves]) + log_local[:, None, :]
    products = jax.lax.associative_scan(_multiply, _rescale(matrices))
    log_filtered, _ = normalize(products[:, 0])

    scores = (log_filtered + gumbels)[:, :, None] + jnp.concatenate([log_moves, jnp.zeros((1, num, num))])
    maps = jnp.argmax(scores, axis=1).astype(jnp.int32)  # J_t, of which the last is a constant
    return jax.lax.associative_scan(_compose, maps, reverse=True)[:, 0], log_filtered, num_invalid_moves


def _multiply(left: Float[Array, "... N N"], right: Float[Array, "... N N"]) -> Float[Array, "... N N"]:
    """The product of matrices that are given by their logarithms, up to a factor."""
    return _rescale(logsumexp(left[..., :, :, None] + right[..., None, :, :], axis=-2))


def _rescale(log_matrix: Float[Array, "... N N"]) -> Float[Array, "... N N"]:
    """The largest element to 1: the logarithms of long products would lose their differences in float32."""
    largest = jnp.max(log_matrix, axis=(-2, -1), keepdims=True)
    return log_matrix - jnp.where(jnp.isfinite(largest), largest, 0.0)


def _compose(later: Int[Array, "... N"], earlier: Int[Array, "... N"]) -> Int[Array, "... N"]:
    """The map i -> J_earlier(J_later(i))."""
    return jnp.take_along_axis(earlier, later, axis=-1)


def _perturb(key: Key[Array, ""], tree: PyTree, step_size: Float[Array, "..."]) -> PyTree:
    """A draw of N(x, (delta/2) I); leaves have leading axis T."""

    def add(x, noise):
        scale = jnp.sqrt(0.5 * step_size).astype(x.dtype)
        return x + scale.reshape(scale.shape + (1,) * (x.ndim - scale.ndim)) * noise

    return jax.tree.map(add, tree, ot.random_like(key, tree))


def _log_local(model: StateSpaceModel, ys: PyTree, candidates: PyTree) -> Float[Array, "t N"]:
    """Log g_t(x_t^i), with log m_0(x_0^i) at t = 0."""

    def observe(xs, y, t):
        return jax.vmap(lambda x: observation_log_prob(model, x, y, t))(xs)

    log_observed = jax.vmap(observe)(candidates, ys, jnp.arange(jax.tree.leaves(ys)[0].shape[0]))
    first = jax.tree.map(lambda leaf: leaf[0], candidates)
    return log_observed.at[0].add(jax.vmap(lambda x: _log_density(model.initial(), x))(first))


def _log_moves(model: StateSpaceModel, xs_prev: PyTree, xs: PyTree, t: Int[Array, ""]) -> Float[Array, "N n"]:
    """Log m_t(x_{t-1}^j, x_t^i), j the row."""

    def row(x_prev):
        law = model.transition(x_prev, t)
        return jax.vmap(lambda x: _log_density(law, x))(xs)

    return jax.vmap(row)(xs_prev)


def _log_density(law, x: PyTree) -> Float[Array, ""]:
    """`log_prob`, and -inf outside the support: candidates may lie there, and not every law checks its argument."""
    if isinstance(law, tuple):
        return log_prob(law, x)
    return jnp.where(jnp.all(law.support(x)), log_prob(law, x), -jnp.inf)


def _pairs(candidates: PyTree) -> tuple[PyTree, PyTree]:
    """The candidates at t - 1 and at t, for t >= 1."""
    return jax.tree.map(lambda leaf: leaf[:-1], candidates), jax.tree.map(lambda leaf: leaf[1:], candidates)


def _check_states(model: StateSpaceModel) -> None:
    """Real states: candidates are drawn around them."""
    x = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, sample(jax.random.key(0), model.initial())))
    for leaf in jax.tree.leaves(x):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"model must have states of floating point, around which candidates are drawn, but model.initial() "
                f"draws {leaf.dtype}; take ConditionalSMC, which moves states of any kind"
            )
