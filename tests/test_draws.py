"""Draws: names, ArviZ, disk."""

import functools

import arviz_stats
import h5netcdf
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import xarray
from numpyro.handlers import scope

import bayesinf as bi


def model(x, y):
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("day", len(x)):
        numpyro.sample("y", dist.Normal(slope * x, scale), obs=y)


X, Y = jnp.linspace(-1.0, 1.0, 6), jnp.array([-0.9, -0.7, 0.1, 0.2, 0.5, 1.3])


@pytest.fixture(scope="module")
def draws():
    target = bi.Target.from_numpyro(model, X, Y).with_labels(coords={"day": list("abcdef")})
    kernel = bi.kernels.MALA(target, step_size=0.1)
    return bi.sample(0, kernel, target.init(1, 4), num_samples=300, num_warmup=300, progress=False)


def test_draws_are_constrained_by_default(draws):
    assert set(draws.variables) == {"slope", "scale"}
    assert np.all(draws["scale"] > 0)


def test_unknown_variable_is_named(draws):
    with pytest.raises(KeyError, match=r"no variable 'slop'; there are \['scale', 'slope'\]"):
        draws["slop"]


def test_nested_positions_get_dotted_names():
    target = bi.Target(lambda x: -0.5 * (x["a"]["b"] ** 2 + jnp.sum(x["c"][0] ** 2)))
    initial = {"a": {"b": jnp.zeros(2)}, "c": (jnp.zeros((2, 3)),)}
    draws = bi.sample(0, bi.kernels.MALA(target, 0.1), initial, num_samples=5, progress=False)
    assert {name: value.shape for name, value in draws.variables.items()} == {"a.b": (2, 5), "c.0": (2, 5, 3)}


def test_tree_follows_the_schema(draws):
    tree = draws.to_arviz()
    assert isinstance(tree, xarray.DataTree)
    assert set(tree.children) == {"posterior", "sample_stats", "observed_data", "log_likelihood"}
    assert tree["posterior"]["slope"].dims == ("chain", "draw")
    assert {"lp", "diverging", "acceptance_rate", "step_size"} <= set(tree["sample_stats"].data_vars)
    assert np.allclose(tree["observed_data"]["y"], Y)
    assert list(tree["observed_data"]["day"].values) == list("abcdef")
    assert tree["posterior"].attrs["inference_library"] == "bayesinf"


def test_log_likelihood_of_each_observation(draws):
    pointwise = draws.to_arviz()["log_likelihood"]["y"]
    assert pointwise.dims == ("chain", "draw", "day")
    expected = dist.Normal(draws["slope"][2, 7] * X, draws["scale"][2, 7]).log_prob(Y)
    assert np.allclose(pointwise[2, 7], expected, rtol=1e-4)
    assert "log_likelihood" not in draws.to_arviz(log_likelihood=False).children


def test_arviz_reads_it(draws):
    assert np.isfinite(float(arviz_stats.loo(draws.to_arviz()).elpd))


def test_summary_is_arvizs_under_familiar_names(draws):
    table = draws.summary()
    assert list(table.columns) == [
        "mean", "sd", "hdi_3%", "hdi_97%", "ess_bulk", "ess_tail", "r_hat", "mcse_mean", "mcse_sd"
    ]  # fmt: skip
    assert table.loc["slope", "mean"] == pytest.approx(float(draws["slope"].mean()), rel=1e-5)
    assert table.loc["slope", "r_hat"] == pytest.approx(float(arviz_stats.rhat(draws["slope"])), rel=1e-6)
    assert list(draws.summary(var_names=["scale"]).index) == ["scale"]


def test_saved_and_loaded(draws, tmp_path):
    draws.save(tmp_path / "run.nc")
    loaded = bi.Draws.load(tmp_path / "run.nc")
    assert np.array_equal(loaded["slope"], draws["slope"])
    assert np.array_equal(loaded.stats["is_divergent"], draws.stats["is_divergent"])
    assert loaded.status == "complete"
    assert loaded.seconds == draws.seconds
    assert loaded.stats["step_size"].shape == draws.stats["is_divergent"].shape
    assert np.array_equal(loaded.observed["y"], draws.to_arviz()["observed_data"]["y"])
    loaded.save(tmp_path / "again.nc")
    assert bi.Draws.load(tmp_path / "again.nc").seconds == draws.seconds
    assert loaded.summary().equals(draws.summary())


