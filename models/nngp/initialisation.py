"""Variances of weights and biases at which signals neither die nor explode with depth.

    V(q) = b + w E phi(u)^2,     u ~ N(0, q)           the variance of one layer out of that of the layer before
    chi = w E phi'(u)^2                                how fast two close inputs part, and how gradients grow

The edge of chaos has V(q*) = q* and chi = 1 there. Whether q* attracts is said by V'(q*): for shifted rectifiers and
soft thresholds V'(q*) = chi = 1 and V'' > 0, so variances a little above q* run away, and networks whose activations
are mostly zero cannot be deep. Clipped at height m they have

    V'(1) = 1 - m N(tau + m) / (Phi(tau + m) - Phi(tau)) < 1

and `sparse_init` finds the m for a V'(1) that is asked for.

References:
    Poole, Lahiri, Raghu, Sohl-Dickstein and Ganguli (2016), arXiv:1606.05340.
    Schoenholz, Gilmer, Ganguli and Sohl-Dickstein (2017), arXiv:1611.01232.
    Price, Adam, Nait Saada and Tanner (2024), arXiv:2402.16184.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Real
from scipy.optimize import brentq
from scipy.stats import norm

from bayesinf import errors
from bayesinf.models.nngp.duals.dual import Dual
from bayesinf.models.nngp.duals.piecewise_linear import PiecewiseLinear, shifted_relu, soft_threshold
from bayesinf.models.nngp.layers import check_dual

__all__ = ["EdgeOfChaos", "SparseInit", "edge_of_chaos", "sparse_init"]


class EdgeOfChaos(NamedTuple):
    """Variances on the edge of chaos, from `edge_of_chaos`.

    Attributes:
        w_var, b_var: of weights, times the width, and of biases.
        chi1: w E phi'(u)^2 at q*, which is 1.
        v_prime, v_second: derivatives of V at q*.
        is_stable: whether |V'(q*)| < 1, so that variances return to q*.
    """

    w_var: Float[Array, ""]
    b_var: Float[Array, ""]
    chi1: Float[Array, ""]
    v_prime: Float[Array, ""]
    v_second: Float[Array, ""]
    is_stable: Bool[Array, ""]


class SparseInit(NamedTuple):
    """A clipped activation and its variances, from `sparse_init`.

    Attributes:
        dual: of the activation.
        w_var, b_var: with which q* = 1 is on the edge of chaos.
        tau, clip: where the activation leaves zero, and the height at which it stays.
    """

    dual: PiecewiseLinear
    w_var: float
    b_var: float
    tau: float
    clip: float


def edge_of_chaos(dual: Dual, *, q_star: Real[ArrayLike, ""] = 1.0) -> EdgeOfChaos:
    """The variances at which q* is a fixed point with chi = 1.

    Args:
        dual: of the activation.
        q_star: variance of the units; > 0.

    Returns:
        An `EdgeOfChaos`.

    Raises:
        ValueError: q_star is not positive, or no variance of biases makes it a fixed point.

    Example:
        >>> from bayesinf.models import nngp
        >>> edge = nngp.edge_of_chaos(nngp.relu())
        >>> float(edge.w_var), float(edge.b_var)
        (2.0, 0.0)
    """
    check_dual(dual)
    errors.check_positive_scalar("q_star", q_star)
    q = jnp.asarray(q_star, jnp.result_type(q_star, 1.0))
    variance, slope_variance, slope, bend = _moments(dual, q)
    w_var = 1.0 / slope_variance
    b_var = q - w_var * variance
    margin = jnp.finfo(q.dtype).eps ** 0.5
    if errors.is_concrete(b_var) and not b_var >= -margin * q:
        raise ValueError(
            f"q_star must leave room for biases: chi = 1 there asks for w_var = {w_var:.4g} and b_var = {b_var:.4g}, "
            "which is negative; try another q_star, or another activation"
        )
    return EdgeOfChaos(
        w_var=w_var,
        b_var=jnp.maximum(b_var, 0.0),
        chi1=w_var * slope_variance,
        v_prime=w_var * slope,
        v_second=w_var * bend,
        is_stable=jnp.abs(w_var * slope) < 1.0 - margin,
    )


@jax.jit
def _moments(dual: Dual, q: Float[Array, ""]) -> tuple[Array, Array, Array, Array]:
    """E phi^2 and E phi'^2, and the first two derivatives of the former."""
    slope, bend = jax.value_and_grad(jax.grad(dual.v))(q)
    return dual.v(q), dual.vdot(q), slope, bend


def sparse_init(kind: Literal["relu", "soft"], sparsity: float, v_prime: float = 0.7) -> SparseInit:
    """An activation that is zero with a given probability, clipped so that deep networks of it are stable.

    Args:
        kind: "relu" for clip(x - tau, 0, m), "soft" for the odd sign(x) clip(|x| - tau, 0, m).
        sparsity: the share of zeros, in (0, 1).
        v_prime: V'(1), in (0, 1): less is more stable, and clips more.

    Returns:
        A `SparseInit`.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> from bayesinf.models import nngp
        >>> init = nngp.sparse_init("relu", 0.85, v_prime=0.7)
        >>> round(init.clip, 2), round(init.w_var, 2), round(init.b_var, 3)
        (1.17, 7.33, 0.595)
        >>> kernel = nngp.NNGP(init.dual, 100, init.w_var, init.b_var)
    """
    errors.check_choice("kind", kind, ("relu", "soft"))
    errors.check_fraction("sparsity", sparsity)
    errors.check_fraction("v_prime", v_prime)
    sides = 1.0 if kind == "relu" else 2.0
    tau = float(norm.isf((1.0 - sparsity) / sides))

    def slope(m: float) -> float:
        return float(1.0 - m * norm.pdf(tau + m) / _between(tau, tau + m))

    root: Any = brentq(lambda m: slope(m) - v_prime, 1e-6, 40.0, xtol=1e-14)
    clip = float(root)
    top = tau + clip
    # E clip(x - tau, 0, m)^2
    rise = (1.0 + tau**2) * _between(tau, top) - (top * norm.pdf(top) - tau * norm.pdf(tau))
    rise += 2.0 * tau * (norm.pdf(top) - norm.pdf(tau))
    w_var = 1.0 / (sides * _between(tau, top))
    b_var = 1.0 - w_var * sides * (rise + clip**2 * norm.sf(top))
    if not b_var >= 0:
        raise ValueError(f"sparsity must be larger for v_prime={v_prime}: b_var would be {b_var:.4g}, got {sparsity}")
    make = shifted_relu if kind == "relu" else soft_threshold
    return SparseInit(make(tau, clip), float(w_var), float(b_var), tau, clip)


def _between(low: float, high: float) -> float:
    """P(low < z < high), from the tails that are small."""
    return float(norm.sf(low) - norm.sf(high)) if low > 0 else float(norm.cdf(high) - norm.cdf(low))
