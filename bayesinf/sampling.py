"""`sample`: runs any kernel over several chains, in chunks of one compiled loop.

The host sees the run between chunks only: it moves draws off the device, updates the bar, writes the checkpoint, and
honours Ctrl-C. The loop is compiled once; how many steps it takes, which of them are warm-up, and how far they are
apart are arguments. Chain c takes step t with the key fold_in(fold_in(key, c), t), so that a resumed or differently
chunked run is bitwise the run that it continues.
"""

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key, PyTree

from bayesinf import adaptation, errors
from bayesinf.captured import captured, current
from bayesinf.checkpoint import Checkpoint, fingerprint
from bayesinf.diagnostics import SplitRHat
from bayesinf.draws import Draws, variables
from bayesinf.judge import (
    check_initial,
    check_mesh,
    check_start,
    check_warmup,
    describe_initial,
    judge,
    known_target,
    listed,
)
from bayesinf.loop import Chain, Collect, Plan, Runner, program, start
from bayesinf.progress import Progress
from bayesinf.store import Memory, Zarr

__all__ = ["sample"]

_SECONDS_PER_CHUNK = 0.5
_MAX_CHUNK = 1_000
_MAX_BYTES = 32 * 2**20  # of draws on the device: larger buffers cost more to clear than they save


def sample(
    key: errors.KeyLike,
    kernel: Any,
    initial: PyTree,
    *,
    num_samples: int,
    num_warmup: int = 0,
    thin: int = 1,
    constrain: Callable[[PyTree], PyTree] | None = None,
    warmup: adaptation.Warmup | None = None,
    collect: Callable[[Any], PyTree] | None = None,
    reducers: Sequence[Any] = (),
    chunk_size: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    store: str | os.PathLike[str] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    chain_method: str = "auto",
    throw: bool = True,
) -> Draws:
    """Runs `kernel` from `initial` and returns the draws of all chains.

    Args:
        key: PRNG key or integer seed.
        kernel: anything with `init(position)` and `step(key, state) -> (state, info)`; ours are pytrees, so that a run
            with new data or another step size of the same shape compiles nothing.
        initial: starting positions, a pytree whose leaves have a leading axis of chains; `target.init` makes one.
        num_samples: draws kept of each chain.
        num_warmup: steps taken first and discarded, while step size and metric are tuned if the kernel has a target
            acceptance rate.
        thin: steps between kept draws.
        constrain: maps each collected value before it is kept. By default the kernel's or its target's own `constrain`
            where the position is collected.
        warmup: how to tune; by default what suits the kernel (`adaptation.default_warmup`).
        collect: what of a state is kept; the position by default. Return None to keep nothing, with `reducers`.
        reducers: streaming expectations, such as `diagnostics.Moments()`, of the collected values.
        chunk_size: draws between two looks of the host; by default about half a second of them.
        progress: show a bar with acceptance rate, steps per second, R-hat and remaining time.
        checkpoint: a folder; an unfinished run found there is continued, bitwise.
        store: a new zarr folder that takes the draws, for runs larger than memory; `xarray.open_datatree(store,
            engine="zarr", consolidated=False)` reads it lazily. With `checkpoint`, it is continued too.
        mesh: devices over which chains are spread, along the mesh's first axis.
        chain_method: "vectorized", "parallel" (one thread a chain), "sequential"; "auto" is vectorized, but parallel
            on a CPU for kernels that say they are sequential.
        throw: raise if the run has failed; otherwise return what there is with its `status`.

    Returns:
        `Draws`. After Ctrl-C, those drawn until then, with status "interrupted".

    Raises:
        ValueError: bad arguments, named.
        InitializationError: a starting point has a non-finite log density or gradient.
        SamplingError: a chain diverged at every step of a chunk, never moved, or produced draws that are not finite;
            `error.draws` holds what there is.
        CheckpointError: the checkpoint is damaged or of another run.
        MemoryError: the draws do not fit into memory.

    Example:
        >>> import jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5)
        >>> draws = bi.sample(0, kernel, jnp.zeros((4, 2)), num_samples=500, num_warmup=500, progress=False)
        >>> draws.num_chains, draws.num_samples
        (4, 500)
    """
    if not errors.is_concrete((key, kernel, initial)):
        raise ValueError("sample drives compiled loops from the host and cannot itself be under jax.jit, vmap or grad")
    key = errors.as_key(key)
    for name, value, minimum in (("num_samples", num_samples, 0), ("num_warmup", num_warmup, 0), ("thin", thin, 1)):
        errors.check_count(name, value, minimum=minimum)
    if chunk_size is not None:
        errors.check_count("chunk_size", chunk_size)
    errors.check_choice("chain_method", chain_method, ("auto", "vectorized", "parallel", "sequential"))
    if isinstance(kernel, type) or not (hasattr(kernel, "init") and hasattr(kernel, "step")):
        what = kernel.__name__ if isinstance(kernel, type) else type(kernel).__name__
        raise ValueError(f"kernel must be an object with init(position) and step(key, state), got {what}")
    initial = check_initial(kernel, initial)
    kernel = current(jax.tree.map(lambda leaf: leaf if eqx.is_array_like(leaf) else captured(leaf), kernel))

    if warmup is None:
        warmup = adaptation.default_warmup(kernel, num_warmup)
    check_warmup(warmup, kernel, num_warmup)
    if warmup is not None:
        kernel = warmup.prepare(kernel, initial, num_warmup)
    for name, function in (("constrain", constrain), ("collect", collect)):
        if function is not None and not callable(function):
            raise ValueError(f"{name} must be a function, got {type(function).__name__}")
    if not isinstance(reducers, Sequence) or not all(hasattr(reducer, "update") for reducer in reducers):
        raise ValueError(f"reducers must be a list of objects such as diagnostics.Moments(), got {reducers!r}")
    if constrain is None and collect is None:
        owner = kernel if hasattr(kernel, "constrain") else getattr(kernel, "target", None)
        constrain = getattr(owner, "constrain", None)
    plan = Plan(kernel, warmup, Collect(captured(collect), captured(constrain)), tuple(current(list(reducers))))

    started = time.perf_counter()
    try:
        chains, shapes = start(plan, key, initial)
    except Exception as error:
        error.add_note(describe_initial(initial))
        raise
    if throw:
        check_start(kernel, chains.state)
    variables(shapes[0])  # names that collide are told before the run
    if mesh is not None:
        check_mesh(mesh, chains.key.shape[0])
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names[0]))
        chains = jax.device_put(chains, sharding)

    capacity = _capacity(shapes, chains.key.shape[0], chunk_size)
    runner = Runner(plan, shapes, capacity, _resolve(chain_method, kernel), jnp.asarray(num_warmup, jnp.int32))
    run = _Run(chains, Progress(num_warmup + num_samples * thin, is_shown=progress), _known(kernel))
    pooled_at = set() if warmup is None else warmup.pooling_steps()
    saved = None
    if checkpoint is not None:
        parts = (plan, initial, key, num_warmup, thin, sorted(pooled_at))
        saved = Checkpoint(checkpoint, fingerprint(program(plan, chains), *parts))
    run.begin(saved, store, shapes, num_samples)

    try:
        runner.advance(run.chains, 0, 0, 1)
        run.seconds["compile"] = time.perf_counter() - started
        while run.step < num_warmup + num_samples * thin and run.failure is None:
            is_warmup = run.step < num_warmup
            every = 1 if is_warmup else thin
            stop = min((step for step in pooled_at if step > run.step), default=num_warmup)
            left = stop - run.step if is_warmup else num_samples - run.num_draws
            num = min(left, capacity if chunk_size else run.pace(every, capacity))
            clock = time.perf_counter()
            chains, chunk = runner.advance(run.chains, run.step, num, every)
            run.take(chains, chunk, num, every, is_warmup=is_warmup, seconds=time.perf_counter() - clock)
            if is_warmup and warmup is not None and run.step in pooled_at:
                run.pool(warmup)
            if saved is not None:
                saved.save(run.chains, run.standing(), None if is_warmup or store is not None else _flatten(chunk))
    except KeyboardInterrupt:
        run.failure = "interrupted"
    finally:
        run.progress.close()
    draws = run.result(plan, _describe(key, kernel, num_warmup, thin))
    return judge(draws, run.has_moved, thin=thin, throw=throw)


