"""Gaussian processes as NumPyro distributions: covariance functions, processes, and solvers."""

from bayesinf.models.gp.covariances import RBF as RBF
from bayesinf.models.gp.covariances import Constant as Constant
from bayesinf.models.gp.covariances import Covariance as Covariance
from bayesinf.models.gp.covariances import Linear as Linear
from bayesinf.models.gp.covariances import Matern12 as Matern12
from bayesinf.models.gp.covariances import Matern32 as Matern32
from bayesinf.models.gp.covariances import Matern52 as Matern52
from bayesinf.models.gp.covariances import Periodic as Periodic
from bayesinf.models.gp.covariances import Product as Product
from bayesinf.models.gp.covariances import RationalQuadratic as RationalQuadratic
from bayesinf.models.gp.covariances import Sum as Sum
from bayesinf.models.gp.deep_kernel_machine import DeepKernelFit as DeepKernelFit
from bayesinf.models.gp.deep_kernel_machine import DeepKernelMachine as DeepKernelMachine
from bayesinf.models.gp.deep_kernel_machine import GramKernel as GramKernel
from bayesinf.models.gp.dense import dense as dense
from bayesinf.models.gp.latent import gp_latent as gp_latent
from bayesinf.models.gp.latent import latent_log_likelihood as latent_log_likelihood
from bayesinf.models.gp.latent import latent_target as latent_target
from bayesinf.models.gp.low_rank import hsgp as hsgp
from bayesinf.models.gp.low_rank import sgpr as sgpr
from bayesinf.models.gp.process import GP as GP
from bayesinf.models.gp.scale_mixture import ScaleMixtureGP as ScaleMixtureGP
from bayesinf.models.gp.statespace import statespace as statespace
from bayesinf.models.gp.student_t import StudentTProcess as StudentTProcess
from bayesinf.models.gp.vecchia import vecchia as vecchia
