"""Particle Gibbs over parameters and path: the joint law, a posterior known by quadrature, and what drivers rely on."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from planted.parisian import StaleParticleGibbs
from ppg_models import Scalar, assert_published, learning_series, mean_and_error

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels import MALA, NUTS, ConditionalSMC, ParticleGibbs, Repeat
from bayesinf.kernels.innovations import innovations, path_of

# ---- a Gaussian model of a level and a path, whose joint posterior is Gaussian ----

A, Q, R = 0.8, 0.6, 0.7
YS = np.array([0.9, 1.4, np.nan, 2.2, 0.3])


class Level(bi.models.StateSpaceModel):
    """An autoregression about the level theta, seen in noise."""

    level: jax.Array

    def initial(self):
        return dist.Normal(self.level, Q)

    def transition(self, x_prev, t):
        return dist.Normal(self.level + A * (x_prev - self.level), Q)

    def observation(self, x, t):
        return dist.Normal(x, R)


def _log_prior(theta):
    return -0.5 * theta["level"] ** 2


def _build_level(theta):
    return Level(theta["level"])


def _joint_posterior():
    """Mean and covariance of (theta, x_0, ..., x_4) given y."""
    num = len(YS)
    lag = np.arange(num)[:, None] - np.arange(num)
    mixing = np.column_stack([np.ones(num), Q * np.where(lag >= 0, A ** np.maximum(lag, 0), 0.0)])
    mixing = np.vstack([np.eye(1, num + 1), mixing])  # (theta, x) of (theta, noises)
    prior = mixing @ mixing.T
    C = np.eye(num + 1)[1:][~np.isnan(YS)]
    gain = np.linalg.solve(C @ prior @ C.T + R**2 * np.eye(len(C)), C @ prior).T
    return gain @ YS[~np.isnan(YS)], prior - gain @ C @ prior


JOINT_MEAN, JOINT_COV = _joint_posterior()


def _exact_draw(key):
    tril = jnp.asarray(np.linalg.cholesky(JOINT_COV))
    draw = jnp.asarray(JOINT_MEAN) + tril @ jax.random.normal(key, (len(JOINT_MEAN),))
    return {"theta": {"level": draw[0]}, "path": draw[1:]}


def _level_kernel(kernel_class=ParticleGibbs, **options):
    mala = partial(MALA, step_size=0.1)
    return kernel_class(_build_level, _log_prior, YS, 4, parameter_kernel=mala, **options)


@eqx.filter_jit
def _after(kernel, keys, num_steps):
    def chain(key):
        key_start, key_steps = jax.random.split(key)

        def move(i, state):
            return kernel.step(jax.random.fold_in(key_steps, i), state)[0]

        return jax.lax.fori_loop(0, num_steps, move, kernel.init(_exact_draw(key_start))).position

    return jax.lax.map(chain, keys, batch_size=10_000)


def _joint_p_values(kernel, num=20_000, num_steps=5):
    """P-values for the means, variances and the correlation of theta with the mean of the path, from exact starts."""
    position = _after(kernel, jax.random.split(jax.random.key(8), num), num_steps)
    draws = np.column_stack([position["theta"]["level"], position["path"]]).astype(np.float64)
    centred = draws - JOINT_MEAN
    weights = np.r_[1.0, np.zeros(len(YS))], np.r_[0.0, np.full(len(YS), 1 / len(YS))]
    cov = np.array([[w @ JOINT_COV @ v for v in weights] for w in weights])
    exact = cov[0, 1] / np.sqrt(cov[0, 0] * cov[1, 1])
    found = np.corrcoef(centred @ weights[0], centred @ weights[1])[0, 1]
    z = (np.arctanh(found) - np.arctanh(exact)) * np.sqrt(num - 3)
    return {
        "mean": mean_p_value(draws, JOINT_MEAN),
        "variance": mean_p_value(centred**2, np.diag(JOINT_COV)),
        "correlation of parameter and path": float(2 * scipy.stats.norm.sf(abs(z))),
    }


@pytest.mark.parametrize("options", [{"refresh": "ancestor"}, {"refresh": "backward", "interweave": True}])
def test_the_joint_correlation_of_parameters_and_path_is_exact(options):
    p_values = _joint_p_values(_level_kernel(**options))
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_blocks_that_see_old_values_lose_the_joint_correlation():
    p_values = _joint_p_values(_level_kernel(StaleParticleGibbs))
    assert p_values["correlation of parameter and path"] < FALSE_ALARM, p_values


# ---- a posterior of two variances, known by quadrature ----

LEARNING = learning_series()


def test_the_learning_series_is_the_published_one():
    np.testing.assert_allclose(
        LEARNING[:6], [0.369515, -0.919538, -0.838581, 0.969673, -0.601555, -0.890114], atol=1e-6
    )
    np.testing.assert_allclose([LEARNING.mean(), LEARNING.var()], [-0.895984, 0.950137], atol=1e-6)


def _quadrature():
    """Posterior means of q^2, r^2 and of their squares: prior IG(2, 1/2) each, a = 0.9 and P0 = 1 known."""
    log_q2, log_r2 = np.linspace(-4.5, 1.5, 161)[:, None], np.linspace(-2.5, 1.2, 161)[None, :]
    q2, r2 = np.exp(log_q2) + 0 * log_r2, np.exp(log_r2) + 0 * log_q2
    mean, variance, log_likelihood = 0.0, 1.0, 0.0
    for t, y in enumerate(LEARNING):  # Kalman filter on the whole grid
        if t:
            mean, variance = 0.9 * mean, 0.81 * variance + q2
        s = variance + r2
        log_likelihood = log_likelihood - 0.5 * (np.log(2 * np.pi * s) + (y - mean) ** 2 / s)
        mean, variance = mean + variance / s * (y - mean), variance * r2 / s
    log_posterior = log_likelihood + sum(-2 * np.log(v) - 0.5 / v for v in (q2, r2))  # of the logarithms
    p = np.exp(log_posterior - log_posterior.max())
    return np.array([np.sum(p * v) for v in (q2, r2, q2**2, r2**2)]) / p.sum()


def test_the_quadrature_is_the_published_one():
    q2, r2, q2_second, r2_second = _quadrature()
    np.testing.assert_allclose([q2, r2], [0.22957, 0.52361], atol=2e-5)
    sd = np.sqrt([q2_second - q2**2, r2_second - r2**2])
    np.testing.assert_allclose(sd, [0.08674, 0.11284], atol=2e-5)


def _variance_prior():
    for name in ("q2", "r2"):
        numpyro.sample(name, dist.InverseGamma(2.0, 0.5))


def _build_variances(theta):
    return Scalar(0.9, jnp.sqrt(theta["q2"]), 1.0, jnp.sqrt(theta["r2"]), 1.0)


class Conjugate(bi.Kernel):
    """Draws q^2 and r^2 from their inverse Gamma laws given the path: what a user may write for a conjugate block."""

    target: bi.Target

    def init(self, position):
        return kernels.path_kernel.PathState(position)

    def step(self, key, state):
        prior, ys, path = self.target.data
        key_q, key_r = jax.random.split(key)
        squares = jnp.sum((path[1:] - 0.9 * path[:-1]) ** 2), jnp.sum((ys - path) ** 2)
        shapes = 2.0 + 0.5 * (path.size - 1), 2.0 + 0.5 * path.size
        drawn = [
            (0.5 + 0.5 * square) / jax.random.gamma(k, shape)
            for k, square, shape in zip((key_q, key_r), squares, shapes, strict=True)
        ]
        theta = prior.unconstrain({"q2": drawn[0], "r2": drawn[1]})
        yes = jnp.ones((), bool)
        return kernels.path_kernel.PathState(theta), bi.Info(jnp.ones(()), yes, ~yes, jnp.zeros((), jnp.int32))


@eqx.filter_jit
def _chain_means(kernel, keys, starts, num_steps, burn_in):
    """Means of q^2, r^2 and their squares over each chain."""

    def chain(row):
        key, start = row

        def move(state, i):
            state, _ = kernel.step(jax.random.fold_in(key, i), state)
            values = kernel.constrain(state.position)
            return state, jnp.stack([values["q2"], values["r2"], values["q2"] ** 2, values["r2"] ** 2])

        _, values = jax.lax.scan(move, kernel.init(start), jnp.arange(num_steps))
        return jnp.mean(values[burn_in:], axis=0)

    return jax.vmap(lambda key, start: chain((key, start)))(keys, starts)


def _posterior_means(num_chains, num_steps, burn_in, parameter_kernel=Conjugate, **options):
    """Of chains that start at the mean of the prior."""
    prior = bi.Target.from_numpyro(_variance_prior)
    kernel = ParticleGibbs(_build_variances, prior, LEARNING, 20, parameter_kernel=parameter_kernel, **options)
    theta = prior.unconstrain({"q2": jnp.asarray(0.5), "r2": jnp.asarray(0.5)})
    starts = kernel.initial(0, num_chains, theta=jax.tree.map(lambda leaf: jnp.full(num_chains, leaf), theta))
    return _chain_means(kernel, jax.random.split(jax.random.key(1), num_chains), starts, num_steps, burn_in)


def _with_means_off_by(share):
    """The quadrature, its two means off by this share of a standard deviation."""
    truth = _quadrature()
    return truth + np.r_[share * np.sqrt(truth[2:] - truth[:2] ** 2), 0.0, 0.0]


@pytest.mark.slow
def test_the_posterior_of_the_parameters_is_that_of_quadrature():
    means = _posterior_means(100, 600, 100)
    assert mean_p_value(means, _quadrature()) > FALSE_ALARM
    # and the test is sharp: an error of a tenth of a standard deviation would show
    assert mean_p_value(means, _with_means_off_by(0.1)) < FALSE_ALARM


@pytest.mark.slow
def test_interwoven_moves_leave_the_posterior_of_the_parameters():
    means = _posterior_means(
        50,
        500,
        150,
        lambda target: Repeat(MALA(target, 0.02), 5),
        interweave=True,
        innovation_kernel=lambda target: MALA(target, 0.05),
    )
    assert mean_p_value(means, _quadrature()) > FALSE_ALARM
    assert mean_p_value(means, _with_means_off_by(0.25)) < FALSE_ALARM


def _blackjax_mala(target):
    import blackjax

    return blackjax.mala(target.logdensity, step_size=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("parameter_kernel", [partial(NUTS, step_size=0.1), _blackjax_mala])
def test_kernels_of_blackjax_move_the_parameters(parameter_kernel):
    """Its NUTS on our targets, and a kernel of its own that is built on the path of every sweep."""
    means = _posterior_means(50, 1_000, 300, parameter_kernel)
    assert mean_p_value(means, _quadrature()) > FALSE_ALARM
    assert mean_p_value(means, _with_means_off_by(0.5)) < FALSE_ALARM


def test_a_kernel_of_blackjax_sees_the_path_of_its_sweep():
    """Were it built once, on the path of the start, it would go on as the target of that path has it."""
    ours = _variances_kernel(parameter_kernel=partial(MALA, step_size=0.02))
    theirs = _variances_kernel(parameter_kernel=_blackjax_mala)
    start = ours.initial(0, 1)
    start = jax.tree.map(lambda leaf: leaf[0], start)
    (after, _), (state, info) = (
        jax.jit(lambda kernel, key, start: kernel.step(key, kernel.init(start)))(kernel, jax.random.key(1), start)
        for kernel in (ours, theirs)
    )
    np.testing.assert_array_equal(after.position["path"], state.position["path"])  # the sweep comes first
    target = theirs._target(0, state.position["path"])
    expected, _ = _blackjax_mala(target).step(
        jax.random.split(jax.random.key(1), 2)[1], _blackjax_mala(target).init(start["theta"])
    )
    for a, b in zip(jax.tree.leaves(state.position["theta"]), jax.tree.leaves(expected.position), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert int(info.num_gradients) >= 1


@pytest.mark.slow
def test_the_genealogy_alone_does_not_find_the_posterior():
    # of paths of 101 states and 20 particles it never refreshes the early ones
    assert mean_p_value(_posterior_means(50, 500, 150, refresh="none"), _quadrature()) < FALSE_ALARM


@pytest.mark.slow
def test_the_posterior_of_the_parameters_is_the_published_one():
    means = np.asarray(_posterior_means(128, 1_500, 300), np.float64)
    assert_published(mean_and_error(means[:, 0]), 0.22957, 0.007)
    assert_published(mean_and_error(means[:, 1]), 0.52361, 0.007)
    for i, (published, sd) in enumerate(((0.22957, 0.08674), (0.52361, 0.11284))):
        # E (v - c)^2 about the exact mean c; to a twentieth of the standard deviation
        variances = means[:, 2 + i] - 2 * published * means[:, i] + published**2
        assert_published(mean_and_error(variances / (2 * sd)), sd / 2, 0.05 * sd)


# ---- innovations ----


def test_innovations_are_standard_normal_and_invert():
    model = Level(jnp.asarray(0.4))
    xs, _ = jax.vmap(lambda key: bi.models.simulate(key, model, 6))(jax.random.split(jax.random.key(0), 5_000))
    z = np.asarray(jax.vmap(lambda x: innovations(model, x))(xs), np.float64)
    assert mean_p_value(z, 0.0) > FALSE_ALARM
    assert mean_p_value(z**2, 1.0) > FALSE_ALARM
    assert mean_p_value(z[:, 1:] * z[:, :-1], 0.0) > FALSE_ALARM
    np.testing.assert_allclose(jax.vmap(lambda z: path_of(model, z))(jnp.asarray(z, xs.dtype)), xs, atol=1e-5)


def test_innovations_of_vectors():
    class Rotation(bi.models.StateSpaceModel):
        def initial(self):
            return dist.Normal(jnp.ones(2), jnp.array([1.0, 2.0])).to_event(1)

        def transition(self, x_prev, t):
            tril = jnp.array([[0.5, 0.0], [0.3, 0.4]])
            return dist.MultivariateNormal(x_prev[::-1] * 0.9, scale_tril=tril)

        def observation(self, x, t):
            return dist.Normal(x, 1.0).to_event(1)

    xs, _ = bi.models.simulate(0, Rotation(), 8)
    z = innovations(Rotation(), xs)
    noise = np.asarray(xs[1:]) - 0.9 * np.asarray(xs[:-1])[:, ::-1]
    np.testing.assert_allclose(z[1:], noise @ np.linalg.inv([[0.5, 0.0], [0.3, 0.4]]).T, atol=1e-5)
    np.testing.assert_allclose(z[0], (np.asarray(xs[0]) - 1.0) / [1.0, 2.0], atol=1e-6)
    np.testing.assert_allclose(path_of(Rotation(), z), xs, atol=1e-5)


# ---- what drivers rely on ----


START = {"theta": {"q2": jnp.zeros(()), "r2": jnp.zeros(())}, "path": jnp.zeros(20)}


def _variances_kernel(**options):
    prior = bi.Target.from_numpyro(_variance_prior)
    options = {"parameter_kernel": partial(MALA, step_size=0.02)} | options
    return ParticleGibbs(_build_variances, prior, LEARNING[:20], 8, **options)


def test_draws_have_the_names_of_the_prior_and_warm_up_tunes_the_parameter_kernel():
    kernel = _variances_kernel(parameter_kernel=partial(MALA, step_size=1e-5))
    starts = kernel.initial(0, num_chains=2)
    draws = bi.sample(1, kernel, starts, num_samples=100, num_warmup=100, progress=False)
    posterior = draws.to_arviz().posterior
    assert posterior["q2"].shape == posterior["r2"].shape == (2, 100)
    assert posterior["path"].shape == (2, 100, 20)
    assert np.all(posterior["q2"] > 0)
    stats = draws.to_arviz().sample_stats
    assert 0.3 < float(stats["acceptance_rate"].mean()) < 0.85  # it would be 1 at the step size of the start
    assert float(stats["update_rate"].mean()) > 0.5


def test_step_sizes_keep_their_ratio_and_are_those_of_the_parameter_kernel():
    kernel = _variances_kernel(interweave=True, innovation_kernel=partial(MALA, step_size=0.2))
    assert kernel.target_acceptance == MALA.target_acceptance
    np.testing.assert_allclose(kernel.step_size, 0.02)
    tuned = kernel.with_step_size(0.04)
    np.testing.assert_allclose([part.step_size for part in tuned.parts], [0.04, 0.4], rtol=1e-6)
    assert jax.tree.structure(tuned) == jax.tree.structure(kernel)


def test_gradients_are_counted():
    info = _step_once(_variances_kernel())
    assert int(info.num_gradients) == 2  # at the start of the move, on the new path, and of the proposal
    info = _step_once(_variances_kernel(parameter_kernel=lambda target: Repeat(MALA(target, 0.02), 3)))
    assert int(info.num_gradients) == 4
    assert np.isfinite(info.log_evidence)


def _step_once(kernel):
    return jax.jit(lambda kernel, start: kernel.step(jax.random.key(0), kernel.init(start))[1])(kernel, START)


def test_new_data_compile_nothing():
    traces = []

    @jax.jit
    def step(kernel, key, state):
        traces.append(1)
        return kernel.step(key, state)

    kernel = _variances_kernel()
    state = jax.jit(lambda kernel: kernel.init(START))(kernel)
    step(kernel, jax.random.key(0), state)
    prior = bi.Target.from_numpyro(_variance_prior)
    other = ParticleGibbs(_build_variances, prior, 2 * LEARNING[:20], 8, parameter_kernel=kernel.parts[0])
    step(other.with_step_size(0.5), jax.random.key(0), state)
    assert len(traces) == 1


def test_a_prior_given_as_a_function_needs_starting_parameters():
    kernel = _level_kernel()
    with pytest.raises(ValueError, match="theta is needed"):
        kernel.initial(0, 3)
    with pytest.raises(ValueError, match="leading axis of num_chains=3"):
        kernel.initial(0, 3, theta={"level": jnp.zeros(2)})
    starts = kernel.initial(0, 3, theta={"level": jnp.array([-1.0, 0.0, 1.0])})
    assert starts["path"].shape == (3, 5)
    np.testing.assert_array_equal(starts["theta"]["level"], [-1.0, 0.0, 1.0])
    assert set(kernel.constrain(starts)) == {"level", "path"}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: _variances_kernel(parameter_kernel=0.1), "parameter_kernel must be a kernel"),
        (lambda: _variances_kernel(parameter_kernel=lambda target: 3), "parameter_kernel must be a kernel"),
        (lambda: _variances_kernel(parameter_kernel=MALA), "parameter_kernel=MALA needs more than a target"),
        (
            lambda: _variances_kernel(parameter_kernel=ConditionalSMC),
            "parameter_kernel must be a kernel with a target, got the class ConditionalSMC, which has none",
        ),
        (lambda: _variances_kernel(refresh="all"), "refresh must be one of"),
        (lambda: _variances_kernel(proposal="best"), "proposal must be one of"),
        (lambda: _variances_kernel().init({"theta": {"q2": jnp.zeros(())}}), '"theta" and "path"'),
        (lambda: _variances_kernel().init(jnp.zeros(20)), '"theta" and "path"'),
        (lambda: _level_kernel().init({"theta": {"level": jnp.zeros(())}, "path": jnp.zeros(4)}), "5 rows of ys"),
        (lambda: ParticleGibbs(_build_level, _log_prior, YS, 1, parameter_kernel=Conjugate), "at least 2"),
    ],
)
def test_bad_input_is_refused_by_name(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_interweaving_needs_gaussian_laws():
    class Heavy(Level):
        def transition(self, x_prev, t):
            return dist.StudentT(3.0, x_prev, Q)

    def build(theta):
        return Heavy(theta["level"])

    kernel = ParticleGibbs(build, _log_prior, YS, 4, parameter_kernel=partial(MALA, step_size=0.1), interweave=True)
    with pytest.raises(ValueError, match="interweave needs initial and transition laws that are Normal"):
        kernel.init({"theta": {"level": jnp.zeros(())}, "path": jnp.zeros(5)})


@pytest.mark.usefixtures("unchecked")
def test_interweaving_needs_states_that_are_arrays():
    for move in (innovations, path_of):
        with pytest.raises(ValueError, match="interweave needs states that are one array, got a path of type dict"):
            move(Level(0.0), {"x": jnp.zeros(5)})
