"""Activations and their Gaussian expectations."""

from bayesinf.models.nngp.duals.dual import Dual as Dual
from bayesinf.models.nngp.duals.numerical import numerical as numerical
from bayesinf.models.nngp.duals.piecewise_linear import piecewise_linear as piecewise_linear
from bayesinf.models.nngp.duals.piecewise_linear import shifted_relu as shifted_relu
from bayesinf.models.nngp.duals.piecewise_linear import soft_threshold as soft_threshold
from bayesinf.models.nngp.duals.rectifiers import abs_ as abs_
from bayesinf.models.nngp.duals.rectifiers import leaky_relu as leaky_relu
from bayesinf.models.nngp.duals.rectifiers import relu as relu
from bayesinf.models.nngp.duals.smooth import cos as cos
from bayesinf.models.nngp.duals.smooth import erf as erf
from bayesinf.models.nngp.duals.smooth import gelu as gelu
from bayesinf.models.nngp.duals.smooth import monomial as monomial
from bayesinf.models.nngp.duals.smooth import sin as sin
