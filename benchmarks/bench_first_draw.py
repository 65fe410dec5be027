"""Time to the first draw in a fresh interpreter, imports apart: taking the model apart, compiling, and running NUTS.

Ten steps of warm-up and one draw of one chain, so that nearly all of it is tracing and compilation.
"""

import subprocess
import sys

import pytest

MODELS = {
    "eight schools": """
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
def model(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)
args = SIGMA, Y
""",
    "logistic regression, n=1000, d=100": """
rng = np.random.default_rng(0)
X, Y = jnp.asarray(rng.normal(size=(1000, 100)), "float32"), jnp.asarray(rng.random(1000) < 0.5, "int32")
def model(x, y):
    b = numpyro.sample("b", dist.Normal(0.0, 1.0).expand([100]).to_event(1))
    numpyro.sample("y", dist.Bernoulli(logits=x @ b), obs=y)
args = X, Y
""",
}
START = """
import time
import numpy as np, jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
{imports}
jax.block_until_ready(jnp.zeros(3))
{model}
start = time.perf_counter()
"""
OURS = """
target = bi.Target.from_numpyro(model, *args)
kernel = {kernel}
bi.sample(0, kernel, target.init(0, 1), num_warmup=10, num_samples=1, progress=False, throw=False)
"""
NUMPYRO = """
mcmc = MCMC(NUTS(model), num_warmup=10, num_samples=1, progress_bar=False)
mcmc.run(jax.random.key(0), *args)
jax.block_until_ready(mcmc.get_samples())
"""


@pytest.mark.parametrize("name", MODELS)
def bench_first_draw(compare, name):
    def fresh(imports: str, run: str):
        script = START.format(imports=imports, model=MODELS[name]) + run + "print(time.perf_counter() - start)"

        def call() -> float:
            command = [sys.executable, "-W", "ignore", "-c", script]
            return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

        return call

    calls = {
        "bayesinf NUTS": fresh("import bayesinf as bi", OURS.format(kernel="bi.kernels.NUTS(target, 0.1)")),
        "bayesinf MALA": fresh("import bayesinf as bi", OURS.format(kernel="bi.kernels.MALA(target, 0.1)")),
        "numpyro NUTS": fresh("from numpyro.infer import MCMC, NUTS", NUMPYRO),
    }
    compare(
        f"first draw, {name}, in a fresh interpreter",
        calls,
        rounds=5,
        note=lambda row, medians: f"{medians[row] / medians['bayesinf NUTS']:.2f} times bayesinf NUTS",
    )
