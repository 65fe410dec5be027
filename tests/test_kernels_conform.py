"""Every kernel of the library: the contract, and for those that claim it, the invariance of their law.

A new kernel enters the table here; `test_no_kernel_is_left_out` fails until it does.
"""

import functools
import inspect

import blackjax
import blackjax.util
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import contract, exact_start_invariance, geweke_joint


def logdensity(position, scale):
    """x / scale the logarithm of a Gamma(3) variable; y_i | x ~ N(x^2 / 4, exp(x / 2)): skewed, dependent, a banana."""
    x, y = position["x"] / scale, position["y"]
    return 3.0 * x - jnp.exp(x) - 0.5 * jnp.sum(jnp.exp(-x / 2) * (y - x**2 / 4) ** 2) - y.size * x / 4


SCALE = jnp.asarray(1.2)
TARGET = bi.Target(logdensity, SCALE)
POSITION = {"x": jnp.asarray(1.0), "y": jnp.array([0.3, -0.4])}


def exact_sampler(key):
    key_x, key_y = jax.random.split(key)
    x = jax.random.loggamma(key_x, 3.0)
    return {"x": SCALE * x, "y": x**2 / 4 + jnp.exp(x / 4) * jax.random.normal(key_y, (2,))}


MALA = kernels.MALA(TARGET, 0.3)
NUTS = kernels.NUTS(TARGET, 0.5, max_num_doublings=4)

INVARIANT = {
    "MALA": MALA,
    "HMC": kernels.HMC(TARGET, 0.4, num_integration_steps=3),
    "NUTS": NUTS,
    "Cycle": kernels.Cycle([MALA, kernels.MALA(TARGET, 0.05), kernels.HMC(TARGET, 0.3, num_integration_steps=2)]),
    "Mixture": kernels.Mixture([MALA, kernels.HMC(TARGET, 0.3, num_integration_steps=2)], [0.3, 0.7]),
    "Repeat": kernels.Repeat(MALA, 2),
    "Gibbs": kernels.Gibbs({"x": MALA, "y": kernels.Repeat(kernels.MALA(TARGET, 0.6), 2)}),
}

# biased by their step size; how much is tested against closed forms where they live
UNADJUSTED = {
    "LMC": kernels.LMC(TARGET, 0.05),
    "RandomizedMidpoint": kernels.RandomizedMidpoint(TARGET, 0.1),
    "KineticLangevin": kernels.KineticLangevin(TARGET, 0.1, friction=2.0),
    "RandomizedMidpointKinetic": kernels.RandomizedMidpointKinetic(TARGET, 0.1, friction=2.0),
    "Splitting BAOAB": kernels.Splitting("BAOAB", TARGET, 0.2),
    "Splitting OBABO": kernels.Splitting("OBABO", TARGET, 0.2),
    "Splitting UBU": kernels.Splitting("UBU", TARGET, 0.2),
    "Splitting BUB": kernels.Splitting("BUB", TARGET, 0.2),
}


class Skewed(bi.models.StateSpaceModel):
    """x_0 Gumbel, x_t | x_{t-1} Gumbel around 0.7 x_{t-1}, y_t ~ N(exp(x_t / 2), 1/4): nothing in it is symmetric."""

    persistence: jax.Array = eqx.field(converter=jnp.asarray)

    def initial(self):
        return dist.Gumbel(0.0, 1.0)

    def transition(self, x_prev, t):
        return dist.Gumbel(self.persistence * x_prev - 0.3, 0.5)

    def observation(self, x, t):
        return dist.Normal(jnp.exp(x / 2), 0.5)


class Learnt(bi.models.StateSpaceModel):
    """Gaussian states of unknown level and scale, theta = (level, log scale), seen through the same exponential."""

    theta: jax.Array

    def initial(self):
        return dist.Normal(self.theta[0], jnp.exp(self.theta[1]))

    def transition(self, x_prev, t):
        return dist.Normal(self.theta[0] + 0.7 * (x_prev - self.theta[0]), jnp.exp(self.theta[1]))

    def observation(self, x, t):
        return dist.Normal(jnp.exp(x / 2), 0.5)


