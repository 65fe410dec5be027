"""Functional Tucker decomposition: tensors whose indices are real numbers, with Gaussian processes as factors (FunBaT).

    y_n = W x_1 u^1(i_n1) x_2 ... x_K u^K(i_nK) + e_n,    e_n ~ N(0, s^2)

    u^k_r ~ GP(0, k_k) for r = 1 .. R_k,    W ~ N(0, v I) of shape (R_1, .., R_K),    1 / s^2 ~ Gamma(a, b)

Entries are seen at any indices (i_n1, .., i_nK) in R^K. Given all the others, each block has a law in closed form, and
is drawn from it (the paper approximates them by moments):

    u^k    the R_k functions of a mode jointly: y is linear in u^k(i_nk), and they are Markov processes of `sde`. The
           entries at one index add up to a precision matrix and a vector. One pass forward over the m_k sorted indices
           and one backward, O(n R_k^2 + m_k R_k^3)
    W      Bayesian regression on the products of the factors, O(n (R_1 .. R_K)^2)
    s^2    inverse gamma

The function y is identified; scales, signs and rotations of the factors are so by their priors at most.

References:
    Fang, Yu, Wang, Li, Kirby and Zhe (2024), arXiv:2311.04829.
    Frühwirth-Schnatter (1994), doi:10.1111/j.1467-9892.1994.tb00184.x (forward filtering, backward sampling).
"""

import math
from functools import partial, reduce
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf import errors
from bayesinf.kernel import Kernel
from bayesinf.models.gp.markov import Moves, draw_between, draw_path, moves_of
from bayesinf.models.gp.process import check_resolution
from bayesinf.models.square_root import solve_lower, triangularize

__all__ = ["FunctionalTucker", "TuckerGibbs", "TuckerInfo", "TuckerState"]


class FunctionalTucker(eqx.Module):
    """The prior of a function of K real indices, of Tucker rank (R_1, .., R_K).

    Attributes:
        kernels: of the factors of each mode: Matern12, Matern32, Matern52, their sums, and products with numbers.
        ranks: R_1 .. R_K. Static.
        core_variance: v > 0, of the entries of W.
        noise_shape: a > 0, of the gamma law of the noise's precision.
        noise_rate: b > 0; b / a is the prior's guess of the noise's variance.
    """

    kernels: tuple[Any, ...] = eqx.field(converter=lambda kernels: _as_tuple("kernels", kernels))
    ranks: tuple[int, ...] = eqx.field(static=True, converter=lambda ranks: _as_tuple("ranks", ranks))
    core_variance: Float[Array, ""] = eqx.field(
        default=1.0, converter=errors.as_array("core_variance", is_floating=True)
    )
    noise_shape: Float[Array, ""] = eqx.field(default=1.0, converter=errors.as_array("noise_shape", is_floating=True))
    noise_rate: Float[Array, ""] = eqx.field(default=0.01, converter=errors.as_array("noise_rate", is_floating=True))

    def __check_init__(self):
        if not self.kernels:
            raise ValueError("kernels must hold one covariance function for each mode, got none")
        if len(self.ranks) != len(self.kernels):
            raise ValueError(f"ranks must be {len(self.kernels)} numbers, one for each kernel, got {self.ranks}")
        for mode, (kernel, rank) in enumerate(zip(self.kernels, self.ranks, strict=True)):
            errors.check_count(f"ranks[{mode}]", rank)
            try:
                moves_of(kernel, jnp.ones(1))
            except ValueError as error:
                raise ValueError(f"kernels[{mode}]: {error}") from None
        for name in ("core_variance", "noise_shape", "noise_rate"):
            errors.check_positive_scalar(name, getattr(self, name))


class TuckerState(NamedTuple):
    """Where the chain is: `core` (R_1, .., R_K), `noise` s^2, and `factor_k` (m_k, R_k, d_k) for k from 0."""

    position: dict[str, Array]


