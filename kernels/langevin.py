"""Overdamped Langevin kernels: LMC (unadjusted) and MALA (Metropolis-adjusted).

Both discretise dX = grad log pi(X) dt + sqrt(2) dW with step size h, which is time of this diffusion (TFP's step_size
is 2h):

    y = x + h grad log pi(x) + sqrt(2h) xi,   xi ~ N(0, I)

LMC takes y; its stationary law differs from pi by O(h): on N(0, 1/lam) its variance is 1 / (lam (1 - h lam / 2)), and
it is stable for h lam < 2. MALA accepts y with probability min(1, pi(y) q(y, x) / (pi(x) q(x, y))) and leaves pi
invariant for every h > 0.

References:
    Roberts and Tweedie (1996), doi:10.2307/3318418.
    Durmus and Moulines (2017), doi:10.1214/16-AAP1238.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, Kernel, accept, keep_finite
from bayesinf.kernels.vectors import as_position, combine, dot, normals
from bayesinf.target import Target, as_target

__all__ = ["LMC", "MALA", "LangevinState"]


class LangevinState(NamedTuple):
    """What the next step needs: where the chain is, and the target's evaluation there."""

    position: PyTree
    evaluation: Evaluation


class LMC(Kernel):
    """Langevin Monte Carlo, the Euler-Maruyama scheme, without a Metropolis test.

    Fast and biased by O(h); one gradient a step. Its `log_work` lets annealed importance sampling and SMC correct it.

    Attributes:
        target: what is sampled.
        step_size: h > 0, in units of the diffusion's time; stable for h < 2 / (largest curvature).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.LMC(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.1)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        1
    """

    is_exact: ClassVar[bool] = False
    is_self_reverse: ClassVar[bool] = True

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)

    def init(self, position: PyTree) -> LangevinState:
        return _init(self.target, position)

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        proposed, log_work = _propose(self.target, self.step_size, key, state)
        return keep_finite(proposed, state, num_gradients=1, log_work=log_work)


class MALA(Kernel):
    """Metropolis-adjusted Langevin algorithm; exact for every h.

    Geometrically ergodic for log-concave tails no heavier than Gaussian; warm-up tunes h to an acceptance rate of
    0.574.

    Attributes:
        target: what is sampled; one gradient a step.
        step_size: h > 0, in units of the diffusion's time.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> bool(info.acceptance_rate <= 1)
        True

    References:
        Roberts and Rosenthal (1998), doi:10.1111/1467-9868.00123 (the rate 0.574).
    """

    target_acceptance: ClassVar[float | None] = 0.574

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)

    def init(self, position: PyTree) -> LangevinState:
        return _init(self.target, position)

    def step(self, key: Key[Array, ""], state: LangevinState) -> tuple[LangevinState, Info]:
        key_noise, key_accept = jax.random.split(key)
        proposed, log_work = _propose(self.target, self.step_size, key_noise, state)
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity + log_work
        return accept(key_accept, log_ratio, proposed, state, num_gradients=1)


def _init(target: Target, position: PyTree) -> LangevinState:
    position = as_position(position)
    return LangevinState(position, target.evaluate(position, order=1))


def _propose(
    target: Target, h: Float[Array, ""], key: Key[Array, ""], state: LangevinState
) -> tuple[LangevinState, Float[Array, ""]]:
    """The Euler step y from x, and log q(y, x) - log q(x, y).

    The noise that would bring y back to x is -(xi + s g), with g = grad log pi(x) + grad log pi(y) and s = sqrt(h / 2),
    so the log ratio is (|xi|^2 - |xi + s g|^2) / 2 = -s g.(xi + s g / 2): no difference of positions or of large
    squares, either of which would lose its digits in float32.
    """
    (noise,) = normals(key, state.position, 1)
    position = combine((1, state.position), (h, state.evaluation.grad), (jnp.sqrt(2 * h), noise))
    proposed = LangevinState(position, target.evaluate(position, order=1))

    scaled = combine((jnp.sqrt(h / 2), state.evaluation.grad), (jnp.sqrt(h / 2), proposed.evaluation.grad))
    return proposed, -dot(scaled, combine((1, noise), (0.5, scaled)))
