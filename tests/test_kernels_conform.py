"""Every kernel of the library: the contract, and for those that claim it, the invariance of their law.

A new kernel enters the table here; `test_no_kernel_is_left_out` fails until it does.
"""

import functools
import inspect

import blackjax
import blackjax.util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import state_space_laws as laws
from numpyro.distributions.flows import InverseAutoregressiveTransform

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import contract, exact_start_invariance, geweke_joint
from bayesinf.kernels.vectors import combine, normals


def logdensity(position, scale):
    """x / scale the logarithm of a Gamma(3) variable; y_i | x ~ N(x^2 / 4, exp(x / 2)): skewed, dependent, a banana."""
    x, y = position["x"] / scale, position["y"]
    return 3.0 * x - jnp.exp(x) - 0.5 * jnp.sum(jnp.exp(-x / 2) * (y - x**2 / 4) ** 2) - y.size * x / 4


def sharpened(position, scale):
    return 2.0 * logdensity(position, scale)


def autoregression(y):
    """Location and log scale of each coordinate given those before."""
    return jnp.stack([0.2 + 0 * y[0], y[0] ** 2 / 4]), jnp.stack([0.1 + 0 * y[0], jnp.tanh(y[0]) / 2])


def log_prior(position):
    return -0.1 * position["x"] ** 2


def log_likelihood(position, row):
    """A row has a scale and an observation for each of y_0, y_1, x; the terms are not quadratic."""
    residuals = row["y"] - jnp.append(position["y"], position["x"])
    return -jnp.sum(jnp.logaddexp(residuals, -residuals)) * row["scale"]


def drift(position, data, *, key):
    (noise,) = normals(key, position, 1)
    return combine((-data, position), (0.1, noise))


def diffusion(position, data):
    return jax.tree.map(lambda x: jnp.sqrt(data + 0.1 * x**2), position)


SCALE = jnp.asarray(1.2)
TARGET = bi.Target(logdensity, SCALE)
ROWS = {"scale": jnp.linspace(0.5, 1.5, 7), "y": jnp.linspace(-1.0, 2.0, 21).reshape(7, 3)}
MINIBATCH = kernels.Minibatch(log_prior, log_likelihood, ROWS, batch_size=3)
PRIOR_TRIL = jnp.array([[1.0, 0, 0], [0.3, 1.2, 0], [-0.5, 0.2, 1.0]])
POSITION = {"x": jnp.asarray(1.0), "y": jnp.array([0.3, -0.4])}


def relative(position, scale):
    """The density of the target over that of the prior N(m, L L^T) of elliptical slice sampling."""
    noise = jax.scipy.linalg.solve_triangular(PRIOR_TRIL, jnp.append(position["x"], position["y"]) - 0.5, lower=True)
    return logdensity(position, scale) + 0.5 * noise @ noise


def exact_sampler(key):
    key_x, key_y = jax.random.split(key)
    x = laws.log_gamma(key_x, 3)
    return {"x": SCALE * x, "y": x**2 / 4 + jnp.exp(x / 4) * jax.random.normal(key_y, (2,))}


HOT = 0.6  # a power of the law that is as easy to draw from


def with_hot_replica(key, state):
    key_x, key_y = jax.random.split(key)
    x = laws.log_gamma(key_x, 2) - jnp.log(HOT)
    y = x**2 / 4 + jnp.exp(x / 4) / jnp.sqrt(HOT) * jax.random.normal(key_y, (2,))
    position = {"x": SCALE * x, "y": y}
    hot = jax.tree.map(lambda leaf: leaf[None], (position, TARGET.evaluate(position, order=1)))
    return state._replace(memory=state.memory._replace(positions=hot[0], evaluations=hot[1]))


MALA = kernels.MALA(TARGET, 0.3)
NUTS = kernels.NUTS(TARGET, 0.5, max_num_doublings=4)

