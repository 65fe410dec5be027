"""What a filter of `switching_laws` may know beyond the model: proposals and lookaheads, and parts integrated out.

    p(r_t, y_t | r_{t-1}, x_{t-1}) = SWITCHES[r_{t-1}, r_t] N(y_t; m, s^2 + NOISE^2),
    x_t | r_t, x_{t-1}, y_t ~ N(m + k (y_t - m), (1 - k) s^2),

with m = PULL x_{t-1} + LEVEL and s = SCALE of the regime r_t, and k = s^2 / (s^2 + NOISE^2), are the locally
optimal proposal, whose sum over r_t is the lookahead of the fully adapted filter.
"""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import switching_laws as exact

from bayesinf.models import ConditionallyDiscrete, ConditionallyLinearGaussian


def take(values, r):
    return jnp.asarray(values)[r]


class Adapted(exact.Switching):
    """Regime and state together, with the locally optimal proposal and its lookahead."""

    def _given(self, p, x_prev, y):
        """For each regime: log p(r, y), and the Gaussian law of x given r and y."""
        prior = dist.Normal(jnp.asarray(exact.PULL) * x_prev + jnp.asarray(exact.LEVEL), jnp.asarray(exact.SCALE))
        gain = prior.scale**2 / (prior.scale**2 + exact.NOISE**2)
        seen = dist.Normal(prior.loc, jnp.sqrt(prior.scale**2 + exact.NOISE**2))
        return jnp.log(p) + seen.log_prob(y), prior.loc + gain * (y - prior.loc), jnp.sqrt(1 - gain) * prior.scale

    def _propose(self, p, x_prev, y):
        log_joint, mean, scale = self._given(p, x_prev, y)
        log_p = jax.nn.log_softmax(log_joint)

        def sample(key):
            key_regime, key_x = jax.random.split(key)
            regime = jax.random.categorical(key_regime, log_p).astype(jnp.int32)
            return {"regime": regime, "x": mean[regime] + scale[regime] * jax.random.normal(key_x)}

        def log_prob(x):
            regime = x["regime"]
            return log_p[regime] + dist.Normal(mean[regime], scale[regime]).log_prob(x["x"])

        return sample, log_prob

    def initial_proposal(self, y):
        return self._propose(jnp.asarray(exact.INITIAL), jnp.zeros(()), y)

    def proposal(self, x_prev, y, t):
        return self._propose(take(exact.SWITCHES, x_prev["regime"]), x_prev["x"], y)

    def lookahead(self, x_prev, y, t):
        return jax.nn.logsumexp(self._given(take(exact.SWITCHES, x_prev["regime"]), x_prev["x"], y)[0])


class Crude(Adapted):
    """Proposals and lookahead that are wrong, as they may be: off in place, in spread, and by a factor."""

    def initial_proposal(self, y):
        return self._propose(jnp.array([0.4, 0.3, 0.3]), 0.5 * y, 0.5 * y)

    def proposal(self, x_prev, y, t):
        return self._propose(jnp.array([0.3, 0.3, 0.4]), x_prev["x"], 0.5 * y)

    def lookahead(self, x_prev, y, t):
        return 3.0 - jnp.abs(y - 0.5 * x_prev["x"]) + 0.3 * x_prev["regime"]


class Regimes(ConditionallyLinearGaussian):
    """Particles of regimes; a Kalman filter of the state."""

    def outer_initial(self):
        return dist.Categorical(jnp.asarray(exact.INITIAL))

    def outer_transition(self, u_prev, t):
        return dist.Categorical(take(exact.SWITCHES, u_prev))

    def linear_initial(self, u):
        return take(exact.LEVEL, u)[None], take(exact.SCALE, u)[None, None]

    def linear_transition(self, u_prev, u, t):
        return take(exact.PULL, u)[None, None], take(exact.LEVEL, u)[None], take(exact.SCALE, u)[None, None]

    def linear_observation(self, u, t):
        return jnp.eye(1), jnp.zeros(1), exact.NOISE * jnp.eye(1)

    def outer_initial_proposal(self, y):
        return dist.Categorical(jnp.array([0.3, 0.4, 0.3]))

    def outer_proposal(self, u_prev, belief, y, t):
        return dist.Categorical(logits=jnp.array([0.5, 0.2, 0.1]) * (y[0] - belief.mean[0]))


class Driven(ConditionallyDiscrete):
    """Particles of the state; a hidden Markov filter of the regimes."""

    def regime_initial(self):
        return jnp.asarray(exact.INITIAL)

    def regime_transition(self, u_prev, t):
        return jnp.asarray(exact.SWITCHES)

    def outer_initial(self, r):
        return dist.Normal(take(exact.LEVEL, r), take(exact.SCALE, r))

    def outer_transition(self, u_prev, r, t):
        return dist.Normal(take(exact.PULL, r) * u_prev + take(exact.LEVEL, r), take(exact.SCALE, r))

    def observation(self, x, t):
        return dist.Normal(x.outer[None], exact.NOISE)

    def outer_initial_proposal(self, y):
        return dist.Normal(0.5 * y[0], 1.2)

    def outer_proposal(self, u_prev, belief, y, t):
        return dist.Normal(0.5 * y[0] + belief.probabilities[0], 1.2)
