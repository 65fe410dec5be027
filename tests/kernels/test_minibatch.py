"""Minibatch: which rows are drawn, that estimates are unbiased, and that control variates are never stale."""

import dataclasses
import itertools

import closed_forms
import jax
import jax.numpy as jnp
import minibatch_model as model
import numpy as np
import pytest
import scipy.stats

import bayesinf as bi
from bayesinf import kernels
from bayesinf.conformance import FALSE_ALARM, mean_p_value

KEYS = jax.random.split(jax.random.key(1), 20_000)
estimate_many = jax.jit(jax.vmap(lambda target, key, x: target.estimate(key, x), in_axes=(None, 0, None)))


def test_every_batch_is_as_likely_as_any_other():
    """The gradient of the sum of x_i over a batch shows its rows and their weights."""
    target = kernels.Minibatch(lambda x: jnp.sum(0 * x), lambda x, i: x[i], jnp.arange(model.NUM_ROWS), 3)
    grads = np.asarray(estimate_many(target, KEYS, jnp.zeros(model.NUM_ROWS)).grad)
    sizes = np.array([len(block) for block in model.BLOCKS for _ in block])
    assert set(np.unique(grads / sizes)) == {0.0, 1.0}

    batches = list(itertools.product(*model.BLOCKS))
    counts = dict.fromkeys(batches, 0)
    for row in grads:
        counts[tuple(np.flatnonzero(row))] += 1
    assert scipy.stats.chisquare(list(counts.values())).pvalue > FALSE_ALARM


@pytest.mark.parametrize("centre", [None, model.CENTRE])
@pytest.mark.parametrize("x", [model.START, model.CENTRE, [-3.0, 2.0]])
def test_the_estimate_is_unbiased(centre, x):
    found = estimate_many(model.target(centre), KEYS, jnp.asarray(x, jnp.float32))
    A, c = model.full_gradient()
    exact = c - A @ np.asarray(x)
    if centre is not None and np.all(np.asarray(x) == centre):
        np.testing.assert_allclose(found.grad, np.broadcast_to(exact, found.grad.shape), rtol=1e-5, atol=1e-4)
    else:
        assert mean_p_value(found.grad, exact) > FALSE_ALARM
    full = model.target().full.logdensity(jnp.asarray(x, jnp.float32))
    assert mean_p_value(found.logdensity, full) > FALSE_ALARM


@pytest.mark.parametrize("centre", [None, model.CENTRE])
def test_the_variance_is_that_of_one_row_from_each_block(centre):
    grads = np.asarray(estimate_many(model.target(centre), KEYS, jnp.asarray(model.START, jnp.float32)).grad)

    def p_value(gradients):
        values = np.array([c - A @ model.START for A, c in gradients])
        return mean_p_value((grads - values.mean(0)) ** 2, values.var(0))

    assert p_value(model.batch_gradients(centre)) > FALSE_ALARM
    wrong = [model.with_replacement(), model.batch_gradients(centre, is_scaled=False)]
    if centre is not None:
        # the correction has mean zero, so that its sign shows in the variance only
        wrong.append(model.batch_gradients(centre, sign=-1.0))
    assert all(p_value(gradients) < FALSE_ALARM for gradients in wrong)


def test_all_rows_are_no_estimate():
    found = estimate_many(model.target(batch_size=model.NUM_ROWS), KEYS[:3], jnp.asarray(model.START, jnp.float32))
    exact = model.target().full.evaluate(jnp.asarray(model.START, jnp.float32), order=1)
    np.testing.assert_allclose(found.logdensity, np.full(3, exact.logdensity), rtol=1e-5)
    np.testing.assert_allclose(found.grad, np.tile(exact.grad, (3, 1)), rtol=1e-5)


def test_the_whole_is_a_target():
    full = model.target(model.CENTRE).full
    assert isinstance(full, bi.Target)
    x = jnp.asarray(model.START, jnp.float32)
    squares = ((model.OUTPUTS - model.INPUTS @ model.START) / model.NOISE) ** 2
    exact = -0.5 * np.sum((model.START / model.PRIOR) ** 2) - 0.5 * np.sum(squares)
    np.testing.assert_allclose(full.logdensity(x), exact, rtol=1e-5)
    kernels.MALA(full, 0.01).init(x)


