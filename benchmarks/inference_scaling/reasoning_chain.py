"""A Markov chain of reasoning, with a verifier, whose evidence and posterior are known by dynamic programming.

    branch   s_1 ~ initial,  s_t | s_{t-1} ~ transition[s_{t-1}, .]       0 is on track, 1..M-1 lead to wrong answers
    form     u_t uniform on U ways to write the step
    end      after step t with probability stopping[s_t], and after step T
    score    r_t = sigmoid(signal[t, s_t] + bias[s_t] + sigma e[t, s_t, u_t])

with e standard normal and frozen: a prefix that is scored twice has one score, as a model's has. What the signal is
makes two regimes,

    step-correctness   +-a: whether the step is right. Noise is independent from step to step, so products of scores
                       average it out
    value              logit of P(the answer is right | s_t): nothing is learnt from a second look at the same branch

Any potential G = prod_t g_t(s_t, u_t) h(s_end, u_end) has the exact evidence, and posterior, by

    B_t(s) = sum_{s'} P(s, s') mean_u g_{t+1}(s', u) [stop h_{t+1}(s', u) + (1 - stop) B_{t+1}(s')],    Z = B_0
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from bayesinf.kernels.inference_scaling import StepGenerator, StepInfo
from bayesinf.kernels.inference_scaling.potential import SMALLEST_DOUBT, AbstractPotential
from bayesinf.kernels.inference_scaling.sweep import Reference

__all__ = [
    "ChainPath",
    "Exact",
    "ReasoningChain",
    "Verifier",
    "constant_error",
    "exact",
    "exact_draw",
    "exact_from",
    "log_factors",
    "step_verifier",
    "value_verifier",
]


class ChainPath(NamedTuple):
    """What N particles have written; -1 where nothing is yet.

    Attributes:
        branches, forms: of every step, shape (N, T).
        num_steps: so far.
        is_done: which have finished.
    """

    branches: Int[Array, "N t"]
    forms: Int[Array, "N t"]
    num_steps: Int[Array, " N"]
    is_done: Bool[Array, " N"]

    @property
    def last(self) -> tuple[Array, Array, Array]:
        """(t, branch, form) of the last step, from t = 0; of no use before the first."""
        at = jnp.maximum(self.num_steps - 1, 0)
        branch, form = (jnp.take_along_axis(leaf, at[:, None], 1)[:, 0] for leaf in (self.branches, self.forms))
        return at, jnp.maximum(branch, 0), jnp.maximum(form, 0)


class ReasoningChain(StepGenerator):
    """The chain.

    Attributes:
        initial, transition: laws of the first branch, and of the next; shapes (M,), (M, M).
        stopping: the probability to end after a step, by the branch, shape (M,).
        max_steps, num_forms: T and U. Static.
        proposal: other transitions to draw from, corrected by weights; the same if None.
    """

    initial: Float[Array, " m"]
    transition: Float[Array, "m m"]
    stopping: Float[Array, " m"]
    max_steps: int = eqx.field(static=True)
    num_forms: int = eqx.field(static=True)
    proposal: Float[Array, "m m"] | None = None
    max_tokens_per_step = 1

    def init(self, key: Key[Array, ""], prompt: None, num_particles: int) -> ChainPath:
        empty = jnp.full((num_particles, self.max_steps), -1, jnp.int32)
        return ChainPath(empty, empty, jnp.zeros(num_particles, jnp.int32), jnp.zeros(num_particles, bool))

    def step(self, key: Key[Array, ""], state: ChainPath) -> tuple[ChainPath, StepInfo]:
        key_branch, key_form, key_stop = jax.random.split(key, 3)
        num = state.num_steps.shape[0]
        _, last, _ = state.last
        is_first = (state.num_steps == 0)[:, None]
        log_p = jnp.log(jnp.where(is_first, self.initial, self.transition[last]))
        log_q = log_p if self.proposal is None else jnp.log(jnp.where(is_first, self.initial, self.proposal[last]))
        branch = jax.random.categorical(key_branch, log_q, axis=1).astype(jnp.int32)
        form = jax.random.randint(key_form, (num,), 0, self.num_forms, jnp.int32)
        log_ratio = jnp.take_along_axis(log_p, branch[:, None], 1) - jnp.take_along_axis(log_q, branch[:, None], 1)

        is_open = ~state.is_done
        at = (jnp.arange(num), jnp.where(is_open, state.num_steps, self.max_steps))
        num_steps = state.num_steps + is_open
        stops = jax.random.uniform(key_stop, (num,)) < self.stopping[branch]
        is_done = state.is_done | stops | (num_steps >= self.max_steps)
        path = ChainPath(
            state.branches.at[at].set(branch, mode="drop"),
            state.forms.at[at].set(form, mode="drop"),
            num_steps,
            is_done,
        )
        return path, StepInfo(jnp.where(is_open, log_ratio[:, 0], 0.0), is_open.astype(jnp.int32), is_done)

    def prefix(self, state: ChainPath, num_steps: Int[Array, ""]) -> ChainPath:
        is_kept = jnp.arange(self.max_steps) < num_steps
        return ChainPath(
            jnp.where(is_kept, state.branches, -1),
            jnp.where(is_kept, state.forms, -1),
            jnp.minimum(state.num_steps, num_steps),
            state.is_done & (num_steps >= state.num_steps),
        )

    def decode(self, state: ChainPath) -> list[str]:
        """One line a step; the last branch is the answer."""
        branches, forms = np.asarray(state.branches), np.asarray(state.forms)
        return [
            "\n".join(
                f"{s}" if t + 1 == n else f"{s}.{u}" for t, (s, u) in enumerate(zip(row, ways, strict=True)) if s >= 0
            )
            for row, ways, n in zip(branches, forms, np.asarray(state.num_steps), strict=True)
        ]


class Verifier(eqx.Module):
    """A score of the last step: r = sigmoid(logits[t, s, u]), with a table for the noise."""

    logits: Float[Array, "t m u"]

    def __call__(self, state: ChainPath) -> Float[Array, " N"]:
        return jax.nn.sigmoid(self.logits[state.last])


def step_verifier(key: Key[Array, ""], chain: ReasoningChain, strength: float, sigma: float) -> Verifier:
    """Scores of whether a step is right: logits of +-strength, and noise that is frozen by the prefix."""
    shape = (chain.max_steps, chain.initial.shape[0], chain.num_forms)
    signal = jnp.where(jnp.arange(shape[1]) == 0, strength, -strength)
    return Verifier(signal[:, None] + sigma * jax.random.normal(key, shape))


def value_verifier(
    key: Key[Array, ""], chain: ReasoningChain, sigma: float, fooled: float = 0.0, doubt: float = 0.02
) -> Verifier:
    """Guesses of the probability that the answer will be right, between doubt and 1 - doubt, with frozen noise.

    Args:
        key: of this problem.
        chain: of T steps, all of them taken.
        sigma: of the noise, in logits.
        fooled: standard deviation of a bias for each wrong branch, the same at all steps.
        doubt: by which the guesses stay off 0 and 1.
    """
    key_noise, key_bias = jax.random.split(key)
    num = chain.initial.shape[0]
    is_right = (jnp.arange(num) == 0).astype(chain.initial.dtype)
    _, values = jax.lax.scan(lambda v, _: (chain.transition @ v, v), is_right, None, chain.max_steps)
    values = jnp.clip(values[::-1], doubt, 1.0 - doubt)
    signal = jnp.log(values) - jnp.log1p(-values)
    bias = fooled * jnp.where(is_right > 0, 0.0, jax.random.normal(key_bias, (num,)))
    return Verifier(
        (signal + bias)[:, :, None] + sigma * jax.random.normal(key_noise, (*values.shape, chain.num_forms))
    )


class Exact(NamedTuple):
    """The truth.

    Attributes:
        log_evidence: log Z.
        ends: P(the answer takes t steps and ends in s), shape (T, M).
        answers: P(it ends in s), shape (M,).
    """

    log_evidence: Float[Array, ""]
    ends: Float[Array, "t m"]
    answers: Float[Array, " m"]


def log_factors(potential: AbstractPotential) -> tuple[Array, Array]:
    """log g and log h, shape (T, M, U): the weight of every step, and the one of an answer's last step besides."""
    log_g: Any = 0.0
    log_h: Any = 0.0
    for factor in potential.factors:
        log_r = jax.nn.log_sigmoid(factor.score.logits)
        log_not = jax.nn.log_sigmoid(-factor.score.logits)
        zeros = jnp.zeros_like(log_r)
        least = jnp.log(SMALLEST_DOUBT)
        own_g, own_h = {
            "step": (log_r, zeros),
            "odds": (jnp.maximum(log_r, least) - jnp.maximum(log_not, least), zeros),
            # values telescope, however they are spread over the steps
            "value": (zeros, log_r),
            "terminal": (zeros, log_r),
        }[factor.kind]
        log_g, log_h = log_g + factor.exponent * own_g, log_h + factor.exponent * own_h
    return log_g, log_h