class _Run:
    """Where a run stands, on the host."""

    def __init__(self, chains: Chain, progress: Progress, known: dict[str, Any]):
        self.chains = chains
        self.progress = progress
        self.known = known
        self.step = 0
        self.num_draws = 0
        self.failure: str | None = None
        self.has_moved = np.zeros(chains.key.shape[0], bool)
        self._start = _host(chains.state.position)
        self.seconds = {"compile": 0.0, "warmup": 0.0, "sampling": 0.0}
        self._draws: Memory | Zarr
        self._r_hat = SplitRHat()
        self._speed = 0.0  # steps a second

    def begin(self, saved: Checkpoint | None, store: Any, shapes: Any, num_samples: int) -> None:
        """Makes room for the draws, and continues from a checkpoint if there is one."""
        found = None if saved is None else saved.load(self.chains)
        chunks: list[dict[str, np.ndarray]] = []
        if found is not None:
            self.chains, standing, chunks = found
            if standing["num_draws"] > num_samples:
                raise errors.CheckpointError(
                    f"the checkpoint holds {standing['num_draws']} draws, more than num_samples={num_samples}"
                )
            self.step, self.num_draws = standing["step"], standing["num_draws"]
            self.progress.update(self.step, "resumed", None, None)
        num_chains = self.chains.key.shape[0]
        if store is None:
            self._draws = Memory(shapes, num_chains, num_samples)
        else:
            num_draws = self.num_draws if found is not None else None
            identity = None if saved is None else saved.identity
            self._draws = Zarr(store, shapes, num_chains, self.known, num_draws, identity)
        treedef: Any = jax.tree.structure(shapes)
        start = 0
        for arrays in chunks:
            chunk = jax.tree.unflatten(treedef, [arrays[f"leaf-{i}"] for i in range(treedef.num_leaves)])
            self._draws.put(chunk, start)
            start += chunk[1]["is_accepted"].shape[1]
            self._watch(chunk)
        if store is None and start != self.num_draws:
            raise errors.CheckpointError(
                f"the checkpoint holds {start} of {self.num_draws} draws, the others are in a zarr folder; give store="
            )

    def pace(self, every: int, capacity: int) -> int:
        """Draws that take about as long as a chunk should."""
        return int(np.clip(self._speed * _SECONDS_PER_CHUNK / every, 2, capacity))

    def take(self, chains: Chain, chunk: Any, num: int, every: int, *, is_warmup: bool, seconds: float) -> None:
        """Takes in a finished chunk."""
        self.chains = chains
        self.step += num * every
        self._speed = num * every / max(seconds, 1e-6)
        self.seconds["warmup" if is_warmup else "sampling"] += seconds
        if not is_warmup:
            self._draws.put(chunk, self.num_draws)
            self.num_draws += num
            self._watch(chunk)
        self._look_for_moves(lambda: zip(self._start, _host(chains.state.position), strict=True))
        self.progress.update(num * every, "warm-up" if is_warmup else "sampling", chunk[1], self._r_hat.value())

    def pool(self, warmup: adaptation.Warmup) -> None:
        """Lets the chains learn from one another, where they are."""
        tuned = self.chains.tuned
        pooled = warmup.pool(tuned, self.step)

        def put(new: Any, old: Array) -> Array:
            # what is tied to a device that was not asked for would compile the loop anew, twice
            return jax.device_put(new, old.sharding if old.committed else None)

        self.chains = self.chains._replace(tuned=jax.tree.map(put, pooled, tuned))

    def _watch(self, chunk: Any) -> None:
        """Looks at a chunk of draws: R-hat, and what ends the run."""
        samples, stats = chunk
        leaves = [leaf.reshape(*leaf.shape[:2], math.prod(leaf.shape[2:])) for leaf in jax.tree.leaves(samples)]
        if leaves and self.progress.is_shown:
            self._r_hat.update(np.concatenate(leaves, axis=2))
        self._look_for_moves(lambda: [(leaf[:, :1], leaf) for leaf in leaves])
        for name, leaf in variables(samples).items():
            is_bad = ~np.all(np.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
            if np.any(is_bad):
                self.failure = f"draws of {name!r} of chains {listed(is_bad)} are not finite"
        num = stats["is_divergent"].shape[1]
        is_lost = np.all(stats["is_divergent"], axis=1)
        if num >= 100 and np.any(is_lost):
            self.failure = f"chains {listed(is_lost)} diverged at every one of {num} draws in a row"

    def _look_for_moves(self, pairs: Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]) -> None:
        """Notes which chains have moved by a bit at least; an accepted move may be too small for its precision."""
        if not np.all(self.has_moved):
            for old, new in pairs():
                self.has_moved |= np.any(old != new, axis=tuple(range(1, new.ndim)))

    def standing(self) -> dict[str, int]:
        return {"step": self.step, "num_draws": self.num_draws}

    def result(self, plan: Plan, attrs: dict[str, Any]) -> Draws:
        """What has been drawn until now."""
        samples, stats = self._draws.get(self.num_draws)
        reduced = tuple(
            jax.vmap(reducer.result)(state) for reducer, state in zip(plan.reducers, self.chains.reduced, strict=True)
        )
        return Draws(
            samples,
            stats,
            final_state=self.chains.state,
            tuned=self.chains.tuned,
            reduced=reduced,
            status=self.failure or "complete",
            seconds=self.seconds,
            attrs=attrs,
            **self.known,
        )


