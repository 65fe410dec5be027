"""The tutorials run from top to bottom, each in an interpreter of its own, as a reader would run it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "tutorials"
TUTORIALS = {path.stem: path for path in sorted(FOLDER.glob("*.md"))}

needs_docs = pytest.mark.skipif(not FOLDER.exists(), reason="an sdist has no docs")


def code_of(path: Path) -> str:
    """The cells of a MyST notebook as one program, at the lines that they have on the page."""
    text = path.read_text(encoding="utf-8")
    lines = [""] * text.count("\n")
    for cell in re.finditer(r"^```\{code-cell\}[^\n]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        first = text.count("\n", 0, cell.start(1))
        code = ["" if line.startswith(":") else line for line in cell[1].splitlines()]  # a colon begins an option
        lines[first : first + len(code)] = code
    return "\n".join(lines)


@needs_docs
@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_a_tutorial_runs(tutorial, tmp_path):
    """`make slow` lists the seconds of each."""
    for_tests = ("JAX_ENABLE_X64", "JAX_DISABLE_MOST_OPTIMIZATIONS")
    env = {name: value for name, value in os.environ.items() if name not in for_tests} | {"MPLBACKEND": "Agg"}
    script = tmp_path / f"{tutorial}.py"
    script.write_text(code_of(TUTORIALS[tutorial]), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2_000:]}\n{done.stderr[-4_000:]}"


@needs_docs
def test_cells_keep_their_lines_and_prose_is_left_out(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\n```{code-cell}\nx = 1\n```\n\n```text\nno code\n```\n\n```{code-cell}\n:tags: [a]\nx\n```\n"
    )
    assert code_of(page).split("\n") == ["", "", "", "x = 1", *[""] * 8, "x", ""]
    assert all(len(code_of(path).split()) > 50 for path in TUTORIALS.values())
