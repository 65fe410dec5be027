"""Langevin dynamics driven by gradients of minibatches: SGLD and SGHMC.

Each evaluates an unbiased estimate g(x) of grad log pi(x) once a step, where the step ends, and never the density of
all the data. Nothing is accepted or rejected: one part of the error falls with the step size alone, one with the step
size times the variance of g. Control variates (`Minibatch.centred`) make the second small; a run at half the step size
shows how much is left of both.

A move to where the log density or the gradient of its batch is not finite is undone and counted. `num_gradients` counts
gradients of a batch, two for an estimate with control variates: divide by num_rows / batch_size for passes over the
data. The state has the size of the position, whatever the data.

References:
    Welling and Teh (2011), ICML 28, 681-688 (SGLD).
    Chen, Fox and Guestrin (2014), arXiv:1402.4102 (SGHMC).
    Teh, Thiery and Vollmer (2016), JMLR 17(7) (step sizes that decay).
    Brosse, Durmus and Moulines (2018), arXiv:1811.10072 (what SGLD with a fixed step samples without control variates).
"""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Info, Kernel, keep_finite
from bayesinf.kernels.kinetic import PhaseState, refresh_velocity, turned
from bayesinf.kernels.minibatch import Minibatch
from bayesinf.kernels.vectors import as_position, combine, normals

__all__ = ["SGHMC", "SGLD", "SGLDInfo", "SGLDState"]


class SGLDState(NamedTuple):
    """Position, the estimate of the gradient there, and how many steps have been made."""

    position: PyTree
    gradient: PyTree
    num_steps: Int[Array, ""]


class SGLDInfo(NamedTuple):
    """An Info with the step size of the step: the weight of the draw where step sizes decay."""

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    step_size: Float[Array, ""]


def _as_minibatch(target: Any) -> Minibatch:
    if not isinstance(target, Minibatch):
        raise ValueError(
            f"target must be a kernels.Minibatch, got {type(target).__name__}; for the gradient of all the data take "
            "LMC or a Splitting"
        )
    return target


class SGLD(Kernel):
    """Stochastic gradient Langevin dynamics.

        x' = x + h_k g(x) + sqrt(2 h_k) xi,       h_k = h (1 + k / delay)^(-decay)

    With a fixed step the noise of the batches adds to that of the diffusion: on a Gaussian of curvature A, where g has
    the variance V, the stationary covariance S solves  A S + S A - h A S A = 2 I + h V.  With decay in (0, 1]
    expectations are averages weighted by `info.step_size`; they converge to those of pi, fastest with decay = 1/3.

    Attributes:
        target: what is sampled.
        step_size: h > 0, in units of the Langevin diffusion's time (Welling and Teh's epsilon is 2h).
        decay: the exponent, in [0, 1]; 0 for a fixed step.
        delay: after how many steps the decay sets in, > 0; without meaning for decay = 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def log_prior(x): return -0.5 * (x / 10) ** 2
        >>> def log_likelihood(x, y): return -0.5 * (y - x) ** 2
        >>> target = bi.kernels.Minibatch(log_prior, log_likelihood, jnp.linspace(0.0, 2.0, 100), batch_size=10)
        >>> kernel = bi.kernels.SGLD(target, step_size=1e-3)
        >>> draws = bi.sample(0, kernel, jnp.ones(4), num_samples=1000, num_warmup=100, progress=False)
        >>> abs(float(draws.samples.mean()) - 1.0) < 0.1
        True
    """

    is_exact: ClassVar[bool] = False

    target: Minibatch = eqx.field(converter=_as_minibatch)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    decay: Float[Array, ""] = eqx.field(converter=errors.as_array("decay"), default=0.0)
    delay: Float[Array, ""] = eqx.field(converter=errors.as_array("delay"), default=1.0)

    def __check_init__(self):
        errors.check_positive_scalar("step_size", self.step_size)
        errors.check_positive_scalar("delay", self.delay)
        if errors.is_concrete(self.decay) and not 0 <= float(self.decay) <= 1:
            raise ValueError(f"decay must lie in [0, 1], or the chain comes to a stop, got {float(self.decay)}")

    def init(self, position: PyTree) -> SGLDState:
        """The state at `position`; its gradient is of the middle rows of the blocks, as there is no key to draw by."""
        position = as_position(position)
        gradient = self.target.estimate(None, position).grad
        return SGLDState(position, gradient, jnp.zeros((), jnp.int32))

    def step(self, key: Key[Array, ""], state: SGLDState) -> tuple[SGLDState, SGLDInfo]:
        key_noise, key_batch = jax.random.split(key)
        h = self.step_size * (1 + state.num_steps / self.delay) ** -self.decay
        (noise,) = normals(key_noise, state.position, 1)
        position = combine((1, state.position), (h, state.gradient), (jnp.sqrt(2 * h), noise))
        there = self.target.estimate(key_batch, position)

        proposed = SGLDState(position, there.grad, state.num_steps)
        kept, info = keep_finite(proposed, state, num_gradients=self.target.num_gradients, evaluations=[there])
        return kept._replace(num_steps=state.num_steps + 1), SGLDInfo(*info[:4], step_size=h)


