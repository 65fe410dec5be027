"""Hidden Markov models: exact inference on arrays of log probabilities, and models that learn them."""

from bayesinf.models.hmm.filter import HMMBelief as HMMBelief
from bayesinf.models.hmm.filter import HMMFiltered as HMMFiltered
from bayesinf.models.hmm.filter import hmm_filter as hmm_filter
from bayesinf.models.hmm.filter import hmm_start as hmm_start
from bayesinf.models.hmm.filter import hmm_step as hmm_step
from bayesinf.models.hmm.forecast import hmm_forecast as hmm_forecast
from bayesinf.models.hmm.sample import hmm_sample as hmm_sample
from bayesinf.models.hmm.smoother import HMMSmoothed as HMMSmoothed
from bayesinf.models.hmm.smoother import hmm_fixed_lag as hmm_fixed_lag
from bayesinf.models.hmm.smoother import hmm_smoother as hmm_smoother
from bayesinf.models.hmm.viterbi import HMMPath as HMMPath
from bayesinf.models.hmm.viterbi import hmm_viterbi as hmm_viterbi
