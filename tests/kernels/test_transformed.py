"""Changes of variables; the contract and the invariance of a flow are tested with all kernels."""

from functools import partial

import closed_forms
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tempered_laws as laws
from numpyro.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    LowerCholeskyAffine,
    SigmoidTransform,
    SoftplusTransform,
    StickBreakingTransform,
)
from planted.tempering import WithoutJacobian

import bayesinf as bi
from bayesinf import kernels
from bayesinf.adaptation import Window
from bayesinf.conformance import FALSE_ALARM, exact_start_invariance
from bayesinf.errors import InitializationError

KEY = jax.random.key(0)
TRIL = jnp.array([[1.0, 0.0], [-0.8, 0.6]])


def gamma(x):
    """Gamma(3, 1), which ends at 0."""
    inside = jnp.where(x > 0, x, 1.0)
    return jnp.where(x > 0, 2.0 * jnp.log(inside) - inside, -jnp.inf)


def draw_gamma(key):
    return jnp.sum(jax.random.exponential(key, (3,)))


GAMMA = bi.Target(gamma)
POSITIVE = kernels.Transformed(kernels.MALA(GAMMA, 0.5), ExpTransform())


def invariance(kernel, draw, **settings):
    return exact_start_invariance(0, kernel, draw, num_chains=50_000, num_steps=6, **settings)


CHAINS = {
    "exp and plain": kernels.Cycle([POSITIVE, kernels.MALA(GAMMA, 0.3)]),
    "softplus, velocities": kernels.Transformed(
        kernels.GHMC(GAMMA, 0.7), ComposeTransform([AffineTransform(0.3, 1.5), SoftplusTransform()])
    ),
    "no evaluation": kernels.Transformed(kernels.Gibbs({"x": kernels.MALA(GAMMA, 0.5)}), {"x": ExpTransform()}),
    "nest": kernels.Transformed(
        kernels.Transformed(kernels.MALA(GAMMA, 0.3), ExpTransform()), AffineTransform(0.0, 2.0)
    ),
}


@pytest.mark.parametrize(
    "name", [name if name == "exp and plain" else pytest.param(name, marks=pytest.mark.slow) for name in CHAINS]
)
def test_the_law_of_x_is_left_invariant(name):
    kernel, draw = CHAINS[name], draw_gamma
    if name == "no evaluation":
        kernel = kernel.with_target(bi.Target(lambda position: gamma(position["x"])))
        report = invariance(kernel, lambda key: {"x": draw_gamma(key)})
    else:
        report = invariance(kernel, draw, prepare=getattr(kernel, "refresh", None))
    assert report.raise_if_rejected().notes["moved"] > 0.9


def test_a_forgotten_jacobian_is_found():
    assert invariance(WithoutJacobian(POSITIVE.kernel, ExpTransform()), draw_gamma).p_value < FALSE_ALARM


def test_blocks_whose_target_changes():
    """The evaluation of the block's last step is of another conditional target, at the same position."""
    mala = kernels.MALA(laws.BANANA, 0.4)
    inner = kernels.Transformed(mala, AffineTransform(0.3, 1.4))
    kernel = kernels.Gibbs({"x": inner, "y": kernels.Transformed(mala, LowerCholeskyAffine(jnp.zeros(2), TRIL))})
    report = exact_start_invariance(0, kernel, laws.draw_banana, num_chains=60_000, num_steps=6)
    assert report.raise_if_rejected().notes["moved"] > 0.9


