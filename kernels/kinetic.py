"""Kinetic (underdamped) Langevin kernels: the exponential integrator and the splittings.

With friction gamma, inverse mass u and step size h, they discretise

    dx = v dt,    dv = -gamma v dt + u grad log pi(x) dt + sqrt(2 gamma u) dW,

which leaves pi(x) N(v; 0, u I) invariant. u = 1 is the convention of physics, u = gamma that of Dalalyan and
Riou-Durand; (gamma, u, h) is the same chain as (gamma / sqrt(u), 1, h sqrt(u)). A good friction is gamma^2 = 2 u m to
4 u m, m the smallest curvature of -log pi that matters.

A splitting carries out exactly solvable pieces in the order of a word; a letter that occurs k times takes time h / k:

    A  x += t v          B  v += t u grad log pi(x)          O  v = e^(-gamma t) v + sqrt(u (1 - e^(-2 gamma t))) xi
    U  the exact flow of A and O together

    BAOAB   exact covariance of x on Gaussians at every stable h, one gradient and one normal a coordinate: the default
    OBABO, ABOBA, OABAO, BUB, UBU, ...   also of second order; a palindrome is, other words are of first order

None is Metropolis-adjusted: the bias in x of the exponential integrator is O(h), of palindromes O(h^2). A move on which
the log density or its gradient is not finite, where it is evaluated, is undone and the velocity turned back, which is
the reversible answer to a wall. Words that do not end with a kick at the last position, such as UBU and ABOBA, evaluate
nothing there: they suit targets that are positive everywhere.

`log_work` is that of the joint law of (x, v), with the velocity's sign changed in the reversed step: the change of
kinetic energy |v|^2 / (2u) over the O and U pieces, since the others preserve volume.

References:
    Leimkuhler and Matthews (2013), doi:10.1093/amrx/abs010 (BAOAB).
    Cheng, Chatterji, Bartlett, Jordan (2018), arXiv:1707.03663 (the exponential integrator).
    Dalalyan and Riou-Durand (2020), doi:10.3150/19-BEJ1178.
    Alamo and Sanz-Serna (2016), doi:10.1137/16M1058170 (words and their orders); Zapatero (2017) (UBU).
    Sivak, Chodera, Crooks (2013), doi:10.1103/PhysRevX.3.011007 (shadow work).
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from bayesinf import errors
from bayesinf.kernel import Evaluation, Info, Kernel, keep_finite
from bayesinf.kernels.ornstein_uhlenbeck import FreeFlow, free_flow
from bayesinf.kernels.vectors import as_position, combine, dot, normals
from bayesinf.target import Target, as_target

__all__ = ["KineticLangevin", "KineticState", "PhaseState", "Splitting"]

S = TypeVar("S", bound=Any)


class KineticState(NamedTuple):
    """Position, the target's evaluation there, and velocity."""

    position: PyTree
    evaluation: Evaluation
    velocity: PyTree


class PhaseState(NamedTuple):
    """Position and velocity: the state of splittings whose last gradient is not at the end of the step."""

    position: PyTree
    velocity: PyTree


