"""The standardised innovations of a path: the non-centred coordinates of a state-space model.

With Gaussian laws, x_0 = m_0 + s_0 z_0 and x_t = m(x_{t-1}, t) + s(x_{t-1}, t) z_t with z_t ~ N(0, I), whatever the
parameters are. The map between x and z is one to one given the parameters, so a model can be written in either: x is a
sufficient statistic of the parameters of the transition, z an ancillary one, and samplers that alternate between the
two mix well where either alone does not.

References:
    Yu and Meng (2011), doi:10.1198/jcgs.2011.203main.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jaxtyping import Array, Float

from bayesinf.models.state_space import StateSpaceModel

__all__ = ["innovations", "path_of"]


def innovations(model: StateSpaceModel, path: Float[Array, "t ..."]) -> Float[Array, "t ..."]:
    """z_{0:T-1} of a path; the laws must be numpyro's Normal, independent Normals or MultivariateNormal."""
    _check_array(path)
    previous, current = path[:-1], path[1:]
    ts = jnp.arange(1, path.shape[0])
    first = _standardize(model.initial(), path[0])
    rest = jax.vmap(lambda x_prev, x, t: _standardize(model.transition(x_prev, t), x))(previous, current, ts)
    return jnp.concatenate([first[None], rest]).astype(path.dtype)


def path_of(model: StateSpaceModel, z: Float[Array, "t ..."]) -> Float[Array, "t ..."]:
    """The inverse of `innovations`."""
    _check_array(z)
    x_0 = _scale(model.initial(), z[0]).astype(z.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def move(x_prev, row):
        t, z_t = row
        x = _scale(model.transition(x_prev, t), z_t).astype(z.dtype)
        return x, x

    _, rest = jax.lax.scan(move, x_0, (jnp.arange(1, z.shape[0]), z[1:]))
    return jnp.concatenate([x_0[None], rest])


def _check_array(path: Any) -> None:
    if not hasattr(path, "shape"):
        raise ValueError(f"interweave needs states that are one array, got a path of type {type(path).__name__}")


def _standardize(law: Any, x):
    law = _base(law)
    if isinstance(law, dist.Normal):
        return (x - law.loc) / law.scale
    return jax.scipy.linalg.solve_triangular(law.scale_tril, x - law.loc, lower=True)


def _scale(law: Any, z):
    law = _base(law)
    if isinstance(law, dist.Normal):
        return law.loc + law.scale * z
    return law.loc + law.scale_tril @ z


def _base(law: Any) -> Any:
    while isinstance(law, dist.Independent | dist.ExpandedDistribution):
        law = law.base_dist
    if isinstance(law, dist.Normal | dist.MultivariateNormal):
        return law
    raise ValueError(
        "interweave needs initial and transition laws that are Normal, independent Normals or MultivariateNormal; got "
        f"{type(law).__name__}"
    )
