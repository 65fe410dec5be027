"""Transition kernels and particle methods; imported as `bayesinf.kernels`."""

if __name__ != "bayesinf.kernels":
    raise ImportError("import bayesinf.kernels, not kernels: this folder is only a part of bayesinf")

from bayesinf.kernels.backward import draw_backward as draw_backward
from bayesinf.kernels.kinetic import KineticLangevin as KineticLangevin
from bayesinf.kernels.kinetic import Splitting as Splitting
from bayesinf.kernels.langevin import LMC as LMC
from bayesinf.kernels.langevin import MALA as MALA
from bayesinf.kernels.randomized_midpoint import RandomizedMidpoint as RandomizedMidpoint
from bayesinf.kernels.randomized_midpoint import RandomizedMidpointKinetic as RandomizedMidpointKinetic
from bayesinf.kernels.reference import HMC as HMC
from bayesinf.kernels.reference import NUTS as NUTS
