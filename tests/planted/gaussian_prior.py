"""Kernels for Gaussian priors that sample the wrong law."""

import jax
import jax.numpy as jnp

import bayesinf as bi
from bayesinf.kernel import accept
from bayesinf.kernels.langevin import LangevinState


class ForgottenPrior(bi.kernels.PCN):
    """Accepts by the ratio of the posteriors, as if the proposal were symmetric."""

    def step(self, key, state):
        key_move, key_accept = jax.random.split(key)
        noise = jax.random.normal(key_move, state.position.shape)
        h, tril = self.step_size, self.prior_tril
        shift = state.position - self.prior_mean
        position = self.prior_mean + ((2 - h) * shift + jnp.sqrt(8 * h) * (tril @ noise)) / (2 + h)
        position = position.astype(state.position.dtype)
        proposed = LangevinState(position, self.target.evaluate(position))
        log_ratio = proposed.evaluation.logdensity - state.evaluation.logdensity
        return accept(key_accept, log_ratio, proposed, state, num_gradients=0)


class PriorTwice(bi.kernels.PCNLangevin):
    """Moves with the gradient of the posterior for that of the likelihood, and corrects with the right one."""

    def step(self, key, state):
        inverse = jnp.linalg.inv(self.prior_tril)  # of one matrix; a solve would be one for every chain
        prior = -inverse.T @ (inverse @ (state.position - self.prior_mean))
        grad = (state.evaluation.grad + prior).astype(state.position.dtype)
        wrong = state._replace(evaluation=state.evaluation._replace(grad=grad))
        moved, info = super().step(key, wrong)
        evaluation = jax.tree.map(
            lambda new, old: jnp.where(info.is_accepted, new, old), moved.evaluation, state.evaluation
        )
        return moved._replace(evaluation=evaluation), info


class TestedTwice(bi.kernels.MarginalGradient):
    """Tests what it has accepted once more, by the ratio of the densities alone."""

    def step(self, key, state):
        key_move, key_accept = jax.random.split(key)
        moved, _ = bi.kernels.MarginalGradient(
            self.target, self.step_size, self.prior_mean, self.prior_tril, self.directions, self.variances
        ).step(key_move, state)
        return accept(
            key_accept,
            moved.evaluation.logdensity - state.evaluation.logdensity,
            moved,
            state,
            num_gradients=1,
        )
