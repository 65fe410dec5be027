"""The main job from its command line, at a small size."""

import contextlib
import io

import jax
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import datasets
from bayesinf.__main__ import main

SMALL = ["--samples", "12", "--warmup", "20", "--chains", "2", "--particles", "8", "--seed", "3"]
NUM_DAYS = 150


@pytest.fixture(scope="module", autouse=True)
def short_series():
    """The first days of the series alone."""
    dates, prices, returns = datasets.wti_crude_oil()
    short = datasets.PriceSeries(dates[: NUM_DAYS + 1], prices[: NUM_DAYS + 1], returns[:NUM_DAYS])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "wti_crude_oil", lambda: short)
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory, short_series):
    folder = tmp_path_factory.mktemp("demo")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        main([*SMALL, "--output", str(folder)])
    (folder / "said.txt").write_text(said.getvalue(), encoding="utf-8")
    return folder


def test_writes_draws_and_plot(demo):
    draws = bi.Draws.load(demo / "draws.nc")
    assert draws["path"].shape == (2, 12, NUM_DAYS)
    assert np.all(np.abs(draws["persistence"]) < 1)
    assert np.all(draws["scale"] > 0)
    assert (demo / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_says_what_it_found(demo):
    said = (demo / "said.txt").read_text(encoding="utf-8")
    for text in ("persistence", "r_hat", "ess_bulk", "log evidence", "compile", "PPG smoothing", "demo.png"):
        assert text in said


def test_resume_extends_the_run_bitwise(demo, tmp_path, capsys):
    first = bi.Draws.load(demo / "draws.nc")
    longer = [*SMALL, "--output", str(tmp_path)]
    longer[1] = "20"
    main([*longer, "--resume"])
    assert "nothing to continue" in capsys.readouterr().out
    whole = bi.Draws.load(tmp_path / "draws.nc")
    assert np.array_equal(whole["path"][:, :12], first["path"])
    longer[-1] = str(demo)
    main([*longer, "--resume"])
    assert np.array_equal(bi.Draws.load(demo / "draws.nc")["path"], whole["path"])


def test_info_names_versions_and_devices(capsys):
    main(["info"])
    said = capsys.readouterr().out
    assert f"bayesinf {bi.__version__}" in said
    assert f"jax {jax.__version__}" in said
    assert "devices" in said


@pytest.mark.parametrize("flag", ["--particles", "--chains", "--samples", "--warmup"])
def test_bad_counts_are_named(flag, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([flag, "-3", "--output", str(tmp_path)])
    assert flag in capsys.readouterr().err
