"""Faults that other packages had or have, repeated in this library's code; `docs/peer_faults.md` tells of them."""

from contextlib import contextmanager
from unittest.mock import patch

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bayesinf import resampling, weights
from bayesinf.kernels import ConditionalSMC, cloud, filter_steps, online_filter
from bayesinf.kernels.cloud import Cloud
from bayesinf.models import StateSpaceModel
from bayesinf.models.state_space import log_prob


@contextmanager
def planted(module, **wrong):
    """Functions of a module replaced, and no program compiled before used within, nor one of within after."""
    jax.clear_caches()
    with patch.multiple(module, **wrong):
        yield
    jax.clear_caches()


class SortedConditionalSMC(ConditionalSMC):
    """N sorted ancestors, the first of which is overwritten: the smallest index loses a child that is its due."""

    def step(self, key, state):
        def overwritten(key, log_weights, num_samples):
            return resampling.multinomial(key, log_weights, num_samples + 1)[1:]

        with patch.object(cloud, "iid", overwritten):
            return super().step(key, state)


class AdaptiveConditionalSMC(ConditionalSMC):
    """Conditional SMC that resamples only where ess <= 0.7 N, for refresh="none"; right as it stands."""

    def carry(self, log_weights: Float[Array, " N"]) -> Float[Array, " N"]:
        """The log weights that a step without resampling starts from."""
        return log_weights

    def step(self, key, state):
        right = cloud.move

        def move(keys, model, before, y, t, proposal, reference, parent):
            num = before.log_weights.shape[0]
            is_resampled = weights.ess(before.log_weights) <= 0.7 * num

            def iid(key, log_weights, num_samples):
                drawn = resampling.iid(key, log_weights, num_samples)
                return jnp.where(is_resampled, drawn, jnp.arange(1, num, dtype=jnp.int32))

            with patch.object(cloud, "iid", iid):
                after, ancestors = right(keys, model, before, y, t, proposal, reference, parent)
            log_carried = jnp.where(is_resampled, 0.0, self.carry(before.log_weights))
            return Cloud(after.particles, log_carried + after.log_weights), ancestors

        with patch.object(cloud, "move", move):
            return super().step(key, state)


class ForgottenReferenceWeight(AdaptiveConditionalSMC):
    """Where resampling is skipped the reference starts from a weight of one, as it does where resampling is not."""

    def carry(self, log_weights):
        return log_weights.at[0].set(0.0)


class Swapped(StateSpaceModel):
    """The density of moving from x to x_prev in place of that from x_prev to x; draws are right."""

    model: StateSpaceModel

    def initial(self):
        return self.model.initial()

    def transition(self, x_prev, t):
        sample, _ = self.model.transition(x_prev, t)
        return sample, lambda x: log_prob(self.model.transition(x, t), x_prev)

    def observation(self, x, t):
        return self.model.observation(x, t)


def exponential_spacings(uniforms: Float[Array, " m"], probabilities: Float[Array, " n"]) -> Array:
    """Multinomial resampling by sorted uniforms, from n + 1 uniforms of [0, 1): log(0) = -inf."""
    cumulated = jnp.cumsum(-jnp.log(uniforms))
    indices = jnp.searchsorted(jnp.cumsum(probabilities), cumulated[:-1] / cumulated[-1])
    return jnp.clip(indices, 0, probabilities.shape[0] - 1)


def equal_first_stage(*args, log_lookahead=None, choose=online_filter.choose_ancestors, **kwargs):
    """Offspring of an auxiliary filter start from equal weights, and the first stage's constant is dropped."""
    ancestors, log_carried, is_resampled = choose(*args, log_lookahead=log_lookahead, **kwargs)
    equal = jnp.full_like(log_carried, -jnp.log(log_carried.shape[0]))
    return ancestors, jnp.where(is_resampled, equal, log_carried), is_resampled


def over_lookahead_at_the_new_particle(model, parents, particles, y, t, proposal, weigh=online_filter.weigh_parts):
    """Second-stage weights that divide by the lookahead at x_t, which was made at its parent."""
    log_observed, log_moves = weigh(model, parents, particles, y, t, proposal)
    return log_observed - filter_steps.look_ahead(model, particles, y, t), log_moves


def frozen_regimes(key, model, parents, *args, propagate=online_filter.propagate):
    """Moves all of the state but the regime, which stays that of the start."""
    return {**propagate(key, model, parents, *args), "regime": parents["regime"]}


def missing_taken_as_seen(model, x, y, t):
    """The density of a row as it stands: NaN where anything is missing."""
    return log_prob(model.observation(x, t), y)


def missing_taken_as_zero(model, x, y, t):
    """The density with zeros in place of what is missing."""
    return log_prob(model.observation(x, t), jnp.nan_to_num(y))
