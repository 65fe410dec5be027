"""Bayesian and sequential Monte Carlo inference on JAX."""

from bayesinf import kernels as kernels
from bayesinf import models as models
from bayesinf.kernel import Info as Info
from bayesinf.kernel import Kernel as Kernel
from bayesinf.target import Target as Target

__version__ = "0.1.0"