class TuckerInfo(NamedTuple):
    """What a step did; every draw is exact, so that all are accepted.

    Attributes:
        acceptance_rate, is_accepted, is_divergent, num_gradients: as of every kernel. A step is undone, and divergent,
            if rounding leaves it not finite.
        log_work: None.
        log_likelihood: of the data under the position that the step ends with; it is identified, as factors are not,
            and tells whether chains agree.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: None
    log_likelihood: Float[Array, ""]


class TuckerGibbs(Kernel):
    """Gibbs sampling of a functional Tucker decomposition.

    Leaves the posterior of core, noise and factors invariant. A position holds, of each mode k, the factors' states
    at its sorted distinct indices: the function first, then its derivatives, from which `predict` goes on to new ones.
    Signal to noise is limited: with n entries at one index, s^2 must be above eps n times the signal's variance.

    Attributes:
        model: the prior.
        y: the entries; NaN is missing.
        rows: at which of the distinct indices of its modes each entry is.
        grids: the distinct indices of each mode, sorted.
        moves: of the factors' states between them.

    Args:
        model: a `FunctionalTucker`.
        indices: of the entries, shape (n, K); known before compilation.
        y: the entries, shape (n,), best of mean zero and variance one.

    Raises:
        ValueError: shapes do not fit, an index is not finite, or y infinite.

    Example:
        >>> import jax.numpy as jnp, numpy as np
        >>> import bayesinf as bi
        >>> from bayesinf.models import gp
        >>> indices = np.random.default_rng(0).uniform(size=(200, 2))
        >>> y = np.sin(6.0 * indices[:, 0]) * indices[:, 1]
        >>> model = gp.FunctionalTucker([gp.Matern52(0.5), gp.Matern52(0.5)], ranks=(1, 1))
        >>> gibbs = gp.TuckerGibbs(model, indices, y)
        >>> draws = bi.sample(0, gibbs, gibbs.initial(1, num_chains=2), num_samples=50, num_warmup=50, progress=False)
        >>> f = gibbs.predict(2, draws.samples, np.array([[0.25, 0.5]]))
        >>> f.shape, bool(abs(f.mean() - np.sin(1.5) * 0.5) < 0.05)
        ((2, 50, 1), True)
    """

    model: FunctionalTucker
    y: Float[Array, " n"]
    rows: Int[Array, "n k"]
    grids: tuple[Float[Array, " m"], ...]
    moves: tuple[Moves, ...]

    def __init__(self, model: FunctionalTucker, indices: Any, y: Any):
        if not isinstance(model, FunctionalTucker):
            raise ValueError(f"model must be a FunctionalTucker, got {type(model).__name__}")
        indices = _check_indices(indices, len(model.ranks))
        y = errors.as_array("y", is_floating=True)(y)
        if y.shape != indices.shape[:1]:
            raise ValueError(f"y must have shape {indices.shape[:1]}, one for each row of indices, got {y.shape}")
        if errors.is_concrete(y) and bool(jnp.any(jnp.isinf(y))):
            raise ValueError("y must be finite, or NaN where it is missing, got infinite entries")
        self.model, self.y = model, y.astype(jnp.result_type(y, *jax.tree.leaves(model)))
        grids, self.rows = _distinct(indices)
        self.grids = tuple(map(jnp.asarray, grids))
        gaps = (jnp.asarray(np.r_[np.inf, np.diff(grid), np.inf], self.y.dtype) for grid in grids)
        self.moves = tuple(map(moves_of, model.kernels, gaps))

    def initial(self, key: errors.KeyLike, num_chains: int) -> dict[str, Array]:
        """Draws of the prior, as the start of every chain."""
        errors.check_count("num_chains", num_chains)
        return jax.vmap(self.sample_prior)(jax.random.split(errors.as_key(key), num_chains))

    def sample_prior(self, key: errors.KeyLike) -> dict[str, Array]:
        """A position drawn from the prior: from its law given entries that are all missing."""
        position = {name: jnp.ones(shape, self.y.dtype) for name, shape in self._shapes().items()}
        return _sweep(self, jnp.full_like(self.y, jnp.nan), errors.as_key(key), position)

    def functions(self, samples: dict[str, Any]) -> list[Float[Array, "... m r"]]:
        """The factors of each mode at its `grids`, of positions with any leading axes."""
        return [jnp.asarray(samples[f"factor_{k}"]) @ moves.observation for k, moves in enumerate(self.moves)]

    def evaluate(self, position: dict[str, Array]) -> Float[Array, " n"]:
        """The function at the indices of the data, of one position."""
        return _evaluate(position["core"], self.functions(position), self.rows)

    def init(self, position: dict[str, Array]) -> TuckerState:
        shapes = self._shapes()
        found = {name: jnp.shape(leaf) for name, leaf in position.items()}
        if found != shapes:
            raise ValueError(f"position must have shapes {shapes}, got {found}; take those of initial(key, num_chains)")
        errors.check_floating("position", position)
        return TuckerState(jax.tree.map(jnp.asarray, dict(position)))

    def step(self, key: Key[Array, ""], state: TuckerState) -> tuple[TuckerState, TuckerInfo]:
        drawn = _sweep(self, self.y, key, state.position)
        is_ok = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in drawn.values()]))
        position = {name: jnp.where(is_ok, drawn[name], old).astype(old.dtype) for name, old in state.position.items()}
        residuals, noise = self.y - self.evaluate(position), position["noise"]
        terms = residuals**2 / noise + jnp.log(2.0 * math.pi * noise)
        log_likelihood = -0.5 * jnp.sum(jnp.where(jnp.isnan(residuals), 0.0, terms)).astype(self.y.dtype)
        info = TuckerInfo(jnp.ones_like(log_likelihood), is_ok, ~is_ok, jnp.zeros((), jnp.int32), None, log_likelihood)
        return TuckerState(position), info

    def predict(
        self, key: errors.KeyLike, samples: dict[str, Any], indices: Any, *, is_noisy: bool = False
    ) -> Float[Array, "... t"]:
        """The function at new indices, drawn jointly given each draw of the posterior.

        Args:
            key: PRNG key or seed.
            samples: positions with any leading axes, as `Draws.samples`.
            indices: shape (t, K).
            is_noisy: whether entries are drawn, rather than the function.
        """
        grids, rows = _distinct(_check_indices(indices, len(self.grids)))
        flat = {name: jnp.asarray(samples[name]).reshape(-1, *shape) for name, shape in self._shapes().items()}
        *keys, key_noise = jax.random.split(errors.as_key(key), len(self.grids) + 1)
        functions = []
        for k, (kernel, old, new) in enumerate(zip(self.model.kernels, self.grids, grids, strict=True)):
            states = flat[f"factor_{k}"]
            normals = jax.random.normal(keys[k], (len(new), len(states), *states.shape[2:]), states.dtype)
            drawn = draw_between(kernel, np.asarray(old), states, new, normals)
            functions.append(jnp.moveaxis(drawn @ self.moves[k].observation, 0, 1))
        f = _evaluate_all(flat["core"], functions, rows)
        if is_noisy:
            f = f + jnp.sqrt(flat["noise"])[:, None] * jax.random.normal(key_noise, f.shape, f.dtype)
        return f.reshape(*np.shape(samples["noise"]), -1)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of a position."""
        shapes: dict[str, tuple[int, ...]] = {"core": self.model.ranks, "noise": ()}
        for k, (grid, rank, moves) in enumerate(zip(self.grids, self.model.ranks, self.moves, strict=True)):
            shapes[f"factor_{k}"] = (grid.shape[0], rank, moves.observation.shape[0])
        return shapes


