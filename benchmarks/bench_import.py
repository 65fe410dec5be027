"""What `import bayesinf` costs beyond `import jax, numpyro`, each time in a fresh interpreter."""

import subprocess
import sys

SCRIPT = """
import time
import jax, numpyro
start = time.perf_counter()
import bayesinf
print(time.perf_counter() - start, len(jax._src.xla_bridge._backends))
"""


def bench_import(compare):
    backends = []

    def import_beyond() -> float:
        out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
        seconds, started = out.split()
        backends.append(int(started))
        return float(seconds)

    compare(
        "import, in a fresh interpreter",
        {"import bayesinf, beyond import jax, numpyro": import_beyond},
        note=lambda name, medians: f"{max(backends)} JAX backends started",
    )
