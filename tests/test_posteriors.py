"""Moments of our kernels on eight posteriors, against those of long runs by another library."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.integrate
import scipy.stats
from numpyro import handlers
from planted.metropolis import NeverTurned
from posteriors.comparison import KERNELS, adjusted, compare, judge, reference, target_of
from posteriors.models import POSTERIORS, pumps

from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM

# a few trajectories among thousands may diverge; whether that matters is what is tested
pytestmark = pytest.mark.filterwarnings("ignore:.*the moves were undone:bayesinf.errors.SamplingWarning")

RESOLUTION = 0.1  # standard deviations, and share of a variance: a comparison that resolves less says nothing

# what runs by default; all other pairs are slow
DEFAULT = [("MALT", "eight_schools"), ("BAOAB", "ar5"), ("MALA", "mixture")]
# of the whole table, which make_table.py runs, every second pair: four of each kernel and of each posterior
REST = [
    (kernel, posterior)
    for i, kernel in enumerate(KERNELS)
    for j, posterior in enumerate(POSTERIORS)
    if (i + j) % 2 == 0 and (kernel, posterior) not in DEFAULT
]


@pytest.mark.parametrize(
    ("kernel", "posterior"), [*DEFAULT, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)]
)
def test_moments_are_those_of_the_reference(kernel, posterior):
    report = compare(kernel, posterior).raise_if_rejected()
    assert report.notes["resolution"] < RESOLUTION
    jax.clear_caches()


def test_the_reference_of_eight_schools_is_that_of_quadrature():
    """Given the scale all is Gaussian: three moments by one integral over log scale."""
    entry = reference()["eight_schools"]
    y, errors = (np.asarray(entry["data"][name]) for name in ("effects", "errors"))

    def moments(log_scale):
        """(1, E mean, E scale, E theta_0) and the squares, times the density of log scale."""
        scale = np.exp(log_scale)
        precision = 1 / (errors**2 + scale**2)
        variance = 1 / (1 / 25 + precision.sum())
        mean = variance * (precision @ y)
        covariance = np.diag(1 / precision) + 25
        log_density = scipy.stats.multivariate_normal.logpdf(y, cov=covariance)
        density = np.exp(log_density + 20) * scipy.stats.halfcauchy.pdf(scale, scale=5) * scale
        share = precision[0] * scale**2  # of theta_0, that its own datum determines
        theta = share * y[0] + (1 - share) * mean
        theta_variance = share * errors[0] ** 2 + (1 - share) ** 2 * variance
        firsts = np.array([1.0, mean, scale, theta])
        return density * np.concatenate([firsts, [variance + mean**2, scale**2, theta_variance + theta**2]])

    grid = np.linspace(-12.0, 8.0, 4_001)  # smooth and vanishing at both ends: the sum is exact to 1e-8
    mass, *rest = scipy.integrate.trapezoid(np.stack([moments(x) for x in grid]), grid, axis=0)
    first, second = np.array(rest[:3]) / mass, np.array(rest[3:]) / mass
    exact = dict(zip(("mean", "variance"), (first, second - first**2), strict=True))
    for word, values in exact.items():
        for site, value in zip(("mean", "scale", "theta"), values, strict=True):
            known = entry["moments"][site]
            ours, error = (np.ravel(known[key])[0] for key in (word, f"{word}_error"))
            assert 2 * scipy.stats.norm.sf(abs(ours - value) / error) > FALSE_ALARM / 6


def test_the_references_have_converged():
    for name in POSTERIORS:
        for moments in reference()[name]["moments"].values():
            assert np.max(moments["r_hat"]) < 1.005
            assert np.min(moments["ess"]) >= 10_000


def without_jacobian(hours, failures):
    """The logarithm of the shape has the density that the shape should have."""
    shape = handlers.trace(pumps).get_trace(hours, failures)["shape"]["value"]
    numpyro.factor("forgotten", -jnp.log(shape))


def with_another_prior(hours, failures):
    """The shape has mean two rather than one in the prior."""
    shape = handlers.trace(pumps).get_trace(hours, failures)["shape"]["value"]
    numpyro.factor("ratio", dist.Exponential(0.5).log_prob(shape) - dist.Exponential(1.0).log_prob(shape))


@pytest.mark.parametrize("model", [without_jacobian, pytest.param(with_another_prior, marks=pytest.mark.slow)])
def test_a_wrong_model_is_found(model):
    draws = KERNELS["HMC"](target_of("pumps", model))
    assert judge(model.__doc__, "pumps", draws).p_value < FALSE_ALARM


class GoesOn(NeverTurned):
    """Rejects more often than warm-up would have it, so that what is done then matters."""

    target_acceptance: ClassVar[float | None] = 0.7


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [GoesOn, kernels.Metropolize])
def test_a_wrong_kernel_is_found(kernel):
    """GHMC whose velocity does not turn back where a step is rejected, and the right one."""
    draws = adjusted(lambda target: kernels.Precondition(kernel(kernels.Splitting("OBABO", target, 0.1))), 2_000)(
        target_of("lasso")
    )
    is_wrong = judge(kernel.__doc__, "lasso", draws).p_value < FALSE_ALARM
    assert is_wrong == (kernel is GoesOn)
