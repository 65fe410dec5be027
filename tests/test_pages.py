"""The pages: their examples run as they stand, their links lead somewhere, and every kernel has one."""

import inspect
import re
from pathlib import Path

import pytest

import bayesinf as bi
from bayesinf import kernels

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {path.stem: path for path in sorted((DOCS / "kernels").glob("*.md"))}
SLOW = (  # to compile
    *(
        "backward_sample",
        "blocked_smc",
        "conditional_smc",
        "embedded_hmm",
        "ibis",
        "malt",
        "mclmc",
        "minibatch",
        "mixture",
        "paris",
        "parisian_gibbs",
        "unbiased_smoother",
    ),
    *(
        "particle_gibbs",
        "particle_marginal",
        "ppg",
        "score",
        "score_ascent",
        "saem",
        "smc_squared",
        "iterated_filtering",
        "jitter",
        "cycle",
        "replica_exchange",
        "sghmc",
        "sgld",
        "smc_sampler",
    ),
)

needs_docs = pytest.mark.skipif(not DOCS.exists(), reason="an sdist has no docs")


def run_examples(path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks, "no example found"
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(path), "exec"), names)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        pytest.param("docs/conformal.md", marks=needs_docs),
        pytest.param("docs/hmm.md", marks=[needs_docs, pytest.mark.slow]),
        pytest.param("docs/conformal_series.md", marks=needs_docs),
        pytest.param("docs/nngp.md", marks=needs_docs),
        pytest.param("docs/gp.md", marks=[needs_docs, pytest.mark.slow]),  # to compile
    ],
)
def test_the_examples_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(ROOT / page)


@needs_docs
@pytest.mark.parametrize(
    "page",
    [
        "conformal_sequences.md",
        "inference_scaling.md",
        pytest.param("drafts_and_diffusion.md", marks=pytest.mark.slow),  # to compile
    ],
)
def test_the_examples_of_a_guide_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(DOCS / page)


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page in SLOW)) for page in PAGES])
def test_the_example_of_a_kernel_holds(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_examples(PAGES[page])


@needs_docs
def test_every_kernel_has_one_page():
    classes = {name for name, one in vars(kernels).items() if inspect.isclass(one) and issubclass(one, bi.Kernel)}
    documented = [
        name
        for path in PAGES.values()
        for name in re.findall(r"autoclass:: bayesinf\.kernels\.(\w+)$", path.read_text(), re.M)
    ]
    assert len(documented) == len(set(documented))
    assert classes <= set(documented), f"without a page in docs/kernels: {sorted(classes - set(documented))}"


@needs_docs
def test_the_overview_links_every_page():
    overview = (DOCS / "kernels.md").read_text(encoding="utf-8")
    assert [page for page in PAGES if f"](kernels/{page}.md)" not in overview] == []


@needs_docs
def test_links_between_pages_lead_somewhere():
    broken = []
    for path in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        if "_build" in path.parts:
            continue
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
            if not re.match(r"\w+:", link) and not (path.parent / link).exists():
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert broken == []