def test_file_is_as_arviz_0_23_reads_it(draws, tmp_path):
    """It takes the groups below the root one by one, with axes chain, draw, ... and types of plain netCDF-4."""
    draws.save(tmp_path / "run.nc")
    with h5netcdf.File(tmp_path / "run.nc", "r") as file:
        groups = list(file.groups)
        assert set(groups) == {"posterior", "sample_stats", "observed_data", "log_likelihood"}
        assert not file.variables
        assert not any(group.groups for group in file.groups.values())
    for name in groups:
        with xarray.open_dataset(tmp_path / "run.nc", group=f"//{name}", engine="h5netcdf") as group:
            for value in group.data_vars.values():
                assert value.dims[:2] == ("chain", "draw") or name == "observed_data"
                assert value.dtype.kind in "bif"
            for label in {"chain", "draw"} & set(group.dims):
                assert group[label].dtype == np.int64
                assert np.array_equal(group[label], np.arange(group.sizes[label]))
            for attribute in group.attrs.values():
                assert isinstance(attribute, str | np.number) or attribute.dtype.kind in "if"


def test_draws_on_disk_are_saved_with_their_log_likelihood(tmp_path):
    target = bi.Target.from_numpyro(model, X, Y)
    kernel = bi.kernels.MALA(target, step_size=0.01)
    stored = bi.sample(0, kernel, target.init(1, 2), num_samples=5, progress=False, store=tmp_path / "run")
    pointwise = stored.to_arviz()["log_likelihood"]["y"]
    stored.save(tmp_path / "run.nc")
    assert np.array_equal(bi.Draws.load(tmp_path / "run.nc")["slope"], stored["slope"][:])
    expected = dist.Normal(stored["slope"][1, 3] * X, stored["scale"][1, 3]).log_prob(Y)
    assert np.allclose(pointwise[1, 3], expected, rtol=1e-4)


def test_slashes_of_a_scope_become_dots(tmp_path):
    target = bi.Target.from_numpyro(scope(model, prefix="left"), X, Y)
    kernel = bi.kernels.MALA(target, step_size=0.01)
    draws = bi.sample(0, kernel, target.init(1, 2), num_samples=5, progress=False)
    assert np.array_equal(draws["left.scale"], draws.samples["left/scale"])
    assert draws["left/scale"] is draws["left.scale"]
    draws.save(tmp_path / "run.nc")
    assert np.array_equal(bi.Draws.load(tmp_path / "run.nc")["left/scale"], draws["left.scale"])
    pointwise = draws.to_arviz()["log_likelihood"]["left.y"]
    assert pointwise.dims == ("chain", "draw", "left.day")
    expected = dist.Normal(draws["left.slope"][1, 3] * X, draws["left.scale"][1, 3]).log_prob(Y)
    assert np.allclose(pointwise[1, 3], expected, rtol=1e-4)


def test_repr_says_what_is_there(draws):
    assert repr(draws).startswith("Draws(4 chains x 300 draws of scale, slope; complete; acceptance 0.")


def test_no_draws_are_said_to_be_none():
    kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), 0.5)
    draws = bi.sample(0, kernel, jnp.zeros((2, 3)), num_samples=0, progress=False)
    assert repr(draws) == "Draws(2 chains x 0 draws of x[3]; complete)"
    with pytest.raises(ValueError, match="there are no draws to summarise"):
        draws.summary()


def test_series_of_kernels_on_paths_are_observed_data(tmp_path):
    model = bi.models.StochasticVolatility(-1.0, 0.9, 0.3)
    _, ys = bi.models.simulate(0, model, 6)
    kernel = bi.kernels.ConditionalSMC(model, ys, 8)
    run = functools.partial(bi.sample, 1, kernel, kernel.initial(2, 2), num_samples=5, progress=False)
    for draws in (run(), run(store=tmp_path / "zarr")):
        assert np.array_equal(draws.to_arviz()["observed_data"]["ys"], ys)
    on_disk = xarray.open_datatree(tmp_path / "zarr", engine="zarr", consolidated=False)
    assert np.array_equal(on_disk["observed_data"]["ys"], ys)
