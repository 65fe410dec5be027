"""Deep kernel machines: Bayesian networks of infinite width that still learn their representation.

    L(G_1 .. G_L) = sum_c log N(y_c; 0, K(G_L) + s^2 I) - sum_l nu_l KL( N(0, G_l) || N(0, K(G_{l-1})) )
    KL = (tr(K^{-1} G) - log det(K^{-1} G) - n) / 2

G_l is the Gram matrix of the features of layer l, K(G) the kernel that the next layer makes of it, element by element
from q = G_ii, p = G_jj and c = G_ij, and K(G_0) a covariance function of the inputs. With nu_l to infinity G_l is
K(G_{l-1}), which is the network's Gaussian process; with finite nu_l the data change it.

Written is G_l = R M M^T R^T with R R^T = K(G_{l-1}) and M triangular: then KL = (|M|^2 - n) / 2 - sum log M_ii needs no
inverse, and M = I is the Gaussian process, where the search begins. New inputs follow the law that the kernel gives
them, at no cost in KL:

    G_ti = K_ti K_ii^{-1} G_ii,     G_tt = K_tt - K_ti K_ii^{-1} K_it + K_ti K_ii^{-1} G_ii K_ii^{-1} K_it

With inducing inputs Z the G_l are those of Z, the data are new inputs, and the likelihood is Titsias' bound, which is
never above the maximum of the exact objective, equal to it at Z = X, and of cost O(n m^2).

References:
    Yang, Robeyns, Milsom, Anson, Schoots and Aitchison (2023), arXiv:2108.13097.
"""

import math
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Bool, Float, Real

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.models.gp.covariances import as_covariance, diagonal, gram
from bayesinf.models.gp.dense import cholesky_or_identity, log_density, solve
from bayesinf.models.gp.lbfgs import minimise
from bayesinf.models.gp.process import as_inputs, marginal_scale
from bayesinf.models.gp.solver import add_jitter
from bayesinf.models.nngp.duals.dual import Dual

__all__ = ["DeepKernelFit", "DeepKernelMachine", "GramKernel"]

Raw = Float[Array, "depth m m"]


class GramKernel(eqx.Module):
    """The kernel that a layer of a network makes of the Gram matrix of its inputs.

        K(G)_ij = b + w E phi(u) phi(v),      (u, v) ~ N(0, [[G_ii, G_ij], [G_ij, G_jj]])

    Attributes:
        dual: of the activation, such as `nngp.relu()`.
        w_var: w > 0.
        b_var: b >= 0.
    """

    dual: Dual
    w_var: Float[Array, ""] = eqx.field(default=1.0, converter=errors.as_array("w_var", is_floating=True))
    b_var: Float[Array, ""] = eqx.field(default=0.0, converter=errors.as_array("b_var", is_floating=True))

    def __check_init__(self):
        if not isinstance(self.dual, Dual):
            raise ValueError(f"dual must be that of an activation, such as nngp.relu(), got {self.dual!r}")
        errors.check_positive_scalar("w_var", self.w_var)
        errors.check_nonnegative("b_var", self.b_var)

    def __call__(self, q: Real[Array, "..."], p: Real[Array, "..."], c: Real[Array, "..."]) -> Float[Array, "..."]:
        """K of variances q and p and covariance c, element by element."""
        value = self.dual.k(q, p, c)
        return self.b_var.astype(value.dtype) + self.w_var.astype(value.dtype) * value


