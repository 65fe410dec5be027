"""The parameters of a hidden Markov model by name, as samplers have them."""

from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

__all__ = ["parameters_of", "with_parameters"]


def parameters_of(model: Any) -> dict[str, Array]:
    """The arrays of the model that are learnt, by name; those of the emission without its name before theirs.

    Args:
        model: a `HiddenMarkovModel`.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> sorted(hmm.parameters_of(hmm.HiddenMarkovModel(hmm.Poisson(jnp.array([1.0, 2.0])))))
        ['initial', 'rate', 'transition']
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(eqx.filter(model, eqx.is_array)):
        name = _name(path)
        if name is not None:
            named[name] = leaf
    return named


def with_parameters(model: Any, values: Mapping[str, Array]) -> Any:
    """The model with these parameters in the place of its own.

    Args:
        model: a `HiddenMarkovModel`.
        values: some of the parameters, by the names of `parameters_of`.

    Raises:
        ValueError: the model has no parameter of a name.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> model = hmm.HiddenMarkovModel(hmm.Poisson(jnp.array([1.0, 2.0])))
        >>> hmm.with_parameters(model, {"rate": jnp.array([3.0, 4.0])}).emission.rate.tolist()
        [3.0, 4.0]
    """
    if unknown := set(values) - set(parameters_of(model)):
        raise ValueError(f"values must be of {sorted(parameters_of(model))}, got one of {sorted(unknown)}")

    def replace(path: Any, leaf: Any) -> Any:
        return values.get(_name(path) or "", leaf)

    return jax.tree_util.tree_map_with_path(replace, model)


def _name(path: Any) -> str | None:
    """None for what is no parameter: concentrations and other hyperparameters of priors."""
    parts = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    if any("prior" in part for part in parts):
        return None
    return ".".join(part for part in parts if part not in ("emission", "parameters"))
