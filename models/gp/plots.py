"""Pictures of laws of functions of one variable: the median, a band, and functions drawn from the law.

The band is pointwise: at each input the interval between two quantiles of the law there, exact for laws that are
normal, Student-t and finite mixtures of normals, and of 4,000 draws for others, as for the prior of a scale mixture. A
function lies inside it at each input with the probability asked for, not at all of them together.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import scipy.stats
from jaxtyping import ArrayLike

from bayesinf import errors
from bayesinf.models.gp.covariances import diagonal
from bayesinf.models.gp.process import GP, Process, as_inputs, mean_elsewhere
from bayesinf.models.gp.scale_mixture import ScaleMixtureGP
from bayesinf.models.gp.student_t import StudentTProcess
from bayesinf.models.gp.vecchia import Vecchia

__all__ = ["plot_functions"]


def plot_functions(
    law: Process | dist.Distribution,
    X: ArrayLike,
    y: ArrayLike | None = None,
    *,
    num_functions: int = 5,
    level: float = 0.9,
    key: errors.KeyLike = 0,
    ax: Any = None,
    color: Any = "C0",
    label: str | None = None,
) -> Any:
    """Draws the median, a band and some functions of a prior or a posterior.

    Args:
        law: a process, for its prior at X, or with `y` its posterior there; or any law of the values at X, such as what
            `process.condition(y, X)` is, of each value or with `full_cov=True` of all. Functions are drawn where the
            law is joint.
        X: where to draw, (m,) or (m, 1), increasing. For inputs of several columns `law` is one of the values, and X
            says where on the axis they are.
        y: data at `law.X`, which are shown as dots.
        num_functions: how many functions are drawn; they take memory for m x m entries of the kernel, and 0 take none.
        level: probability of the band, in (0, 1).
        key: for the functions; a key or an integer seed.
        ax: matplotlib axes; made if None.
        color: of all lines.
        label: of the median, for a legend.

    Returns:
        The axes.

    Raises:
        ValueError: X is not one-dimensional, or of another length than the law; or there is a batch.
        ImportError: matplotlib is not installed.

    Example:
        >>> import jax.numpy as jnp
        >>> import matplotlib; matplotlib.use("Agg")
        >>> from bayesinf.models import gp
        >>> process, grid = gp.GP(gp.RBF(1.0), jnp.array([1.0, 3.0]), noise=0.01), jnp.linspace(0.0, 5.0, 50)
        >>> ax = gp.plot_functions(process, grid, jnp.array([0.5, -0.5]))
        >>> len(ax.lines), len(ax.collections)  # median, five functions and the data; a band
        (7, 1)
    """
    errors.check_fraction("level", level)
    errors.check_count("num_functions", num_functions, minimum=0)
    places = np.asarray(as_inputs("X", X))
    if places.ndim > 1 and places.shape[1:] != (1,):
        raise ValueError(
            f"X must be places on a line, of shape (m,), got {places.shape}; for inputs of several columns plot "
            "process.condition(y, inputs) over an X of your choice"
        )
    places = places.reshape(-1)
    if y is not None and not isinstance(law, Process):
        raise ValueError(f"y must be None where law is not a process, got {type(law).__name__}; plot the data yourself")
    each, joint = _laws(law, X, y, num_functions > 0)
    shape = jnp.shape(each.mean)
    if shape != places.shape:
        raise ValueError(f"law must be one of the values at X, of shape {places.shape}, got {shape}")

    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("plot_functions needs matplotlib: pip install 'bayesinf[plots]'") from error
    ax = plt.subplots(figsize=(7, 3.5), layout="constrained")[1] if ax is None else ax
    low, middle, high = _quantiles(each, np.array([0.5 * (1 - level), 0.5, 0.5 * (1 + level)]))
    ax.fill_between(places, low, high, color=color, alpha=0.2, lw=0)
    if joint is not None:
        for values in np.asarray(joint.sample(errors.as_key(key), (num_functions,))):
            ax.plot(places, values, color=color, lw=0.8, alpha=0.7)
    ax.plot(places, middle, color=color, lw=2, label=label)
    if y is not None:
        ax.plot(np.asarray(law.X).reshape(-1), np.asarray(y), "k.", ms=5)  # type: ignore[union-attr]  # pyright: ignore
    return ax


def _laws(law: Any, X: Any, y: Any, is_joint: bool) -> tuple[Any, Any]:
    """The law of each value at X, and that of all together, or None."""
    if isinstance(law, Process):
        if law.batch_shape:
            raise ValueError(f"law must be one process, got batch shape {law.batch_shape}; plot them one by one")
        if y is not None:
            is_joint = is_joint and not isinstance(law.solver, Vecchia)
            return law.condition(y, X), law.condition(y, X, full_cov=True) if is_joint else None
        law = _prior(law, X)
    if not isinstance(law, dist.Distribution):
        raise ValueError(f"law must be a process or a NumPyro distribution of the values at X, got {law!r}")
    return _marginal(law), law if is_joint and law.event_shape and not law.batch_shape else None


def _prior(process: Process, X: Any) -> Process:
    """The same process at X, of the function itself."""
    X = as_inputs("X", X)
    given: dict[str, Any] = {"mean": mean_elsewhere(process.mean_function, X)}
    if isinstance(process, StudentTProcess):
        return StudentTProcess(process.a, process.b, process.kernel, X, **given)
    if isinstance(process, ScaleMixtureGP):
        noise = 1e-6 * jnp.mean(diagonal(process.kernel, X))  # which the process asks for, and no eye sees
        return ScaleMixtureGP(process.mixing, process.kernel, X, noise, nodes=process.nodes, **given)
    return GP(process.kernel, X, **given)


def _marginal(law: Any) -> Any:
    """The law of each value alone."""
    if isinstance(law, GP):
        return dist.Normal(law.loc, jnp.sqrt(jnp.diagonal(law.factor.covariance)))
    if isinstance(law, StudentTProcess):
        variances = jnp.diagonal(law.factor.covariance) * law.b / law.a
        return dist.StudentT(2.0 * law.a, law.loc, jnp.sqrt(variances))
    if isinstance(law, ScaleMixtureGP):
        return law
    if isinstance(law, dist.MultivariateNormal):
        return dist.Normal(law.loc, _row_norms(law.scale_tril))
    if isinstance(law, dist.MultivariateStudentT):
        return dist.StudentT(law.df, law.loc, _row_norms(law.scale_tril))
    return law


def _row_norms(tril: Any) -> Any:
    """Standard deviations."""
    return jnp.linalg.norm(tril, axis=-1)


def _quantiles(law: Any, probabilities: np.ndarray) -> np.ndarray:
    """Quantiles of each value, on the host; of laws without a formula those of 4,000 draws."""
    p = probabilities[:, None]
    if isinstance(law, dist.Normal):
        return scipy.stats.norm.ppf(p, np.asarray(law.loc), np.asarray(law.scale))
    if isinstance(law, dist.StudentT):
        return scipy.stats.t.ppf(p, np.asarray(law.df), np.asarray(law.loc), np.asarray(law.scale))
    parts = getattr(law, "component_distribution", None)
    if isinstance(parts, dist.Normal):
        weights = np.asarray(law.mixing_distribution.probs)
        return _mixture_quantiles(weights, np.asarray(parts.loc), np.asarray(parts.scale), p)
    return np.quantile(np.asarray(law.sample(errors.as_key(0), (4_000,))), probabilities, axis=0)


def _mixture_quantiles(weights: np.ndarray, means: np.ndarray, scales: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Where the distribution function of a mixture, over the last axis, is p, by bisection."""
    reach = 40.0 * np.max(np.where(weights > 0, scales, 0.0), axis=-1)
    low = np.broadcast_to(np.min(means, axis=-1) - reach, (len(p), len(means))).copy()
    high = np.broadcast_to(np.max(means, axis=-1) + reach, low.shape).copy()
    for _ in range(100):
        middle = 0.5 * (low + high)
        below = np.sum(weights * scipy.stats.norm.cdf(middle[..., None], means, scales), axis=-1) < p
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return 0.5 * (low + high)
