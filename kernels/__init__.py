"""Transition kernels and particle methods; imported as `bayesinf.kernels`."""

if __name__ != "bayesinf.kernels":
    raise ImportError("import bayesinf.kernels, not kernels: this folder is only a part of bayesinf")

from bayesinf.kernels.langevin import MALA as MALA
