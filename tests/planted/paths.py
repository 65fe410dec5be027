"""Kernels on paths with one bug each: the right ones, with one of their parts replaced while they are traced."""

from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np

from bayesinf.kernels import BlockedSMC, EmbeddedHMM, blocked_smc, embedded_hmm


class ForgetsTheNext(BlockedSMC):
    """The last weights of a block are not multiplied by the density of the state that follows."""

    def step(self, key, state):
        with patch.object(blocked_smc, "_end", lambda model, cloud, block: cloud.log_weights):
            return super().step(key, state)


class StaleBorders(BlockedSMC):
    """Blocks that touch, all refreshed at once: each is given the old border of the next."""

    def step(self, key, state):
        def wrong(num_steps, block_size, shift):
            borders = np.arange(block_size - shift, num_steps, block_size)
            starts, stops = np.append(0, borders), np.append(borders, num_steps)
            return starts[stops > starts], stops[stops > starts]

        with patch.object(blocked_smc, "_bounds", wrong):
            return super().step(key, state)


class CentredAtThePath(EmbeddedHMM):
    """Candidates around x_t itself, of the right spread."""

    def step(self, key, state):
        def wrong(key, path, num_particles, step_size):
            free = jax.tree.map(lambda x: jnp.repeat(x[:, None], num_particles - 1, axis=1), path)
            free = embedded_hmm._perturb(key, free, 2 * step_size)
            return jax.tree.map(lambda x, xs: jnp.concatenate([x[:, None], xs], axis=1), path, free)

        with patch.object(embedded_hmm, "draw_candidates", wrong):
            return super().step(key, state)


class PathNotACandidate(EmbeddedHMM):
    """All N candidates are new."""

    def step(self, key, state):
        right = embedded_hmm.draw_candidates

        def wrong(key, path, num_particles, step_size):
            candidates = right(key, path, num_particles + 1, step_size)
            return jax.tree.map(lambda leaf: leaf[:, 1:], candidates)

        with patch.object(embedded_hmm, "draw_candidates", wrong):
            return super().step(key, state)


class MapsInTheWrongOrder(EmbeddedHMM):
    """The maps of next indices to indices composed the other way round."""

    def step(self, key, state):
        right = embedded_hmm._compose
        with patch.object(embedded_hmm, "_compose", lambda later, earlier: right(earlier, later)):
            return super().step(key, state)


class DensityOutsideTheSupport(EmbeddedHMM):
    """The formula of a density is taken where the law has none."""

    def step(self, key, state):
        with patch.object(embedded_hmm, "_log_density", embedded_hmm.log_prob):
            return super().step(key, state)