def _describe(key: Key[Array, ""], kernel: Any, num_warmup: int, thin: int) -> dict[str, Any]:
    """What is needed to say how the draws came about, and to make them again."""
    from bayesinf import __version__

    return {
        "inference_library_version": __version__,
        "jax_version": jax.__version__,
        "device": str(jax.devices()[0]),
        "key_data": np.asarray(jax.random.key_data(key)).tolist(),
        "kernel": type(kernel).__name__,
        "num_warmup": num_warmup,
        "thin": thin,
    }


def _known(kernel: Any) -> dict[str, Any]:
    """The fields of the draws that are known before the run."""
    ys = getattr(kernel, "ys", None)
    return {"target": known_target(kernel), "observed": None if ys is None else {"ys": ys}}


def _host(tree: PyTree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def _flatten(chunk: Any) -> dict[str, np.ndarray]:
    return {f"leaf-{i}": leaf for i, leaf in enumerate(jax.tree.leaves(chunk))}


def _capacity(shapes: Any, num_chains: int, chunk_size: int | None) -> int:
    """Draws that a chunk may hold; the same for every num_samples, so that another one compiles nothing."""
    if chunk_size is not None:
        return chunk_size
    bytes_per_draw = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes)) * num_chains
    return int(np.clip(_MAX_BYTES // max(bytes_per_draw, 1), 1, _MAX_CHUNK))


def _resolve(chain_method: str, kernel: Any) -> str:
    if chain_method != "auto":
        return chain_method
    # vectorised branches and loops run to the slowest chain, and gathers do not vectorise, on a CPU
    is_sequential = getattr(kernel, "is_sequential", False) and jax.default_backend() == "cpu"
    return "parallel" if is_sequential else "vectorized"
