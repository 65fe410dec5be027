"""A random step size: the kernel's own, times a factor that is drawn anew for every step of every chain.

    s ~ distribution on (0, inf),   x' ~ K_{s h}(x, .)

The factor is drawn without a look at the state, so the step is a mixture of kernels: it leaves invariant what every K_h
does. It breaks resonances, such as a trajectory of Hamiltonian Monte Carlo that returns to where it began in one
direction at one step size, and now and then takes the small step that gets a chain out of a narrow place.

References:
    Neal (2011), arXiv:1206.1901, sections 3.2 and 3.3 (where the step size is uniform within 20% of its mean).
"""

from typing import Any

import equinox as eqx
import jax
import numpyro.distributions as dist
from jaxtyping import Array, Key, PyTree

from bayesinf import errors
from bayesinf.kernels.wrapping import Wrapping

__all__ = ["Jitter"]


def _as_distribution(distribution: Any) -> Any:
    if not isinstance(distribution, dist.Distribution):
        raise ValueError(f"distribution must be a NumPyro distribution, got {type(distribution).__name__}")
    return jax.tree.map(errors.as_array("distribution", is_floating=True), distribution)


class Jitter(Wrapping):
    """A kernel whose step size is multiplied by a random factor in every step.

    Warm-up tunes the step size that is multiplied, to the mean acceptance rate over the factors.

    Attributes:
        kernel: a kernel with a step size.
        distribution: of the factor; a NumPyro distribution of positive scalars, uniform on [0.8, 1.2] by default.

    Raises:
        ValueError: the kernel has no step size, or the distribution is not one of positive scalars.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> hmc = bi.kernels.HMC(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5, num_integration_steps=4)
        >>> kernel = bi.kernels.Jitter(hmc, dist.LogNormal(0.0, 0.3))
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        4
    """

    kernel: Any
    distribution: Any = eqx.field(converter=_as_distribution, default_factory=lambda: dist.Uniform(0.8, 1.2))

    def __check_init__(self):
        if not (hasattr(self.kernel, "step_size") and hasattr(self.kernel, "with_step_size")):
            raise ValueError(f"kernel must be a kernel with a step size, got {type(self.kernel).__name__}")
        law = self.distribution
        if law.batch_shape or law.event_shape:
            raise ValueError(f"distribution must be one of scalars, got shape {law.batch_shape + law.event_shape}")
        lowest = getattr(law.support, "lower_bound", -1.0)
        if law.support.is_discrete or (errors.is_concrete(lowest) and lowest < 0):
            raise ValueError(f"distribution must be continuous on (0, inf), got {type(law).__name__}")

    def init(self, position: PyTree) -> Any:
        return self.kernel.init(position)

    def step(self, key: Key[Array, ""], state: Any) -> tuple[Any, Any]:
        key_factor, key_step = jax.random.split(key)
        factor = self.distribution.sample(key_factor)
        return self.kernel.with_step_size(self.kernel.step_size * factor).step(key_step, state)

    @property
    def is_self_reverse(self) -> bool:  # type: ignore[override]
        # forwards and backwards by one factor
        return getattr(self.kernel, "is_self_reverse", False)