def test_a_new_centre_or_new_data_make_a_new_gradient():
    target = model.target(model.CENTRE)
    data = jax.tree.map(lambda leaf: 2 * leaf + 1, target.data)
    for new in (
        dataclasses.replace(target, data=data),
        dataclasses.replace(target, centre=jnp.array([5.0, 5.0])),
        dataclasses.replace(target, data=data, centre=None).centred(model.CENTRE),
        target.centred(jnp.array([5.0, 5.0])),
    ):
        likelihood = bi.Target(lambda x, rows: jnp.sum(jax.vmap(model.log_likelihood, (None, 0))(x, rows)), new.data)
        exact = likelihood.evaluate(new.centre.position, order=1).grad
        assert not np.allclose(exact, target.centre.grad, rtol=0.01)
        np.testing.assert_allclose(new.centre.grad, exact, rtol=1e-4)


def test_centres_may_be_traced_and_vectorised():
    centres = jnp.array([[0.5, 0.5], [1.0, -1.0]])
    many = jax.jit(jax.vmap(lambda centre: model.target().centred(centre)))(centres)
    for i in range(2):
        np.testing.assert_allclose(many.centre.grad[i], model.target(centres[i]).centre.grad, rtol=1e-4)


def test_new_data_compile_nothing():
    def kernel(scale):
        data = jax.tree.map(lambda leaf: scale * leaf, model.target().data)
        return kernels.SGLD(kernels.Minibatch(model.log_prior, model.log_likelihood, data, 3, model.CENTRE), 0.01)

    assert closed_forms.num_programs(map(kernel, (1.0, 3.0)), jnp.zeros(2)) == 1


def test_the_mode_is_the_posterior_mean():
    A, c = model.full_gradient()
    np.testing.assert_allclose(model.target().mode(jnp.array([30.0, -20.0])), np.linalg.solve(A, c), atol=2e-3)
    # from the mode itself it goes nowhere, and says so by returning
    np.testing.assert_allclose(
        model.target().mode(jnp.asarray(np.linalg.solve(A, c))), np.linalg.solve(A, c), atol=2e-3
    )


def test_a_density_without_a_mode_is_said_to_have_none():
    for log_prior in (jnp.sum, lambda x: jnp.sum(x**4), lambda x: jnp.nan * jnp.sum(x)):
        target = kernels.Minibatch(log_prior, lambda x, y: 0 * y, jnp.ones(3), 1)
        with pytest.raises(ValueError, match="start led to no maximum"):
            target.mode(jnp.ones(2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"a": jnp.zeros(3), "b": jnp.zeros(4)}}, "one common leading axis"),
        ({"data": jnp.zeros(())}, "one common leading axis"),
        ({"data": jnp.zeros((0, 2))}, "one common leading axis"),
        ({"batch_size": 4}, "at most the number of rows, 3, got 4"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"centre": jnp.array([0, 1])}, "must be floating point"),
        ({"centre": jnp.array([jnp.nan, 0.0])}, "centre must be where the gradient"),
    ],
)
def test_bad_arguments(change, message):
    given = {"data": jnp.zeros(3), "batch_size": 2, "centre": None} | change
    with pytest.raises(ValueError, match=message):
        kernels.Minibatch(lambda x: 0.0 * jnp.sum(x), lambda x, y: jnp.sum(x - y) ** 2, **given)


@pytest.mark.usefixtures("unchecked")
def test_functions_that_do_not_return_one_number():
    prior, x = (lambda x: -jnp.sum(x**2)), jnp.zeros(2)
    with pytest.raises(ValueError, match=r"log_likelihood of one row must be a floating-point scalar, got .*\(2,\)"):
        kernels.Minibatch(prior, lambda x, y: x - y, jnp.zeros(3), 2).estimate(None, x)
    with pytest.raises(ValueError, match="log_prior must be a floating-point scalar"):
        kernels.Minibatch(lambda x: -(x**2), lambda x, y: jnp.sum(x - y), jnp.zeros(3), 2).estimate(None, x)
    with pytest.raises(ValueError, match="log_prior must be a function"):
        kernels.Minibatch(1.0, prior, jnp.zeros(3), 2)
    with pytest.raises(ValueError, match="centre must be a position"):
        kernels.Minibatch(prior, lambda x, y: jnp.sum(x) - y, jnp.zeros(3), 2, jnp.zeros(4)).estimate(None, x)