@eqx.filter_jit
def _sweep(gibbs: TuckerGibbs, y: Array, key: Array, position: dict[str, Array]) -> dict[str, Array]:
    """Every block drawn given the others."""
    model, rows, dtype = gibbs.model, gibbs.rows, y.dtype
    *keys, key_core, key_noise = jax.random.split(key, len(model.ranks) + 2)
    position = {name: leaf.astype(dtype) for name, leaf in position.items()}
    functions, core, drawn = gibbs.functions(position), position["core"], {}
    is_seen = ~jnp.isnan(y)
    y, weight = jnp.where(is_seen, y, 0.0), jnp.where(is_seen, 1.0 / position["noise"], 0.0)
    for k, (key_mode, moves) in enumerate(zip(keys, gibbs.moves, strict=True)):
        x, a = position[f"factor_{k}"], _coefficients(core, functions, rows, k)
        add_up = partial(jax.ops.segment_sum, segment_ids=rows[:, k], num_segments=x.shape[0])
        precision = add_up((weight[:, None] * a)[:, :, None] * a[:, None, :])
        information = add_up((weight * y)[:, None] * a)
        drawn[f"factor_{k}"] = x = draw_path(moves, precision, information, jax.random.normal(key_mode, x.shape, dtype))
        functions[k] = x @ moves.observation

    drawn["core"] = core = _draw_core(model, functions, rows, y, weight, key_core)
    squares = jnp.sum(jnp.where(is_seen, y - _evaluate(core, functions, rows), 0.0) ** 2)
    shape, rate = model.noise_shape + 0.5 * jnp.sum(is_seen), model.noise_rate + 0.5 * squares
    drawn["noise"] = jnp.exp(jnp.log(rate) - jax.random.loggamma(key_noise, shape.astype(dtype)))
    return drawn


