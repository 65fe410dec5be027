"""The second run: the same model on new data of the same shape, by each library's own high-level call.

Every call is given data that were never seen. Whatever compiles again is about as slow warm as at first.
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


def run_bayesinf(features, response):
    kernel = bi.kernels.MALA(bi.Target.from_numpyro(model, features, response), step_size=STEP_SIZE)
    initial = {"weights": jnp.zeros((1, NUM_FEATURES))}
    return bi.sample(0, kernel, initial, num_samples=NUM_SAMPLES, progress=False, throw=False).samples


def run_blackjax(features, response):
    import blackjax
    from blackjax.util import run_inference_algorithm

    def logdensity(weights):
        return -0.5 * jnp.sum(weights**2) - 0.5 * jnp.sum((response - features @ weights) ** 2)

    algorithm = blackjax.mala(logdensity, STEP_SIZE)
    start = jnp.zeros(NUM_FEATURES)
    return run_inference_algorithm(jax.random.key(0), algorithm, NUM_SAMPLES, initial_position=start)


def numpyro_runner(jit_model_args):
    # HMC of one leapfrog step is MALA
    one_step = HMC(model, step_size=STEP_SIZE, num_steps=1, adapt_step_size=False, adapt_mass_matrix=False)
    mcmc = MCMC(one_step, num_warmup=0, num_samples=NUM_SAMPLES, progress_bar=False, jit_model_args=jit_model_args)

    def run(features, response):
        mcmc.run(jax.random.key(0), features, response)
        return mcmc.get_samples()

    return run


def bench_new_data(compare):
    rng = np.random.default_rng(0)

    def new_data():
        features = rng.normal(size=(NUM_ROWS, NUM_FEATURES))
        response = rng.normal(size=NUM_ROWS)
        return jnp.asarray(features, jnp.float32), jnp.asarray(response, jnp.float32)

    calls = {"bayesinf sample": run_bayesinf}
    if has("blackjax"):
        calls["blackjax run_inference_algorithm"] = run_blackjax
    calls["numpyro MCMC"] = numpyro_runner(jit_model_args=False)
    calls["numpyro MCMC, jit_model_args=True"] = numpyro_runner(jit_model_args=True)
    compare(
        f"{NUM_SAMPLES} MALA draws, one chain, regression, n={NUM_ROWS}, d={NUM_FEATURES}, new data at every call",
        calls,
        prepare=new_data,
    )