INVARIANT = {
    "MALA": MALA,
    "Barker": kernels.Barker(TARGET, 0.3),
    "GHMC": kernels.GHMC(TARGET, 0.3),
    "MALT": kernels.MALT(TARGET, 0.3, num_steps=3),
    "Metropolize": kernels.Metropolize(kernels.Splitting("UBU", TARGET, 0.4)),
    "Precondition": kernels.Precondition(MALA, jnp.array([[1.0, 0, 0], [0.3, 1.2, 0], [-0.5, 0.2, 0.6]])),
    "HMC": kernels.HMC(TARGET, 0.4, num_integration_steps=3),
    "NUTS": NUTS,
    "EllipticalSlice": kernels.EllipticalSlice(relative, 0.5, PRIOR_TRIL, SCALE),
    "PCN": kernels.PCN(TARGET, 0.2, 0.5, PRIOR_TRIL),
    "PCNLangevin": kernels.PCNLangevin(TARGET, 0.1, 0.5, PRIOR_TRIL),
    "MarginalGradient": kernels.MarginalGradient(TARGET, 0.4, 0.5, PRIOR_TRIL),
    "Cycle": kernels.Cycle([MALA, kernels.MALA(TARGET, 0.05), kernels.HMC(TARGET, 0.3, num_integration_steps=2)]),
    "Mixture": kernels.Mixture([MALA, kernels.HMC(TARGET, 0.3, num_integration_steps=2)], [0.3, 0.7]),
    "Repeat": kernels.Repeat(MALA, 2),
    "Jitter": kernels.Jitter(kernels.HMC(TARGET, 0.4, num_integration_steps=3)),
    "Temper": kernels.Temper(kernels.MALA(bi.Target(sharpened, SCALE), 0.3), 0.5),
    "Transformed": kernels.Transformed(MALA, {"y": InverseAutoregressiveTransform(autoregression)}),
    "ReplicaExchange": kernels.ReplicaExchange(MALA, [1.0, HOT]),
    "Gibbs": kernels.Gibbs({"x": MALA, "y": kernels.Repeat(kernels.MALA(TARGET, 0.6), 2)}),
}

# biased by their step size; how much is tested against closed forms where they live
UNADJUSTED = {
    "LMC": kernels.LMC(TARGET, 0.05),
    "RandomizedMidpoint": kernels.RandomizedMidpoint(TARGET, 0.1),
    "ParallelMidpoint": kernels.ParallelMidpoint(TARGET, 0.1, num_nodes=2),
    "KineticLangevin": kernels.KineticLangevin(TARGET, 0.1, friction=2.0),
    "RandomizedMidpointKinetic": kernels.RandomizedMidpointKinetic(TARGET, 0.1, friction=2.0),
    "Splitting BAOAB": kernels.Splitting("BAOAB", TARGET, 0.2),
    "Splitting UBU": kernels.Splitting("UBU", TARGET, 0.2),
    "MCLMC": kernels.MCLMC(TARGET, 0.3, 1.5),
    "SGLD": kernels.SGLD(MINIBATCH, 0.05, decay=0.3, delay=10.0),
    "SGLD centred": kernels.SGLD(MINIBATCH.centred(POSITION), 0.05),
    "SGHMC": kernels.SGHMC(MINIBATCH, 0.1, friction=2.0, gradient_variance=0.3),
    "ItoChain": kernels.ItoChain(drift, diffusion, "rademacher", step_size=0.1, exponent=0.2, data=SCALE),
}


SUM = kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x_prev * x)

ON_PATHS = {
    "ConditionalSMC ancestor": kernels.ConditionalSMC(laws.PATHS, laws.SERIES, 3, "ancestor"),
    "ConditionalSMC backward": kernels.ConditionalSMC(laws.PATHS, laws.SERIES, 3, "backward"),
    "ConditionalSMC none": kernels.ConditionalSMC(laws.PATHS, laws.SERIES, 3, "none"),
    "ParisianGibbs": kernels.ParisianGibbs(laws.PATHS, laws.SERIES, SUM, 3),
    "BlockedSMC": kernels.BlockedSMC(laws.PATHS, laws.SERIES, 3, 2),
    "EmbeddedHMM sequential": kernels.EmbeddedHMM(laws.PATHS, laws.SERIES, 8, 0.3, "sequential"),
    "EmbeddedHMM parallel": kernels.EmbeddedHMM(laws.PATHS, laws.SERIES, 8, [0.3, 0.5, 0.5, 0.3], "parallel"),
}

SLOW_ON_PATHS = ("ConditionalSMC backward", "ConditionalSMC none", "EmbeddedHMM sequential")

# on parameters and path given data, as functions of the data
JOINT = {
    "ParticleGibbs": laws.particle_gibbs,
    "ParticleGibbs interweaving": functools.partial(laws.particle_gibbs, interweave=True),
}


def but_slow(name, *names):
    """The parameter of a test, which is left to the slow tier if it is one of `names`."""
    return pytest.param(name, marks=pytest.mark.slow) if name in names else name


