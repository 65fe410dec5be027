"""A stochastic epidemic: susceptible, infected and recovered people of a finite population, and cases reported.

    B_t ~ Binomial(S_{t-1}, 1 - exp(-beta I_{t-1} / N)),   D_t ~ Binomial(I_{t-1}, 1 - exp(-gamma))
    S_t = S_{t-1} - B_t,   I_t = I_{t-1} + B_t - D_t
    I_0 ~ Binomial(N, p_0),   S_0 = N - I_0,   B_0 = I_0
    y_t ~ NegativeBinomial of mean m = rho B_t + b and variance m + m^2 / k

A chain binomial: over one interval whoever is susceptible escapes the force of infection beta I / N independently of
the others; whoever is infected stays so for a geometric number of intervals, 1 / (1 - exp(-gamma)) on average.

References:
    Bailey (1975), The Mathematical Theory of Infectious Diseases, chapter 14 (chain binomials).
    Bretó, He, Ionides and King (2009), doi:10.1214/08-AOAS201 (over-dispersed time series of epidemics).
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jaxtyping import Array, Float, Int

from bayesinf import errors
from bayesinf.models.binomial import binomial_log_prob, sample_binomial
from bayesinf.models.gaussian import as_floating
from bayesinf.models.state_space import StateSpaceModel

__all__ = ["SIR"]


class SIR(StateSpaceModel):
    """A chain-binomial epidemic in discrete time, with over-dispersed counts of new infections.

        B_t ~ Binomial(S_{t-1}, 1 - exp(-beta I_{t-1} / N)),   D_t ~ Binomial(I_{t-1}, 1 - exp(-gamma))
        S_t = S_{t-1} - B_t,   I_t = I_{t-1} + B_t - D_t
        y_t ~ NegativeBinomial of mean m = rho B_t + b and variance m + m^2 / k

    States are arrays (S_t, I_t, B_t) of whole numbers in floating point; every other state has probability zero. A law
    of (S_t, I_t, B_t) is one of (B_t, D_t), so that transitions have a probability mass. It is at most 1, which
    `log_transition_bound` says; the bound is far from sharp for large populations. There is no guided proposal.
    Gradients with respect to the rates pass through log probabilities, not through whole numbers that are drawn. So the
    gradient of a particle filter's log evidence is 0 in beta, gamma and p_0; the score is a smoothed expectation of
    gradients of log probabilities, by Fisher's identity.

    Attributes:
        population: N, a whole number; at most 2^23 in single precision.
        infection_rate: beta > 0, per interval.
        recovery_rate: gamma > 0, per interval.
        initial_fraction: p_0 in (0, 1), of the population, infected at time 0.
        reporting_rate: rho in (0, 1], of infections that are counted.
        dispersion: k > 0; small for counts that vary much, large for Poisson's law.
        background: b > 0, mean of counts that no infection has caused, such as imports and errors. It keeps the counts
            possible after the epidemic has died out.

    Raises:
        ValueError: a parameter is out of range.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.SIR(1_000, infection_rate=0.5, recovery_rate=0.2, initial_fraction=0.01)
        >>> xs, ys = bi.models.simulate(0, model, num_steps=60)
        >>> xs.shape, ys.shape
        ((60, 3), (60,))
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=500)
        >>> bool(filtered.log_evidence < 0)
        True

    References:
        Bailey (1975), The Mathematical Theory of Infectious Diseases.
        Bretó, He, Ionides and King (2009), doi:10.1214/08-AOAS201.
    """

    population: Float[Array, ""] = eqx.field(converter=as_floating("population"))
    infection_rate: Float[Array, ""] = eqx.field(converter=as_floating("infection_rate"))
    recovery_rate: Float[Array, ""] = eqx.field(converter=as_floating("recovery_rate"))
    initial_fraction: Float[Array, ""] = eqx.field(converter=as_floating("initial_fraction"))
    reporting_rate: Float[Array, ""] = eqx.field(default=0.5, converter=as_floating("reporting_rate"))
    dispersion: Float[Array, ""] = eqx.field(default=10.0, converter=as_floating("dispersion"))
    background: Float[Array, ""] = eqx.field(default=1e-3, converter=as_floating("background"))

    def __check_init__(self):
        for name in ("infection_rate", "recovery_rate", "reporting_rate", "dispersion", "background"):
            errors.check_positive_scalar(name, getattr(self, name))
        errors.check_fraction("initial_fraction", self.initial_fraction)
        if errors.is_concrete(self.reporting_rate) and self.reporting_rate > 1:
            raise ValueError(f"reporting_rate must lie in (0, 1], got {self.reporting_rate}")
        if errors.is_concrete(self.population):
            largest = int(1 / jnp.finfo(self.population.dtype).eps)
            size = np.asarray(self.population, np.float64)
            if not (1 <= size <= largest and size == np.round(size)):
                raise ValueError(
                    f"population must be a whole number from 1 to {largest}, beyond which {self.population.dtype} does "
                    f"not count exactly, got {size}"
                )

    def initial(self):
        rate = -jnp.log1p(-self.initial_fraction)

        def sample(key):
            infected = sample_binomial(key, self.population, rate)
            return jnp.stack([self.population - infected, infected, infected])

        def log_prob(x):
            susceptible, infected, new = x
            is_possible = (susceptible + infected == self.population) & (new == infected)
            return jnp.where(is_possible, binomial_log_prob(infected, self.population, rate), -jnp.inf)

        return sample, log_prob

    def transition(self, x_prev: Float[Array, " 3"], t: Int[Array, ""]):
        susceptible_prev, infected_prev, _ = x_prev
        force = self.infection_rate * infected_prev / self.population

        def sample(key):
            key_infect, key_recover = jax.random.split(key)
            new = sample_binomial(key_infect, susceptible_prev, force)
            recovered = sample_binomial(key_recover, infected_prev, self.recovery_rate)
            return jnp.stack([susceptible_prev - new, infected_prev + new - recovered, new])

        def log_prob(x):
            susceptible, infected, new = x
            recovered = infected_prev + new - infected
            log_mass = binomial_log_prob(new, susceptible_prev, force) + binomial_log_prob(
                recovered, infected_prev, self.recovery_rate
            )
            return jnp.where(susceptible + new == susceptible_prev, log_mass, -jnp.inf)

        return sample, log_prob

    def observation(self, x: Float[Array, " 3"], t: Int[Array, ""]):
        return dist.NegativeBinomial2(self.reporting_rate * x[2] + self.background, self.dispersion)

    def log_transition_bound(self, t: Int[Array, ""]) -> Float[Array, ""]:
        return jnp.zeros_like(self.population)
