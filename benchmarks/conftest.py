"""One way of measuring: rivals take turns, so that a busy moment of the machine hits all of them alike.

The first call, which compiles, stands apart from the median of the later ones. Timings decide nothing: no benchmark
fails because something is slow. The table at the end is Markdown, for benchmarks/README.md.
"""

import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import pytest

TABLES: dict[str, list[tuple[str, float, float, str]]] = {}


def has(package: str) -> bool:
    """Whether an optional rival is installed; looking does not import it."""
    return importlib.util.find_spec(package) is not None


@pytest.fixture
def compare(benchmark):
    """`compare(title, calls)`: the first call of each, then `rounds` rounds in which each is called once.

    Args of compare:
        calls: by name, what does the work and returns the arrays to wait for. A call may also return a float: seconds
            that it measured itself, of work done in another process.
        prepare: makes the arguments of one call, outside the clock.
        note: `note(name, medians)` says what the row of that name shows beside its time, given the medians of all
            rows in seconds.
    """

    def run(
        title: str,
        calls: dict[str, Callable[..., Any]],
        *,
        rounds: int = 9,
        prepare: Callable[[], tuple] = lambda: (),
        note: Callable[[str, dict[str, float]], str] = lambda name, medians: "",
    ) -> None:
        first = {name: _seconds(call, prepare()) for name, call in calls.items()}
        warm: dict[str, list[float]] = {name: [] for name in calls}

        def take_turns():
            for name, call in calls.items():
                warm[name].append(_seconds(call, prepare()))

        benchmark.pedantic(take_turns, rounds=rounds)
        medians = {name: statistics.median(seconds) for name, seconds in warm.items()}
        benchmark.extra_info.update(first_call_s=first, median_s=medians)
        TABLES[title] = [(name, first[name], medians[name], note(name, medians)) for name in calls]

    return run


def _seconds(call: Callable[..., Any], arguments: tuple) -> float:
    start = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    elapsed = time.perf_counter() - start
    return result if isinstance(result, float) else elapsed


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.write_line
    if not TABLES:
        return
    rivals = (
        "blackjax",
        "numpyro",
        "cuthbert",
        "hmmlearn",
        "dynamax",
        "tinygp",
        "smolgp",
        "gpjax",
        "gpytorch",
        "torch",
    )
    names = [name for name in ("bayesinf", "jax", "numpy", *rivals) if has(name)]
    terminalreporter.section("medians")
    write(f"{jax.devices()[0].device_kind}, {platform.platform()}, Python {platform.python_version()}")
    write(", ".join(f"{name} {metadata.version(name)}" for name in names))
    for title, rows in TABLES.items():
        write(f"\n### {title}\n\n| | first call (s) | warm, median (ms) | |\n|---|---|---|---|")
        for name, first, median, remark in rows:
            write(f"| {name} | {first:.2f} | {1e3 * median:.3g} | {remark} |")
