"""What is inferred: state-space models and priors; imported as `bayesinf.models`."""

if __name__ != "bayesinf.models":
    raise ImportError("import bayesinf.models, not models: this folder is only a part of bayesinf")

from bayesinf.models import conformal as conformal
from bayesinf.models import gp as gp
from bayesinf.models import hmm as hmm
from bayesinf.models import language as language
from bayesinf.models import nngp as nngp
from bayesinf.models.autoregression import autoregression_plus_noise as autoregression_plus_noise
from bayesinf.models.chaotic_rnn import ChaoticRNN as ChaoticRNN
from bayesinf.models.conditionally_discrete import ConditionallyDiscrete as ConditionallyDiscrete
from bayesinf.models.conditionally_linear_gaussian import ConditionallyLinearGaussian as ConditionallyLinearGaussian
from bayesinf.models.hmm import HiddenMarkovModel as HiddenMarkovModel
from bayesinf.models.hmm import HiddenSemiMarkovModel as HiddenSemiMarkovModel
from bayesinf.models.hmm import HMMBelief as HMMBelief
from bayesinf.models.hmm import HMMEstimator as HMMEstimator
from bayesinf.models.hmm import HMMFiltered as HMMFiltered
from bayesinf.models.hmm import HMMPath as HMMPath
from bayesinf.models.hmm import HMMSmoothed as HMMSmoothed
from bayesinf.models.hmm import hmm_filter as hmm_filter
from bayesinf.models.hmm import hmm_fixed_lag as hmm_fixed_lag
from bayesinf.models.hmm import hmm_forecast as hmm_forecast
from bayesinf.models.hmm import hmm_sample as hmm_sample
from bayesinf.models.hmm import hmm_smoother as hmm_smoother
from bayesinf.models.hmm import hmm_start as hmm_start
from bayesinf.models.hmm import hmm_step as hmm_step
from bayesinf.models.hmm import hmm_viterbi as hmm_viterbi
from bayesinf.models.hmm import hsmm_filter as hsmm_filter
from bayesinf.models.hmm import hsmm_sample as hsmm_sample
from bayesinf.models.hmm import hsmm_smoother as hsmm_smoother
from bayesinf.models.hmm import hsmm_viterbi as hsmm_viterbi
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
