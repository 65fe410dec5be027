"""Draws on disk: as in memory, continued after a crash, read by xarray, refused where they would be lost."""

import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import bayesinf as bi
from bayesinf.checkpoint import Checkpoint
from bayesinf.errors import CheckpointError
from bayesinf.store import Memory


def skewed(x):
    """Log of a gamma(3) variable and a normal whose mean depends on it: asymmetric and correlated."""
    return 3.0 * x["a"] - jnp.exp(x["a"]) - 0.5 * jnp.sum((x["b"] - x["a"]) ** 2)


KERNEL = bi.kernels.MALA(bi.Target(skewed), step_size=0.3)
INITIAL = {"a": jnp.array([0.0, 0.5, 1.0]), "b": jnp.zeros((3, 2))}


def run(**options):
    options = {"num_samples": 40, "num_warmup": 20, "chunk_size": 10, "progress": False, **options}
    return bi.sample(7, KERNEL, INITIAL, **options)


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.fixture(scope="module")
def whole():
    return run()


def test_a_folder_holds_what_memory_would(tmp_path, whole):
    draws = run(store=tmp_path / "draws")
    assert same(jax.tree.map(np.asarray, draws.samples), whole.samples)
    assert same(draws.stats, whole.stats)
    np.testing.assert_array_equal(draws["b"][1, 3:5], whole["b"][1, 3:5])  # reads that slice
    assert draws.summary().equals(whole.summary())


def test_xarray_reads_the_folder_in_the_schema_of_arviz(tmp_path, whole):
    run(store=tmp_path / "draws")
    with xarray.open_datatree(tmp_path / "draws", engine="zarr", consolidated=False) as tree:
        expected = whole.to_arviz()
        assert set(tree.children) == set(expected.children)
        for name in tree.children:
            assert not set(expected[name].data_vars) - set(tree[name].data_vars) - {"step_size"}
        xarray.testing.assert_equal(tree["posterior"].to_dataset(), expected["posterior"].to_dataset())
        np.testing.assert_array_equal(tree["sample_stats/lp"], expected["sample_stats/lp"])


@pytest.mark.parametrize("num_saves", [1, 3, 5])
def test_a_crash_between_draws_and_checkpoint_is_continued_bitwise(tmp_path, monkeypatch, whole, num_saves):
    options = {"checkpoint": tmp_path / "run", "store": tmp_path / "draws"}
    save, seen = Checkpoint.save, []

    def dies(self, *args):
        if len(seen) == num_saves:
            raise OSError("no space left on device")
        seen.append(None)
        save(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", dies)
        with pytest.raises(OSError, match="no space"):
            run(**options)
    resumed = run(**options)
    assert same(jax.tree.map(np.asarray, resumed.samples), whole.samples)
    assert same(resumed.stats, whole.stats)
    assert not list((tmp_path / "run").glob("draws-*"))  # they are kept once


def test_folders_are_never_overwritten_nor_forgotten(tmp_path):
    options = {"checkpoint": tmp_path / "run", "store": tmp_path / "draws"}
    run(**options)
    with pytest.raises(ValueError, match="store must be a new folder"):
        run(store=tmp_path / "draws")
    with pytest.raises(CheckpointError, match="0 of 40 draws, the others are in a zarr folder"):
        run(checkpoint=tmp_path / "run", num_samples=60)
    with pytest.raises(ValueError, match="is not there"):
        run(checkpoint=tmp_path / "run", store=tmp_path / "elsewhere")
    assert run(**options, num_samples=60)["a"].shape == (3, 60)


def test_a_folder_of_another_run_or_an_older_copy_is_refused(tmp_path):
    run(store=tmp_path / "one", checkpoint=tmp_path / "of one", num_samples=20)
    run(store=tmp_path / "two", checkpoint=tmp_path / "of two", num_samples=20, num_warmup=10)
    with pytest.raises(CheckpointError, match="was written by another run"):
        run(store=tmp_path / "two", checkpoint=tmp_path / "of one")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    whole = run(store=tmp_path / "one", checkpoint=tmp_path / "of one")
    shutil.rmtree(tmp_path / "one")
    shutil.move(tmp_path / "copy", tmp_path / "one")
    with pytest.raises(CheckpointError, match=r"holds 20 of the 40 draws"):
        run(store=tmp_path / "one", checkpoint=tmp_path / "of one", num_samples=60)
    assert whole.num_samples == 40


def test_a_run_that_came_to_no_checkpoint_begins_anew(tmp_path, monkeypatch, whole):
    def interrupt(*args):
        raise KeyboardInterrupt

    folders = {"store": tmp_path / "draws", "checkpoint": tmp_path / "checkpoint"}
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupt)
        run(**folders)
    assert same(jax.tree.map(np.asarray, run(**folders).samples), whole.samples)


def test_nothing_kept_is_nothing_stored(tmp_path):
    draws = run(store=tmp_path / "draws", collect=lambda state: None)
    assert draws.samples is None
    assert draws.num_samples == 40


def test_draws_that_do_not_fit_say_so_before_the_run():
    with pytest.raises(MemoryError, match="GiB; keep fewer with thin or collect"):
        Memory({"x": jax.ShapeDtypeStruct((1_000_000,), jnp.float32)}, 100, 10**9)


def test_statistics_may_be_pytrees(tmp_path):
    class Chatty(bi.Kernel):
        target: bi.Target

        def init(self, position):
            return KERNEL.init(position)

        def step(self, key, state):
            state, info = KERNEL.step(key, state)
            return state, Info(*info[:4], {"norm": jnp.sum(state.position["b"] ** 2)})

    class Info(NamedTuple):
        acceptance_rate: Any
        is_accepted: Any
        is_divergent: Any
        num_gradients: Any
        estimate: dict

    options = {"num_samples": 5, "progress": False}
    in_memory = bi.sample(0, Chatty(KERNEL.target), INITIAL, **options)
    on_disk = bi.sample(0, Chatty(KERNEL.target), INITIAL, store=tmp_path / "draws", **options)
    assert same(in_memory.stats, on_disk.stats)
    np.testing.assert_allclose(
        in_memory.to_arviz()["sample_stats/estimate.norm"], np.sum(in_memory["b"] ** 2, -1), rtol=1e-5
    )