class KineticLangevin(Kernel):
    """The exponential integrator: the gradient is held over the step, everything else is exact.

        x' = x + psi v + u (h - psi) / gamma grad log pi(x) + n_x,    v' = e^(-gamma h) v + u psi grad log pi(x) + n_v

    with psi = (1 - e^(-gamma h)) / gamma. Biased by O(h); a splitting is better at the same cost, this is the kernel of
    the theory.

    Attributes:
        target: what is sampled; one gradient a step.
        step_size: h > 0, time of the diffusion.
        friction: gamma > 0.
        inverse_mass: u > 0, the variance of the velocity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.KineticLangevin(target, step_size=0.1, friction=2.0)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> state.velocity.shape
        (3,)
    """

    is_exact: ClassVar[bool] = False
    is_self_reverse: ClassVar[bool] = True

    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    friction: Float[Array, ""] = eqx.field(converter=errors.as_array("friction"), default=1.0)
    inverse_mass: Float[Array, ""] = eqx.field(converter=errors.as_array("inverse_mass"), default=1.0)

    def __check_init__(self):
        check_parameters(self)

    def init(self, position: PyTree) -> KineticState:
        """The state at `position` and at rest; `refresh` draws a velocity."""
        return init_at_rest(self.target, position)

    def refresh(self, key: Key[Array, ""], state: KineticState) -> KineticState:
        """The state with a fresh velocity from N(0, u I)."""
        return refresh_velocity(key, state, self.inverse_mass)

    def step(self, key: Key[Array, ""], state: KineticState) -> tuple[KineticState, Info]:
        u = self.inverse_mass
        x, v, grad = state.position, state.velocity, state.evaluation.grad
        flow = free_flow(self.step_size, self.friction, u)

        z_v, z_x = normals(key, x, 2)
        noise = flow.noise(z_v, z_x)
        free_x, free_v = flow.apply(x, v, noise)
        position = combine((1, free_x), (u * flow.lag, grad))
        velocity = combine((1, free_v), (u * flow.reach, grad))
        proposed = KineticState(position, self.target.evaluate(position, order=1), velocity)

        back_v, back_x = _noise_back(flow, u, noise, state, proposed)
        log_work = 0.5 * (_squared(z_v, z_x) - _squared(back_v, back_x))
        return keep_finite(proposed, turned(state), num_gradients=1, log_work=log_work)


class Splitting(Kernel):
    """A splitting of kinetic Langevin dynamics, named by its word.

    Attributes:
        word: letters A, B and O, or B and U; take "BAOAB" unless there is a reason. Static.
        target: what is sampled; BAOAB, ABOBA, OBABO, UBU and BUB take one gradient a step.
        step_size: h > 0, time of the diffusion; BAOAB and OBABO are stable for h < 2 / sqrt(u M), with M the largest
            curvature of -log pi.
        friction: gamma > 0.
        inverse_mass: u > 0, the variance of the velocity.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
        >>> kernel = bi.kernels.Splitting("BAOAB", target, step_size=0.5, friction=1.0)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(3)))
        >>> int(info.num_gradients)
        1
    """

    is_exact: ClassVar[bool] = False

    word: str = eqx.field(static=True)
    target: Target = eqx.field(converter=as_target)
    step_size: Float[Array, ""] = eqx.field(converter=errors.as_array("step_size"))
    friction: Float[Array, ""] = eqx.field(converter=errors.as_array("friction"), default=1.0)
    inverse_mass: Float[Array, ""] = eqx.field(converter=errors.as_array("inverse_mass"), default=1.0)

    def __check_init__(self):
        _check_word(self.word)
        check_parameters(self)

    def init(self, position: PyTree) -> KineticState | PhaseState:
        """The state at `position` and at rest; `refresh` draws a velocity."""
        if self._ends_evaluated:
            return init_at_rest(self.target, position)
        position = as_position(position)
        return PhaseState(position, jax.tree.map(jnp.zeros_like, position))

    def refresh(self, key: Key[Array, ""], state: KineticState | PhaseState) -> KineticState | PhaseState:
        """The state with a fresh velocity from N(0, u I)."""
        return refresh_velocity(key, state, self.inverse_mass)

    def step(self, key: Key[Array, ""], state: KineticState | PhaseState) -> tuple[KineticState | PhaseState, Info]:
        u = self.inverse_mass
        times = {letter: self.step_size / self.word.count(letter) for letter in sorted(set(self.word))}
        flows = {letter: free_flow(times[letter], self.friction, u) for letter in times if letter in "OU"}
        noises = iter(normals(key, state.position, self.word.count("O") + 2 * self.word.count("U")))

        x, v = state.position, state.velocity
        here = state.evaluation if isinstance(state, KineticState) else None  # the evaluation at x, where it is known
        evaluations: list[Evaluation] = []
        log_work = jnp.zeros((), jnp.result_type(*jax.tree.leaves(v)))
        for letter in self.word:
            v_before = v
            if letter == "A":
                x, here = combine((1, x), (times["A"], v)), None
            elif letter == "B":
                if here is None:
                    here = self.target.evaluate(x, order=1)
                    evaluations.append(here)
                v = combine((1, v), (times["B"] * u, here.grad))
            elif letter == "O":
                v = combine((flows["O"].decay, v), (flows["O"].velocity_scale, next(noises)))
            else:
                (x, v), here = flows["U"].apply(x, v, flows["U"].noise(next(noises), next(noises))), None
            if letter in "OU":
                change, total = combine((1, v), (-1, v_before)), combine((1, v), (1, v_before))
                log_work += dot(change, total) / (2 * u)

        proposed = PhaseState(x, v) if here is None else KineticState(x, here, v)
        return keep_finite(
            proposed, turned(state), num_gradients=len(evaluations), log_work=log_work, evaluations=evaluations
        )

    @property
    def is_self_reverse(self) -> bool:  # type: ignore[override]
        return self.word == self.word[::-1]

    @property
    def _ends_evaluated(self) -> bool:
        """Whether the last gradient of a step is at the position where it ends."""
        return self.word.rfind("B") > max(self.word.rfind("A"), self.word.rfind("U"))


