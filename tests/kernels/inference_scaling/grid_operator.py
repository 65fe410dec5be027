"""The Euler-Maruyama chain with its weights as an operator on a grid, and mixtures of normals under noise; in float64.

On the grid integrals are sums: their error vanishes faster than any power of the spacing, for functions as smooth as
these and steps whose noise is wider than it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

GRID = np.linspace(-7.0, 7.0, 281)
SPACING = GRID[1] - GRID[0]


class Mixture(NamedTuple):
    """A mixture of normals on the line, and what a linear noising process makes of it."""

    shares: tuple[float, ...]
    means: tuple[float, ...]
    sds: tuple[float, ...]

    def parts(self, x, t, noising, xp):
        """Residuals, variances and log densities of the parts, along the last axis."""
        alpha, variance = xp.exp(noising.log_scale(t)), noising.variance(t)
        if xp is np:
            alpha, variance = float(alpha), float(variance)
        shares, means, sds = (xp.asarray(values) for values in self)
        residuals = x[..., None] - alpha * means
        variances = variance + alpha**2 * sds**2
        return (
            residuals,
            variances,
            xp.log(shares) - 0.5 * residuals**2 / variances - 0.5 * xp.log(2 * np.pi * variances),
        )

    def log_density(self, x, t, noising):
        """For the library."""
        return jax.nn.logsumexp(self.parts(x, t, noising, jnp)[2], axis=-1)

    def score(self, noising):
        """For the library, by differentiation."""
        return jax.grad(lambda x, t: self.log_density(x, t, noising))

    def density_on_grid(self, t, noising):
        return np.exp(self.parts(GRID, t, noising, np)[2]).sum(-1)

    def score_on_grid(self, t, noising):
        """By the formula."""
        residuals, variances, log_parts = self.parts(GRID, t, noising, np)
        parts = np.exp(log_parts - log_parts.max(-1, keepdims=True))
        return -(parts * residuals / variances).sum(-1) / parts.sum(-1)

    def cdf(self, x):
        from scipy.stats import norm

        return sum(w * norm.cdf(x, m, s) for w, m, s in zip(*self, strict=True))


def move(density, mean, sd):
    """The density after x' ~ N(mean(x), sd^2)."""
    kernel = np.exp(-0.5 * ((GRID[:, None] - mean) / sd) ** 2) / (np.sqrt(2 * np.pi) * sd)
    return kernel @ density * SPACING


def integral(values):
    return values.sum() * SPACING