def log_prior(theta):
    """The level is the logarithm of a Gamma(2) variable, the scale is e^-2 times a Gamma(4) variable."""
    log_gamma = theta[1] + 2.0
    return 2.0 * theta[0] - jnp.exp(theta[0]) + 4.0 * log_gamma - jnp.exp(log_gamma)


NUM_STEPS = 4
MODEL = Skewed(0.7)
SUM = kernels.AdditiveFunctional(lambda x: x, lambda x_prev, x, t: x_prev * x)


def draw_path(key):
    return bi.models.simulate(key, MODEL, NUM_STEPS)[0]


def draw_parameters_and_path(key):
    key_level, key_scale, key_path = jax.random.split(key, 3)
    log_gammas = jax.random.loggamma(key_level, 2.0), jax.random.loggamma(key_scale, 4.0) - 2.0
    theta = jnp.stack(log_gammas)
    return {"theta": theta, "path": bi.models.simulate(key_path, Learnt(theta), NUM_STEPS)[0]}


def draw_series(key, position):
    path = position["path"] if isinstance(position, dict) else position
    return jnp.exp(path / 2) + 0.5 * jax.random.normal(key, path.shape)


def particle_gibbs(ys, **options):
    moves = functools.partial(kernels.MALA, step_size=0.05)
    return kernels.ParticleGibbs(Learnt, log_prior, ys, 3, parameter_kernel=moves, **options)


# kernels on paths given data: what draws their position from its prior, and the kernel as a function of the data
ON_PATHS = {
    "ConditionalSMC ancestor": (draw_path, lambda ys: kernels.ConditionalSMC(MODEL, ys, 3, "ancestor")),
    "ConditionalSMC backward": (draw_path, lambda ys: kernels.ConditionalSMC(MODEL, ys, 3, "backward")),
    "ConditionalSMC none": (draw_path, lambda ys: kernels.ConditionalSMC(MODEL, ys, 3, "none")),
    "ParisianGibbs": (draw_path, lambda ys: kernels.ParisianGibbs(MODEL, ys, SUM, 3)),
    "ParticleGibbs": (draw_parameters_and_path, particle_gibbs),
    "ParticleGibbs interweaving": (draw_parameters_and_path, functools.partial(particle_gibbs, interweave=True)),
}


@pytest.mark.parametrize("name", [*INVARIANT, *UNADJUSTED])
def test_contract_on_vectors(name):
    contract((INVARIANT | UNADJUSTED)[name], POSITION)


@pytest.mark.parametrize("name", ON_PATHS)
def test_contract_on_paths(name):
    draw, build = ON_PATHS[name]
    position = draw(jax.random.key(0))
    contract(build(draw_series(jax.random.key(1), position)), position)


@pytest.mark.parametrize("name", INVARIANT)
def test_law_is_invariant(name):
    num_chains = 20_000 if name == "NUTS" else 100_000
    report = exact_start_invariance(1, INVARIANT[name], exact_sampler, num_chains=num_chains, num_steps=10)
    assert report.raise_if_rejected().notes["moved"] > 0.9


@pytest.mark.parametrize("name", ON_PATHS)
def test_joint_law_of_path_and_series_is_invariant(name):
    draw, build = ON_PATHS[name]

    def transition(key, position, ys):
        kernel = build(ys)
        return kernel.step(key, kernel.init(position))[0].position

    geweke_joint(1, draw, draw_series, transition).raise_if_rejected()


@pytest.mark.parametrize("name", [*INVARIANT, *UNADJUSTED])
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
    ys = jnp.zeros(NUM_STEPS)
    tested = [*INVARIANT.values(), *UNADJUSTED.values(), *(build(ys) for _, build in ON_PATHS.values())]
    assert public == {type(kernel).__name__ for kernel in tested}
