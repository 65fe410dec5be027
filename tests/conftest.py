"""Shared set-up: shapes and dtypes of every public signature are checked while the tests run."""

import gc
import os
import time
from importlib.metadata import version

# Threads of BLAS that wait for each other cost twenty times what small matrices need; read when the library is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from jaxtyping import config, install_import_hook

install_import_hook("bayesinf", "beartype.beartype")

# Most of the time is compilation, of programs that run once: without optimisation it takes a third of it. The slow
# tests are for what users run: `make slow` sets this to 0.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and version("jaxlib").startswith("0.10."):
    # a version that does not know a flag ends the process
    # code of one program is made on one core: the workers have the others, and what is split has to be put together
    flags = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    # of what is optimised at all, under `run_fast`
    flags += " --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flags

STARTED = time.monotonic()


@pytest.fixture
def unchecked():
    """Without the run-time type checks, as in a user's run: what bad arguments say there."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def compile_fast(request):
    """Unoptimised programs in slow tests too, where nearly all of their time is compilation."""
    yield from _unoptimised("run_fast" not in request.fixturenames)


@pytest.fixture
def run_fast():
    """Programs that are optimised a little, where running takes longer: a quarter of it, for twice the compilation."""
    yield from _unoptimised(False)


def _unoptimised(value):
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", value)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Compiled programs of one file are of no use to the next, and hundreds of them take gigabytes."""
    yield
    import jax

    jax.clear_caches()


def pytest_collection_finish():
    # what is imported stays: to look through it again and again for garbage is a twentieth of the time
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 20, 20)


def pytest_addoption(parser):
    parser.addoption("--budget", type=float, help="seconds after which tests that have not begun are skipped")


def pytest_runtest_setup(item):
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() - STARTED > budget:
        pytest.skip(f"not reached within the budget of {budget:.0f} s")
