"""Prints the table of docs/posteriors.md: the largest |z| of every kernel on every posterior.

python tests/posteriors/make_table.py [KERNEL ...]
"""

import sys
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posteriors.comparison import KERNELS, compare
from posteriors.models import POSTERIORS


def main(names: list[str]) -> None:
    print("|", " | ".join(["kernel", *(f"`{name}`" for name in POSTERIORS)]), "|")
    print("|---" * (len(POSTERIORS) + 1) + "|")
    for kernel in names or KERNELS:
        print(f"| `{kernel}`", end="", flush=True)
        for posterior in POSTERIORS:
            report = compare(kernel, posterior)
            jax.clear_caches()
            print(f" | {report.notes['largest z']:.1f}", end="", flush=True)
            print(repr(report), file=sys.stderr, flush=True)
        print(" |")


if __name__ == "__main__":
    main(sys.argv[1:])
