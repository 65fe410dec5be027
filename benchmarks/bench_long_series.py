"""A series of 1e5 steps with 1e4 particles: how long, and in how much memory.

Each run is a fresh interpreter, so that the peak of its resident memory is its own; compilation is in the time.
"""

import subprocess
import sys

SCRIPT = """
import resource, time
import jax
import bayesinf as bi
model = bi.models.StochasticVolatility(0.0, 0.97, 0.2)
_, ys = bi.models.simulate(0, model, num_steps=100_000)
total = bi.kernels.AdditiveFunctional(initial=lambda x0: x0, increment=lambda x_prev, x, t: x)
start = time.perf_counter()
jax.block_until_ready({call})
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""
FILTER = 'bi.kernels.particle_filter(1, model, ys, num_particles=10_000, store="{}")'
CALLS = {
    "particle_filter, nothing stored": FILTER.format("none"),
    "particle_filter, filtered means": FILTER.format("summary"),
    "particle_filter, the tree of paths": FILTER.format("tree"),
    "paris, mcmc": 'bi.kernels.paris(1, model, ys, total, num_particles=10_000, method="mcmc")',
}


def bench_long_series(compare):
    memory = {}

    def fresh(row, call):
        def run() -> float:
            command = [sys.executable, "-W", "ignore", "-c", SCRIPT.format(call=call)]
            seconds, memory[row] = map(
                float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            )
            return seconds

        return run

    compare(
        "stochastic volatility, T=100,000, N=10,000",
        {row: fresh(row, call) for row, call in CALLS.items()},
        rounds=1,
        note=lambda row, medians: f"{memory[row]:.2f} GiB at most, {1e6 * medians[row] / 1e5:.3g} us a step",
    )
