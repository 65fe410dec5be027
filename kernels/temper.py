"""Any kernel on a flatter target: the target to a power, or on the way from a reference to it.

    pi_beta(x)  proportional to  pi(x)^beta                      or with a reference rho,
    pi_beta(x)  proportional to  rho(x)^(1 - beta) pi(x)^beta

With the prior as reference this is prior times likelihood^beta, so that one form serves both, and pi is the whole
posterior in either: the target that other kernels sample.

What the state holds is the evaluation of pi, which the kernels of a composition share, not that of pi_beta. One
follows from the other by arithmetic, log pi_beta = beta log pi + (1 - beta) log rho, and the same for gradients:
tempering costs no gradient of pi, and neither does another beta. Only the reference is evaluated anew, at both ends of
a step, since what was kept would go stale when another kernel moves the chain; its gradients are not counted. The way
back divides by beta and magnifies rounding by 1 / beta, which is undone where it is multiplied by a beta of that order
again. At beta = 0 there is no way back.

References:
    Neal (1996), doi:10.1007/BF00143556 (tempered transitions).
    Gelman and Meng (1998), doi:10.1214/ss/1028905934 (the geometric path between two densities).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, select
from bayesinf.kernels.parts import check_target
from bayesinf.kernels.posterior import as_prior
from bayesinf.kernels.vectors import combine, differ
from bayesinf.kernels.wrapping import Wrapping
from bayesinf.target import Target

__all__ = ["Temper", "as_reference"]


def as_reference(reference: Any) -> Target | None:
    """The density of a reference: of a target as it is, of a prior moved to the unconstrained space."""
    if reference is None or (isinstance(reference, Target) and reference.model is None):
        return reference
    return Target(_log_density, as_prior(reference))


def _log_density(position: PyTree, prior: Any) -> Float[Array, ""]:
    return prior.log_density(position)


class Temper(Wrapping):
    """A kernel on pi^beta, or on rho^(1 - beta) pi^beta; its `target` is still pi.

    Attributes:
        kernel: a kernel with a target, pi. It leaves pi_beta invariant, not pi.
        beta: inverse temperature, positive; 1 changes nothing, above 1 the target is sharper.
        reference: rho; a `Target`, or the prior where pi is the posterior: a NumPyro distribution or a pytree of them,
            a pair (sample, log_prob), or `Target.from_numpyro(model, ...)`, whose latent sites are the prior. None for
            a constant.

    Raises:
        ValueError: the kernel has no target, or beta is not a positive scalar.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -50.0 * (x**2 - 1.0) ** 2)  # two modes and a wall between them
        >>> kernel = bi.kernels.Temper(bi.kernels.MALA(target, step_size=0.1), beta=0.05)
        >>> draws = bi.sample(0, kernel, jnp.ones(4), num_samples=200, progress=False)
        >>> bool(jnp.any(draws.samples < -0.5))
        True
    """

    kernel: Any
    beta: Float[Array, ""] = eqx.field(converter=errors.as_array("beta", is_floating=True))
    reference: Target | None = eqx.field(converter=as_reference, default=None)

    def __check_init__(self):
        check_target(self.kernel)
        errors.check_positive_scalar("beta", self.beta)

    def init(self, position: PyTree) -> Any:
        return self._untempered(self._tempered().init(position))

    def step(self, key: Key[Array, ""], state: Any) -> tuple[Any, Any]:
        before = state
        if hasattr(state, "evaluation"):
            reference = self._refer(state.evaluation, state.position)
            before = state._replace(evaluation=_blend(self.beta, state.evaluation, reference))
        after, info = self._tempered().step(key, before)
        moved = self._untempered(after)
        if hasattr(state, "evaluation"):
            # what stands still keeps its evaluation, bit for bit
            has_moved = differ(after.position, state.position)
            moved = moved._replace(evaluation=select(has_moved, moved.evaluation, state.evaluation))
        return moved, info

    @property
    def is_self_reverse(self) -> bool:  # type: ignore[override]
        return getattr(self.kernel, "is_self_reverse", False)

    def _tempered(self) -> Any:
        """The kernel on pi_beta."""
        return self.kernel.with_target(Target(_tempered, (self.target, self.reference, self.beta)))

    def _untempered(self, state: Any) -> Any:
        """The state of the tempered kernel with the evaluation of pi."""
        if not hasattr(state, "evaluation"):
            return state
        reference = self._refer(state.evaluation, state.position)
        return state._replace(evaluation=_blend(1 / self.beta, state.evaluation, reference))

    def _refer(self, like: Evaluation, position: PyTree) -> Evaluation | None:
        """The reference at `position`, with a gradient where `like` has one."""
        return None if self.reference is None else self.reference.evaluate(position, order=int(like.grad is not None))


def _blend(beta: Float[Array, ""], one: PyTree, other: PyTree) -> PyTree:
    """The blend c = beta a + (1 - beta) b of evaluations or numbers; at beta = 1 it is a, even if b is infinite.

    The blend of c and b by 1 / beta is a again.
    """
    if other is None:
        return combine((beta, one))

    def mix(a: Array, b: Array) -> Array:
        weight = jnp.asarray(beta, a.dtype)
        return weight * a + jnp.where(weight == 1, 0.0, (1 - weight) * b.astype(a.dtype))

    return jax.tree.map(mix, one, other)


def _tempered(position: PyTree, data: tuple[Target, Target | None, Array]) -> Float[Array, ""]:
    target, reference, beta = data
    other = None if reference is None else reference.logdensity(position)
    return _blend(beta, target.logdensity(position), other)
