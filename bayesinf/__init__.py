"""Bayesian and sequential Monte Carlo inference on JAX."""

from bayesinf import compiler
from bayesinf import kernels as kernels
from bayesinf import models as models
from bayesinf.draws import Draws as Draws
from bayesinf.kernel import Info as Info
from bayesinf.kernel import Kernel as Kernel
from bayesinf.kernels.guaranteed import guaranteed as guaranteed
from bayesinf.sampling import sample as sample
from bayesinf.target import Target as Target

__version__ = "0.1.0"

compiler.warn_of_wrong_sums()