class DeepKernelMachine(eqx.Module):
    """A deep kernel machine for regression.

    Attributes:
        kernel: K(G_0), a covariance function of the inputs, such as `RBF()` or an `NNGP`.
        kernel_of_gram: K(G), `k(q, p, c)` element by element: a `GramKernel`, or for instance
            `lambda q, p, c: jnp.exp(c - 0.5 * (q + p))`, the squared exponential of the features.
        depth: L, how many Gram matrices are learnt; at least 1.
        width_ratio: nu > 0, for all layers or of shape (depth,); small values follow the data, large ones the prior.
        noise: s^2 >= 0, raised to the jitter as that of `GP` is.
        jitter: as of `dense`, for every kernel matrix.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import gp, nngp
        >>> X = jnp.linspace(-2.0, 2.0, 20)
        >>> machine = gp.DeepKernelMachine(gp.RBF(), gp.GramKernel(nngp.relu(), 2.0), depth=2, noise=0.1)
        >>> fitted = machine.fit(X, jnp.sin(2.0 * X))
        >>> bool(fitted.is_converged)
        True
        >>> round(float(fitted.predict(jnp.array([0.5])).mean[0]), 1)  # sin(1) = 0.84
        0.8
    """

    kernel: Any = eqx.field(converter=as_covariance)
    kernel_of_gram: Any = eqx.field(converter=lambda k: as_pytree(k) if callable(k) else k)
    depth: int = eqx.field(static=True, default=1)
    width_ratio: Float[Array, "..."] = eqx.field(
        default=1.0, converter=errors.as_array("width_ratio", is_floating=True)
    )
    noise: Float[Array, ""] = eqx.field(default=0.01, converter=errors.as_array("noise", is_floating=True))
    jitter: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        errors.check_arguments("kernel_of_gram", self.kernel_of_gram, "q, p, c")
        errors.check_count("depth", self.depth)
        errors.check_positive("width_ratio", self.width_ratio)
        if self.noise.shape != ():
            raise ValueError(f"noise must be one variance for all data, got shape {self.noise.shape}")
        errors.check_nonnegative("noise", self.noise)
        if self.width_ratio.shape not in ((), (self.depth,)):
            raise ValueError(
                f"width_ratio must be a number, or one for each of {self.depth} layers, got shape "
                f"{self.width_ratio.shape}"
            )
        if self.jitter is not None:
            errors.check_nonnegative("jitter", self.jitter)

    def fit(self, X: Any, Y: ArrayLike, *, Z: Any = None, num_steps: int = 500) -> "DeepKernelFit":
        """The Gram matrices that maximise the objective, by L-BFGS from those of the Gaussian process.

        The objective may have several maxima where the kernel is not linear; this finds one that is no worse than the
        Gaussian process. Parameters of the machine stay as they are: they may be chosen by `objective` of the result.

        Args:
            X: inputs, (n,) or (n, d).
            Y: data, (n,), or (n, c) for c outputs of one law.
            Z: inducing inputs, (m,) or (m, d); None for the exact objective.
            num_steps: of L-BFGS, at most.

        Raises:
            ValueError: shapes do not fit, or a kernel matrix has no Cholesky factor.
        """
        errors.check_count("num_steps", num_steps)
        X, Y, Z = _check_data(X, Y, Z)
        raw, value, is_converged = _fit(self, X, Y, Z, num_steps)
        if errors.is_concrete(value) and not jnp.isfinite(value):
            raise ValueError(
                "kernel and kernel_of_gram must give positive definite matrices at the inputs, with noise > 0 or "
                "without duplicates; a larger jitter, such as 1e-3, may help"
            )
        return DeepKernelFit(self, X, Y, Z, raw, value, is_converged)

    def objective(self, raw: Any, X: Any, Y: Any, *, Z: Any = None) -> Float[Array, ""]:
        """L at given Gram matrices, differentiable in them and in all parameters.

        Args:
            raw: M_l of all layers: the lower triangles, with the logarithm of the diagonal; zeros are the Gaussian
                process. (depth, n, n), or (depth, m, m) with inducing inputs.
            X, Y, Z: as of `fit`.
        """
        X, Y, Z = _check_data(X, Y, Z)
        raw, m = errors.as_array("raw", is_floating=True)(raw), X.shape[0] if Z is None else Z.shape[0]
        if raw.shape != (self.depth, m, m):
            raise ValueError(f"raw must have shape {(self.depth, m, m)}, got {raw.shape}")
        return _objective(self, raw, X, Y, Z)


