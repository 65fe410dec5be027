"""The contract of a transition kernel.

A kernel is a pytree with two pure functions,

    init(position) -> state,          step(key, state) -> (state, info),

and every State has a `.position`. Data, step sizes and preconditioners are leaves, so a new value of the same shape
compiles nothing, and kernels can be vmapped, differentiated, donated and checkpointed. Structure, shape and dtype of
the state never change across a step. Nothing raises inside: a non-finite log density is a rejected move (for an
unadjusted kernel an undone one) and is counted in `Info.is_divergent`; the driver decides.

It is BlackJAX's protocol, so kernels of either library run in the loops of the other.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

__all__ = ["Evaluation", "Info", "Kernel", "accept", "is_finite", "keep_finite", "refreshed", "select"]

S = TypeVar("S")
K = TypeVar("K", bound="Kernel")


class Evaluation(NamedTuple):
    """What a target says of one position.

    Attributes:
        logdensity: log pi(x) up to a constant; a scalar.
        grad: its gradient, a pytree like the position; None where only the log density was asked for.
    """

    logdensity: Float[Array, ""]
    grad: PyTree = None


class Info(NamedTuple):
    """What a diagnostic may want from one step; `sample` keeps it of every draw as `Draws.stats`.

    A kernel that has more to say returns a NamedTuple of its own, the first four of these among its fields. All are
    scalars, in the types given here.

    Attributes:
        acceptance_rate: the probability with which the proposal is accepted; 1 for kernels that always move.
        is_accepted: whether the state moved to the proposal.
        is_divergent: whether a log density or gradient was NaN or +inf; the move was then undone.
        num_gradients: gradient evaluations spent.
        log_work: log density of the reversed step minus that of the step, log r(x' -> x) - log q(x -> x'), where a
            path weight exists, else None. Along a path with targets pi_0, ..., pi_n the weight
            log pi_n(x_n) - log pi_0(x_0) + sum log_work has mean-exp Z_n / Z_0, for unadjusted kernels too.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.LMC(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.1)
        >>> _, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> float(info.acceptance_rate), bool(info.is_divergent)
        (1.0, False)
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    log_work: Float[Array, ""] | None = None


class Kernel(eqx.Module):
    """Abstract transition kernel; concrete kernels are final.

    To write one, declare what it samples and its parameters as fields, and give it `init` and `step`. Fields that are
    converted to arrays are arguments of the compiled programs; the class attributes say what drivers may do with it.
    Then it warms up, composes, and runs in `sample`, and `conformance.contract` tells whether it keeps the protocol.

    Class attributes:
        target_acceptance: the acceptance rate that warm-up tunes the step size to; None where there is none to tune.
        is_sequential: whether several chains run faster one by one (on threads) than vectorised on a CPU, as is the
            case for kernels that branch, loop or gather.
        is_self_reverse: whether `log_work` compares a step with one of this same kernel, backwards; such a kernel may
            be adjusted by `Metropolize`.
        is_tied_to_target: whether its state holds draws of the target besides the position, as of replicas; such a
            kernel is no block of `Gibbs`, whose target changes from step to step.
        is_memoryless: whether its state follows from the position, and holds besides it what goes stale when another
            kernel moves the chain; compositions then start it anew at every step.
        is_exact: whether its own steps leave the target invariant; False for a discretised diffusion that no
            Metropolis test corrects. What a composite is follows from its parts.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp
        >>> from typing import ClassVar, NamedTuple
        >>> import bayesinf as bi
        >>> from bayesinf.kernel import Evaluation, accept
        >>> class State(NamedTuple):
        ...     position: jax.Array
        ...     evaluation: Evaluation
        >>> class RandomWalk(bi.Kernel):
        ...     target_acceptance: ClassVar[float | None] = 0.234
        ...     target: bi.Target
        ...     step_size: jax.Array = eqx.field(converter=jnp.asarray)
        ...     def init(self, position):
        ...         return State(position, self.target.evaluate(position))
        ...     def step(self, key, state):
        ...         key_move, key_accept = jax.random.split(key)
        ...         move = self.step_size * jax.random.normal(key_move, state.position.shape)
        ...         proposed = self.init((state.position + move).astype(state.position.dtype))
        ...         log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity
        ...         return accept(key_accept, log_ratio, proposed, state, num_gradients=0)
        >>> kernel = RandomWalk(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=1.0)
        >>> bi.sample(0, kernel, jnp.zeros((4, 2)), num_samples=100, num_warmup=100, progress=False).num_chains
        4
    """

    target_acceptance: ClassVar[float | None] = None
    is_sequential: ClassVar[bool] = False
    is_self_reverse: ClassVar[bool] = False
    is_tied_to_target: ClassVar[bool] = False
    is_memoryless: ClassVar[bool] = False
    is_exact: ClassVar[bool] = True

    @abc.abstractmethod
    def init(self, position: PyTree) -> Any:
        """The state that starts a chain at `position`; deterministic."""

    @abc.abstractmethod
    def step(self, key: Key[Array, ""], state: Any) -> tuple[Any, Any]:
        """One transition."""

    def with_target(self: K, target: Any) -> K:
        """The same kernel on another target."""
        return dataclasses.replace(self, target=target)  # type: ignore[call-arg]

    def with_step_size(self: K, step_size: Any) -> K:
        """The same kernel with another step size; what warm-up calls."""
        return dataclasses.replace(self, step_size=step_size)  # type: ignore[call-arg]

    def with_metric(self: K, covariance: Any) -> K:
        """The same kernel with a metric for this covariance of the target, or its diagonal; what warm-up calls."""
        return dataclasses.replace(self, inverse_mass_matrix=covariance)  # type: ignore[call-arg]

    def suited_warmup(self, num_warmup: int) -> Any:
        """The kernel's own warm-up, which `sample` uses unless told otherwise; None where it has none."""
        return None

    @property
    def metric(self) -> Float[Array, "..."] | None:
        """The covariance, or its diagonal, that `with_metric` would set to what it is; None where it is all ones."""
        return getattr(self, "inverse_mass_matrix", None)

    @property
    def has_metric(self) -> bool:
        """Whether `with_metric` has something to set: a field `inverse_mass_matrix`, or it is the kernel's own."""
        return hasattr(self, "inverse_mass_matrix") or type(self).with_metric is not Kernel.with_metric