def test_by_a_linear_map_it_is_the_preconditioned_kernel():
    """Step for step from the same keys."""
    target = bi.Target(lambda x: jnp.sum(3.0 * x - jnp.exp(x)) - 0.1 * x[0] * x[1])
    one = kernels.Transformed(kernels.MALA(target, 0.3), LowerCholeskyAffine(jnp.array([0.5, -1.0]), TRIL))
    two = kernels.Precondition(kernels.MALA(target, 0.3), TRIL)
    first, second = one.init(jnp.array([0.3, 0.2])), two.init(jnp.array([0.3, 0.2]))
    for t in range(8):
        first, told_first = one.step(jax.random.key(t), first)
        second, told_second = two.step(jax.random.key(t), second)
        np.testing.assert_allclose(first.position, second.position, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(told_first.acceptance_rate, told_second.acceptance_rate, rtol=1e-2, atol=1e-4)


def test_the_evaluation_is_that_of_x_and_costs_nothing():
    target = closed_forms.counted()
    transformed = kernels.Transformed(kernels.MALA(target, 0.1), LowerCholeskyAffine(jnp.ones(2), TRIL))
    kernel = kernels.Cycle([transformed, kernels.MALA(target, 0.1), transformed])
    state = kernel.init(jnp.ones(2))
    assert closed_forms.num_evaluations(transformed.step, KEY, transformed.init(jnp.ones(2))) == 1
    assert closed_forms.num_evaluations(kernel.step, KEY, state) == 3
    step = eqx.filter_jit(kernel.step)
    for t in range(6):
        state, info = step(jax.random.key(t), state)
        fresh = target.evaluate(state.position, order=1)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), state.evaluation, fresh)
        assert int(info.num_gradients) == 3


def test_a_rejected_move_changes_no_bit():
    kernel = kernels.Transformed(kernels.MALA(GAMMA, 1e4), SoftplusTransform())
    start = kernel.init(jnp.asarray(0.7))
    state = start
    for t in range(5):
        state, info = kernel.step(jax.random.key(t), state)
        assert not bool(info.is_accepted)
    jax.tree.map(np.testing.assert_array_equal, state, start)


def test_z_is_kept_where_x_has_lost_its_digits():
    """Far out x rounds to the last number before 1, of which the inverse makes z = 15.9 whatever it was."""
    target = bi.Target(lambda x: -0.95 * jnp.log1p(-x))
    kernel = kernels.Transformed(kernels.MALA(target, 2.0), SigmoidTransform())

    def step(state, key):
        state, _ = kernel.step(key, state)
        return state, (state.memory.inner.position, state.position)

    start = kernel.init(jnp.asarray(0.999, jnp.float32))
    _, (z, x) = jax.lax.scan(step, start, jax.random.split(KEY, 5_000))
    is_far = np.asarray(z) > 16.5
    assert len(np.unique(np.asarray(x)[is_far])) == 1
    assert len(np.unique(np.asarray(z)[is_far])) > 20
    assert not is_far[-1] or np.any(np.diff(is_far.astype(int)) == -1)


def test_paths_lead_into_the_position():
    def logdensity(position):
        return gamma(position["a"][1]) - position["a"][0] ** 2 + gamma(position["b"]) - jnp.sum(position["c"] ** 2)

    kernel = kernels.Transformed(
        kernels.MALA(bi.Target(logdensity), 0.3), {("a", 1): ExpTransform(), "b": SoftplusTransform()}
    )
    position = {"a": (jnp.asarray(-0.5), jnp.asarray(1.0)), "b": jnp.asarray(2.0), "c": jnp.ones(3)}
    state, info = eqx.filter_jit(kernel.step)(KEY, kernel.init(position))
    assert bool(info.is_accepted)
    assert jax.tree.structure(state.position) == jax.tree.structure(position)
    np.testing.assert_allclose(jnp.exp(state.memory.inner.position["a"][1]), state.position["a"][1], rtol=1e-5)
    np.testing.assert_array_equal(state.memory.inner.position["c"], state.position["c"])
    fresh = kernel.target.evaluate(state.position, order=1)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4), state.evaluation, fresh)
    # the Jacobians of all paths
    z = state.memory.inner.position
    log_det = z["a"][1] + jax.nn.log_sigmoid(z["b"])
    np.testing.assert_allclose(
        state.memory.inner.evaluation.logdensity, logdensity(state.position) + log_det, rtol=1e-5
    )
    with pytest.raises(ValueError, match=r"path \('d',\) leads nowhere"):
        kernels.Transformed(kernel.kernel, {"d": ExpTransform()}).init(position)


