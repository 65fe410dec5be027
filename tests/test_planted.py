"""The conformance suite rejects every planted bug."""

import functools

import jax
import jax.numpy as jnp
import pytest
import state_space_laws as laws
from planted import composition, gaussian_prior, metropolis, parisian, paths, posteriors, protocol

import bayesinf as bi
from bayesinf.conformance import (
    FALSE_ALARM,
    ContractError,
    contract,
    evidence_is_unbiased,
    exact_start_invariance,
    geweke_joint,
    simulation_based_calibration,
)


def logdensity(x):
    """x_0 the logarithm of a Gamma(3) variable, x_1 | x_0 ~ N(x_0^2 / 4, exp(x_0 / 2)): skewed, and a banana."""
    return 3.0 * x[0] - jnp.exp(x[0]) - 0.5 * jnp.exp(-x[0] / 2) * (x[1] - x[0] ** 2 / 4) ** 2 - x[0] / 4


def exact(key):
    key_0, key_1 = jax.random.split(key)
    x = jnp.log(jnp.sum(jax.random.exponential(key_0, (3,))))
    return jnp.stack([x, x**2 / 4 + jnp.exp(x / 4) * jax.random.normal(key_1)])


TARGET = bi.Target(logdensity)
SUM = bi.kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x_prev * x)
POSITION = jnp.array([1.0, 0.3])
PRIOR_TRIL = jnp.array([[1.5, 0.0], [0.4, 2.0]])
MALA = bi.kernels.MALA(TARGET, 0.4)

WRONG_LAW = {
    "log ratio times 0.95": metropolis.ShrunkLogRatio(TARGET, 1.0),
    "2% extra acceptance": metropolis.ExtraAcceptance(TARGET, 1.0),
    "reused key": metropolis.ReusedKey(TARGET, 1.0),
    "drifting proposal": metropolis.DriftingProposal(TARGET, 1.0),
    "forgotten gradient": metropolis.ForgottenGradient(TARGET, 0.4),
    "forgotten Jacobian": bi.kernels.MALA(metropolis.without_jacobian(TARGET), 0.4),
    "stale cycle": composition.StaleCycle(metropolis.RandomWalk(TARGET, 1.0), metropolis.RandomWalk(TARGET, 0.5)),
    "Gibbs given the old block": composition.OldBlockGibbs(TARGET, 1.0),
    "mixture by place": composition.MixtureByPlace([MALA, bi.kernels.MALA(TARGET, 0.05)]),
    "repeat until accepted": composition.RepeatUntilAccepted(MALA, 3),
    "jitter by place": composition.JitterByPlace(MALA),
    "Crank-Nicolson without the prior's ratio": gaussian_prior.ForgottenPrior(TARGET, 0.5, 0.5, PRIOR_TRIL),
    "gradient with the prior's counted twice": gaussian_prior.PriorTwice(TARGET, 0.3, 0.5, PRIOR_TRIL),
    "marginal gradient tested twice": gaussian_prior.TestedTwice(TARGET, 0.5, 0.5, PRIOR_TRIL),
    "unscaled gradient": composition.UnscaledGradient(MALA, jnp.array([0.6, 1.2])),
}

WRONG_LAW_OF_PATHS = {
    "unweighted backward draw": parisian.UnweightedBackward(laws.PATHS, laws.SERIES, SUM, 3),
    "reference not inserted": parisian.ReferenceNotInserted(laws.PATHS, laws.SERIES, SUM, 3),
    "systematic resampling in conditional SMC": parisian.SystematicConditionalSMC(laws.PATHS, laws.SERIES, 3),
    "block without the next state": paths.ForgetsTheNext(laws.PATHS, laws.SERIES, 3, 2),
    "blocks with stale borders": paths.StaleBorders(laws.PATHS, laws.SERIES, 3, 2),
    "candidates around the path": paths.CentredAtThePath(laws.PATHS, laws.SERIES, 8, 0.3),
    "path not a candidate": paths.PathNotACandidate(laws.PATHS, laws.SERIES, 8, 0.3),
    "maps in the wrong order": paths.MapsInTheWrongOrder(laws.PATHS, laws.SERIES, 8, 0.3, "parallel"),
}

BROKEN_CLAUSE = {
    protocol.NamelessState: "protocol",
    protocol.BareInfo: "info",
    protocol.JitteredInit: "init",
    protocol.PromotedState: "types",
    protocol.LateField: "types",
    protocol.StaticStepSize: "leaves",
    protocol.PythonStepSize: "one trace",
    protocol.IgnoredStepSize: "step size",
    protocol.TracedOnce: "jit",
    protocol.LaneMixing: "vmap",
    metropolis.ReusedKey: "keys",
    protocol.FixedKey: "reproducible",
    protocol.HostCounter: "resume",
    protocol.AcceptsNaN: "divergence",
    protocol.TakesIntegers: "bad input",
}


def test_the_kernel_that_the_bugs_are_planted_in_is_right():
    kernel = metropolis.RandomWalk(TARGET, 1.0)
    exact_start_invariance(0, kernel, exact).raise_if_rejected()
    contract(kernel, POSITION)


@pytest.mark.parametrize("kernel", WRONG_LAW.values(), ids=WRONG_LAW.keys())
def test_exact_start_invariance_rejects(kernel):
    assert exact_start_invariance(0, kernel, exact).p_value < FALSE_ALARM


# of the slow ones other tests find the bug on small problems
SLOW_ON_PATHS = ("blocks with stale borders", "path not a candidate", "maps in the wrong order")


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_ON_PATHS)) for name in WRONG_LAW_OF_PATHS],
)
def test_exact_start_invariance_rejects_on_paths(name):
    kernel = WRONG_LAW_OF_PATHS[name]
    report = exact_start_invariance(0, kernel, laws.draw_path, num_chains=40_000, num_steps=10)
    assert report.p_value < FALSE_ALARM


@pytest.mark.parametrize(
    ("kernel", "clause"), BROKEN_CLAUSE.items(), ids=lambda value: getattr(value, "__name__", value)
)
def test_contract_rejects(kernel, clause):
    with pytest.raises(ContractError) as caught:
        contract(kernel(TARGET, 1.0), POSITION)
    assert clause in caught.value.violations


@pytest.mark.parametrize(
    "posterior",
    [posteriors.the_prior, posteriors.without_prior_mean, posteriors.wrong_shape, posteriors.separate_blocks],
)
def test_calibration_rejects(posterior):
    report = simulation_based_calibration(
        0, posteriors.prior, posteriors.simulate, posterior, num_simulations=4_000, num_draws=50
    )
    assert report.p_value < FALSE_ALARM


@pytest.mark.parametrize(
    "transition", [posteriors.without_jacobian, posteriors.drops_a_datum, posteriors.forgets_normaliser]
)
def test_geweke_rejects(transition):
    assert geweke_joint(0, posteriors.prior, posteriors.simulate, transition).p_value < FALSE_ALARM


def test_geweke_rejects_parameters_given_the_old_path():
    build = functools.partial(laws.particle_gibbs, kind=parisian.StaleParticleGibbs)
    report = geweke_joint(0, laws.draw_parameters_and_path, laws.draw_series, laws.transition(build))
    assert report.p_value < FALSE_ALARM


@pytest.mark.parametrize(
    "estimate", [posteriors.mean_of_logs, posteriors.divides_by_one_less, posteriors.loses_the_dead]
)
def test_evidence_rejects(estimate):
    assert evidence_is_unbiased(0, estimate, posteriors.LOG_EVIDENCE).p_value < FALSE_ALARM
