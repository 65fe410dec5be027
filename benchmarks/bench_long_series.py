"""A series of 1e5 steps with 1e4 particles: how long, and in how much memory.

Each run is a fresh interpreter, so that the peak of its resident memory is its own; compilation is in the time.

    python -m benchmarks.bench_long_series [--num-steps 100000] [--num-particles 10000] [--precision float64]
"""

import argparse
import os
import subprocess
import sys

SCRIPT = """
import re, resource, time
import jax
import bayesinf as bi
model = bi.models.StochasticVolatility(0.0, 0.97, 0.2)
_, ys = bi.models.simulate(0, model, num_steps={num_steps})
total = bi.kernels.AdditiveFunctional(initial=lambda x0: x0, increment=lambda x_prev, x, t: x)
start = time.perf_counter()
result = jax.block_until_ready({call})
seconds = time.perf_counter() - start
try:  # on Linux ru_maxrss is at least what the parent held when it started this process
    kibibytes = int(re.search(r"VmHWM:\\s+([0-9]+)", open("/proc/self/status").read())[1])
except OSError:
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, kibibytes / 2**20, result.log_evidence.dtype)
"""
FILTER = 'bi.kernels.particle_filter(1, model, ys, num_particles={num_particles}, store="%s"%s)'
CALLS = {
    "particle_filter, nothing stored": FILTER % ("none", ""),
    "particle_filter, filtered means": FILTER % ("summary", ""),
    # its room is for paths that coalesce as independent draws at every step make them
    "particle_filter, the tree of paths": FILTER % ("tree", ', resampling="multinomial", ess_threshold=1.0'),
    "paris, mcmc": 'bi.kernels.paris(1, model, ys, total, num_particles={num_particles}, method="mcmc")',
}
PRECISIONS = ("float32", "float64")
SIZES = {"num_steps": 100_000, "num_particles": 10_000}


def measure(call: str, precision: str, *, num_steps: int, num_particles: int) -> tuple[float, float]:
    """Seconds, and GiB at most, of one of CALLS in an interpreter of its own."""
    script = SCRIPT.format(call=call.format(num_particles=num_particles), num_steps=num_steps)
    command = [sys.executable, "-W", "ignore", "-c", script]
    environment = os.environ | {"JAX_ENABLE_X64": str(PRECISIONS.index(precision))}
    said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.split()
    if said[2] != precision:
        raise RuntimeError(f"the run was in {said[2]}, not in {precision}")
    return float(said[0]), float(said[1])


def bench_long_series(compare):
    memory = {}

    def fresh(row, call, precision):
        def run() -> float:
            seconds, memory[row] = measure(call, precision, **SIZES)
            return seconds

        return run

    rows = {f"{name}, {precision}": (call, precision) for name, call in CALLS.items() for precision in PRECISIONS}
    compare(
        "stochastic volatility, T={num_steps:,}, N={num_particles:,}".format(**SIZES),
        {row: fresh(row, *what) for row, what in rows.items()},
        rounds=1,
        note=lambda row, medians: (
            f"{memory[row]:.2f} GiB at most, {1e6 * medians[row] / SIZES['num_steps']:.3g} us a step"
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--precision", choices=PRECISIONS, default="float64")
    arguments = vars(parser.parse_args())
    precision = arguments.pop("precision")
    print("T={num_steps:,}, N={num_particles:,}, ".format(**arguments) + precision)
    for name, call in CALLS.items():
        seconds, memory = measure(call, precision, **arguments)
        each = 1e6 * seconds / arguments["num_steps"]
        print(f"{name}: {seconds:.1f} s, {each:.3g} us a step, {memory:.2f} GiB at most", flush=True)


if __name__ == "__main__":
    main()
