"""The exponential integrator, the splittings, and the free flow that they share."""

import re
from decimal import Decimal, localcontext

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value
from bayesinf.kernels.ornstein_uhlenbeck import free_flow

FRICTION, INVERSE_MASS = 1.5, 0.8
STEP_SIZES = {
    "exponential": 0.4,
    "BAOAB": 1.0,
    "ABOBA": 1.0,
    "OBABO": 0.8,
    "OABAO": 0.8,
    "UBU": 1.0,
    "BUB": 1.0,
    "BAO": 0.6,
    "ABAOABA": 1.0,
}
NUM_GRADIENTS = {"exponential": 1, "BAOAB": 1, "ABOBA": 1, "OBABO": 1, "OABAO": 1, "UBU": 1, "BUB": 1, "BAO": 1}


def build(name, target, **parameters):
    parameters = {"step_size": STEP_SIZES[name], "friction": FRICTION, "inverse_mass": INVERSE_MASS} | parameters
    if name == "exponential":
        return kernels.KineticLangevin(target, **parameters)
    return kernels.Splitting(name, target, **parameters)


def scheme_of(name, lam, h=None):
    h = STEP_SIZES[name] if h is None else h
    if name == "exponential":
        return closed_forms.kinetic(h, lam, FRICTION, INVERSE_MASS)
    return closed_forms.splitting(name, h, lam, FRICTION, INVERSE_MASS)


@pytest.mark.parametrize("name", STEP_SIZES)
def test_gaussian_law_is_exact(name):
    kernel = build(name, closed_forms.gaussian())
    assert closed_forms.law_p_value(kernel, lambda lam: scheme_of(name, lam)) > FALSE_ALARM


def test_stationary_variances_are_the_known_ones():
    """lam Var(x) and Var(v) / u, with s = u lam h^2."""
    h, lam, u = 0.7, 1.3, INVERSE_MASS
    s = u * lam * h**2
    known = {
        "OBABO": (1 / (1 - s / 4), 1.0),
        "OABAO": (1 - s / 4, 1.0),
        "BAOAB": (1.0, 1 - s / 4),
        "ABOBA": (1.0, 1 / (1 - s / 4)),
    }
    for word, (position, velocity) in known.items():
        S = closed_forms.stationary(scheme_of(word, lam, h))
        np.testing.assert_allclose([lam * S[0, 0], S[1, 1] / u], [position, velocity], err_msg=word)
    for h in (0.02, 0.04):
        S = {name: closed_forms.stationary(scheme_of(name, lam, h)) for name in ("exponential", "UBU", "BUB")}
        s = u * lam * h**2
        np.testing.assert_allclose(lam * S["exponential"][0, 0] - 1, u * lam * h / (2 * FRICTION), rtol=2 * h)
        np.testing.assert_allclose(lam * S["UBU"][0, 0] - 1, -s / 6, rtol=2 * h)
        np.testing.assert_allclose(lam * S["BUB"][0, 0] - 1, s / 12, rtol=2 * h)


@pytest.mark.parametrize("name", NUM_GRADIENTS)
def test_gradients_are_counted(name):
    kernel = build(name, closed_forms.counted())
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == NUM_GRADIENTS[name]
    assert int(kernel.step(jax.random.key(0), state)[1].num_gradients) == NUM_GRADIENTS[name]


def test_a_word_that_moves_between_kicks_pays_for_each():
    kernel = kernels.Splitting("BABOABAB", closed_forms.counted(), 0.1)
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(kernel.step, jax.random.key(0), state) == 3
    assert int(kernel.step(jax.random.key(0), state)[1].num_gradients) == 3


@pytest.mark.parametrize(
    "name", [name for name in STEP_SIZES if name not in ("ABOBA", "OABAO", "UBU", "BAO", "ABAOABA")]
)
def test_evaluation_is_that_of_the_position(name):
    kernel = build(name, closed_forms.gaussian())
    state, _ = kernel.step(jax.random.key(0), kernel.init(jnp.ones(2)))
    fresh = kernel.target.evaluate(state.position, order=1)
    np.testing.assert_allclose(state.evaluation.grad, fresh.grad, rtol=1e-5)


@pytest.mark.parametrize("name", STEP_SIZES)
def test_log_work_weighs_paths(name):
    kernel = build(name, closed_forms.quartic(), step_size=0.5)
    assert closed_forms.work_p_value(kernel) > FALSE_ALARM


@pytest.mark.parametrize("name", ["exponential", "BAOAB", "BUB"])
def test_log_work_weighs_paths_that_meet_walls(name):
    """An undone move is its own reverse only if the velocity is turned back."""
    target = bi.Target(lambda x: jnp.where((x > 0) & (x < 1), 0.3 * x, -jnp.inf))
    kernel = build(name, target, step_size=0.4, friction=0.5)
    scale = np.sqrt(INVERSE_MASS)
    log_normal = jax.scipy.stats.norm.logpdf

    def path(key):
        """From the density (1/2 + x) N(v; 0, u) on the box to (3/2 - x) N(v; 1/2, u)."""
        key_start, key_velocity, *keys = jax.random.split(key, 5)
        x = -0.5 + jnp.sqrt(0.25 + 2 * jax.random.uniform(key_start))
        state = kernel.refresh(key_velocity, kernel.init(x))
        weight = -jnp.log(0.5 + x) - log_normal(state.velocity, 0.0, scale)
        for key_step in keys:
            state, info = kernel.step(key_step, state)
            weight += info.log_work
        weight += jnp.log(1.5 - state.position) + log_normal(state.velocity, 0.5, scale)
        return jnp.exp(weight), info.is_divergent

    weights, is_undone = jax.jit(jax.vmap(path))(jax.random.split(jax.random.key(0), 100_000))
    assert np.asarray(is_undone).mean() > 0.1
    assert closed_forms.weights_p_value(np.asarray(weights, np.float64)) > FALSE_ALARM


