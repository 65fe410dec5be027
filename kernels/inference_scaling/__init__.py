"""Particle methods for generative models; imported as `bayesinf.kernels.inference_scaling`."""

from bayesinf.kernels.inference_scaling.generator import StepGenerator as StepGenerator
from bayesinf.kernels.inference_scaling.generator import StepInfo as StepInfo