class DeepKernelFit(eqx.Module):
    """A fitted deep kernel machine.

    Attributes:
        machine: what was fitted.
        X, Y, Z: to what; Z is None for the exact objective.
        raw: M_l of all layers, as of `DeepKernelMachine.objective`.
        objective: L there.
        is_converged: whether a further step promises an increase of at most ten times the rounding of L, as of `lbfgs`.
    """

    machine: DeepKernelMachine
    X: Float[Array, "n ..."]
    Y: Float[Array, "n ..."]
    Z: Float[Array, "m ..."] | None
    raw: Raw
    objective: Float[Array, ""]
    is_converged: Bool[Array, ""]

    @property
    def grams(self) -> Raw:
        """G_l of all layers, at X, or at Z."""
        at = self.X if self.Z is None else self.Z
        return _propagate(self.machine, self.raw, at, None)[2]

    def predict(self, Xs: Any, noise: ArrayLike | None = None) -> dist.Distribution:
        """The law of each value of the function at new inputs: a Normal of the shape (t,), or (t, c).

        Args:
            Xs: new inputs, (t,) or (t, d).
            noise: variance of the noise of new observations; None for the function itself.
        """
        Xs = _check_rows("Xs", as_inputs("Xs", Xs), self.X)
        noise = jnp.zeros(()) if noise is None else jnp.asarray(noise)
        errors.check_nonnegative("noise", noise)
        mean, variance = _predict(self.machine, self.raw, self.X, self.Y, self.Z, Xs)
        scale = marginal_scale(variance, noise)
        return dist.Normal(mean, scale if mean.ndim == 1 else jnp.broadcast_to(scale[:, None], mean.shape))


def _check_data(X: Any, Y: Any, Z: Any) -> tuple[Array, Array, Array | None]:
    X, Y = as_inputs("X", X), errors.as_array("Y", is_floating=True)(Y)
    if Y.ndim not in (1, 2) or Y.shape[0] != X.shape[0] or 0 in Y.shape:
        raise ValueError(f"Y must have shape ({X.shape[0]},) or ({X.shape[0]}, c), a row for each of X, got {Y.shape}")
    errors.check_finite("Y", Y)
    return X, Y, None if Z is None else _check_rows("Z", as_inputs("Z", Z), X)


def _check_rows(name: str, new: Array, X: Array) -> Array:
    if new.shape[1:] != X.shape[1:]:
        raise ValueError(f"{name} must have rows of the shape of those of X, {X.shape[1:]}, got {new.shape[1:]}")
    return new


@partial(jax.jit, static_argnames="num_steps")
def _fit(machine: DeepKernelMachine, X: Array, Y: Array, Z: Array | None, num_steps: int) -> tuple[Array, ...]:
    at = X if Z is None else Z
    dtype = jnp.result_type(gram(machine.kernel, at[:1], at[:1]), Y)
    outputs = Y.size // Y.shape[0]
    scale = outputs + jnp.sum(jnp.broadcast_to(machine.width_ratio, (machine.depth,))).astype(dtype)

    def loss(raw: Array) -> Array:
        return -_objective(machine, raw, X, Y, Z) / scale

    start = jnp.zeros((machine.depth, at.shape[0], at.shape[0]), dtype)
    found = minimise(loss, start, num_steps)
    return found.point, -found.value * scale, found.is_converged


@jax.jit
def _objective(machine: DeepKernelMachine, raw: Array, X: Array, Y: Array, Z: Array | None) -> Array:
    at, new = (X, None) if Z is None else (Z, X)
    last, divergences, _ = _propagate(machine, raw, at, new)
    nu = jnp.broadcast_to(machine.width_ratio, (machine.depth,)).astype(raw.dtype)
    columns = Y.reshape(Y.shape[0], -1)
    likelihood = (_exact(machine, last, columns) if Z is None else _bound(machine, last, columns))[0]
    return jnp.where(_is_ok(machine), likelihood - jnp.sum(nu * divergences), -jnp.inf)


def _is_ok(machine: DeepKernelMachine) -> Array:
    """Traced values are not refused."""
    return (machine.noise >= 0) & jnp.all(machine.width_ratio > 0)


@jax.jit
def _predict(
    machine: DeepKernelMachine, raw: Array, X: Array, Y: Array, Z: Array | None, Xs: Array
) -> tuple[Array, Array]:
    columns = Y.reshape(Y.shape[0], -1)
    if Z is None:
        last, _, _ = _propagate(machine, raw, X, Xs)
        _, tril, whitened = _exact(machine, last, columns)
        half = solve(tril, last[1])
        mean, variance = half.T @ whitened, last[2] - jnp.sum(half**2, axis=0)
    else:
        last, _, _ = _propagate(machine, raw, Z, jnp.concatenate([X, Xs]))
        n = X.shape[0]
        _, outer, inner, whitened = _bound(machine, (last[0], last[1][:, :n], last[2][:n]), columns)
        prior = solve(outer, last[1][:, n:])
        half = solve(inner, prior)
        mean = half.T @ whitened
        variance = last[2][n:] - jnp.sum(prior**2, axis=0) + jnp.sum(half**2, axis=0)
    mean, variance = (jnp.where(_is_ok(machine), value, jnp.nan) for value in (mean, variance))
    return mean.reshape(-1, *Y.shape[1:]), variance