def test_log_work_without_end_evaluation_is_zero_where_undone():
    target = bi.Target(lambda x: jnp.where(x > 0, jnp.nan, -0.5 * x**2))
    kernel = build("UBU", target, step_size=1.0)
    start = kernel.init(jnp.asarray(-0.1))._replace(velocity=jnp.asarray(3.0))
    state, info = kernel.step(jax.random.key(0), start)
    assert bool(info.is_divergent)
    assert not bool(info.is_accepted)
    assert float(info.acceptance_rate) == float(info.log_work) == 0.0
    assert float(state.position) == float(start.position)
    assert float(state.velocity) == -3.0


def test_refresh_draws_the_velocity_of_the_invariant_law():
    kernel = build("BAOAB", bi.Target(lambda x: -0.5 * x["a"] ** 2 - jnp.sum(x["b"] ** 2)))
    state = kernel.init({"a": jnp.asarray(0.0), "b": jnp.zeros(2)})
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(state.velocity))
    velocity = jax.vmap(lambda key: kernel.refresh(key, state).velocity)(jax.random.split(jax.random.key(0), 20_000))
    flat = np.column_stack([velocity["a"], velocity["b"]]).astype(np.float64)
    products = np.einsum("ni,nj->nij", flat, flat)
    assert mean_p_value(flat, 0.0) > FALSE_ALARM
    assert mean_p_value(products, INVERSE_MASS * np.eye(3)) > FALSE_ALARM


def exact_flow(a, gamma, u):
    """The coefficients in decimal arithmetic of 60 digits, by the formulas of the literature."""
    with localcontext() as context:
        context.prec = 60
        a, gamma, u = Decimal(a), Decimal(gamma), Decimal(u)
        e = (-a).exp()
        values = {
            "C_xx": u / gamma**2 * (2 * a - 3 + 4 * e - e * e),
            "C_xv": u / gamma * (1 - e) ** 2,
            "C_vv": u * (1 - e * e),
            "reach": (1 - e) / gamma,
            "lag": (a - 1 + e) / gamma**2,
            "decay": e,
        }
        return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize(("is_x64", "tolerance"), [(False, 1e-5), (True, 1e-12)])
def test_free_flow_is_precise(is_x64, tolerance):
    """In float32 the covariance as it is written has an error of 17 % at a = 0.01 and of a factor 88 at 0.001."""
    gamma, u = 1.5, 0.75
    with jax.enable_x64(is_x64):
        dtype = jnp.float64 if is_x64 else jnp.float32
        for a in np.concatenate([np.geomspace(1e-4, 10.0, 41), [0.2999, 0.3001]]):
            time = jnp.asarray(a / gamma, dtype)
            flow = free_flow(time, jnp.asarray(gamma, dtype), jnp.asarray(u, dtype))
            decay, reach, lag, scale, tilt, rest = (np.float64(value) for value in flow)
            got = {"decay": decay, "reach": reach, "lag": lag}
            got |= {"C_vv": scale**2, "C_xv": tilt * scale**2, "C_xx": rest**2 + tilt**2 * scale**2}
            exact = exact_flow(float(time) * gamma, gamma, u)
            for name, value in exact.items():
                np.testing.assert_allclose(got[name], value, rtol=tolerance, err_msg=f"{name} at a = {a}")


@pytest.mark.parametrize("word", ["", "XYZ", "BAB", "OAO", "BAOB U", "AUB", "BBAO", "UB U", "baoab", "U", 3])
@pytest.mark.usefixtures("unchecked")
def test_words_that_are_no_splittings(word):
    with pytest.raises(ValueError, match="word must"):
        kernels.Splitting(word, closed_forms.quartic(), 0.1)


@pytest.mark.parametrize("name", ["step_size", "friction", "inverse_mass"])
@pytest.mark.parametrize("value", [0.0, -1.0, jnp.nan, jnp.inf])
def test_bad_parameters(name, value):
    for kernel in ("exponential", "BAOAB"):
        with pytest.raises(ValueError, match=re.escape(f"{name} must be finite and positive")):
            build(kernel, closed_forms.quartic(), **{name: value})


def test_presets_are_one_chain():
    """(gamma, u, h) is the chain (gamma / sqrt(u), 1, h sqrt(u)), with velocities divided by sqrt(u)."""
    u = 4.0
    target = closed_forms.gaussian()
    general = kernels.Splitting("BAOAB", target, 0.3, friction=2.0, inverse_mass=u)
    physics = kernels.Splitting("BAOAB", target, 0.6, friction=1.0)
    states = [kernel.init(jnp.ones(2)) for kernel in (general, physics)]
    for t in range(5):
        states = [k.step(jax.random.key(t), state)[0] for k, state in zip((general, physics), states, strict=True)]
    np.testing.assert_allclose(states[0].position, states[1].position, rtol=1e-4)
    np.testing.assert_allclose(states[0].velocity, states[1].velocity * np.sqrt(u), rtol=1e-4)
