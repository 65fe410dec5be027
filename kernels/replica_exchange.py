"""Replica exchange, or parallel tempering: chains on flatter and flatter targets that exchange their positions.

    pi_k  proportional to  pi^beta_k,  or  rho^(1 - beta_k) pi^beta_k with a reference rho,    1 = beta_1 > ... > beta_K

    1. every replica k makes a step of the kernel on pi_k; if rho can be drawn from, the last, of beta_K = 0, is drawn
    2. neighbours k, k + 1 exchange their positions with probability
       min(1, exp((beta_k - beta_{k+1}) (V(x_{k+1}) - V(x_k)))),       V = log pi - log rho

Both steps leave the product of all pi_k invariant; the chain is the first replica, whose law is pi. The flat targets
have no walls between modes, and what is found there comes down. In 2., pairs that begin at odd and at even k take
turns, so that a position goes on in one direction until it is refused: a round trip takes a time of the order of K,
rather than of K^2 as with pairs that are drawn at random.

An exchange takes along the evaluation of pi and so costs nothing, since tempering is arithmetic (see `temper`). What a
kernel remembers besides, such as a velocity, stays at its temperature.

References:
    Geyer (1991), Computing Science and Statistics: Proc. 23rd Symposium on the Interface, 156.
    Syed, Bouchard-Cote, Deligiannidis and Doucet (2022), doi:10.1111/rssb.12464, arXiv:1905.02939 (turns, reference).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, is_finite, refreshed
from bayesinf.kernels.parts import SharedState, attach, check_target, detach, plain_info
from bayesinf.kernels.posterior import as_prior
from bayesinf.kernels.temper import Temper, as_reference
from bayesinf.kernels.vectors import as_position
from bayesinf.kernels.wrapping import Wrapping
from bayesinf.target import Target

__all__ = ["ReplicaExchange", "ReplicaInfo", "Replicas"]


class Replicas(NamedTuple):
    """What a replica exchange remembers; m replicas are moved by the kernel, the first of them the chain itself.

    Attributes:
        positions: of the replicas from the second on, leading axis m - 1.
        evaluations: of the target itself there.
        own: what each replica's kernel remembers besides, leading axis m.
        is_odd: whether the pairs that begin at the first, third, ... replica are the next to exchange.
    """

    positions: PyTree
    evaluations: Evaluation
    own: Any
    is_odd: Bool[Array, ""]


class ReplicaInfo(NamedTuple):
    """Info of a replica exchange; K replicas, of which m are moved by the kernel.

    Attributes:
        acceptance_rate: mean over the replicas.
        is_accepted: whether the chain was moved by the kernel or by an exchange.
        is_divergent: whether any replica met a log density or gradient of NaN or +inf.
        num_gradients: of all replicas.
        acceptance_rates: of the kernel at each replica.
        swap_rates: probability of an exchange of each pair of neighbours, whether it was its turn or not.
        is_swapped: whether each pair was exchanged.
        log_ratios: V = log pi - log rho of each replica, before the exchange.
    """

    acceptance_rate: Float[Array, ""]
    is_accepted: Bool[Array, ""]
    is_divergent: Bool[Array, ""]
    num_gradients: Int[Array, ""]
    acceptance_rates: Float[Array, " m"]
    swap_rates: Float[Array, " k-1"]
    is_swapped: Bool[Array, " k-1"]
    log_ratios: Float[Array, " k"]


class ReplicaExchange(Wrapping):
    """A kernel on a ladder of tempered targets, whose replicas exchange their positions.

    The state's position is that of the first replica. A chain starts with all replicas at one position, so that the
    first steps are warm-up whatever the position. Warm-up tunes the step size of each replica by itself, a metric from
    the first. `suggest_betas` makes a better ladder of the `swap_rates` of a run.

    It is no block of `Gibbs`, and moves no particles: its replicas would be draws of another target than the next one.

    Args:
        kernel: a kernel with a target, which leaves that target invariant whatever it is.
        betas: inverse temperatures, from 1 down, all positive; ends with 0 if the reference can be drawn from.
        reference: rho. A prior where the target is the posterior: a NumPyro distribution or a pytree of them, a pair
            (sample, log_prob) on the unconstrained space, or `Target.from_numpyro(model, ...)`, whose latent sites are
            the prior; it is drawn from, so that betas must end with 0. Any other `Target`, or None for a constant.
        step_sizes: of the m replicas that the kernel moves; by default h / sqrt(beta) for the kernel's h, which keeps
            pace with the width of pi^beta where a step size is a length, and is cautious where it is a time (MALA).

    Raises:
        ValueError: the kernel has no target, or betas or step_sizes are not of that form.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import numpyro.distributions as dist
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: jnp.logaddexp(-jnp.sum((x - 5.0) ** 2), -jnp.sum((x + 5.0) ** 2)))
        >>> kernel = bi.kernels.ReplicaExchange(bi.kernels.MALA(target, 0.3), betas=[1.0, 0.3, 0.1, 0.03])
        >>> draws = bi.sample(0, kernel, jnp.full((4, 1), 5.0), num_samples=1_000, num_warmup=500, progress=False)
        >>> bool(abs(jnp.mean(draws.samples > 0) - 0.5) < 0.2)
        True
    """

    kernel: Any
    betas: Float[Array, " k"]
    reference: Any
    step_sizes: Float[Array, " m"] | None

    def __init__(self, kernel: Any, betas: Any, reference: Any = None, step_sizes: Any = None):
        check_target(kernel)
        self.kernel = kernel
        is_density = reference is None or (isinstance(reference, Target) and reference.model is None)
        self.reference = reference if is_density else errors.as_arrays("reference", as_prior(reference))
        self.betas = _check_betas(errors.as_array("betas", is_floating=True)(betas), is_drawn=not is_density)
        if step_sizes is None and hasattr(kernel, "step_size"):
            step_sizes = kernel.step_size / jnp.sqrt(self._moving)
        self.step_sizes = errors.as_array("step_sizes", is_optional=True)(step_sizes)
        if self.step_sizes is not None:
            if self.step_sizes.shape != self._moving.shape:
                raise ValueError(
                    "step_sizes must be one for each replica that the kernel moves, of shape "
                    f"{self._moving.shape}, got shape {self.step_sizes.shape}"
                )
            errors.check_positive("step_sizes", self.step_sizes)

    def init(self, position: PyTree) -> SharedState:
        """The state with all replicas at `position`."""
        position = as_position(position)
        if self._prior is not None:
            _check_prior(self._prior, position)
        own = self._each(lambda kernel: detach(kernel.init(position)))
        needs_grad = getattr(getattr(own, "evaluation", None), "grad", None) is not None
        evaluation = self.target.evaluate(position, order=int(needs_grad))
        positions, evaluations = jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self._moving.size - 1, *leaf.shape)), (position, evaluation)
        )
        return SharedState(position, evaluation, Replicas(positions, evaluations, own, jnp.ones((), bool)))

    def refresh(self, key: Key[Array, ""], state: SharedState) -> SharedState:
        """The state with fresh velocities, where the kernel has them; positions stay."""

        def fresh(kernel: Any, key: Array, own: Any, position: PyTree, evaluation: Evaluation) -> Any:
            before, _ = attach(kernel, own, position, evaluation)
            return detach(refreshed(kernel, key, before))

        keys = jax.random.split(key, self._moving.size)
        own = self._each(fresh, keys, state.memory.own, *_joined(state))
        return state._replace(memory=state.memory._replace(own=own))

    def step(self, key: Key[Array, ""], state: SharedState) -> tuple[SharedState, ReplicaInfo]:
        key_move, key_draw, key_swap = jax.random.split(key, 3)
        keys = jax.random.split(key_move, self._moving.size)
        replicas, own, infos = self._each(self._move, keys, state.memory.own, *_joined(state))
        is_divergent = jnp.any(infos.is_divergent)
        num_gradients = jnp.sum(infos.num_gradients, dtype=jnp.int32)
        if self._prior is not None:
            drawn, is_bad = self._draw(key_draw, state)
            replicas = jax.tree.map(lambda leaf, last: jnp.concatenate([leaf, last[None]]), replicas, drawn)
            is_divergent |= is_bad
            num_gradients += int(state.evaluation.grad is not None)

        log_ratios = self._log_ratios(*replicas)
        log_rates = _log_swap_rates(self.betas, log_ratios)
        is_turn = (jnp.arange(log_rates.size) % 2 == 0) == state.memory.is_odd
        is_swapped = is_turn & (jnp.log(jax.random.uniform(key_swap, log_rates.shape, log_rates.dtype)) < log_rates)
        positions, evaluations = self._swap(is_swapped, *replicas)

        position, evaluation = jax.tree.map(lambda leaf: leaf[0], (positions, evaluations))
        hot = jax.tree.map(lambda leaf: leaf[1 : self._moving.size], (positions, evaluations))
        info = ReplicaInfo(
            acceptance_rate=jnp.mean(infos.acceptance_rate),
            is_accepted=infos.is_accepted[0] | is_swapped[0],
            is_divergent=is_divergent,
            num_gradients=num_gradients,
            acceptance_rates=infos.acceptance_rate,
            swap_rates=jnp.exp(jnp.minimum(log_rates, 0.0)),
            is_swapped=is_swapped,
            log_ratios=log_ratios,
        )
        return SharedState(position, evaluation, Replicas(hot[0], hot[1], own, ~state.memory.is_odd)), info

    def with_step_size(self, step_size: Any) -> "ReplicaExchange":
        """With these step sizes, or with those in the present ratios of which the first is a given number."""
        if jnp.ndim(step_size) == 0:
            step_size = self.step_size * (step_size / self.step_size[0])
        return ReplicaExchange(self.kernel, self.betas, self.reference, step_size)

    @property
    def step_size(self) -> Array:
        if self.step_sizes is None:
            raise AttributeError("the kernel that is exchanged has no step size")
        return self.step_sizes

    @property
    def is_tied_to_target(self) -> bool:  # type: ignore[override]
        return True

    @property
    def _prior(self) -> Any:
        """What draws the last replica; None where all are moved by the kernel."""
        return None if self.reference is None or isinstance(self.reference, Target) else self.reference

    @property
    def _moving(self) -> Float[Array, " m"]:
        """The inverse temperatures of the replicas that the kernel moves."""
        return self.betas if self._prior is None else self.betas[:-1]

    def _each(self, function: Any, *args: Any) -> Any:
        """The function of each replica's kernel, and of the rows of the other arguments."""

        def one(beta: Array, step_size: Any, *args: Any) -> Any:
            kernel = self.kernel if step_size is None else self.kernel.with_step_size(step_size)
            return function(Temper(kernel, beta, as_reference(self.reference)), *args)

        return jax.vmap(one)(self._moving, self.step_sizes, *args)

    def _move(
        self, kernel: Any, key: Array, own: Any, position: PyTree, evaluation: Evaluation
    ) -> tuple[tuple[PyTree, Evaluation], Any, Info]:
        """One step of a replica: where it is then, what it remembers, and its info."""
        before, num_starting = attach(kernel, own, position, evaluation)
        after, info = kernel.step(key, before)
        evaluation = after.evaluation if hasattr(after, "evaluation") else self.target.evaluate(after.position)
        info = plain_info(info)
        info = info._replace(num_gradients=info.num_gradients + num_starting)
        return (after.position, evaluation), detach(after), info

    def _draw(self, key: Key[Array, ""], state: SharedState) -> tuple[tuple[PyTree, Evaluation], Bool[Array, ""]]:
        """A draw from the reference, and whether the target is not finite there; then it is not exchanged."""
        drawn = self._prior.draw(key)
        position = jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), drawn, state.position)
        evaluation = self.target.evaluate(position, order=int(state.evaluation.grad is not None))
        is_bad = ~jnp.isneginf(evaluation.logdensity) & ~is_finite(evaluation)
        logdensity = jnp.where(is_bad, -jnp.inf, evaluation.logdensity)
        return (position, evaluation._replace(logdensity=logdensity)), is_bad

    def _log_ratios(self, positions: PyTree, evaluations: Evaluation) -> Float[Array, " k"]:
        """V = log pi - log rho of every replica."""
        reference = as_reference(self.reference)
        if reference is None:
            return evaluations.logdensity
        return evaluations.logdensity - jax.vmap(reference.logdensity)(positions)

    def _swap(self, is_swapped: Bool[Array, " pairs"], positions: PyTree, evaluations: Evaluation) -> Any:
        """Positions and evaluations with the pairs exchanged; no replica is in two of them."""
        order = jnp.arange(self.betas.size) + jnp.pad(is_swapped, (0, 1)) - jnp.pad(is_swapped, (1, 0))
        return jax.tree.map(lambda leaf: leaf[order], (positions, evaluations))


