"""Conformal prediction: sets over any model, over hidden Markov models, over particles; pure functions of scores."""

from bayesinf.models.conformal.guarantee import Guarantee as Guarantee
