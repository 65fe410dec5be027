"""Plots of priors and posteriors: that what is drawn is the law."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest
import scipy.stats

from bayesinf.models import gp

pytest.importorskip("matplotlib").use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

GRID = jnp.linspace(0.0, 3.0, 20)
X, Y = jnp.array([0.5, 2.0]), jnp.array([1.0, -1.0])
PROCESSES = {
    "GP": gp.GP(2.0 * gp.RBF(1.0), X, mean=jnp.sin, noise=0.1),
    "StudentTProcess": gp.StudentTProcess(2.0, 3.0, gp.RBF(1.0), X, mean=jnp.sin, noise=0.1),
    "ScaleMixtureGP": gp.ScaleMixtureGP(dist.InverseGamma(2.0, 3.0), gp.RBF(1.0), X, 0.1, mean=jnp.sin, nodes=64),
}


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def band(ax):
    """Lower and upper edge over the grid."""
    vertices = ax.collections[0].get_paths()[0].vertices
    at = [vertices[np.isclose(vertices[:, 0], x), 1] for x in np.asarray(GRID)]
    return np.array([[values.min(), values.max()] for values in at]).T


def near(a, b):
    return np.max(np.abs(np.asarray(a) - np.asarray(b))) < 1e-3


@pytest.mark.parametrize("name", ["GP", "StudentTProcess"])
def test_the_band_and_the_middle_of_a_prior(name):
    ax = gp.plot_functions(PROCESSES[name], GRID, num_functions=2, level=0.8)
    standard = scipy.stats.norm(0, 2**0.5) if name == "GP" else scipy.stats.t(4, 0, 1.5**0.5)
    expected = [np.sin(GRID) + standard.ppf(p) for p in (0.1, 0.9)]
    assert near(band(ax), expected)
    assert near(ax.lines[-1].get_ydata(), np.sin(GRID))
    assert len(ax.lines) == 3  # two functions and the median


@pytest.mark.parametrize("name", list(PROCESSES))
def test_the_band_of_a_posterior_with_its_data(name):
    process = PROCESSES[name]
    ax = gp.plot_functions(process, GRID, Y, num_functions=3)
    law = process.condition(Y, GRID)
    if name == "ScaleMixtureGP":  # the distribution function at the edges, rather than its inverse
        found = [law.cdf(jnp.asarray(edge, law.mean.dtype)) for edge in band(ax)]
        assert near(found[0], 0.05)
        assert near(found[1], 0.95)
    else:
        standard = scipy.stats.norm if name == "GP" else scipy.stats.t(np.asarray(law.df))
        scale = np.asarray(law.scale)
        assert near(band(ax), [law.loc + standard.ppf(p) * scale for p in (0.05, 0.95)])
    dots = ax.lines[-1]
    assert near(dots.get_xdata(), X)
    assert near(dots.get_ydata(), Y)
    assert len(ax.lines) == 5


@pytest.mark.parametrize("unit", [1.0, 1e-4])
def test_the_prior_of_a_mixture_is_that_of_its_draws(unit):
    """By the t law that it is, to five standard errors of a quantile of 4,000 draws, at 20 correlated places."""
    process = gp.ScaleMixtureGP(
        dist.InverseGamma(2.0, 3.0), unit**2 * gp.RBF(1.0), X, 0.1, mean=lambda x: unit * jnp.sin(x), nodes=64
    )
    ax = gp.plot_functions(process, GRID, num_functions=0)
    law = scipy.stats.t(4, 0, 1.5**0.5)
    error = 5 * np.sqrt(0.05 * 0.95 / 4_000) / law.pdf(law.ppf(0.05))
    assert np.max(np.abs(band(ax)[0] / unit - np.sin(GRID) - law.ppf(0.05))) < error


def test_laws_computed_elsewhere_and_axes_that_exist():
    process = PROCESSES["GP"]
    _, ax = plt.subplots()
    joint = process.condition(Y, GRID, full_cov=True)
    assert gp.plot_functions(joint, GRID[:, None], ax=ax, color="C3", label="posterior") is ax
    assert len(ax.lines) == 6
    assert ax.get_legend_handles_labels()[1] == ["posterior"]
    each = gp.plot_functions(process.condition(Y, GRID), GRID)
    assert len(each.lines) == 1  # of each value alone there are no functions to draw
    assert near(band(each), band(ax))


def test_functions_are_draws_of_the_law():
    joint = PROCESSES["GP"].condition(Y, GRID, full_cov=True)
    ax = gp.plot_functions(joint, GRID, num_functions=4, key=3)
    assert near([line.get_ydata() for line in ax.lines[:4]], joint.sample(jax.random.key(3), (4,)))


def test_without_a_joint_law_no_functions_are_drawn():
    process = gp.GP(gp.Matern32(1.0), X, noise=0.1, solver=gp.vecchia(1))
    assert len(gp.plot_functions(process, GRID, Y).lines) == 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gp.plot_functions(PROCESSES["GP"], jnp.ones((4, 2))), "X must be places on a line"),
        (lambda: gp.plot_functions(3.0, GRID), "law must be a process or a NumPyro distribution"),
        (lambda: gp.plot_functions(PROCESSES["GP"], GRID, level=1.5), "level must lie in"),
        (lambda: gp.plot_functions(PROCESSES["GP"], GRID, num_functions=-1), "num_functions must be at least 0"),
        (lambda: gp.plot_functions(PROCESSES["GP"].condition(Y, GRID), GRID[:3]), "law must be one of the values at X"),
        (lambda: gp.plot_functions(dist.Normal(GRID, 1.0), GRID, Y), "y must be None where law is not a process"),
        (lambda: gp.plot_functions(gp.GP(gp.RBF(jnp.ones((2, 1))), X), GRID), "law must be one process"),
        (lambda: gp.plot_functions(gp.GP(gp.RBF(), X, mean=Y), GRID), "mean must be a number, a function"),
        (lambda: gp.plot_functions(gp.GP(gp.RBF(), X, mean=Y), X), "mean must be a number, a function"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_matplotlib_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"bayesinf\[plots\]"):
        gp.plot_functions(PROCESSES["GP"], GRID)
