"""Any kernel after a change of variables: it moves z, and the chain is x = f(z).

    x = f(z),    log pi_z(z) = log pi(f(z)) + log |det J_f(z)|

Where f takes a simple law to about pi, as a trained flow does or the map to a non-centred parametrisation, the kernel
moves on a simple law. It leaves pi invariant if it leaves invariant whatever it is given.

The state keeps x, the evaluation of pi at x, which other kernels on pi share, and the kernel's own state at z; what is
rejected stays where it was, bit for bit, and no rounding of f(f^-1(x)) adds up. No gradient of pi is spent on the way
between the two evaluations,

    grad log pi_z(z) = J^T grad log pi(x) + grad log |det J|(z),       J^-T by the derivative of f^-1,

and where another kernel has moved x, z = f^-1(x) follows. Every step goes through f and f^-1 once or twice, with
derivatives: both should be cheap next to pi.

References:
    Parno and Marzouk (2018), doi:10.1137/17M1134640 (transport maps in Markov chains).
    Hoffman, Sountsov, Dillon, Langmore, Tran and Vasudevan (2019), arXiv:1903.03704 (flows).
    Papaspiliopoulos, Roberts and Skold (2007), doi:10.1214/088342307000000014 (parametrisations).
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, PyTree
from numpyro.distributions.transforms import Transform

from bayesinf import errors
from bayesinf.kernel import Evaluation, refreshed, select
from bayesinf.kernels.parts import PartsState, SharedState, check_target
from bayesinf.kernels.paths import Path, as_path, get, put
from bayesinf.kernels.vectors import as_position, combine, differ
from bayesinf.kernels.wrapping import Wrapping
from bayesinf.target import Target

__all__ = ["Latent", "Transformed"]


class Latent(NamedTuple):
    """What lies behind a position.

    Attributes:
        inner: the kernel's own state, at z.
        seen: position and evaluation as the last step left them; z is of no use where they have changed since.
    """

    inner: Any
    seen: tuple[PyTree, Evaluation | None]


def _as_transforms(transform: Any) -> OrderedDict[Path, Transform]:
    """Transforms by path, that of the whole position at the path ()."""
    found = {as_path(path): t for path, t in transform.items()} if isinstance(transform, Mapping) else {(): transform}
    for path, one in found.items():
        if not isinstance(one, Transform):
            where = f" at {path}" if path else ""
            raise ValueError(
                f"transform{where} must be a NumPyro transform, or a dict from path to one, got {type(one).__name__}"
            )
        if any(path == other[: len(path)] for other in found if other != path):
            raise ValueError(f"transform must have paths of which none leads into another, got {list(found)}")
    if not found:
        raise ValueError("transform must have at least one entry, got {}")
    return OrderedDict((path, errors.as_arrays("transform", one)) for path, one in found.items())


class Transformed(Wrapping):
    """A kernel in the coordinates z of x = f(z); its `target` is that of x.

    The step size is in units of z. Warm-up tunes it, but no metric, since what it sees are draws of x.

    Args:
        kernel: a kernel with a target.
        transform: f, a NumPyro transform with an inverse that keeps shapes, for a position that is an array; or a dict
            from path to one, for a pytree: a path is a key, or a tuple of keys and indices. What no path leads to stays
            as it is.

    Raises:
        ValueError: the kernel has no target, there is no such transform, or (from `init`) a path leads to no array, the
            shape changes, or the position is outside of the range of f.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from numpyro.distributions.transforms import ExpTransform
        >>> import bayesinf as bi
        >>> target = bi.Target(lambda x: 2.0 * jnp.log(x["rate"]) - x["rate"])  # Gamma(3, 1), on (0, inf)
        >>> kernel = bi.kernels.Transformed(bi.kernels.MALA(target, step_size=0.5), {"rate": ExpTransform()})
        >>> draws = bi.sample(0, kernel, {"rate": jnp.ones(4)}, num_samples=1_000, num_warmup=500, progress=False)
        >>> bool(jnp.all(draws.samples["rate"] > 0))
        True
    """

    kernel: Any
    transform: OrderedDict[Path, Any]

    def __init__(self, kernel: Any, transform: Any):
        check_target(kernel)
        self.kernel, self.transform = kernel, _as_transforms(transform)

    def init(self, position: PyTree) -> SharedState | PartsState:
        position = as_position(position)
        self._check(position)
        inner = self._pulled().init(_invert(self.transform, position))
        if not hasattr(inner, "evaluation"):
            return PartsState(position, Latent(inner, (position, None)))
        evaluation = self.target.evaluate(position, order=int(inner.evaluation.grad is not None))
        # where no z leads to x, pi may be finite, and yet no chain can start
        logdensity = evaluation.logdensity
        is_out_of_reach = jnp.isfinite(logdensity) & ~jnp.isfinite(inner.evaluation.logdensity)
        evaluation = evaluation._replace(logdensity=jnp.where(is_out_of_reach, -jnp.inf, logdensity))
        return SharedState(position, evaluation, Latent(inner, (position, evaluation)))

    def refresh(self, key: Key[Array, ""], state: SharedState | PartsState) -> SharedState | PartsState:
        """The state with a fresh velocity, where the kernel has one."""
        latent: Latent = state.memory
        return state._replace(memory=latent._replace(inner=refreshed(self._pulled(), key, latent.inner)))

    def step(self, key: Key[Array, ""], state: SharedState | PartsState) -> tuple[SharedState | PartsState, Any]:
        before = self._behind(state)
        after, info = self._pulled().step(key, before)
        has_moved = differ(after.position, before.position)
        x = select(has_moved, _apply(self.transform, after.position)[0], state.position)
        if isinstance(state, PartsState):
            return PartsState(x, Latent(after, (x, None))), info
        evaluation = select(has_moved, self._push(after, x), state.evaluation)
        return SharedState(x, evaluation, Latent(after, (x, evaluation))), info

    @property
    def has_metric(self) -> bool:
        return False

    def _pulled(self) -> Any:
        """The kernel on the target of z."""
        return self.kernel.with_target(Target(_pulled_back, (self.target, self.transform)))

    def _behind(self, state: SharedState | PartsState) -> Any:
        """The kernel's own state: as it was left, or where the chain has been moved since, by f^-1."""
        evaluation = getattr(state, "evaluation", None)
        latent: Latent = state.memory
        moved = latent.inner._replace(position=_invert(self.transform, state.position))
        if evaluation is not None:
            moved = moved._replace(evaluation=self._pull(moved.position, evaluation))
        return select(differ((state.position, evaluation), latent.seen), moved, latent.inner)

    def _pull(self, z: PyTree, evaluation: Evaluation) -> Evaluation:
        """The evaluation of the target of z, from that of x = f(z)."""
        (_, log_det), pull = jax.vjp(lambda z: _apply(self.transform, z), z)
        logdensity = evaluation.logdensity + log_det.astype(evaluation.logdensity.dtype)
        if evaluation.grad is None:
            return Evaluation(logdensity)
        return Evaluation(logdensity, pull((evaluation.grad, jnp.ones_like(log_det)))[0])

    def _push(self, inner: Any, x: PyTree) -> Evaluation:
        """The evaluation of the target at x = f(z), from that of z."""
        log_det, slope = jax.value_and_grad(lambda z: _apply(self.transform, z)[1])(inner.position)
        logdensity = inner.evaluation.logdensity - log_det.astype(inner.evaluation.logdensity.dtype)
        if inner.evaluation.grad is None:
            return Evaluation(logdensity)
        _, pull_by_inverse = jax.vjp(lambda x: _invert(self.transform, x), x)
        return Evaluation(logdensity, pull_by_inverse(combine((1, inner.evaluation.grad), (-1, slope)))[0])

    def _check(self, position: PyTree) -> None:
        """Shapes while tracing, and the range of f where the position is known."""
        for path, transform in self.transform.items():
            x = get(position, path)
            where = f"the position at {path}" if path else "the position"
            if not hasattr(x, "shape"):
                raise ValueError(f"transform must be of an array, but {where} is a {type(x).__name__}: give paths")
            shapes = tuple(transform.inverse_shape(x.shape)), jax.eval_shape(lambda x, f=transform: f(x), x).shape
            if shapes != (x.shape, x.shape):
                raise ValueError(
                    f"transform must keep the shape {x.shape} of {where}, {type(transform).__name__} does not"
                )
            if errors.is_concrete(x) and not np.all(transform.codomain(x)):
                raise ValueError(f"{where} must be in the range of {type(transform).__name__}, got {x}")


def _pulled_back(z: PyTree, data: tuple[Target, OrderedDict[Path, Any]]) -> Float[Array, ""]:
    target, transform = data
    x, log_det = _apply(transform, z)
    logdensity = target.logdensity(x)
    return logdensity + log_det.astype(logdensity.dtype)


def _apply(transform: OrderedDict[Path, Any], z: PyTree) -> tuple[PyTree, Float[Array, ""]]:
    """The x = f(z) and log |det J_f(z)|, in the dtype of z."""
    x, log_dets = z, []
    for path, one in transform.items():
        part = get(z, path)
        moved = one(part)
        log_dets.append(jnp.sum(one.log_abs_det_jacobian(part, moved)).astype(part.dtype))
        x = put(x, path, moved.astype(part.dtype))
    return x, jnp.sum(jnp.stack(log_dets))


def _invert(transform: OrderedDict[Path, Any], x: PyTree) -> PyTree:
    """The z = f^-1(x)."""
    for path, one in transform.items():
        part = get(x, path)
        x = put(x, path, one.inv(part).astype(part.dtype))
    return x