def check_parameters(kernel: Any) -> None:
    """The step size, the friction and the inverse mass are positive."""
    for name in ("step_size", "friction", "inverse_mass"):
        errors.check_positive_scalar(name, getattr(kernel, name))


def init_at_rest(target: Target, position: PyTree) -> KineticState:
    """The state at `position` with velocity zero."""
    position = as_position(position)
    return KineticState(position, target.evaluate(position, order=1), jax.tree.map(jnp.zeros_like, position))


def refresh_velocity(key: Key[Array, ""], state: S, inverse_mass: Float[Array, ""]) -> S:
    """The state with a velocity from N(0, u I)."""
    (xi,) = normals(key, state.position, 1)
    return state._replace(velocity=combine((jnp.sqrt(inverse_mass), xi)))


def turned(state: S) -> S:
    """The state with its velocity turned back.

    It is what an undone move leaves behind: so the undone move is its own reverse, and path weights stay right.
    """
    return state._replace(velocity=combine((-1, state.velocity)))


def _noise_back(
    flow: FreeFlow, u: Float[Array, ""], noise: tuple[PyTree, PyTree], state: KineticState, proposed: KineticState
) -> tuple[PyTree, PyTree]:
    """The standard normals (z_v, z_x) with which the integrator goes from (x', -v') to (x, -v)."""
    grad, grad_new = state.evaluation.grad, proposed.evaluation.grad
    back_v = combine((flow.decay, proposed.velocity), (-1, state.velocity), (-u * flow.reach, grad_new))
    # x - x' + psi v' - u lag grad', with x' - x written out: no difference of positions, which would lose digits
    change = combine((1, proposed.velocity), (-1, state.velocity))
    back_x = combine((flow.reach, change), (-u * flow.lag, grad), (-u * flow.lag, grad_new), (-1, noise[0]))
    residual = combine((1, back_x), (-flow.tilt, back_v))
    return combine((1 / flow.velocity_scale, back_v)), combine((1 / flow.position_scale, residual))


def _squared(*trees: PyTree) -> Float[Array, ""]:
    return sum(dot(tree, tree) for tree in trees)  # type: ignore[return-value]


def _check_word(word: Any) -> None:
    if not isinstance(word, str) or not word or set(word) - set("ABOU"):
        raise ValueError(f'word must be a string of the letters A, B, O, U, such as "BAOAB", got {word!r}')
    if set(word) not in (set("ABO"), set("BU")):
        raise ValueError(
            f"word must hold each of A, B, O, or B and U (which is A and O together), so that every part of the "
            f"dynamics is there once; got {word!r}"
        )
    doubled: Sequence[str] = [pair for pair in ("AA", "BB", "OO", "UU") if pair in word]
    if doubled:
        raise ValueError(f"word must not repeat a letter side by side, got {doubled[0]!r} in {word!r}")
