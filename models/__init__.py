"""What is inferred: state-space models and priors; imported as `bayesinf.models`."""

if __name__ != "bayesinf.models":
    raise ImportError("import bayesinf.models, not models: this folder is only a part of bayesinf")

from bayesinf.models import conformal as conformal
from bayesinf.models.autoregression import autoregression_plus_noise as autoregression_plus_noise
from bayesinf.models.chaotic_rnn import ChaoticRNN as ChaoticRNN
from bayesinf.models.conditionally_discrete import ConditionallyDiscrete as ConditionallyDiscrete
from bayesinf.models.conditionally_linear_gaussian import ConditionallyLinearGaussian as ConditionallyLinearGaussian
from bayesinf.models.leverage_volatility import LeverageVolatility as LeverageVolatility
from bayesinf.models.linear_gaussian import KalmanResult as KalmanResult
from bayesinf.models.linear_gaussian import LinearGaussian as LinearGaussian
from bayesinf.models.linear_gaussian import SmootherResult as SmootherResult
from bayesinf.models.linear_gaussian import kalman_filter as kalman_filter
from bayesinf.models.linear_gaussian import rts_smoother as rts_smoother
from bayesinf.models.linear_gaussian import sample_posterior as sample_posterior
from bayesinf.models.lorenz import lorenz63 as lorenz63
from bayesinf.models.lorenz import lorenz96 as lorenz96
from bayesinf.models.marginalized import Marginalized as Marginalized
from bayesinf.models.markov_chain import add_constant as add_constant
from bayesinf.models.markov_chain import estimation_risk as estimation_risk
from bayesinf.models.markov_chain import predict_next as predict_next
from bayesinf.models.markov_chain import prediction_risk as prediction_risk
from bayesinf.models.markov_chain import sample_chain as sample_chain
from bayesinf.models.markov_chain import stationary_law as stationary_law
from bayesinf.models.markov_chain import transition_counts as transition_counts
from bayesinf.models.nested import Nested as Nested
from bayesinf.models.nonlinear_gaussian import NonlinearGaussian as NonlinearGaussian
from bayesinf.models.sir import SIR as SIR
from bayesinf.models.state_space import StateSpaceModel as StateSpaceModel
from bayesinf.models.state_space import simulate as simulate
from bayesinf.models.stochastic_volatility import StochasticVolatility as StochasticVolatility
from bayesinf.models.structural import local_level as local_level
from bayesinf.models.structural import local_linear_trend as local_linear_trend