def _draw_core(model: FunctionalTucker, functions: Any, rows: Array, y: Array, weight: Array, key: Array) -> Array:
    """W = sqrt(v) z, by the triangular factor of [X, y; I, 0] with X = sqrt(v) u^1 (x) .. (x) u^K of each entry."""
    at_entries = [values[rows[:, k]] for k, values in enumerate(functions)]
    products = reduce(lambda left, right: (left[:, :, None] * right[:, None, :]).reshape(len(y), -1), at_entries)
    num, root = products.shape[1], jnp.sqrt(model.core_variance)
    data = jnp.sqrt(weight)[:, None] * jnp.concatenate([root * products, y[:, None]], axis=1)
    L = triangularize(jnp.concatenate([data.T, jnp.eye(num + 1, num, dtype=y.dtype)], axis=1))
    normals = jax.random.normal(key, (num,), y.dtype)
    z = solve_lower(L[:num, :num], (L[num, :num] + normals)[:, None], trans=True)
    return (root * z).reshape(model.ranks)


def _coefficients(core: Array, functions: list[Array], rows: Array, mode: int) -> Array:
    """What the factors of a mode are multiplied with in each entry: the core contracted with all others."""
    tensor = jnp.moveaxis(core, mode, 0)
    others = [k for k in reversed(range(len(functions))) if k != mode]

    def one(row: Array) -> Array:
        return reduce(jnp.matmul, (functions[k][row[k]] for k in others), tensor)

    return jax.vmap(one)(rows)


def _evaluate(core: Array, functions: list[Array], rows: Array) -> Array:
    return jnp.sum(_coefficients(core, functions, rows, 0) * functions[0][rows[:, 0]], axis=1)


@jax.jit
def _evaluate_all(cores: Array, functions: list[Array], rows: Array) -> Array:
    return jax.lax.map(lambda draw: _evaluate(draw[0], draw[1], rows), (cores, functions), batch_size=64)


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} must be a list with one entry for each mode, got {values!r}")
    return tuple(values)


def _distinct(indices: np.ndarray) -> tuple[list[np.ndarray], Array]:
    """The sorted distinct indices of each mode, and which of them each row has."""
    grids, rows = zip(*(np.unique(column, return_inverse=True) for column in indices.T), strict=True)
    return list(grids), jnp.asarray(np.stack(rows, axis=1))


def _check_indices(indices: Any, num_modes: int) -> np.ndarray:
    if not errors.is_concrete(indices):
        raise ValueError("indices must be known values, which are sorted on the host; close over them")
    given = np.asarray(indices)
    indices = given.astype(jnp.result_type(given, 1.0))
    if indices.ndim != 2 or indices.shape[0] == 0 or indices.shape[1] != num_modes:
        raise ValueError(f"indices must have shape (n, {num_modes}), one column for each mode, got {indices.shape}")
    if not np.all(np.isfinite(indices)):
        raise ValueError(f"indices must be finite, got {int(np.sum(~np.isfinite(indices)))} that are not")
    for mode in range(num_modes):
        check_resolution(f"indices[:, {mode}]", given[:, mode], indices.dtype)
    return indices