def _propagate(
    machine: DeepKernelMachine, raw: Array, X: Array, new: Array | None
) -> tuple[tuple[Array, Any, Any], Array, Array]:
    """The last K_ii, K_it and diagonal of K_tt (None without new inputs); KL and G_ii of every layer."""
    K = gram(machine.kernel, X, X).astype(raw.dtype)
    if K.ndim > 2:
        raise ValueError(f"kernel must be one covariance function, got a batch of shape {K.shape[:-2]}; use jax.vmap")
    first: tuple[Array, Any, Any] = (
        K,
        None if new is None else gram(machine.kernel, X, new).astype(raw.dtype),
        None if new is None else diagonal(machine.kernel, new).astype(raw.dtype),
    )

    def layer(blocks: tuple[Array, Any, Any], raw: Array) -> tuple[tuple[Array, Any, Any], tuple[Array, Array]]:
        K, cross, variances = blocks
        tril, log_ok = _factor(K, machine.jitter)
        log_diagonal = jnp.diagonal(raw)
        M = jnp.tril(raw, -1) + jnp.diag(jnp.exp(log_diagonal))
        divergence = 0.5 * (jnp.sum(M**2) - raw.shape[0]) - jnp.sum(log_diagonal) - log_ok

        root = tril @ M
        G = root @ root.T
        q = jnp.diagonal(G)
        K = jnp.asarray(machine.kernel_of_gram(q[:, None], q[None, :], G))
        if K.shape != G.shape:
            raise ValueError(f"kernel_of_gram must return the shape of c, {G.shape}, got {K.shape}")
        if cross is not None:
            half = solve(tril, cross)
            moved = M.T @ half
            p = jnp.maximum(variances - jnp.sum(half**2, axis=0), 0.0) + jnp.sum(moved**2, axis=0)
            cross = machine.kernel_of_gram(q[:, None], p[None, :], root @ moved)
            variances = machine.kernel_of_gram(p, p, p)
        return (K, cross, variances), (divergence, G)

    last, (divergences, grams) = jax.lax.scan(layer, first, raw)
    return last, divergences, grams


def _exact(machine: DeepKernelMachine, last: tuple[Array, Any, Any], Y: Array) -> tuple[Array, Array, Array]:
    """sum_c log N(y_c; 0, K + s^2 I), the Cholesky factor, and the whitened data."""
    K = last[0]
    noise = add_jitter(jnp.diagonal(K), machine.noise, machine.jitter)
    covariance = K + jnp.diag(noise)
    tril, log_ok = cholesky_or_identity(covariance)
    return jnp.sum(log_density(covariance, tril, Y)) + log_ok, tril, solve(tril, Y)


def _bound(machine: DeepKernelMachine, last: tuple[Array, Any, Any], Y: Array) -> tuple[Array, Array, Array, Array]:
    """Titsias' bound on the same, the factors of K_ii and of I + F F^T / s^2, and the whitened data."""
    K, cross, variances = last
    outer, log_outer = _factor(K, machine.jitter)
    noise = add_jitter(variances, machine.noise, machine.jitter)[0]
    F = solve(outer, cross)
    inner, log_inner = cholesky_or_identity(jnp.eye(F.shape[0], dtype=F.dtype) + F @ F.T / noise)
    whitened = solve(inner, F @ Y) / noise
    n, outputs = Y.shape
    quadratic = jnp.sum(Y**2) / noise - jnp.sum(whitened**2)
    log_scale = 2.0 * jnp.sum(jnp.log(jnp.diagonal(inner))) + n * jnp.log(2.0 * math.pi * noise)
    slack = (jnp.sum(variances) - jnp.sum(F**2)) / noise
    value = -0.5 * (quadratic + outputs * (log_scale + slack))
    return value + log_outer + log_inner, outer, inner, whitened


def _factor(K: Array, jitter: float | None) -> tuple[Array, Array]:
    return cholesky_or_identity(K + jnp.diag(add_jitter(jnp.diagonal(K), None, jitter)))
