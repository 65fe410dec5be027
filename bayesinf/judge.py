"""Whether a run may start, and whether its draws may be trusted: the checks of `sample`, on the host."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bayesinf import adaptation, errors
from bayesinf.draws import Draws
from bayesinf.kernel import Kernel, is_finite
from bayesinf.target import Target

__all__ = [
    "check_initial",
    "check_mesh",
    "check_start",
    "check_warmup",
    "describe_initial",
    "judge",
    "known_target",
    "listed",
]


def check_warmup(warmup: Any, kernel: Any, num_warmup: int) -> None:
    """A warm-up that fits the kernel and the length of the run."""
    if warmup is None:
        return
    if not isinstance(warmup, adaptation.Warmup):
        raise ValueError(f"warmup must be a Warmup, such as adaptation.Window(num_warmup), got {warmup!r}")
    length = getattr(warmup, "num_warmup", None)
    if length is not None and errors.is_concrete(length) and int(length) != num_warmup:
        raise ValueError(f"warmup must be for num_warmup={num_warmup} steps, it is for {int(length)}")
    if isinstance(warmup, adaptation.Window) and not adaptation.has_metric(kernel):
        raise ValueError(
            f"warmup=Window(...) needs a kernel with a metric, and {type(kernel).__name__} has none; wrap it in "
            "kernels.Precondition, or use adaptation.StepSize"
        )
    by_rate = isinstance(warmup, adaptation.StepSize | adaptation.Window)
    if by_rate and isinstance(kernel, Kernel) and kernel.target_acceptance is None:
        raise ValueError(
            f"warmup={type(warmup).__name__}(...) tunes by the acceptance rate, and {type(kernel).__name__} has no "
            "target_acceptance: what never rejects would be given ever longer steps. Adjust it with "
            "kernels.Metropolize, or tune an unadjusted kernel with kernels.EnergyError"
        )


def check_initial(kernel: Any, initial: PyTree) -> PyTree:
    """Starting positions as arrays with one leading axis of chains; whole numbers only where there is no gradient."""
    if isinstance(initial, list) and len({np.shape(row) for row in map(np.asarray, initial)}) == 1:
        initial = jnp.asarray(initial)  # a list of positions, one for each chain
    if hasattr(kernel, "target") or not jax.tree.leaves(initial):
        errors.check_floating("initial", initial)
    initial = errors.as_arrays("initial", initial)
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in jax.tree.leaves(initial)}
    if len(sizes) != 1 or None in sizes:
        shapes = jax.tree.map(jnp.shape, initial)
        raise ValueError(f"initial must have one leading axis of chains in every leaf, got shapes {shapes}")
    if sizes == {0}:
        raise ValueError("initial must hold at least one chain, got a leading axis of length 0")
    return initial


def describe_initial(initial: PyTree) -> str:
    """What `sample` takes the starting positions for: an axis that was forgotten shows in it."""
    one = jax.tree.map(lambda leaf: jnp.shape(leaf)[1:], initial)
    num_chains = jax.tree.leaves(initial)[0].shape[0] if jax.tree.leaves(initial) else 0
    return (
        f"initial was taken for {num_chains} chains, each at a position of shape {one}; of one position alone make "
        "one chain by jax.tree.map(lambda leaf: leaf[None], position)"
    )


def check_start(kernel: Any, state: Any) -> None:
    """That every chain starts where the log density is finite, and told to enough digits."""
    if hasattr(state, "evaluation"):
        is_ok = np.asarray(jax.vmap(is_finite)(state.evaluation))
    else:
        known = (state.position, [getattr(state, name, None) for name in ("logdensity", "log_likelihood")])
        finite = [jnp.all(jnp.isfinite(leaf).reshape(leaf.shape[0], -1), axis=1) for leaf in _leaves(known)]
        is_ok = np.all(np.asarray(finite), axis=0)
    if np.all(is_ok):
        _warn_of_rounding(state)
        return
    chain = int(np.flatnonzero(~is_ok)[0])
    position = jax.tree.map(lambda leaf: leaf[chain], state.position)
    target = known_target(kernel)
    value = getattr(state, "log_likelihood", None)
    why = "The position, or what the kernel knows of it, is not finite." if target is None else target.explain(position)
    if value is not None:
        why = f"The log likelihood is {float(value[chain])}."
    raise errors.InitializationError(
        f"initial: chain {chain} starts where the log density or its gradient is not finite. {why} "
        "Start elsewhere, for example at target.init(key, num_chains)."
    )


def judge(draws: Draws, has_moved: np.ndarray, *, thin: int, throw: bool) -> Draws:
    """The draws, after the checks that decide whether they may be trusted; `has_moved` says which chains did."""
    num_steps = draws.num_samples * thin
    is_stuck = ~(has_moved & np.any(draws.stats["is_accepted"], axis=1))
    if draws.status == "complete" and num_steps:
        draws = dataclasses.replace(draws, status=_failure(draws, is_stuck, num_steps) or "complete")
    if draws.status not in ("complete", "interrupted"):
        if throw:
            raise errors.SamplingError(
                f"sampling failed: {draws.status}. Try another step_size or more num_warmup, and look at the model "
                "there; the draws until then are in error.draws, and throw=False returns them.",
                draws,
            )
        return draws
    num_invalid = int(np.sum(draws.stats.get("num_invalid", 0)))
    if num_invalid:
        _warn(
            f"{num_invalid} particle weights were NaN or +inf and were counted as weights of zero; the densities of "
            "the model are not finite there"
        )
    if num_steps >= 20 and np.any(is_stuck):  # of a hundred steps it is a failure
        _warn(f"chains {listed(is_stuck)} never moved in {num_steps} steps; try another step_size")
    num_divergent = int(np.sum(draws.stats["is_divergent"]))
    if num_divergent:
        _warn(
            f"{num_divergent} draws ({np.mean(draws.stats['is_divergent']):.1%}) met a log density or gradient that is "
            "not finite, or a divergent trajectory; the moves were undone, and the region behind them may be missing "
            "from the draws"
        )
    return draws


def _failure(draws: Draws, is_stuck: np.ndarray, num_steps: int) -> str | None:
    share = np.mean(draws.stats["is_divergent"], axis=1)
    if num_steps < 100:
        return None
    if np.any(share > 0.5):
        return f"chains {listed(share > 0.5)} diverged at more than half of their {num_steps} steps"
    step_sizes = np.asarray(getattr(draws.tuned, "step_size", 1.0))
    is_none = np.any(
        (~(step_sizes > 0) | np.isinf(step_sizes)).reshape(step_sizes.shape[0] if step_sizes.ndim else 1, -1), 1
    )
    if np.any(is_none):
        return f"warm-up left chains {listed(is_none)} with a step size of {step_sizes.min():g}"
    if np.any(is_stuck):
        is_lost = np.any(draws.stats["is_accepted"], axis=1)[is_stuck]
        why = ", though moves were accepted: they are too small for the precision" if np.all(is_lost) else ""
        return f"chains {listed(is_stuck)} never moved in {num_steps} steps{why}"
    return None


def _warn(message: str) -> None:
    warnings.warn(message, errors.SamplingWarning, stacklevel=4)  # where `sample` was called


def _warn_of_rounding(state: Any) -> None:
    if not hasattr(state, "evaluation"):
        return
    values = np.asarray(state.evaluation.logdensity)
    if values.dtype == np.float32 and np.any(np.spacing(np.abs(values)) > 0.1):
        _warn(
            f"the log density is {values.ravel()[0]:.3g} at the start, which float32 rounds to multiples of "
            f"{np.max(np.spacing(np.abs(values))):.2g}: acceptance rates are off by as much. Subtract a constant from "
            "it, add up its terms in float64 (JAX_ENABLE_X64=1), or take control variates"
        )


def check_mesh(mesh: Any, num_chains: int) -> None:
    """A mesh whose first axis shares the chains evenly."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, such as jax.make_mesh((2,), ('chains',)), got {mesh!r}")
    name = mesh.axis_names[0]
    if num_chains % mesh.shape[name]:
        raise ValueError(
            f"mesh must share the chains of initial evenly: {num_chains} chains are not a multiple of the "
            f"{mesh.shape[name]} devices along its axis {name!r}"
        )


def listed(is_named: np.ndarray) -> str:
    """The indices, at most ten of them."""
    indices = np.flatnonzero(is_named).tolist()
    return str(indices) if len(indices) <= 10 else f"{indices[:10]} and {len(indices) - 10} more"


def known_target(kernel: Any) -> Target | None:
    """The kernel's target, if it is one of this library."""
    target = getattr(kernel, "target", None)
    return target if isinstance(target, Target) else None


def _leaves(tree: PyTree) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
