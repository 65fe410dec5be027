"""Particle Gibbs kernels with one bug each: the right ones, with one of their atoms replaced while they are traced."""

from unittest.mock import patch

import jax
import jax.numpy as jnp

from bayesinf import resampling
from bayesinf.kernels import ConditionalSMC, ParisianGibbs, ParticleGibbs, ParticleMarginal, cloud, parisian_gibbs
from bayesinf.kernels.backward import draw_counted
from bayesinf.kernels.cloud import Cloud
from bayesinf.kernels.filter_steps import propagate, propagate_initial, weigh, weigh_initial
from bayesinf.resampling import gather, iid


class UnweightedBackward(ParisianGibbs):
    """Backward draws that forget the filter's weights."""

    def step(self, key, state):
        def wrong(key, model, particles_prev, log_weights_prev, *rest):
            return draw_counted(key, model, particles_prev, jnp.zeros_like(log_weights_prev), *rest)

        with patch.object(parisian_gibbs, "draw_counted", wrong):
            return super().step(key, state)


class ShiftedBackward(ParisianGibbs):
    """Backward draws by a transition density whose mean is off by 0.1."""

    def step(self, key, state):
        def wrong(key, model, particles_prev, log_weights_prev, particles, *rest):
            return draw_counted(key, model, particles_prev, log_weights_prev, particles + 0.1, *rest)

        with patch.object(parisian_gibbs, "draw_counted", wrong):
            return super().step(key, state)


class UnweightedAverage(ParisianGibbs):
    """The final average of the statistics forgets the weights."""

    def step(self, key, state):
        def wrong(cloud, statistics):
            return jax.tree.map(
                lambda total, apart: total + jnp.mean(apart, axis=0), statistics.total, statistics.apart
            )

        with patch.object(parisian_gibbs, "weighted_mean", wrong):
            return super().step(key, state)


class ReferenceNotInserted(ParisianGibbs):
    """A free particle filter in place of the conditional one."""

    def step(self, key, state):
        def free_start(key, model, y, num_particles, proposal, reference):
            particles = propagate_initial(key, model, y, num_particles, proposal)
            return Cloud(particles, weigh_initial(model, particles, y, proposal))

        def free_move(keys, model, before, y, t, proposal, reference, parent):
            ancestors = iid(keys[0], before.log_weights, before.log_weights.shape[0])
            parents = gather(before.particles, ancestors)
            particles = propagate(keys[1], model, parents, y, t, proposal)
            return Cloud(particles, weigh(model, parents, particles, y, t, proposal)), ancestors

        with patch.object(cloud, "start", free_start), patch.object(cloud, "move", free_move):
            return super().step(key, state)


class ReferenceExcludedAtTheEnd(ParisianGibbs):
    """The new path never ends in the reference."""

    def step(self, key, state):
        right = parisian_gibbs.draw_last

        def wrong(key, log_weights):
            return right(key, log_weights.at[-1, 0].set(-jnp.inf))

        with patch.object(parisian_gibbs, "draw_last", wrong):
            return super().step(key, state)


def _overwritten(key, log_weights, num_samples):
    """The free ancestors that are left when slot 0 of N systematic ones is overwritten."""
    return resampling.systematic(key, log_weights, num_samples + 1)[1:]


class SystematicParisian(ParisianGibbs):
    """Systematic resampling in conditional PaRIS."""

    def step(self, key, state):
        with patch.object(cloud, "iid", _overwritten):
            return super().step(key, state)


class SystematicConditionalSMC(ConditionalSMC):
    """Systematic resampling in conditional SMC."""

    def step(self, key, state):
        with patch.object(cloud, "iid", _overwritten):
            return super().step(key, state)


class StaleParticleGibbs(ParticleGibbs):
    """Parameters and path are each drawn given the old value of the other, so that they lose their dependence."""

    def step(self, key, state):
        key_theta, key_path = jax.random.split(key)
        with_theta, info = super().step(key_theta, state)
        with_path, _ = super().step(key_path, state)
        position = {"theta": with_theta.position["theta"], "path": with_path.position["path"]}
        return with_theta._replace(position=position), info


class StaleMarginal(ParticleMarginal):
    """Renews the estimate at the current parameters before every step: Monte Carlo within Metropolis."""

    def step(self, key, state):
        key_seeds, key_step = jax.random.split(key)
        seeds = jax.random.bits(key_seeds, state.seeds.shape)
        evaluation, _, _ = self._evaluate(state.position, seeds)
        return super().step(key_step, state._replace(evaluation=evaluation, seeds=seeds))
