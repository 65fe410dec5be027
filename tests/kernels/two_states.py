"""A chain of two states, whose paths can be counted."""

import jax
import jax.numpy as jnp
import numpy as np

import bayesinf as bi

INITIAL = np.array([0.3, 0.7])
TRANSITION = np.array([[0.8, 0.2], [0.45, 0.55]])
LIKELIHOOD = np.array([[0.9, 0.2], [0.15, 0.6], [0.5, 0.35]])  # of y_t at each of three steps, by state


class Chain(bi.models.StateSpaceModel):
    """Two states and laws given as pairs of functions; y_t says which row of likelihoods is seen."""

    def _law(self, p):
        log_p = jnp.log(p)
        return lambda key: jax.random.categorical(key, log_p), lambda x: log_p[x]

    def initial(self):
        return self._law(jnp.asarray(INITIAL))

    def transition(self, x_prev, t):
        return self._law(jnp.asarray(TRANSITION)[x_prev])

    def observation(self, x, t):
        return (lambda key: jnp.zeros(())), lambda y: jnp.log(jnp.asarray(LIKELIHOOD)[y.astype(int), x])


CHAIN_YS = jnp.arange(3.0)