def test_where_the_chain_was_moved_by_another_z_follows():
    kernel = kernels.Transformed(kernels.MALA(GAMMA, 1e-10), ExpTransform())
    state, _ = kernel.step(KEY, kernel.init(jnp.asarray(2.0)))
    moved = jnp.asarray(5.0)
    state, _ = kernel.step(KEY, state._replace(position=moved, evaluation=GAMMA.evaluate(moved, order=1)))
    np.testing.assert_allclose(state.position, 5.0, atol=1e-3)
    np.testing.assert_allclose(state.memory.inner.position, np.log(5.0), atol=1e-3)
    # on log x the density is that of x times x
    np.testing.assert_allclose(state.memory.inner.evaluation.logdensity, 3 * np.log(5.0) - 5.0, atol=1e-3)
    np.testing.assert_allclose(state.memory.inner.evaluation.grad, 3 - 5.0, atol=1e-3)


def test_where_the_target_has_changed_its_evaluation_follows():
    """As for a block, whose chain is where it was left, on another conditional target."""
    kernel = kernels.Transformed(kernels.MALA(GAMMA, 1e-6), ExpTransform())
    state, _ = kernel.step(KEY, kernel.init(jnp.asarray(2.0)))
    other = bi.Target(lambda x: -4.0 * (x - 1.0) ** 2)
    kernel = kernel.with_target(other).with_step_size(1e4)
    state, info = kernel.step(KEY, state._replace(evaluation=other.evaluate(state.position, order=1)))
    assert not bool(info.is_accepted)
    np.testing.assert_allclose(state.memory.inner.evaluation.logdensity, -4.0 + np.log(2.0), rtol=0.02)
    np.testing.assert_allclose(state.memory.inner.evaluation.grad, -8.0 * 2.0 + 1.0, rtol=0.02)


def test_warm_up_and_new_parameters():
    kernel = kernels.Transformed(kernels.MALA(GAMMA, 1e-3), ExpTransform())
    draws = bi.sample(0, kernel, jnp.ones(4), num_samples=500, num_warmup=500, progress=False)
    assert abs(draws.stats["acceptance_rate"].mean() - 0.574) < 0.06
    with pytest.raises(ValueError, match="needs a kernel with a metric"):
        bi.sample(0, kernel, jnp.ones(4), num_samples=5, num_warmup=50, progress=False, warmup=Window(50))
    mala = kernels.MALA(laws.RATE, 0.1)
    built = [kernels.Transformed(mala, AffineTransform(0.5, jnp.asarray(scale, float))) for scale in (1.0, 2)]
    assert closed_forms.num_programs(built, jnp.asarray(1.0)) == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: kernels.Transformed(laws, ExpTransform()), "kernel must be a kernel with a target"),
        (lambda: kernels.Transformed(POSITIVE, jnp.exp), "transform must be a NumPyro transform, or a dict"),
        (lambda: kernels.Transformed(POSITIVE, {"x": 3}), r"transform at \('x',\) must be a NumPyro transform"),
        (lambda: kernels.Transformed(POSITIVE, {}), "at least one entry"),
        (
            lambda: kernels.Transformed(POSITIVE, {"x": ExpTransform(), ("x", 0): ExpTransform()}),
            "none leads into another",
        ),
        (lambda: POSITIVE.init(jnp.asarray(-1.0)), "the position must be in the range of ExpTransform, got -1.0"),
        (lambda: POSITIVE.init({"x": jnp.asarray(1.0)}), "the position is a dict: give paths"),
        (
            lambda: kernels.Transformed(POSITIVE.kernel, StickBreakingTransform()).init(jnp.ones(3) / 3),
            "keep the shape",
        ),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_start_that_no_z_leads_to_is_refused():
    """Of 1 + 2 exp(z) neither map sees by itself that x = 0.5 is out of reach."""
    nest = kernels.Transformed(POSITIVE, AffineTransform(1.0, 2.0))
    with pytest.raises(InitializationError, match="chain 1 starts where the log density"):
        bi.sample(0, nest, jnp.array([2.0, 0.5]), num_samples=5, progress=False)
