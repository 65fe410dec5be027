"""EnbPI: intervals for a series from bootstrap fits, without a point held out and without fitting again.

    S_b a sample of blocks of the n training points, f_b a fit to it,    b = 1, ..., B
    e_i = y_i - mean of f_b(x_i) over the b whose sample does not hold i                    leave-one-out residuals
    f(x) = sum_b c_b f_b(x),    c_b = (1/n) sum_i 1{i not in S_b} / #{b': i not in S_b'}    the mean of what they are of
    C_t = f(x_t) + [R_(a), R_(a+k)],    R_(1) <= ... the last w residuals in order          the narrowest of a few

and once y_t is there, its residual enters and the oldest leaves. Residuals of the fits at their own points would be too
small, by as much as they overfit. Coverage is 1 - alpha in the limit, if errors are stationary and mixing and f is
right; it lags by up to w steps behind errors that change, and at a given x_t it may be anything where they depend on
their past: `spci` uses that.

References:
    Xu and Xie (2021), https://arxiv.org/abs/2010.09107.
    Xu and Xie (2023), doi:10.1109/TPAMI.2023.3272339.
    Politis and Romano (1992), A circular block-resampling procedure for stationary data.
"""

from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Key, PyTree, Real

from bayesinf import errors
from bayesinf.captured import captured, current
from bayesinf.models.conformal.guarantee import Guarantee
from bayesinf.models.conformal.residual_sets import SeriesSets, narrowest
from bayesinf.models.conformal.window import Window, fill

__all__ = ["Ensemble", "bootstrap_ensemble", "enbpi"]

ASYMPTOTIC = Guarantee(
    "asymptotic", "P(y_t in set) -> 1 - alpha", "errors are stationary and mixing, and the centre is consistent"
)


class Ensemble(eqx.Module):
    """Bootstrap fits to a series, from `bootstrap_ensemble`.

    Attributes:
        params: of the B fits, a leading axis of B.
        shares: of each fit in the centre, summing to one, shape (B,).
        residuals: of the training points by the fits without them, shape (n,); NaN where y is missing, or all fits
            have the point.
        predict: as given.
    """

    params: PyTree
    shares: Float[Array, " b"]
    residuals: Float[Array, " n"]
    predict: Callable = eqx.field(static=True)

    def centre(self, x: PyTree) -> Float[Array, " m"]:
        """What the fits say of new points, averaged.

        Args:
            x: a pytree with a leading axis of points.

        Returns:
            f(x), shape (m,).
        """
        return _centre(current(self), x)

    def window(self, size: int) -> Window:
        """The last `size` residuals, from which a stream sets out.

        Args:
            size: how many to keep.

        Returns:
            Window, of signed residuals.

        Example:
            >>> import jax, jax.numpy as jnp
            >>> from bayesinf.models import conformal
            >>> fit = lambda x, y, weights: jnp.average(y, weights=weights)
            >>> predict = lambda mean, x: jnp.full(x.shape[0], mean)
            >>> ys = 3.0 + jax.random.normal(jax.random.key(0), (203, 1))
            >>> fits = conformal.bootstrap_ensemble(jax.random.key(1), fit, predict, ys[:200], ys[:200, 0])
            >>> window = fits.window(100)
            >>> for x, y in zip(ys[200:], ys[200:, 0]):
            ...     centre = fits.centre(x[None])[0]
            ...     lower, upper = conformal.narrowest(window.ordered, window.num_scores, 0.1, 5)
            ...     window = window.push(y - centre)
            ...     print(bool(lower + centre <= y <= upper + centre))
            True
            True
            True
        """
        return fill(self.residuals, errors.check_count("size", size))


def bootstrap_ensemble(
    key: errors.KeyLike,
    fit: Callable[[PyTree, Array, Array], PyTree],
    predict: Callable[[PyTree, PyTree], Array],
    x: PyTree,
    y: Float[Array, " n"],
    *,
    num_bootstrap: int = 20,
    block_length: int | None = None,
) -> Ensemble:
    """Fits to samples of blocks of a series, and the residuals of each point by the fits without it.

    A sample is of blocks that begin anywhere, and go on from the end at the beginning: every point is as likely as any.

    Args:
        key: PRNG key or seed.
        fit: `fit(x, y, weights) -> params`, with how often each point was drawn as its weight, so that all fits go
            through `vmap`; zero for missing points, whose y is then 0.
        predict: `predict(params, x) -> (n,)`.
        x: a pytree with a leading axis of n points.
        y: shape (n,); NaN is missing.
        num_bootstrap: B.
        block_length: of a block; the cube root of n unless given, 1 for the ordinary bootstrap.

    Returns:
        Ensemble.

    Raises:
        ValueError: x and y are of different lengths, or blocks longer than the series.
    """
    num = y.shape[0]
    num_bootstrap = errors.check_count("num_bootstrap", num_bootstrap, minimum=2)
    block_length = max(1, round(num ** (1 / 3))) if block_length is None else block_length
    if errors.check_count("block_length", block_length) > num:
        raise ValueError(f"block_length must be at most the {num} points of the series, got {block_length}")
    _check_rows("x", x, num)
    errors.check_arguments("fit", fit, "x, y, weights")
    errors.check_arguments("predict", predict, "params, x")
    fit, predict = captured(fit), captured(predict)
    params, shares, residuals = _fit(fit, predict, errors.as_key(key), x, y, num_bootstrap, block_length)
    return Ensemble(params, shares, residuals, predict)


