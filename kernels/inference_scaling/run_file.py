"""A run on the host as a file, from which it goes on: every step that is complete, as JSON.

What was drawn and how it was chosen depends on the key and on the steps so far alone, so that with a generator whose
seeds decide, a resumed run is the run it continues. No step in the file is drawn again: its text is taken from it. A
generator in process needs its state beside the text, and draws it again by its seeds; it compares the texts.
"""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bayesinf import errors
from bayesinf.kernels.inference_scaling.population import Record
from bayesinf.kernels.inference_scaling.run_requests import RunRequests
from bayesinf.kernels.inference_scaling.text_generator import TextStep
from bayesinf.kernels.inference_scaling.text_sweep import TextSweep

__all__ = ["RunFile", "read_run"]

FORMAT = 1


class RunFile:
    """Where a run is saved after every step.

    Attributes:
        path: of the file; None saves nothing.
        identity: what the run was asked for; only the same run may continue it.
        requests: whose accounts are kept with it.
    """

    def __init__(
        self, path: Path | None, identity: dict[str, Any], requests: RunRequests, saved: dict[str, Any] | None
    ):
        self.path, self.identity, self.requests = path, identity, requests
        self.sweeps = {} if saved is None else saved["sweeps"]
        if saved is not None:
            requests.restore(saved["accounts"])

    def write(self, sweeps: dict[str, TextSweep], names: set[str]) -> None:
        """Writes the sweeps, of which those in `names` have changed; the file is whole at every moment."""
        if self.path is None:
            return
        self.sweeps |= {name: _as_json(sweeps[name]) for name in names}
        accounts = self.requests.accounts()
        text = json.dumps({"format": FORMAT, "identity": self.identity, "accounts": accounts, "sweeps": self.sweeps})
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(text)
        os.replace(beside, self.path)

    def restore(self, name: str, sweep: TextSweep) -> TextSweep:
        """The sweep as far as it was saved."""
        saved = self.sweeps.get(name)
        if saved is None:
            return sweep
        sweep.t, sweep.num_tokens = saved["t"], saved["num_tokens"]
        sweep.is_failed = np.array(saved["is_failed"], bool)
        sweep.prefixes = [tuple(_as_step(fields) for fields in prefix) for prefix in saved["prefixes"]]
        # a generator that draws them again does so here, where it can say that they are others
        self.requests.generator.decode(sweep.prefixes)
        leaves, treedef = jax.tree.flatten(sweep.population)
        values = [jnp.asarray(new, old.dtype) for new, old in zip(saved["population"], leaves, strict=True)]
        sweep.population = jax.tree.unflatten(treedef, values)
        pairs: list[Any] = saved["records"]
        fields: list[list[Any]] = [[np.array(leaf, dtype) for leaf, dtype in zip(*pair, strict=True)] for pair in pairs]
        sweep.records = [Record(*row) for row in fields]
        return sweep


def read_run(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """What is in a file.

    Raises:
        CheckpointError: it is damaged, or of another run.
    """
    try:
        content = json.loads(path.read_text())
        found, _, _ = content["identity"], content["sweeps"], content["accounts"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise errors.CheckpointError(f"resume={str(path)!r} cannot be read as a saved run: {error}") from error
    if content.get("format") != FORMAT:
        raise errors.CheckpointError(
            f"resume={str(path)!r} has format {content.get('format')!r}, and this version reads {FORMAT}; begin anew"
        )
    identity = json.loads(json.dumps(identity))
    differing = [name for name in identity if found.get(name) != identity[name]]
    if differing:
        pairs = "; ".join(
            f"{name}: {_shown(found.get(name))} there, {_shown(identity[name])} here" for name in differing
        )
        raise errors.CheckpointError(
            f"resume={str(path)!r} is of a run with another {', '.join(differing)} ({pairs}); pass what that run was "
            "given, or leave resume out to begin anew"
        )
    return content


def _as_json(sweep: TextSweep) -> dict[str, Any]:
    return {
        "t": sweep.t,
        "num_tokens": sweep.num_tokens,
        "is_failed": sweep.is_failed.tolist(),
        "prefixes": sweep.prefixes,
        "population": [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(sweep.population)],
        "records": [
            ([np.asarray(leaf).tolist() for leaf in record], [np.asarray(leaf).dtype.name for leaf in record])
            for record in sweep.records
        ],
    }


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _as_step(fields: list[Any]) -> TextStep:
    step = TextStep(*fields)
    return step if step.seed is None else step._replace(seed=tuple(step.seed))
