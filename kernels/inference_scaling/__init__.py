"""Particle methods for generative models; imported as `bayesinf.kernels.inference_scaling`."""

from bayesinf.kernels.inference_scaling.generator import StepGenerator as StepGenerator
from bayesinf.kernels.inference_scaling.generator import StepInfo as StepInfo
from bayesinf.kernels.inference_scaling.token_generator import LanguageModel as LanguageModel
from bayesinf.kernels.inference_scaling.token_generator import TokenGenerator as TokenGenerator
from bayesinf.kernels.inference_scaling.token_generator import TokenState as TokenState
