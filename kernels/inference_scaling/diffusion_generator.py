"""Diffusion models as generators: a step removes a part of the noise.

From noise x_T at times T = t_0 > t_1 > ... > t_K a denoising step draws, with the data guessed by Tweedie's formula,

    m_t(x) = (x + v_t s(x, t)) / alpha_t                              the guess E[x_0 | x_t]
    x_u | x_t ~ the law of x_u given x_t and x_0 = m_t(x_t),  u < t   (DDPM's ancestral sampling)
              = N(a (v_u / v_t) x_t + alpha_u (c / v_t) m_t, v_u c / v_t)

with a = alpha_t / alpha_u, c = v_t - a^2 v_u, and noise as x_t | x_0 ~ N(alpha_t x_0, v_t). The steps come from the
model, so their log_ratio is 0. The law at the end tends to the data's as the steps get finer, with an error of the
order of their size; at t_K = 0 the last step returns its guess.

`denoised` is the guess for every particle: a reward of it is a value of an unfinished sample, which needs no training
(SVDD-PM), and by which FK steering weighs the particles.

References:
    Ho, Jain and Abbeel (2020), arXiv:2006.11239 (DDPM).
    Singhal et al. (2025), arXiv:2501.06848 (FK steering).
    Li et al. (2024), arXiv:2408.08252 (SVDD).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.captured import as_pytree
from bayesinf.kernels.inference_scaling.generator import StepGenerator, StepInfo
from bayesinf.kernels.inference_scaling.noising import Noising, check_times
from bayesinf.resampling import gather

__all__ = ["DiffusionGenerator", "DiffusionState"]


class DiffusionState(NamedTuple):
    """N samples on their way from noise to data.

    Attributes:
        path: what each was after 0, 1, ..., S steps, shape (N, S + 1, ...); zeros where it has not been.
        num_steps: how many steps each has made.
        prompt: what the score is conditioned on, shared by all; None for nothing.
    """

    path: Float[Array, "N s ..."]
    num_steps: Int[Array, " N"]
    prompt: PyTree

    @property
    def x(self) -> Float[Array, "N ..."]:
        """What each is now."""
        return jax.vmap(lambda path, t: path[t])(self.path, self.num_steps)


class DiffusionGenerator(StepGenerator):
    """A generator that denoises.

    Attributes:
        score: grad log q_t(x) as `score(x, t)` of one x, or `score(x, t, prompt)` where the prompt is not None.
        noising: of the data the score was learnt from.
        times: from noise to data, falling; S * substeps + 1 of them.
        shape: of one x. Static.
        substeps: denoising steps in a step; particles are weighed between steps only. Static.
        max_steps: S.
        max_tokens_per_step: substeps; a token is an evaluation of the score.

    Raises:
        ValueError: the times do not fall, or cannot be grouped in steps.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bayesinf.kernels.inference_scaling import DiffusionGenerator, VariancePreserving
        >>> noising = VariancePreserving()
        >>> def score(x, t):                             # of data from N(1, 1), whose noised law is N(alpha_t, 1)
        ...     return jnp.exp(noising.log_scale(t)) - x
        >>> generator = DiffusionGenerator(score, noising, jnp.linspace(1.0, 0.0, 101), shape=(), substeps=10)
        >>> state = generator.init(jax.random.key(0), None, num_particles=1_000)
        >>> for t in range(generator.max_steps):
        ...     state, info = generator.step(jax.random.key(t + 1), state)
        >>> bool(jnp.all(info.is_done)), bool(abs(jnp.mean(state.x) - 1.0) < 0.1)
        (True, True)

        A reward of what is to be expected of the data, for FK steering, in the hands of `infer`:

        >>> def value(state):                            # Potential(value, kind="value", is_log=True)
        ...     return -4.0 * jnp.abs(generator.denoised(state) - 2.0)
        >>> value(state).shape
        (1000,)

    References:
        Ho, Jain and Abbeel (2020), arXiv:2006.11239.
    """

    score: Callable[..., Any]
    noising: Noising
    times: Float[Array, " t"]
    shape: tuple[int, ...] = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)
    max_tokens_per_step: int = eqx.field(static=True)

    def __init__(
        self,
        score: Callable[..., Any],
        noising: Noising,
        times: Float[ArrayLike, " t"],
        *,
        shape: tuple[int, ...],
        substeps: int = 1,
    ):
        if not callable(score):
            raise ValueError(f"score must be a function score(x, t), got {type(score).__name__}")
        self.score, self.noising, self.shape = as_pytree(score), noising, tuple(shape)
        self.times = check_times(times)
        self.substeps = self.max_tokens_per_step = errors.check_count("substeps", substeps)
        self.max_steps, rest = divmod(self.times.size - 1, substeps)
        if rest:
            raise ValueError(f"times must be a multiple of substeps={substeps} and one more, got {self.times.size}")

    def init(self, key: Key[Array, ""], prompt: Any, num_particles: int) -> DiffusionState:
        """Noise, of variance v at the first time: what is left of the data there is neglected."""
        errors.check_count("num_particles", num_particles)
        noise = jax.random.normal(key, (num_particles, *self.shape), self.times.dtype)
        start = jnp.sqrt(self.noising.variance(self.times[0])).astype(noise.dtype) * noise
        path = jnp.zeros((num_particles, self.max_steps + 1, *self.shape), noise.dtype).at[:, 0].set(start)
        return DiffusionState(path, jnp.zeros(num_particles, jnp.int32), jax.tree.map(jnp.asarray, prompt))

    def step(self, key: Key[Array, ""], state: DiffusionState) -> tuple[DiffusionState, StepInfo]:
        """`substeps` denoising steps of every sample that is not finished."""
        is_going = state.num_steps < self.max_steps
        begin = jnp.minimum(state.num_steps, self.max_steps - 1) * self.substeps

        def denoise(x: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
            key, j = row
            noise = jax.random.normal(key, x.shape, x.dtype)
            t, u = self.times[begin + j], self.times[begin + j + 1]
            return jax.vmap(self._denoise, (0, 0, 0, 0, None))(x, t, u, noise, state.prompt), None

        rows = jax.random.split(key, self.substeps), jnp.arange(self.substeps)
        x, _ = jax.lax.scan(denoise, state.x, rows)
        num_steps = state.num_steps + is_going
        # what has finished writes its last x where it stands
        x = jnp.where(is_going.reshape((-1,) + (1,) * len(self.shape)), x, state.x)
        path = jax.vmap(lambda path, x, t: path.at[t].set(x))(state.path, x, num_steps)
        info = StepInfo(
            jnp.zeros(is_going.shape, x.dtype),
            jnp.where(is_going, self.substeps, 0).astype(jnp.int32),
            num_steps >= self.max_steps,
        )
        return DiffusionState(path, num_steps, state.prompt), info

    def gather(self, state: DiffusionState, ancestors: Int[Array, " n"]) -> DiffusionState:
        path, num_steps = gather((state.path, state.num_steps), ancestors)
        return DiffusionState(path, num_steps, state.prompt)

    def prefix(self, state: DiffusionState, num_steps: Int[Array, ""]) -> DiffusionState:
        num_steps = jnp.minimum(state.num_steps, num_steps).astype(jnp.int32)
        is_past = jnp.arange(state.path.shape[1]) <= num_steps[:, None]
        is_past = is_past.reshape(is_past.shape + (1,) * len(self.shape))
        return DiffusionState(jnp.where(is_past, state.path, 0.0), num_steps, state.prompt)

    def decode(self, state: DiffusionState) -> list[str]:
        """The numbers of each sample, as text."""
        return [np.array2string(x, separator=", ", threshold=20) for x in np.asarray(state.x)]

    def denoised(self, state: DiffusionState) -> Float[Array, "N ..."]:
        """E[x_0 | x_t] of every sample, by Tweedie's formula."""
        times = self.times[state.num_steps * self.substeps]
        return jax.vmap(self._guess, (0, 0, None))(state.x, times, state.prompt)

    def _guess(self, x: Array, t: Array, prompt: PyTree) -> Array:
        score = self.score(x, t) if prompt is None else self.score(x, t, prompt)
        if jnp.shape(score) != x.shape:
            raise ValueError(f"score must return an array of the shape {x.shape} of x, got {jnp.shape(score)}")
        variance, scale = self.noising.variance(t), jnp.exp(self.noising.log_scale(t))
        return ((x + variance * score) / scale).astype(x.dtype)

    def _denoise(self, x: Array, t: Array, u: Array, noise: Array, prompt: PyTree) -> Array:
        v_t, v_u = self.noising.variance(t), self.noising.variance(u)
        shrink = jnp.exp(self.noising.log_scale(t) - self.noising.log_scale(u))
        rest = v_t - shrink**2 * v_u
        mean = shrink * v_u * x + jnp.exp(self.noising.log_scale(u)) * rest * self._guess(x, t, prompt)
        return (mean / v_t + jnp.sqrt(v_u * rest / v_t) * noise).astype(x.dtype)
