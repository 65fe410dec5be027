"""A conjugate model, and samplers of its posterior and estimators of evidence that are wrong by one line.

tau ~ Gamma(3, 1),   mu | tau ~ N(1/2, 1 / tau),   y_i | mu, tau ~ N(mu, 1 / tau),   i = 1, ..., 4
"""

import jax
import jax.numpy as jnp

import bayesinf as bi

NUM = 4
MEAN, SHAPE = 0.5, 3


def erlang(key, shape, batch=()):
    """Gamma variables of a whole-numbered shape; compiles in a tenth of the time of `jax.random.gamma`."""
    return jnp.sum(jax.random.exponential(key, (*batch, shape)), axis=-1)


def prior(key):
    key_tau, key_mu = jax.random.split(key)
    tau = erlang(key_tau, SHAPE)
    return {"mu": MEAN + jax.random.normal(key_mu) / jnp.sqrt(tau), "tau": tau}


def simulate(key, theta):
    return theta["mu"] + jax.random.normal(key, (NUM,)) / jnp.sqrt(theta["tau"])


def log_likelihood(theta, y):
    return jnp.sum(0.5 * jnp.log(theta["tau"]) - 0.5 * theta["tau"] * (y - theta["mu"]) ** 2)


def posterior(key, y, num_draws, *, pseudo=1.0, shape=SHAPE + NUM // 2, is_joint=True):
    """Draws from the normal-gamma posterior, which has one pseudo-observation, at MEAN, from the prior."""
    key_tau, key_mu, key_other = jax.random.split(key, 3)
    gap = jnp.mean(y) - MEAN
    rate = 1.0 + 0.5 * jnp.sum((y - jnp.mean(y)) ** 2) + 0.5 * NUM / (NUM + 1) * gap**2
    tau = erlang(key_tau, shape, (num_draws,)) / rate
    centre = (MEAN * pseudo + jnp.sum(y)) / (pseudo + NUM)
    precision = (pseudo + NUM) * (tau if is_joint else erlang(key_other, shape, (num_draws,)) / rate)
    return {"mu": centre + jax.random.normal(key_mu, (num_draws,)) / jnp.sqrt(precision), "tau": tau}


def the_prior(key, y, num_draws):
    """Ignores the data; the ranks of theta alone are uniform."""
    return jax.vmap(prior)(jax.random.split(key, num_draws))


def without_prior_mean(key, y, num_draws):
    """Forgets that the prior of mu counts as one observation."""
    return posterior(key, y, num_draws, pseudo=0.0)


def wrong_shape(key, y, num_draws):
    """Adds n rather than n / 2 to the shape of tau."""
    return posterior(key, y, num_draws, shape=SHAPE + NUM)


def separate_blocks(key, y, num_draws):
    """Draws mu given another tau than the one it returns: both marginals are right, the joint law is not."""
    return posterior(key, y, num_draws, is_joint=False)


def transition(key, theta, y, *, log_jacobian=1.0, likelihood=log_likelihood):
    """Three steps of MALA on (mu, log tau)."""

    def logdensity(x, y):
        constrained = {"mu": x["mu"], "tau": jnp.exp(x["log_tau"])}
        log_prior = (SHAPE - 1) * x["log_tau"] - constrained["tau"]
        log_prior += 0.5 * x["log_tau"] - 0.5 * constrained["tau"] * (x["mu"] - MEAN) ** 2
        return log_prior + likelihood(constrained, y) + log_jacobian * x["log_tau"]

    kernel = bi.kernels.MALA(bi.Target(logdensity, y), step_size=0.1)
    state = kernel.init({"mu": theta["mu"], "log_tau": jnp.log(theta["tau"])})
    state = jax.lax.fori_loop(0, 3, lambda i, state: kernel.step(jax.random.fold_in(key, i), state)[0], state)
    return {"mu": state.position["mu"], "tau": jnp.exp(state.position["log_tau"])}


def without_jacobian(key, theta, y):
    """Samples log tau with the density of tau."""
    return transition(key, theta, y, log_jacobian=0.0)


def drops_a_datum(key, theta, y):
    """Leaves the last observation out."""
    return transition(key, theta, y, likelihood=lambda theta, y: log_likelihood(theta, y[:-1]))


def forgets_normaliser(key, theta, y):
    """Drops the factor sqrt(tau) of the likelihood, as if the scale were known."""
    return transition(key, theta, y, likelihood=lambda theta, y: -0.5 * jnp.sum(theta["tau"] * (y - theta["mu"]) ** 2))


LOG_EVIDENCE = 0.5 * jnp.log(2 * jnp.pi)


def log_weights(key, num):
    """Importance weights of exp(-x^2 / 2) under N(0, 4)."""
    x = 2.0 * jax.random.normal(key, (num,))
    return -0.5 * x**2 + 0.125 * x**2 + jnp.log(2.0) + LOG_EVIDENCE


def evidence(key):
    return jax.nn.logsumexp(log_weights(key, 2)) - jnp.log(2.0)


def mean_of_logs(key):
    """Averages the logarithms of two estimates, each unbiased."""
    key_1, key_2 = jax.random.split(key)
    return 0.5 * (evidence(key_1) + evidence(key_2))


def divides_by_one_less(key):
    """Divides the sum of 20 weights by 19."""
    return jax.nn.logsumexp(log_weights(key, 20)) - jnp.log(19.0)


def loses_the_dead(key):
    """Averages over the particles that a threshold left alive, not over all."""
    log_w = log_weights(key, 4)
    is_alive = log_w > -4.0
    return jax.nn.logsumexp(log_w, where=is_alive) - jnp.log(jnp.sum(is_alive))