def refreshed(kernel: Any, key: Key[Array, ""], state: Any) -> Any:
    """The state with a velocity, or what else it holds besides the position, drawn from its law; else as it is.

    `init` cannot draw: a chain forgets that it began at rest, but particles that are moved a few times do not.
    """
    refresh = getattr(kernel, "refresh", None)  # of kernels on paths it is a word
    return refresh(key, state) if callable(refresh) else state


def is_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of an evaluation, or of any other pytree, is finite."""
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(finite))


def accept(
    key: Key[Array, ""], log_ratio: Float[Array, ""], proposed: S, current: S, *, num_gradients: int | Array
) -> tuple[S, Info]:
    """The Metropolis-Hastings decision between two states that carry an `evaluation`.

    A log density of -inf is an ordinary rejection; NaN, +inf or a non-finite gradient rejects and counts as divergent.

    Args:
        key: decides.
        log_ratio: log of pi(y) q(y, x) / (pi(x) q(x, y)).
        proposed, current: states with `.evaluation`, of the same structure.
        num_gradients: what the proposal cost.

    Returns:
        The state that was decided for, and its `Info`; `log_work` is that of a reversible move.
    """
    old, new = current.evaluation.logdensity, proposed.evaluation.logdensity  # type: ignore[attr-defined]
    is_outside = jnp.isneginf(new)
    is_divergent = ~is_outside & ~is_finite(proposed.evaluation)  # type: ignore[attr-defined]
    log_ratio = jnp.where(is_outside | is_divergent | jnp.isnan(log_ratio), -jnp.inf, log_ratio)
    is_accepted = jnp.log(jax.random.uniform(key, dtype=log_ratio.dtype)) < log_ratio
    state = select(is_accepted, proposed, current)
    # reversible: r = q, and pi(x) q(x, x') = pi(x') q(x', x)
    log_work = jnp.where(is_accepted, old - new, jnp.zeros_like(old))
    info = Info(
        jnp.exp(jnp.minimum(log_ratio, 0.0)), is_accepted, is_divergent, jnp.asarray(num_gradients, jnp.int32), log_work
    )
    return state, info


def keep_finite(
    proposed: S,
    current: S,
    *,
    num_gradients: int,
    log_work: Float[Array, ""] | None = None,
    evaluations: Sequence[Evaluation] | None = None,
) -> tuple[S, Info]:
    """The move of an unadjusted kernel: taken, unless an evaluation on its way is not finite; then undone and counted.

    Args:
        proposed: where the move ends.
        current: where the chain is if the move is undone.
        num_gradients: what the move cost.
        log_work: of the move; 0 if it is undone.
        evaluations: all that the move has made; by default `proposed.evaluation`.

    Returns:
        The state and its `Info`, with acceptance rate 1 or 0.
    """
    if evaluations is None:
        evaluations = [proposed.evaluation]  # type: ignore[attr-defined]
    is_ok = jnp.all(jnp.stack([is_finite(evaluation) for evaluation in evaluations]))
    if log_work is not None:
        log_work = jnp.where(is_ok, log_work, jnp.zeros_like(log_work))
    rate = is_ok.astype(evaluations[-1].logdensity.dtype)
    info = Info(rate, is_ok, ~is_ok, jnp.asarray(num_gradients, jnp.int32), log_work)
    return select(is_ok, proposed, current), info


def select(condition: Bool[Array, ""], on_true: S, on_false: S) -> S:
    """Leaf-wise `where`, in the dtype of `on_false`."""
    return jax.tree.map(lambda new, old: jnp.where(condition, new, old).astype(old.dtype), on_true, on_false)