def enbpi(
    key: errors.KeyLike,
    fit: Callable[[PyTree, Array, Array], PyTree],
    predict: Callable[[PyTree, PyTree], Array],
    x: PyTree,
    y: Float[Array, " n"],
    x_test: PyTree,
    y_test: Float[Array, " t"],
    alpha: Real[ArrayLike, ""],
    *,
    num_bootstrap: int = 20,
    block_length: int | None = None,
    window: int | None = None,
    num_betas: int = 5,
) -> SeriesSets:
    """EnbPI over a whole series: intervals for its test steps, each from residuals before it.

    Memory is of the order of B (n + T), time of that and of T w.

    Args:
        key: PRNG key or seed.
        fit: `fit(x, y, weights) -> params`, with weights that are counts.
        predict: `predict(params, x) -> (n,)`.
        x, y: of the n training points; NaN in y is missing.
        x_test, y_test: of the T steps after them; where y_test is NaN nothing slides.
        alpha: the level.
        num_bootstrap: B, the number of fits.
        block_length: of the blocks that are drawn; the cube root of n unless given.
        window: w, how many residuals are kept; n unless given.
        num_betas: of how many intervals the narrowest is taken; 1 for the middle one.

    Returns:
        SeriesSets.

    Raises:
        ValueError: alpha is not in (0, 1), or lengths do not fit.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.models import conformal
        >>> def fit(x, y, weights):                                       # least squares
        ...     return jnp.linalg.solve((x.T * weights) @ x, (x.T * weights) @ y)
        >>> predict = lambda params, x: x @ params
        >>> x = jax.random.normal(jax.random.key(0), (1_000, 3))
        >>> y = x @ jnp.array([1.0, -1.0, 2.0]) + jax.random.normal(jax.random.key(1), (1_000,))
        >>> found = conformal.enbpi(jax.random.key(2), fit, predict, x[:500], y[:500], x[500:], y[500:], 0.1)
        >>> round(float(found.coverage), 1), round(float(found.width.mean()))
        (0.9, 3)

    References:
        Xu and Xie (2021), https://arxiv.org/abs/2010.09107.
    """
    errors.check_fraction("alpha", alpha)
    num_betas = errors.check_count("num_betas", num_betas)
    _check_rows("x_test", x_test, y_test.shape[0])
    fits = bootstrap_ensemble(key, fit, predict, x, y, num_bootstrap=num_bootstrap, block_length=block_length)
    centre = fits.centre(x_test)
    residuals = y_test - centre
    lower, upper = slide(fits.window(y.shape[0] if window is None else window), residuals, alpha, num_betas)
    return SeriesSets(centre + lower, centre + upper, centre, residuals, ASYMPTOTIC)


@partial(jax.jit, static_argnums=3)
def slide(
    window: Window, residuals: Float[Array, " t"], alpha: Real[ArrayLike, ""], num_betas: int
) -> tuple[Float[Array, " t"], Float[Array, " t"]]:
    """The intervals of residuals over a series, each before its residual enters the window."""

    def step(window: Window, residual: Array) -> tuple[Window, tuple[Array, Array]]:
        ends = narrowest(window.ordered, window.num_scores, alpha, num_betas)
        return window.push(residual), ends

    return jax.lax.scan(step, window, residuals)[1]


@partial(jax.jit, static_argnums=(0, 1, 5, 6))
def _fit(
    fit: Callable, predict: Callable, key: Key[Array, ""], x: PyTree, y: Array, num_bootstrap: int, block_length: int
) -> tuple[PyTree, Array, Array]:
    is_observed = ~jnp.isnan(y)
    counts = jax.vmap(partial(_draw_blocks, num=y.shape[0], block_length=block_length))(
        jax.random.split(key, num_bootstrap)
    )
    known = jnp.where(is_observed, y, 0.0)
    params = jax.vmap(lambda drawn: fit(x, known, jnp.where(is_observed, drawn, 0).astype(y.dtype)))(counts)
    fitted = jax.vmap(lambda one: predict(one, x))(params)
    is_out = (counts == 0).astype(y.dtype)
    num_out = jnp.sum(is_out, 0)
    share = jnp.where((num_out > 0) & is_observed, is_out / jnp.maximum(num_out, 1.0), 0.0)
    residuals = jnp.where(num_out > 0, y - jnp.sum(share * fitted, 0), jnp.nan)
    shares = jnp.sum(share, 1)
    return params, shares / jnp.sum(shares), residuals


@jax.jit
def _centre(fits: Ensemble, x: PyTree) -> Array:
    predictions = jax.vmap(lambda one: fits.predict(one, x))(fits.params)
    return jnp.matmul(fits.shares, predictions, precision="highest")


def _draw_blocks(key: Key[Array, ""], *, num: int, block_length: int) -> Array:
    """How often each of `num` points is drawn, `num` in all."""
    starts = jax.random.randint(key, (-(-num // block_length),), 0, num)
    drawn = (starts[:, None] + jnp.arange(block_length)).ravel()[:num] % num
    return jnp.zeros(num, jnp.int32).at[drawn].add(1)


def _check_rows(name: str, tree: PyTree, num: int) -> None:
    for leaf in jax.tree.leaves(tree):
        if jnp.shape(leaf)[:1] != (num,):
            raise ValueError(f"{name} must have a leading axis of the {num} points of y, got shape {jnp.shape(leaf)}")
