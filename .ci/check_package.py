"""Builds the sdist and from it the wheel, looks into both, and uses the wheel from an empty environment elsewhere."""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent

USE = """
import sys
import bayesinf as bi
import jax, jax.numpy as jnp
import bayesinf.datasets
assert "site-packages" in bi.__file__, bi.__file__
assert not {"matplotlib", "arviz_plots", "pytest", "beartype"} & set(sys.modules)
assert len(bayesinf.datasets.wti_crude_oil().prices) == 1006
target = bi.Target(lambda x: -0.5 * jnp.sum(x**2))
initial = target.init(0, num_chains=2, template=jnp.zeros(2))
draws = bi.sample(1, bi.kernels.MALA(target, step_size=0.5), initial, num_samples=50, num_warmup=50, progress=False)
print(draws.summary())
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "build", "--outdir", folder, str(ROOT))
        (sdist,) = Path(folder).glob("*.tar.gz")
        (wheel,) = Path(folder).glob("*.whl")

        sources = shipped_sources()
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        missing = sources - names
        assert not missing, f"not in the wheel: {sorted(missing)}"
        tops = {PurePosixPath(name).parts[0] for name in names}
        assert all(top == "bayesinf" or top.endswith(".dist-info") for top in tops), f"strays in the wheel: {tops}"

        with tarfile.open(sdist) as archive:
            links = [member.name for member in archive if member.issym()]
            packed = {str(PurePosixPath(*PurePosixPath(member.name).parts[1:])) for member in archive}
        assert not links, f"links in the sdist: {links}"
        assert sources <= packed, f"not in the sdist: {sorted(sources - packed)}"

        environment = Path(folder, "environment")
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")
        run(python, "-m", "pip", "install", "--quiet", str(wheel))
        run(python, "-m", "pip", "check")
        run(python, "-c", USE, cwd=folder)
    print(f"{wheel.name}: {len(names)} files, installs and runs on its own")


def shipped_sources() -> set[str]:
    """What git tracks of the package, by the names that it has once installed."""
    tracked = subprocess.run(
        ["git", "ls-files", "bayesinf", "kernels", "models"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    links = {"bayesinf/kernels", "bayesinf/models"}
    return {name if name.startswith("bayesinf/") else f"bayesinf/{name}" for name in tracked if name not in links}


def run(*command: str, **options: object) -> None:
    subprocess.run(command, check=True, **options)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
