"""Particle methods for generative models; imported as `bayesinf.kernels.inference_scaling`."""

from bayesinf.kernels.inference_scaling.diffusion_generator import DiffusionGenerator as DiffusionGenerator
from bayesinf.kernels.inference_scaling.diffusion_generator import DiffusionState as DiffusionState
from bayesinf.kernels.inference_scaling.diversity import Clusters as Clusters
from bayesinf.kernels.inference_scaling.diversity import diverse_ancestors as diverse_ancestors
from bayesinf.kernels.inference_scaling.diversity import first_component as first_component
from bayesinf.kernels.inference_scaling.diversity import kmeans as kmeans
from bayesinf.kernels.inference_scaling.feynman_kac_corrector import CorrectorResult as CorrectorResult
from bayesinf.kernels.inference_scaling.feynman_kac_corrector import feynman_kac_corrector as feynman_kac_corrector
from bayesinf.kernels.inference_scaling.generator import StepGenerator as StepGenerator
from bayesinf.kernels.inference_scaling.generator import StepInfo as StepInfo
from bayesinf.kernels.inference_scaling.noising import Noising as Noising
from bayesinf.kernels.inference_scaling.noising import VariancePreserving as VariancePreserving
from bayesinf.kernels.inference_scaling.speculative import SpeculativeResult as SpeculativeResult
from bayesinf.kernels.inference_scaling.speculative import TokenModel as TokenModel
from bayesinf.kernels.inference_scaling.speculative import accept_drafts as accept_drafts
from bayesinf.kernels.inference_scaling.speculative import residual_log_probs as residual_log_probs
from bayesinf.kernels.inference_scaling.speculative import spectr_ratio as spectr_ratio
from bayesinf.kernels.inference_scaling.speculative import speculative_sample as speculative_sample