@pytest.mark.parametrize("name", [*INVARIANT, *UNADJUSTED])
def test_says_whether_it_is_exact(name):
    assert (INVARIANT | UNADJUSTED)[name].is_exact == (name in INVARIANT)


def test_a_composite_is_as_exact_as_its_parts():
    lmc = kernels.LMC(TARGET, 0.05)
    for biased in (
        kernels.Cycle([MALA, lmc]),
        kernels.Mixture([MALA, lmc]),
        kernels.Repeat(lmc, 2),
        kernels.Jitter(lmc),
        kernels.Precondition(kernels.Repeat(lmc, 2)),
        kernels.Gibbs({"x": MALA, "y": lmc}),
    ):
        assert not biased.is_exact
    assert kernels.Repeat(kernels.Metropolize(lmc), 2).is_exact


@pytest.mark.parametrize("name", [*INVARIANT, *UNADJUSTED])
def test_contract_on_vectors(name):
    # replicas are exchanged although their moves have been undone
    skip = ("divergence",) if name == "ReplicaExchange" else ()
    contract((INVARIANT | UNADJUSTED)[name], POSITION, skip=skip)


@pytest.mark.parametrize("name", [but_slow(name, *SLOW_ON_PATHS) for name in ON_PATHS])
def test_contract_on_paths(name):
    # JAX loses track of keys that a vectorised loop reads; of a single block they are followed in test_blocked_smc.py
    contract(ON_PATHS[name], laws.draw_path(jax.random.key(0)), skip=("keys",) if name == "BlockedSMC" else ())


@pytest.mark.parametrize("name", [but_slow(name, "ParticleGibbs interweaving") for name in JOINT])
def test_contract_on_parameters_and_paths(name):
    position = laws.draw_parameters_and_path(jax.random.key(0))
    contract(JOINT[name](laws.draw_series(jax.random.key(1), position)), position)


@pytest.mark.parametrize(
    "name", [but_slow(name, "Metropolize", "Precondition", "Transformed", "ReplicaExchange") for name in INVARIANT]
)
def test_law_is_invariant(name):
    kernel, num_chains = INVARIANT[name], 20_000 if name in ("NUTS", "EllipticalSlice") else 50_000
    # what is not position, from its law: velocities, or another replica
    prepare = with_hot_replica if name == "ReplicaExchange" else getattr(kernel, "refresh", None)
    report = exact_start_invariance(1, kernel, exact_sampler, num_chains=num_chains, num_steps=10, prepare=prepare)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.usefixtures("run_fast")
@pytest.mark.parametrize("name", [but_slow(name, *SLOW_ON_PATHS) for name in ON_PATHS])
def test_law_of_paths_is_invariant(name):
    report = exact_start_invariance(1, ON_PATHS[name], laws.draw_path, num_chains=40_000, num_steps=10)
    assert report.raise_if_rejected().notes["moved"] > 0.5


@pytest.mark.parametrize("name", [but_slow(name, "ParticleGibbs interweaving") for name in JOINT])
def test_joint_law_with_the_data_is_invariant(name):
    build = laws.transition(JOINT[name])
    geweke_joint(1, laws.draw_parameters_and_path, laws.draw_series, build).raise_if_rejected()


@pytest.mark.parametrize("name", ["MALA", "Gibbs", "Splitting BAOAB"])
def test_runs_in_the_loop_of_blackjax(name):
    kernel = (INVARIANT | UNADJUSTED)[name]
    last, (states, infos) = blackjax.util.run_inference_algorithm(
        jax.random.key(0), kernel, num_steps=5, initial_state=kernel.init(POSITION)
    )
    np.testing.assert_array_equal(states.position["y"][-1], last.position["y"])
    assert infos.acceptance_rate.shape == (5,)


def test_no_kernel_is_left_out():
    def is_concrete(value):
        return inspect.isclass(value) and issubclass(value, bi.Kernel) and not inspect.isabstract(value)

    public = {name for name, value in vars(kernels).items() if is_concrete(value)}
    ys = jnp.zeros(laws.NUM_STEPS)
    tested = [*(INVARIANT | UNADJUSTED | ON_PATHS).values(), *(build(ys) for build in JOINT.values())]
    # on parameters and random numbers, on parameters and functions: test_particle_marginal.py, test_hyper_gibbs.py
    elsewhere = {"ParticleMarginal", "HyperGibbs"}
    assert public == {type(kernel).__name__ for kernel in tested} | elsewhere
