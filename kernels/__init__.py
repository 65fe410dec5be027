"""Transition kernels and particle methods; imported as `bayesinf.kernels`."""

if __name__ != "bayesinf.kernels":
    raise ImportError("import bayesinf.kernels, not kernels: this folder is only a part of bayesinf")

from bayesinf.kernels.additive import AdditiveFunctional as AdditiveFunctional
from bayesinf.kernels.adjusted import GHMC as GHMC
from bayesinf.kernels.adjusted import MALT as MALT
from bayesinf.kernels.adjusted import Metropolize as Metropolize
from bayesinf.kernels.backward import backward_sample as backward_sample
from bayesinf.kernels.backward import draw_backward as draw_backward
from bayesinf.kernels.barker import Barker as Barker
from bayesinf.kernels.compose import Cycle as Cycle
from bayesinf.kernels.compose import Mixture as Mixture
from bayesinf.kernels.compose import Repeat as Repeat
from bayesinf.kernels.conditional_smc import ConditionalSMC as ConditionalSMC
from bayesinf.kernels.curvature import estimate_curvature as estimate_curvature
from bayesinf.kernels.elliptical_slice import EllipticalSlice as EllipticalSlice
from bayesinf.kernels.energy_error import EnergyError as EnergyError
from bayesinf.kernels.gaussian_error import gaussian_error as gaussian_error
from bayesinf.kernels.gibbs import Gibbs as Gibbs
from bayesinf.kernels.guarantees import guarantee as guarantee
from bayesinf.kernels.guarantees import wasserstein_bound as wasserstein_bound
from bayesinf.kernels.ibis import IBISResult as IBISResult
from bayesinf.kernels.ibis import ibis as ibis
from bayesinf.kernels.ito_chain import ItoChain as ItoChain
from bayesinf.kernels.jitter import Jitter as Jitter
from bayesinf.kernels.kinetic import KineticLangevin as KineticLangevin
from bayesinf.kernels.kinetic import Splitting as Splitting
from bayesinf.kernels.ladder import stepping_stone as stepping_stone
from bayesinf.kernels.ladder import suggest_betas as suggest_betas
from bayesinf.kernels.langevin import LMC as LMC
from bayesinf.kernels.langevin import MALA as MALA
from bayesinf.kernels.mclmc import MCLMC as MCLMC
from bayesinf.kernels.mclmc_warmup import MCLMCWarmup as MCLMCWarmup
from bayesinf.kernels.minibatch import Minibatch as Minibatch
from bayesinf.kernels.online_filter import ParticleFilter as ParticleFilter
from bayesinf.kernels.parallel_midpoint import ParallelMidpoint as ParallelMidpoint
from bayesinf.kernels.paris import Paris as Paris
from bayesinf.kernels.paris import paris as paris
from bayesinf.kernels.parisian_gibbs import ParisianGibbs as ParisianGibbs
from bayesinf.kernels.parisian_gibbs import ppg as ppg
from bayesinf.kernels.particle_filter import FilterResult as FilterResult
from bayesinf.kernels.particle_filter import particle_filter as particle_filter
from bayesinf.kernels.particle_gibbs import ParticleGibbs as ParticleGibbs
from bayesinf.kernels.plan import plan as plan
from bayesinf.kernels.precondition import Precondition as Precondition
from bayesinf.kernels.randomized_midpoint import RandomizedMidpoint as RandomizedMidpoint
from bayesinf.kernels.randomized_midpoint import RandomizedMidpointKinetic as RandomizedMidpointKinetic
from bayesinf.kernels.reference import HMC as HMC
from bayesinf.kernels.reference import NUTS as NUTS
from bayesinf.kernels.replica_exchange import ReplicaExchange as ReplicaExchange
from bayesinf.kernels.smc_sampler import SMCResult as SMCResult
from bayesinf.kernels.smc_sampler import smc_sampler as smc_sampler
from bayesinf.kernels.stochastic_gradient import SGHMC as SGHMC
from bayesinf.kernels.stochastic_gradient import SGLD as SGLD
from bayesinf.kernels.temper import Temper as Temper
from bayesinf.kernels.transformed import Transformed as Transformed
