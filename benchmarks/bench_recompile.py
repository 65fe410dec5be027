"""The second run: new data of the same shape, or another step size, by each library's own high-level call.

Every call is given data or a step size that were never seen. Whatever compiles again is about as slow warm as at first.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from conftest import has
from numpyro.infer import HMC, MCMC

import bayesinf as bi

NUM_ROWS, NUM_FEATURES, NUM_SAMPLES = 200, 5, 100
STEP_SIZE = 1e-3


def model(features, response):
    weights = numpyro.sample("weights", dist.Normal(0.0, 1.0).expand([NUM_FEATURES]).to_event(1))
    numpyro.sample("response", dist.Normal(features @ weights, 1.0), obs=response)


def run_bayesinf(features, response, step_size):
    kernel = bi.kernels.MALA(bi.Target.from_numpyro(model, features, response), step_size=step_size)
    initial = {"weights": jnp.zeros((1, NUM_FEATURES))}
    return bi.sample(0, kernel, initial, num_samples=NUM_SAMPLES, progress=False, throw=False).samples


def run_blackjax(features, response, step_size):
    import blackjax
    from blackjax.util import run_inference_algorithm

    def logdensity(weights):
        return -0.5 * jnp.sum(weights**2) - 0.5 * jnp.sum((response - features @ weights) ** 2)

    algorithm = blackjax.mala(logdensity, step_size)
    start = jnp.zeros(NUM_FEATURES)
    return run_inference_algorithm(jax.random.key(0), algorithm, NUM_SAMPLES, initial_position=start)


def numpyro_mcmc(step_size, jit_model_args=False):
    # HMC of one leapfrog step is MALA
    one_step = HMC(model, step_size=step_size, num_steps=1, adapt_step_size=False, adapt_mass_matrix=False)
    options = {"progress_bar": False, "jit_model_args": jit_model_args}
    return MCMC(one_step, num_warmup=0, num_samples=NUM_SAMPLES, **options)


def run_numpyro(features, response, step_size):
    return draw(numpyro_mcmc(step_size), features, response)


def draw(mcmc, features, response):
    mcmc.run(jax.random.key(0), features, response)
    return mcmc.get_samples()


def samplers():
    calls = {"bayesinf sample": run_bayesinf}
    if has("blackjax"):
        calls["blackjax run_inference_algorithm"] = run_blackjax
    return calls


def make_data(rng):
    features, response = rng.normal(size=(NUM_ROWS, NUM_FEATURES)), rng.normal(size=NUM_ROWS)
    return jnp.asarray(features, jnp.float32), jnp.asarray(response, jnp.float32)


RUN = f"{NUM_SAMPLES} MALA draws, one chain, regression, n={NUM_ROWS}, d={NUM_FEATURES}"


def bench_new_data(compare):
    rng = np.random.default_rng(0)
    calls = samplers()
    for name, mcmc in {
        "numpyro MCMC": numpyro_mcmc(STEP_SIZE),
        "numpyro MCMC, jit_model_args=True": numpyro_mcmc(STEP_SIZE, jit_model_args=True),
    }.items():
        calls[name] = lambda features, response, step_size, mcmc=mcmc: draw(mcmc, features, response)
    compare(f"{RUN}, new data at every call", calls, prepare=lambda: (*make_data(rng), STEP_SIZE))


def bench_new_step_size(compare):
    rng = np.random.default_rng(1)
    data = make_data(rng)
    compare(
        f"{RUN}, a new step size at every call",
        samplers() | {"numpyro MCMC": run_numpyro},
        prepare=lambda: (*data, STEP_SIZE * rng.uniform(0.5, 1.0)),
    )
