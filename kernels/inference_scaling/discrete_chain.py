"""A Markov chain that writes letters: the smallest generator, whose posteriors are known by dynamic programming.

    x_1 ~ initial,    x_t | x_{t-1} ~ transition[x_{t-1}, .]    until an end letter, or T letters

Use it to try a potential or a method where the truth can be computed, before paying for a language model.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf import errors
from bayesinf.kernels.inference_scaling.generator import StepGenerator, StepInfo

__all__ = ["ChainState", "DiscreteChain"]


class ChainState(NamedTuple):
    """Letters so far.

    Attributes:
        letters: indices into the alphabet; -1 where nothing is written yet.
        num_letters: how many are written.
        is_done: which particles have finished.
    """

    letters: Int[Array, "N t"]
    num_letters: Int[Array, " N"]
    is_done: Bool[Array, " N"]

    @property
    def last(self) -> Int[Array, " N"]:
        """The last letter of each particle; -1 before the first."""
        at = jnp.maximum(self.num_letters - 1, 0)
        return jnp.take_along_axis(self.letters, at[:, None], axis=1)[:, 0]


class DiscreteChain(StepGenerator):
    """A Markov chain that writes one letter a step.

    Attributes:
        initial: probabilities of the first letter.
        transition: of the next, given the last; rows sum to one.
        proposal: other transition probabilities to draw from, corrected by weights; the same if None.
        max_steps: T. Static.
        alphabet: the letters. Static.
        end: the letters after which nothing follows. Static.

    Raises:
        ValueError: probabilities do not sum to one, shapes or letters do not fit, or the proposal misses a transition.

    Example:
        >>> import jax
        >>> from bayesinf.kernels.inference_scaling import DiscreteChain
        >>> chain = DiscreteChain([0.0, 1.0, 0.0], [[0, 0, 1], [1, 0, 0], [0, 0, 1]], max_steps=5, end="c")
        >>> state = chain.init(jax.random.key(0), None, 1)
        >>> for _ in range(5):
        ...     state, info = chain.step(jax.random.key(0), state)
        >>> chain.decode(state)
        ['bac']
    """

    initial: Float[Array, " k"] = eqx.field(converter=errors.as_array("initial", is_floating=True))
    transition: Float[Array, "k k"] = eqx.field(converter=errors.as_array("transition", is_floating=True))
    max_steps: int = eqx.field(static=True)
    alphabet: str = eqx.field(static=True, default="abcdefghijklmnopqrstuvwxyz")
    end: str = eqx.field(static=True, default="")
    proposal: Float[Array, "k k"] | None = eqx.field(
        converter=errors.as_array("proposal", is_optional=True, is_floating=True), default=None
    )
    max_tokens_per_step = 1

    def __check_init__(self):
        errors.check_count("max_steps", self.max_steps)
        num = self.initial.shape[0] if self.initial.ndim == 1 else 0
        for name, shape in (("initial", (num,)), ("transition", (num, num)), ("proposal", (num, num))):
            table = getattr(self, name)
            if table is None:
                continue
            if table.shape != shape or num == 0:
                raise ValueError(f"{name} must have shape {shape}, as many letters as initial has, got {table.shape}")
            if errors.is_concrete(table):
                rows = np.asarray(table)
                if np.any(rows < 0) or not np.allclose(rows.sum(-1), 1.0, atol=1e-5):
                    raise ValueError(f"{name} must hold probabilities that sum to one, got sums {rows.sum(-1)}")
        if self.proposal is not None and errors.is_concrete((self.transition, self.proposal)):
            is_missed = (np.asarray(self.transition) > 0) & (np.asarray(self.proposal) == 0)
            if np.any(is_missed):
                row, column = np.argwhere(is_missed)[0]
                raise ValueError(
                    "proposal must be positive where transition is, or what it misses is missing from every estimate; "
                    f"got 0 at [{row}, {column}]"
                )
        if len(self.alphabet) < num:
            raise ValueError(f"alphabet must have at least {num} letters, got {len(self.alphabet)}")
        if set(self.end) - set(self.alphabet[:num]):
            raise ValueError(f"end must be letters of {self.alphabet[:num]!r}, got {self.end!r}")

    def init(self, key: Key[Array, ""], prompt: None, num_particles: int) -> ChainState:
        return ChainState(
            jnp.full((num_particles, self.max_steps), -1, jnp.int32),
            jnp.zeros(num_particles, jnp.int32),
            jnp.zeros(num_particles, bool),
        )

    def step(self, key: Key[Array, ""], state: ChainState) -> tuple[ChainState, StepInfo]:
        is_first = (state.num_letters == 0)[:, None]
        last = jnp.maximum(state.last, 0)
        log_p = jnp.log(jnp.where(is_first, self.initial, self.transition[last]))
        log_q = log_p if self.proposal is None else jnp.log(jnp.where(is_first, self.initial, self.proposal[last]))
        letter = jax.random.categorical(key, log_q, axis=1).astype(jnp.int32)
        log_ratio = jnp.take_along_axis(log_p, letter[:, None], 1) - jnp.take_along_axis(log_q, letter[:, None], 1)

        is_open = ~state.is_done
        at = jnp.where(is_open, state.num_letters, self.max_steps)
        letters = state.letters.at[jnp.arange(letter.shape[0]), at].set(letter, mode="drop")
        num_letters = state.num_letters + is_open
        is_end = jnp.isin(letter, jnp.asarray(self._end_indices(), jnp.int32)) if self.end else jnp.zeros_like(is_open)
        is_done = state.is_done | is_end | (num_letters >= self.max_steps)
        info = StepInfo(jnp.where(is_open, log_ratio[:, 0], 0.0), is_open.astype(jnp.int32), is_done)
        return ChainState(letters, num_letters, is_done), info

    def prefix(self, state: ChainState, num_steps: Int[Array, ""]) -> ChainState:
        is_cut = num_steps < state.num_letters
        is_kept = jnp.arange(self.max_steps) < num_steps
        return ChainState(
            jnp.where(is_kept, state.letters, -1),
            jnp.minimum(state.num_letters, num_steps),
            state.is_done & ~is_cut,
        )

    def decode(self, state: ChainState) -> list[str]:
        rows = np.asarray(state.letters)
        return ["".join(self.alphabet[i] for i in row if i >= 0) for row in rows]

    def _end_indices(self) -> list[int]:
        return [self.alphabet.index(letter) for letter in self.end]
