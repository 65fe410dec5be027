"""Gibbs sampling of a latent Gaussian function and of its parameters.

    theta ~ p(theta),   f | theta ~ N(m, K),   y | f, theta ~ L(f, theta)

    f      ~ any kernel of p(f | theta, y), in whitened coordinates z, f = m + L z, where its prior is N(0, I)
    theta  ~ any kernel of p(theta | what a form holds fixed of f, y), and f follows (see `latent_forms`)

leaves p(theta, f | y) invariant in every form. Which one mixes depends on the data. Centred, theta moves only as far as
f allows, which is hardly at all where f is long and smooth; whitened, f follows theta, against what strong data say of
it; surrogate data hold f where the data do and let it follow where they do not. Several forms one after the other
interweave, and mix at least about as well as the best of them.

References:
    Murray and Adams (2010), arXiv:1006.0868.
    Yu and Meng (2011), doi:10.1198/jcgs.2011.203main (interweaving).
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree, captured, current
from bayesinf.kernel import Kernel, select
from bayesinf.kernels.foreign import rebindable
from bayesinf.kernels.latent_forms import FORMS, LatentGaussian
from bayesinf.kernels.latent_model import GivenForm, GivenParameters, LatentModel, SliceOf, takes_theta
from bayesinf.kernels.parts import (
    PartsState,
    attach,
    check_untied,
    common_target_acceptance,
    detach,
    first_step_size,
    merge_infos,
    scale_steps,
)
from bayesinf.kernels.posterior import Model, as_prior, constrain_beside
from bayesinf.kernels.vectors import as_position, differ
from bayesinf.target import Target

__all__ = ["HyperGibbs", "HyperGibbsInfo"]


class HyperGibbsInfo(NamedTuple):
    """What one sweep tells: of the parameters' moves, as in `Info`, and of the function's.

    Attributes:
        acceptance_rate: of the parameters.
        is_accepted: whether they moved.
        is_divergent: whether a log density was NaN or +inf, or a covariance without a Cholesky factor; that move was
            then undone.
        num_gradients: of both.
        latent_acceptance_rate: of f.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    latent_acceptance_rate: Float[Array, ""]


