"""Many chains at once: 10,000 chains of a posterior of ten dimensions, and the memory that they take.

Each run is a fresh interpreter, so that the peak of its resident memory is its own. NUTS is carried out chain by chain
on every thread (`chain_method="parallel"`, the default for kernels that branch) and for all chains in step
("vectorized"), where every chain waits for the deepest tree of all.
"""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, time
import jax, jax.numpy as jnp, numpy as np
import bayesinf as bi
def logdensity(x, data):
    # a funnel-like posterior: the scale of nine coordinates is the tenth
    return -0.5 * (x[0] / 1.5) ** 2 - 0.5 * jnp.sum(x[1:] ** 2 * jnp.exp(-x[0])) - 4.5 * x[0]
target = bi.Target(logdensity, jnp.zeros(1))
initial = 0.5 * jax.random.normal(jax.random.key(1), ({num_chains}, 10))
kernel = {kernel}
def run(key):
    start = time.perf_counter()
    bi.sample(key, kernel, initial, num_samples={num_samples}, chain_method="{method}", progress=False, throw=False)
    return time.perf_counter() - start
run(0)
print(run(1), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
NUTS = "bi.kernels.NUTS(target, step_size=0.2)"
RUNS = {
    "10,000 chains": {
        "MALA, 1000 draws, vectorized": ("bi.kernels.MALA(target, step_size=0.05)", 10_000, 1_000, "vectorized"),
        "NUTS, 100 draws, parallel": (NUTS, 10_000, 100, "parallel"),
    },
    "512 chains": {
        "NUTS, 100 draws, parallel": (NUTS, 512, 100, "parallel"),
        "NUTS, 100 draws, vectorized": (NUTS, 512, 100, "vectorized"),
    },
}


@pytest.mark.parametrize("name", RUNS)
def bench_many_chains(compare, name):
    memory = {}

    def fresh(row, kernel, num_chains, num_samples, method):
        script = SCRIPT.format(kernel=kernel, num_chains=num_chains, num_samples=num_samples, method=method)

        def call() -> float:
            command = [sys.executable, "-W", "ignore", "-c", script]
            seconds, memory[row] = map(
                float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            )
            return seconds

        return call

    compare(
        f"{name}, a funnel in ten dimensions",
        {row: fresh(row, *settings) for row, settings in RUNS[name].items()},
        rounds=3,
        note=lambda row, medians: f"{memory[row]:.2f} GiB at most",
    )