class SGHMC(Kernel):
    """Stochastic gradient Hamiltonian Monte Carlo: kinetic Langevin dynamics with friction against the batches' noise.

        x' = x + h v,       v' = e^(-gamma h) v + h u g(x') + sqrt(u (1 - e^(-2 gamma h)) - h^2 u^2 V) xi

    with friction gamma, inverse mass u, and V an estimate of the variance of g: what the batches add counts as a part
    of the noise that the friction asks for. Chen, Fox and Guestrin's friction 1 - gamma h and noise 2 (gamma - B) u h,
    B = h u V / 2, are the first order of what stands here, which is stable for every gamma if h^2 u M < 2, with M the
    largest curvature of -log pi. A move that is undone turns the velocity back.

    V = 0 is always safe, but leaves the noise of the batches on top. An estimate at the mode:

        V = jnp.var(jax.vmap(target.estimate, (0, None))(keys, mode).grad, axis=0)

    Attributes:
        target: what is sampled.
        step_size: h > 0, time of the dynamics; on a Gaussian stable for h^2 u M < 2 (1 + e^(-gamma h)).
        friction: gamma > 0.
        inverse_mass: u > 0, the variance of the velocity.
        gradient_variance: V >= 0, a number, or for each coordinate in the structure of the position.

    Raises:
        ValueError: a parameter is out of range, or h^2 u^2 V exceeds u (1 - e^(-2 gamma h)): the batches are noisier
            than the friction can take up.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> def log_prior(x): return -0.5 * (x / 10) ** 2
        >>> def log_likelihood(x, y): return -0.5 * (y - x) ** 2
        >>> target = bi.kernels.Minibatch(log_prior, log_likelihood, jnp.linspace(0.0, 2.0, 100), batch_size=10)
        >>> kernel = bi.kernels.SGHMC(target, step_size=0.01, friction=10.0)
        >>> draws = bi.sample(0, kernel, jnp.ones(4), num_samples=1000, num_warmup=100, progress=False)
        >>> abs(float(draws.samples.mean()) - 1.0) < 0.1
        True
    """

    is_exact: ClassVar[bool] = False

    target: Minibatch = eqx.field(converter=_as_minibatch)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    friction: Float[Array, ""] = eqx.field(converter=errors.as_array("friction"), default=1.0)
    inverse_mass: Float[Array, ""] = eqx.field(converter=errors.as_array("inverse_mass"), default=1.0)
    gradient_variance: PyTree = eqx.field(
        converter=lambda variance: errors.as_arrays("gradient_variance", variance), default=0.0
    )

    def __check_init__(self):
        for name in ("step_size", "friction", "inverse_mass"):
            errors.check_positive_scalar(name, getattr(self, name))
        parameters = (self.step_size, self.friction, self.inverse_mass, self.gradient_variance)
        if not errors.is_concrete(parameters):
            return
        variances = [np.asarray(leaf) for leaf in jax.tree.leaves(self.gradient_variance)]
        if not all(np.all(np.isfinite(variance) & (variance >= 0)) for variance in variances):
            raise ValueError(f"gradient_variance must be finite and not negative, got {self.gradient_variance}")
        h, u = float(self.step_size), float(self.inverse_mass)
        largest, bound = max(map(np.max, variances)), -np.expm1(-2 * float(self.friction) * h) / (u * h**2)
        if largest > bound:
            raise ValueError(
                "gradient_variance must be at most (1 - exp(-2 friction step_size)) / (inverse_mass step_size^2) = "
                f"{bound:.4g}, got {largest:.4g}; take a smaller step, more friction, larger batches, or a centre"
            )

    def init(self, position: PyTree) -> PhaseState:
        """The state at `position` and at rest; `refresh` draws a velocity."""
        position = as_position(position)
        self.target.estimate(None, position)  # what does not fit is said here
        return PhaseState(position, jax.tree.map(jnp.zeros_like, position))

    def refresh(self, key: Key[Array, ""], state: PhaseState) -> PhaseState:
        """The state with a fresh velocity from N(0, u I)."""
        return refresh_velocity(key, state, self.inverse_mass)

    def step(self, key: Key[Array, ""], state: PhaseState) -> tuple[PhaseState, Info]:
        key_noise, key_batch = jax.random.split(key)
        h, gamma, u = self.step_size, self.friction, self.inverse_mass
        position = combine((1, state.position), (h, state.velocity))
        there = self.target.estimate(key_batch, position)

        (xi,) = normals(key_noise, position, 1)
        free = -u * jnp.expm1(-2 * gamma * h)
        noise = jax.tree.map(
            lambda z, V: jnp.sqrt(free - (h * u) ** 2 * V).astype(z.dtype) * z, xi, self._variances(xi)
        )
        velocity = combine((jnp.exp(-gamma * h), state.velocity), (h * u, there.grad), (1, noise))
        num_gradients = self.target.num_gradients
        proposed = PhaseState(position, velocity)
        return keep_finite(proposed, turned(state), num_gradients=num_gradients, evaluations=[there])

    def _variances(self, like: PyTree) -> PyTree:
        """V for every leaf."""
        if isinstance(self.gradient_variance, jax.Array) and self.gradient_variance.ndim == 0:
            return jax.tree.map(lambda _: self.gradient_variance, like)
        if jax.tree.structure(self.gradient_variance) != jax.tree.structure(like):
            raise ValueError("gradient_variance must be a number, or have the structure of the position")
        return self.gradient_variance
