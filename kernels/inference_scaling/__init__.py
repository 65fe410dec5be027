"""Particle methods for generative models; imported as `bayesinf.kernels.inference_scaling`."""

from bayesinf.kernels.inference_scaling.discrete_chain import ChainState as ChainState
from bayesinf.kernels.inference_scaling.discrete_chain import DiscreteChain as DiscreteChain
from bayesinf.kernels.inference_scaling.generator import StepGenerator as StepGenerator
from bayesinf.kernels.inference_scaling.generator import StepInfo as StepInfo
from bayesinf.kernels.inference_scaling.infer import METHODS as METHODS
from bayesinf.kernels.inference_scaling.infer import infer as infer
from bayesinf.kernels.inference_scaling.inference import Inference as Inference
from bayesinf.kernels.inference_scaling.inference import TokenCount as TokenCount
from bayesinf.kernels.inference_scaling.inference import last_line as last_line
from bayesinf.kernels.inference_scaling.methods import Gibbs as Gibbs
from bayesinf.kernels.inference_scaling.methods import Islands as Islands
from bayesinf.kernels.inference_scaling.methods import ParallelTempering as ParallelTempering
from bayesinf.kernels.inference_scaling.potential import Potential as Potential
from bayesinf.kernels.inference_scaling.potential import PotentialProduct as PotentialProduct
from bayesinf.kernels.inference_scaling.selection import DVTS as DVTS
from bayesinf.kernels.inference_scaling.selection import Beam as Beam
from bayesinf.kernels.inference_scaling.selection import Entropic as Entropic
from bayesinf.kernels.inference_scaling.selection import FKSteering as FKSteering
from bayesinf.kernels.inference_scaling.selection import Independent as Independent
from bayesinf.kernels.inference_scaling.selection import Published as Published
from bayesinf.kernels.inference_scaling.selection import Resample as Resample
from bayesinf.kernels.inference_scaling.selection import Selection as Selection
from bayesinf.kernels.inference_scaling.selection import SoftValue as SoftValue
from bayesinf.kernels.inference_scaling.token_generator import LanguageModel as LanguageModel
from bayesinf.kernels.inference_scaling.token_generator import TokenGenerator as TokenGenerator
from bayesinf.kernels.inference_scaling.token_generator import TokenState as TokenState
