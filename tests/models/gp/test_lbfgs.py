"""When L-BFGS says that it has converged: by the rounding of what it minimises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bayesinf.models.gp.lbfgs import FACTOR, minimise


def banana(point):
    return 10.0 * (point["y"] - point["x"] ** 2) ** 2 + (1.0 - point["x"]) ** 2


@pytest.mark.parametrize("x64", [False, True])
def test_a_minimum_is_found_to_the_rounding_of_its_value(x64):
    """A constant beside it raises the rounding; near the minimum the promise is the decrease that there is."""
    with jax.enable_x64(x64):
        start = {"x": jnp.asarray(-1.0), "y": jnp.asarray(1.0)}
        for constant in (0.0, 1e3):
            found = jax.jit(minimise, static_argnums=(0, 2))(lambda p: banana(p) + constant, start, 200)  # noqa: B023
            assert found.is_converged
            assert found.rounding >= jnp.finfo(found.value.dtype).eps * max(1.0, constant)
            assert banana(found.point) <= 2 * FACTOR * found.rounding
        few = minimise(banana, start, 3)
        assert not few.is_converged
        assert few.decrease > FACTOR * few.rounding


def test_without_a_minimum_it_has_not_converged():
    found = minimise(lambda x: 1.0 / (1.0 + x), jnp.asarray(0.0), 20)
    assert not found.is_converged
    assert found.num_steps <= 20
    # of negative curvature, the step promises less than nothing
    assert not minimise(lambda x: -0.5 * x**2, jnp.asarray(0.5), 20).is_converged


@pytest.mark.parametrize("x64", [False, True])
def test_a_small_slope_may_lead_far_down(x64):
    """Minima a thousand units away; half the squared slope is far below the rounding of the function at the start."""
    with jax.enable_x64(x64):
        eps = jnp.finfo(jnp.result_type(float)).eps
        for curvature in (1e-10, 1e-6, 1.0, 1e6):
            loss = lambda x: 0.5 * curvature * (x - 1000.0) ** 2  # noqa: B023, E731
            found = minimise(loss, jnp.asarray(0.0), 50)
            assert found.is_converged
            assert loss(found.point) <= 2 * FACTOR * eps


def test_rounding_is_seen_that_the_value_does_not_tell():
    """Terms of 1e4 that cancel: the loss is known to their rounding only, not to that of its own value."""
    with jax.enable_x64(False):
        a = jnp.asarray(np.random.default_rng(0).normal(size=1000) * 1e4, jnp.float32)

        def loss(x):
            return jnp.sum(jnp.cos(x[:1000]) * a) - jnp.sum(jnp.cos(x[1000:]) * a) + jnp.sum((x - 1.0) ** 2)

        found = minimise(loss, jnp.ones(2000, jnp.float32), 1)
        assert found.rounding > 1e4 * jnp.finfo(jnp.float32).eps  # of one of the terms


@pytest.mark.parametrize("x64", [False, True])
def test_a_minimum_close_to_the_start_is_found(x64):
    """Steps of length one lead far past it, and very short ones change nothing that is seen."""
    with jax.enable_x64(x64):
        scales = jnp.array([1.0, 1.5, 2.0])
        for distance in (1e-2, 1e-3, 1e-6, 1e-9):
            loss = lambda x: jnp.sum((scales * (x - distance)) ** 2 + (x - distance) ** 4)  # noqa: B023, E731
            found = minimise(lambda x: 1.0 + loss(x), jnp.zeros(3), 50)  # noqa: B023
            assert found.is_converged
            # the promise is that of the steepest direction where no other has been seen: a condition number of four
            assert loss(found.point) <= 4 * FACTOR * found.rounding


def test_it_never_ends_above_where_it_began():
    """A loss of rounding alone, whose gradient promises what is not there."""

    @jax.custom_jvp
    def loss(x):
        return jnp.abs(x)

    loss.defjvp(lambda x, dx: (jnp.abs(x[0]), dx[0]))
    found = minimise(loss, jnp.asarray(0.0), 20)
    assert found.point == 0.0
    assert found.value == 0.0
    assert not found.is_converged