def _stopping(chain: ReasoningChain) -> Array:
    """P(end after step t in s), shape (T, M)."""
    is_last = jnp.arange(chain.max_steps)[:, None] == chain.max_steps - 1
    return jnp.where(is_last, 1.0, chain.stopping)


def backward(chain: ReasoningChain, potential: AbstractPotential) -> tuple[Array, Array, Array]:
    """Weights of what is drawn at step t: (going on, ending), shape (T, M, U), and P(., s') rows times those' sum.

    The first two are g (1 - stop) B_t(s) / U and g h stop / U; the third is their sum over forms, shape (T, M).
    """
    log_g, log_h = log_factors(potential)
    stop = _stopping(chain)[:, :, None]
    ending = jnp.exp(log_g + log_h) * stop / chain.num_forms
    passing = jnp.exp(log_g) * (1.0 - stop) / chain.num_forms

    def back(later: Array, row: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        end, on = row
        on = on * (chain.transition @ later)[:, None]
        total = jnp.sum(end + on, axis=1)
        return total, (on, total)

    _, (going, totals) = jax.lax.scan(back, jnp.zeros_like(chain.initial), (ending, passing), reverse=True)
    return going, ending, totals


def exact(chain: ReasoningChain, potential: AbstractPotential) -> Exact:
    """The evidence and the posterior of the answer, by forward recursion."""
    return exact_from(chain, *log_factors(potential))


def exact_from(chain: ReasoningChain, log_g: Array, log_h: Array) -> Exact:
    """The same, with the weights of steps and ends as tables of shape (T, M, U)."""
    stop = _stopping(chain)
    mean_on = jnp.mean(jnp.exp(log_g), axis=2) * (1.0 - stop)
    mean_end = jnp.mean(jnp.exp(log_g + log_h), axis=2) * stop

    def forward(law: Array, row: tuple[Array, Array]) -> tuple[Array, Array]:
        on, end = row
        return (law * on) @ chain.transition, law * end

    _, ends = jax.lax.scan(forward, chain.initial, (mean_on, mean_end))
    total = jnp.sum(ends)
    return Exact(jnp.log(total), ends / total, jnp.sum(ends, axis=0) / total)


def exact_draw(key: Key[Array, ""], chain: ReasoningChain, potential: AbstractPotential) -> Reference:
    """A draw of the posterior, as the reference of a conditional run."""
    going, ending, _ = backward(chain, potential)
    num_forms = chain.num_forms

    def draw(carry: tuple[Array, Array], row: tuple[Array, Array, Array, Array]) -> tuple[Any, Any]:
        last, is_done = carry
        key_t, on, end, t = row
        prior = jnp.where(t == 0, chain.initial, chain.transition[last])
        weight = prior[:, None, None] * jnp.stack([on, end], axis=-1)
        index = jax.random.categorical(key_t, jnp.log(weight).reshape(-1)).astype(jnp.int32)
        branch, form, ends = index // (2 * num_forms), (index // 2) % num_forms, index % 2 == 1
        drawn_from = prior if chain.proposal is None else jnp.where(t == 0, chain.initial, chain.proposal[last])
        log_ratio = jnp.where(is_done, 0.0, jnp.log(prior[branch]) - jnp.log(drawn_from[branch]))
        out = (jnp.where(is_done, -1, branch), jnp.where(is_done, -1, form), log_ratio, ~is_done)
        return (jnp.where(is_done, last, branch), is_done | ends), out

    rows = (jax.random.split(key, chain.max_steps), going, ending, jnp.arange(chain.max_steps))
    start = (jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    _, (branches, forms, log_ratio, was_open) = jax.lax.scan(draw, start, rows)
    num_steps = jnp.sum(was_open).astype(jnp.int32)
    path = ChainPath(
        branches[None].astype(jnp.int32), forms[None].astype(jnp.int32), num_steps[None], jnp.ones(1, bool)
    )
    return Reference(path, log_ratio, num_steps)


def constant_error(
    num_branches: int, max_steps: int, num_forms: int, error: float, recovery: float = 0.0
) -> ReasoningChain:
    """The chain that leaves the track with probability `error` a step, and finds back with `recovery`."""
    stay = jnp.eye(num_branches) * (1.0 - recovery)
    transition = stay.at[1:, 0].set(recovery)
    leave = jnp.full(num_branches, error / (num_branches - 1)).at[0].set(1.0 - error)
    transition = transition.at[0].set(leave)
    return ReasoningChain(leave, transition, jnp.zeros(num_branches), max_steps, num_forms)
