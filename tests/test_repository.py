"""The repository keeps its promises: the links are links, the import is quiet, the examples in the pages run."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("room", ["kernels", "models"])
def test_the_two_folders_are_real_and_the_package_links_to_them(room):
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout: a source distribution holds files in place of the links")
    link = ROOT / "bayesinf" / room
    assert link.is_symlink(), "a checkout without links: see CONTRIBUTING.md"
    assert link.readlink() == Path("..", room)
    assert (ROOT / room).is_dir()
    assert not (ROOT / room).is_symlink()


@pytest.mark.parametrize("room", ["kernels", "models"])
def test_no_second_copy_of_a_class_can_be_imported(room):
    if not (ROOT / room).exists():
        pytest.skip("not a checkout: there is only one copy")
    with pytest.raises(ImportError, match=rf"import bayesinf\.{room}, not {room}"):
        importlib.import_module(room)


def test_import_is_quiet():
    script = """if True:
        import sys
        import jax
        settings = dict(jax.config.values)
        import bayesinf, bayesinf.conformance, bayesinf.datasets
        assert not jax._src.xla_bridge._backends, "a backend was started"
        assert dict(jax.config.values) == settings, "a setting of JAX was changed"
        unwanted = {"blackjax", "matplotlib", "arviz", "arviz_plots", "zarr", "IPython"} & set(sys.modules)
        assert not unwanted, f"imported without need: {unwanted}"
    """
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