def _log_swap_rates(betas: Float[Array, " k"], log_ratios: Float[Array, " k"]) -> Float[Array, " pairs"]:
    """Log of the probability ratio of an exchange of each pair of neighbours; -inf where it is not defined."""
    gaps = (betas[:-1] - betas[1:]).astype(log_ratios.dtype)
    rates = gaps * (log_ratios[1:] - log_ratios[:-1])
    return jnp.where(jnp.isnan(rates), -jnp.inf, rates)


def _joined(state: SharedState) -> tuple[PyTree, Evaluation]:
    """Positions and evaluations of all replicas that the kernel moves."""
    first, hot = (state.position, state.evaluation), (state.memory.positions, state.memory.evaluations)
    return jax.tree.map(lambda leaf, rest: jnp.concatenate([leaf[None], rest]), first, hot)


def _check_betas(betas: Float[Array, "..."], *, is_drawn: bool) -> Float[Array, " k"]:
    if betas.ndim != 1 or betas.size < 2:
        raise ValueError(f"betas must be a vector of at least two inverse temperatures, got shape {betas.shape}")
    if not errors.is_concrete(betas):
        return betas
    values = np.asarray(betas)
    if not (values[0] == 1 and np.all(np.diff(values) <= 0) and np.all(values[:-1] > 0) and values[-1] >= 0):
        raise ValueError(f"betas must begin with 1, not rise, and be positive up to the last, got {values}")
    if (values[-1] == 0) != is_drawn:
        raise ValueError(
            f"betas must end with 0 if the reference is a prior, which can be drawn from, got {values}"
            if is_drawn
            else "betas may end with 0 only where a prior is given as reference, to draw that replica from"
        )
    return betas


def _check_prior(prior: Any, position: PyTree) -> None:
    drawn = jax.eval_shape(lambda: prior.draw(jax.random.key(0)))
    expected, got = (jax.tree.map(jnp.shape, tree) for tree in (position, drawn))
    if expected != got:
        raise ValueError(f"reference must draw positions as those of the target, of shapes {expected}, got {got}")