class HyperGibbs(Kernel):
    """Gibbs sampling on positions {"theta": unconstrained parameters, "f": the function at n points}.

    Args:
        build: `build(theta)` is the law of f, a `models.gp.GP` without noise or a NumPyro MultivariateNormal; `theta`
            is what the prior draws.
        prior: of theta, as in `smc_sampler`: a NumPyro distribution or a pytree of them, `Target.from_numpyro(model)`,
            or (sample, log_prob).
        log_likelihood: `log_likelihood(f)`, or `log_likelihood(f, data)` where `data` is given; a scalar. A last
            argument of the name `theta` is given the parameters, such as the scale of a noise.
        data: any pytree of arrays; new values of the same shape compile nothing.
        parameter_kernel: what moves theta: a function of a target that returns a kernel, such as
            `functools.partial(MALA, step_size=0.1)`, or a kernel, which is rebound. Its step size is tuned by warm-up.
        latent_kernel: what moves f, as z with prior N(0, I), in the same way: `PCNLangevin`, `NUTS`, and so on, whose
            step size stays as it is. `EllipticalSlice` if None.
        form: "whitened", "centred" or "surrogate"; or several, to interweave them.
        auxiliary_variance: S of the surrogate data, a number, (n,), or a function of theta that returns these; good
            is about the variance that the likelihood alone would leave to each f_i.

    Raises:
        ValueError: an argument is not of that form.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp, numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> from bayesinf.models import gp
        >>> X, counts = jnp.linspace(0.0, 3.0, 8), jnp.array([1, 0, 2, 4, 6, 5, 2, 1])
        >>> prior = {"lengthscale": dist.LogNormal(0.0, 0.5), "variance": dist.Gamma(2.0, 2.0)}
        >>> def build(theta):
        ...     return gp.GP(theta["variance"] * gp.Matern52(theta["lengthscale"]), X)
        >>> def log_likelihood(f, counts):
        ...     return jnp.sum(dist.Poisson(jnp.exp(f)).log_prob(counts))
        >>> mala = functools.partial(bi.kernels.MALA, step_size=0.1)
        >>> kernel = bi.kernels.HyperGibbs(build, prior, log_likelihood, counts, parameter_kernel=mala)
        >>> draws = bi.sample(0, kernel, kernel.initial(1, num_chains=2), num_samples=50, num_warmup=50,
        ...                   constrain=kernel.constrain, progress=False)
        >>> draws["f"].shape
        (2, 50, 8)
    """

    is_sequential: ClassVar[bool] = True

    build: Callable[[PyTree], Any] = eqx.field(static=True)
    log_likelihood: Callable[..., Any] = eqx.field(static=True)
    prior: Any
    data: PyTree
    auxiliary_variance: Any
    latent_part: Kernel
    parts: tuple[Any, ...]  # the kernels of theta, one a form
    forms: tuple[str, ...] = eqx.field(static=True)

    def __init__(
        self,
        build: Callable[[PyTree], Any],
        prior: Any,
        log_likelihood: Callable[..., Any],
        data: PyTree = None,
        *,
        parameter_kernel: Callable[[Target], Any] | Kernel,
        latent_kernel: Callable[[Target], Any] | Kernel | None = None,
        form: str | Sequence[str] = "whitened",
        auxiliary_variance: Any = None,
    ):
        errors.check_arguments("build", build, "theta")
        arguments = ("f",) if data is None else ("f", "data")
        arguments = (*arguments, "theta") if takes_theta(log_likelihood) else arguments
        errors.check_arguments("log_likelihood", log_likelihood, ", ".join(arguments))
        self.build, self.log_likelihood = captured(build), captured(log_likelihood)
        self.prior = errors.as_arrays("prior", as_prior(prior))
        if isinstance(self.prior, Model) and self.prior.observed:
            raise ValueError(
                f"prior must be a model without observed sites, got {list(self.prior.observed)}: what is observed "
                "belongs to log_likelihood"
            )
        self.data = errors.as_arrays("data", data)
        self.forms = (form,) if isinstance(form, str) else tuple(form)
        for one in self.forms or ("",):
            errors.check_choice("form", one, FORMS)
        self.auxiliary_variance = self._as_variance(auxiliary_variance)

        size = self._check()
        latent_kernel = SliceOf(size) if latent_kernel is None else latent_kernel
        self.latent_part = rebindable("latent_kernel", latent_kernel, Target(GivenParameters(self._model), ()))
        self.parts = tuple(
            rebindable("parameter_kernel", parameter_kernel, Target(GivenForm(self._model, form), ()))
            for form in self.forms
        )
        for name, part in (("latent_kernel", self.latent_part), ("parameter_kernel", self.parts[0])):
            check_untied(name, part)

    def init(self, position: PyTree) -> PartsState:
        """The state at `position`, a dict of "theta" and "f"."""
        if not isinstance(position, dict) or set(position) != {"theta", "f"}:
            found = f"the keys {sorted(position)}" if isinstance(position, dict) else type(position).__name__
            raise ValueError(f'position must be a dict of "theta" and "f", got {found}')
        position = as_position(position)
        theta, f = position["theta"], position["f"]
        latent = self._latent(theta)
        if f.shape != latent.loc.shape:
            raise ValueError(f"position['f'] must have the shape {latent.loc.shape} of build(theta), got {f.shape}")
        memory = [detach(self._latent_kernel(theta, latent).init(latent.whiten(f).astype(f.dtype)))]
        for part, form in zip(self.parts, self.forms, strict=True):
            fixed = FORMS[form].fix(jax.random.key(0), latent, f)  # of which the memory keeps nothing
            memory.append(detach(part.with_target(self._target(form, fixed)).init(theta)))
        return PartsState(position, tuple(memory))

    def step(self, key: Key[Array, ""], state: PartsState) -> tuple[PartsState, HyperGibbsInfo]:
        key_latent, *keys = jax.random.split(key, 1 + len(self.parts))
        theta, f = state.position["theta"], state.position["f"]

        latent = self._latent(theta)
        z = latent.whiten(f).astype(f.dtype)
        kernel = self._latent_kernel(theta, latent)
        before, num_starting = attach(kernel, state.memory[0], z, None)
        after, latent_info = kernel.step(key_latent, before)
        f = select(differ(after.position, z), latent.color(after.position), f)  # bitwise where it is, if z is

        memory, infos = [detach(after)], []
        for part, form, own, key_form in zip(self.parts, self.forms, state.memory[1:], keys, strict=True):
            key_fix, key_move = jax.random.split(key_form)
            fixed = FORMS[form].fix(key_fix, self._latent(theta), f)
            kernel = part.with_target(self._target(form, fixed))
            before, cost = attach(kernel, own, theta, None)
            after, info = kernel.step(key_move, before)
            placed, _ = FORMS[form].place(self._latent(after.position), fixed)
            f = select(differ(after.position, theta), placed, f)
            theta = after.position
            memory.append(detach(after))
            infos.append(info)
            num_starting += cost

        merged = merge_infos(infos, self.parts, num_starting)
        info = HyperGibbsInfo(
            acceptance_rate=merged.acceptance_rate,
            is_accepted=merged.is_accepted,
            is_divergent=merged.is_divergent | latent_info.is_divergent,
            num_gradients=merged.num_gradients + latent_info.num_gradients,
            latent_acceptance_rate=jnp.asarray(latent_info.acceptance_rate, jnp.result_type(float)),
        )
        return PartsState({"theta": theta, "f": f}, tuple(memory)), info

    def initial(self, key: errors.KeyLike, num_chains: int = 4, *, theta: PyTree = None) -> PyTree:
        """Starting positions with a leading chain axis: draws of the prior, of theta and of f.

        Args:
            key: PRNG key or seed.
            num_chains: number of chains.
            theta: starting parameters, unconstrained, with a leading chain axis, instead of draws.

        Raises:
            InitializationError: for some theta the covariance of f has no Cholesky factor, or the likelihood of f is
                not finite.
        """
        key_theta, key_f = jax.random.split(errors.as_key(key))
        num_chains = errors.check_count("num_chains", num_chains)
        if theta is None:
            theta = jax.vmap(self.prior.draw)(jax.random.split(key_theta, num_chains))
        theta = jax.tree.map(jnp.asarray, theta)
        if {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(theta)} != {(num_chains,)}:
            raise ValueError(f"theta must have a leading axis of num_chains={num_chains} in every leaf")
        f, is_ok = _draw_f_for_each(current(self), jax.random.split(key_f, num_chains), theta)
        if errors.is_concrete(is_ok) and not np.all(is_ok):
            chain = int(np.flatnonzero(~np.asarray(is_ok))[0])
            start = self.prior.constrain(jax.tree.map(lambda leaf: leaf[chain], theta))
            raise errors.InitializationError(
                f"at the parameters {start} of chain {chain} the covariance of f has no Cholesky factor, or the log "
                "likelihood of a draw of f is not finite: pass better ones as theta=, or a larger jitter"
            )
        return {"theta": theta, "f": f}

    def constrain(self, position: PyTree) -> PyTree:
        """The parameters by name as `build` gets them, and "f"; {"theta", "f"} where they have no names."""
        return constrain_beside(self.prior, position, "f", "the function")

    def with_step_size(self, step_size: Any) -> "HyperGibbs":
        return eqx.tree_at(lambda kernel: kernel.parts, self, tuple(scale_steps(self.parts, step_size)))

    @property
    def step_size(self) -> Array:
        return first_step_size(self.parts)

    @property
    def target_acceptance(self) -> float | None:  # type: ignore[override]
        return common_target_acceptance(self.parts)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        return all(part.is_exact for part in (self.latent_part, *self.parts))

    @property
    def _has_noise(self) -> bool:
        return any(FORMS[form].has_noise for form in self.forms)

    @property
    def _model(self) -> LatentModel:
        return LatentModel(self.build, self.log_likelihood)

    def _latent(self, theta: PyTree) -> LatentGaussian:
        return self._model.latent(self.prior.constrain(theta), self.auxiliary_variance)

    def _latent_kernel(self, theta: PyTree, latent: LatentGaussian) -> Any:
        data = (self.prior.constrain(theta), latent, self.data)
        return self.latent_part.with_target(Target(GivenParameters(self._model), data))

    def _target(self, form: str, fixed: PyTree) -> Target:
        return Target(GivenForm(self._model, form), (self.prior, self.auxiliary_variance, self.data, fixed))

    def _as_variance(self, variance: Any) -> Any:
        if not self._has_noise:
            if variance is not None:
                raise ValueError(f"auxiliary_variance must be None unless form is 'surrogate', got {self.forms}")
            return None
        if variance is None:
            raise ValueError(
                "auxiliary_variance must be given for form='surrogate': about the variance that the likelihood alone "
                "would leave to each f_i"
            )
        if callable(variance):
            errors.check_arguments("auxiliary_variance", variance, "theta")
            return as_pytree(variance)
        variance = errors.as_array("auxiliary_variance", is_floating=True)(variance)
        errors.check_positive("auxiliary_variance", variance)
        return variance

    def _check(self) -> int:
        """That prior, law and likelihood fit each other; the length of f."""

        def draw(key: Any) -> tuple[LatentGaussian, Any]:
            theta = self.prior.constrain(self.prior.draw(key))
            latent = self._model.latent(theta, self.auxiliary_variance)
            latent.whiten(latent.loc)  # solvers that cannot say so
            return latent, self._model.log_likelihood_of(latent.loc, theta, self.data)

        latent, value = jax.eval_shape(draw, jax.random.key(0))
        if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"log_likelihood must return a floating-point scalar, got {value}; sum over observations")
        if self._has_noise and not hasattr(latent.factor, "tril"):
            raise ValueError("form='surrogate' needs a dense covariance: solver=dense() or a MultivariateNormal")
        return latent.loc.shape[0]


@jax.jit
def _draw_f_for_each(kernel: HyperGibbs, keys: Key[Array, " c"], theta: PyTree) -> tuple[Array, Array]:
    """A draw of f at every theta, and whether covariance and likelihood are fit to start from."""

    def draw(row):
        key, theta = row
        values, latent = kernel.prior.constrain(theta), kernel._latent(theta)
        f = latent.color(jax.random.normal(key, latent.loc.shape, latent.loc.dtype))
        return f, latent.is_ok & jnp.isfinite(kernel._model.log_likelihood_of(f, values, kernel.data))

    return jax.lax.map(draw, (keys, theta))
