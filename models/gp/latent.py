"""Gaussian processes that are not observed directly: a site of a NumPyro model, and a target for the kernels.

    f = m(X) + R z,   z ~ N(0, I),   R R^T = S

Sampled are the whitened z, whose prior has no correlations and no parameters: lengths and variances may then be
sampled together with them. R is the Cholesky factor, or what the solver has in its place.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jaxtyping import Array, ArrayLike, Float, PyTree

from bayesinf import errors
from bayesinf.models.gp.predict import predict_latent
from bayesinf.models.gp.process import GP, from_columns, or_nan, to_columns
from bayesinf.target import Target

__all__ = ["LatentTarget", "gp_latent", "latent_log_likelihood", "latent_target"]


def gp_latent(
    name: str,
    kernel: Any,
    X: Any,
    *,
    mean: Any = 0.0,
    whiten: bool = True,
    num_outputs: int | None = None,
    solver: Any = None,
) -> Float[Array, "... n"]:
    """A NumPyro site that is a draw of a Gaussian process at X; to be called in a model.

    Args:
        name: of the site. Whitened, it is a deterministic site, and `{name}_normals` is what is sampled.
        kernel, X, mean, solver: as of `GP`, without noise.
        whiten: whether the normals are sampled rather than the function; better where the data are few or noisy.
        num_outputs: of independent functions of one law; None for one.

    Returns:
        The function at X, shape (n,), or (num_outputs, n), with the axes of plates and batches in front.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> from bayesinf.models import gp
        >>> def model(X, counts):
        ...     lengthscale = numpyro.sample("lengthscale", dist.LogNormal(0.0, 1.0))
        ...     log_rate = gp.gp_latent("log_rate", gp.Matern52(lengthscale), X)
        ...     numpyro.sample("counts", dist.Poisson(jnp.exp(log_rate)).to_event(1), obs=counts)
        >>> target = bi.Target.from_numpyro(model, jnp.arange(4.0), jnp.array([1, 2, 4, 3]))
        >>> {name: value.shape for name, value in target.init(0, num_chains=2).items()}
        {'lengthscale': (2,), 'log_rate_normals': (2, 4)}
    """
    process = GP(kernel, X, mean=mean, solver=solver)
    outputs = () if num_outputs is None else (errors.check_count("num_outputs", num_outputs),)
    if not whiten:
        if outputs and process.batch_shape:
            raise ValueError(
                "num_outputs must be None with whiten=False for a batch of processes, whose axis is not that of "
                f"outputs, got {num_outputs} and batch shape {process.batch_shape}; give whiten=True"
            )
        law: dist.Distribution = process.expand([*outputs]) if outputs else process
        return jnp.asarray(numpyro.sample(name, law.to_event(len(outputs)) if outputs else law))
    shape = (*process.batch_shape, *outputs, process.factor.num_normals)
    normals = dist.Normal(jnp.zeros((), process.loc.dtype), 1.0).expand(shape).to_event(1 + len(outputs))
    z = jnp.asarray(numpyro.sample(f"{name}_normals", normals))
    if outputs and process.batch_shape:
        z = jnp.moveaxis(z, -2, 0)
    log_ok = getattr(process.factor, "log_ok", None)
    if log_ok is not None and not errors.is_concrete(log_ok):  # parameters without a factor are rejected
        numpyro.factor(f"{name}_has_factor", log_ok)
    f = process.loc + _color(process.factor, z, process.batch_shape)
    if outputs and process.batch_shape:
        f = jnp.moveaxis(f, 0, -2)
    return jnp.asarray(numpyro.deterministic(name, f))


def latent_target(
    kernel: Any,
    X: Any,
    log_likelihood: Callable[..., Any],
    data: PyTree = None,
    *,
    mean: Any = 0.0,
    solver: Any = None,
) -> "LatentTarget":
    """The posterior of a function under a Gaussian-process prior and any likelihood, in whitened coordinates.

    Args:
        kernel, X, mean, solver: as of `GP`, without noise.
        log_likelihood: `log_likelihood(f)`, or `log_likelihood(f, data)` where `data` is given, of the function at X;
            a scalar.
        data: any pytree of arrays; new values of the same shape compile nothing.

    Returns:
        A `LatentTarget`: its `target` is for any kernel. Samplers that take prior and likelihood apart are given
        `latent.prior` and `latent_log_likelihood` with `data=latent`, as in `smc_sampler(key, latent.prior,
        gp.latent_log_likelihood, kernel, num_particles=500, data=latent)`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> from bayesinf.models import gp
        >>> X, wins = jnp.linspace(0.0, 1.0, 5), jnp.array([0.0, 1.0, 1.0, 1.0, 0.0])
        >>> def log_likelihood(f, wins):
        ...     return jnp.sum(wins * f - jnp.logaddexp(0.0, f))
        >>> latent = gp.latent_target(gp.RBF(0.3), X, log_likelihood, wins)
        >>> kernel = bi.kernels.PCNLangevin(latent.target, step_size=0.5)
        >>> draws = bi.sample(0, kernel, jnp.zeros((2, latent.dim)), num_samples=100, progress=False)
        >>> latent.to_function(draws["x"]).shape
        (2, 100, 5)
        >>> new = latent.predict(1, draws["x"], jnp.array([0.5, 2.0]))  # the function elsewhere
        >>> jax.nn.sigmoid(new).mean((0, 1)).shape  # chances to win there
        (2,)
    """
    process = GP(kernel, X, mean=mean, solver=solver)
    if process.batch_shape:
        raise ValueError(f"kernel and mean must be those of one process, got batch shape {process.batch_shape}")
    errors.check_arguments("log_likelihood", log_likelihood, "f" if data is None else "f, data")
    return LatentTarget(process, Target(log_likelihood, data))


class LatentTarget(eqx.Module):
    """What `latent_target` returns; pi(z) proportional to N(z; 0, I) L(m + R z).

    Attributes:
        process: the law of f, a `GP` without noise.
        likelihood: the log likelihood of f.
    """

    process: GP
    likelihood: Target

    @property
    def factor(self) -> Any:
        """The covariance of f, factorised."""
        return self.process.factor

    @property
    def loc(self) -> Float[Array, " n"]:
        """The mean of f."""
        return self.process.loc

    @property
    def dim(self) -> int:
        """Of z."""
        return self.factor.num_normals

    @property
    def prior(self) -> dist.Distribution:
        """The law of z, N(0, I)."""
        return dist.Normal(jnp.zeros(self.dim, self.loc.dtype), 1.0).to_event(1)

    @property
    def target(self) -> Target:
        """The posterior of z; its data are leaves."""
        return Target(_log_posterior, self)

    def to_function(self, z: ArrayLike) -> Float[Array, "... n"]:
        """The function at X that z stands for, m + R z; NaN where the covariance has no factor."""
        columns, shape = to_columns(self._check(z), ())
        return self.loc + from_columns(or_nan(self.factor, self.factor.sqrt_matvec(columns)), shape)

    def _check(self, z: ArrayLike) -> Array:
        z = jnp.asarray(z)
        if z.ndim == 0 or z.shape[-1] != self.dim:
            raise ValueError(f"z must have a last axis of length {self.dim}, the dim of the target; got {z.shape}")
        return z

    def predict(
        self, key: errors.KeyLike, z: ArrayLike, Xs: ArrayLike, *, full_cov: bool = False, block: int | None = None
    ) -> Float[Array, "... m"]:
        """Draws of the function at new inputs, one for each draw z (..., dim) of the posterior: `predict_latent`."""
        return predict_latent(key, self.process, self.to_function(z), Xs, full_cov=full_cov, block=block)

    def log_likelihood(self, z: ArrayLike) -> Float[Array, ""]:
        """Log L(m + R z); -inf where the covariance has no factor."""
        value = self.likelihood.logdensity(self.loc + _color(self.factor, self._check(z), ()))
        log_ok = getattr(self.factor, "log_ok", None)
        return value if log_ok is None else jnp.where(jnp.isneginf(log_ok), -jnp.inf, value)


def latent_log_likelihood(z: ArrayLike, latent: LatentTarget) -> Float[Array, ""]:
    """Log L(m + R z), a function of z and data for samplers that take the prior and the likelihood apart."""
    return latent.log_likelihood(z)


def _log_posterior(z: Array, latent: LatentTarget) -> Array:
    return latent.log_likelihood(z) - 0.5 * jnp.sum(z**2)


def _color(factor: Any, z: Array, batch_shape: tuple[int, ...]) -> Array:
    columns, shape = to_columns(z, batch_shape)
    return from_columns(factor.sqrt_matvec(columns), shape)
