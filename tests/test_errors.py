"""Conversions of arguments, which must name them."""

import dataclasses
import inspect

import equinox as eqx
import jax.numpy as jnp
import pytest

from bayesinf import errors, kernels, models


def test_conversions_name_their_field():
    classes = [value for room in (kernels, models) for value in vars(room).values() if inspect.isclass(value)]
    num_tested = 0
    for cls in classes:
        for field in dataclasses.fields(cls) if issubclass(cls, eqx.Module) else ():
            converter = field.metadata.get("converter")
            if getattr(converter, "__qualname__", "").startswith("as_array."):
                with pytest.raises(ValueError, match=f"^{field.name} must be a number or an array.*'large'"):
                    converter("large")
                num_tested += 1
    assert num_tested > 20


def test_fractions_are_numbers():
    for value in ("half", None, 0.0, 1.0, float("nan"), [0.5, 2.0]):
        with pytest.raises(ValueError, match=r"eps must lie in \(0, 1\), got"):
            errors.check_fraction("eps", value)
    for value in (0.5, jnp.asarray(0.5, jnp.bfloat16), [0.1, 0.9]):
        errors.check_fraction("eps", value)


def test_arrays():
    assert errors.as_array("step_size")(1).dtype == jnp.result_type(int)
    assert errors.as_array("mean", is_floating=True)([1, 2]).dtype == jnp.result_type(float)
    assert errors.as_array("metric", is_optional=True)(None) is None
    with pytest.raises(ValueError, match=r"step_size must be a number.*got None"):
        errors.as_array("step_size")(None)
