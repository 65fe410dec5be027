"""What generates in steps: a language model that writes lines, a diffusion model that denoises, a Markov chain.

A generator draws, for N particles at once, the next step of every unfinished one,

    x_t ~ q(. | prompt, x_{1:t-1}),    log_ratio = log p(x_t | prompt, x_{1:t-1}) - log q(x_t | prompt, x_{1:t-1})

with p the model and q what was drawn from; they are the same, and the ratio 0, unless the generator has a proposal of
its own. What a step is, the generator says: a token, a line, a paragraph. Particles take different numbers of steps:
one that has finished stays as it is, whatever is called.

All methods are pure, so that a whole run is one compiled loop.
"""

from abc import abstractmethod
from typing import Any, NamedTuple

import equinox as eqx
import jax
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf.resampling import gather

__all__ = ["StepGenerator", "StepInfo"]


class StepInfo(NamedTuple):
    """What a step did to each particle; zeros, and True, for those that had finished before.

    Attributes:
        log_ratio: log p - log q of what was drawn; 0 where it was drawn from the model.
        num_tokens: how many tokens, or other units of cost, it took.
        is_done: whether the particle is complete.
    """

    log_ratio: Float[Array, " N"]
    num_tokens: Int[Array, " N"]
    is_done: Bool[Array, " N"]


class StepGenerator(eqx.Module):
    """The contract of a generator that runs in process.

    A state is a pytree with a leading axis of particles, but for what all of them share (such as the prompt's part of
    a cache), which `gather` and `prefix` leave as it is. Its structure, shapes and dtypes never change.

    Attributes:
        max_steps: after which every particle is finished, if it was not before.
        max_tokens_per_step: the most that a step of one particle costs.
    """

    max_steps: eqx.AbstractVar[int]
    max_tokens_per_step: eqx.AbstractVar[int]

    def encode(self, prompt: Any) -> PyTree:
        """The prompt as `init` takes it, on the host: arrays, best of a shape that does not depend on its length."""
        return prompt

    @abstractmethod
    def init(self, key: Key[Array, ""], prompt: Any, num_particles: int) -> PyTree:
        """The state before the first step; the prompt is read once, not once a particle."""

    @abstractmethod
    def step(self, key: Key[Array, ""], state: PyTree) -> tuple[PyTree, StepInfo]:
        """One more step of every particle that has not finished."""

    def gather(self, state: PyTree, ancestors: Int[Array, " n"]) -> PyTree:
        """The state of n particles, the i-th of which is a copy of particle ancestors[i].

        It is called before every step. Of most resamplings, survivors keep their place: a generator whose rows are
        large copies those alone that change.
        """
        return gather(state, ancestors)

    def place(self, state: PyTree, other: PyTree) -> PyTree:
        """The state with the one particle of `other` in its first place; both were begun with one prompt.

        What has the same shape in both is shared by all particles, and left as it is.
        """
        return jax.tree.map(lambda leaf, new: leaf if leaf.shape == new.shape else leaf.at[0].set(new[0]), state, other)

    @abstractmethod
    def prefix(self, state: PyTree, num_steps: Int[Array, ""]) -> PyTree:
        """The state that these particles were in after their first `num_steps` steps; the state itself, if longer."""

    @abstractmethod
    def decode(self, state: PyTree) -> list[str]:
        """What the particles have written, on the host."""

    def num_prompt_tokens(self, prompt: Any) -> int:
        """How many tokens an encoded prompt has, on the host; 0 for generators that read none."""
        return 0
