"""Writes reference.json: the moments of every posterior by long runs of NumPyro's NUTS, in double precision.

    python tests/posteriors/make_reference.py [NAME ...]

runs those that are named, or all, and leaves the others in the file as they are. The chains run on the model itself,
by NumPyro alone: nothing of this library is in the reference but the data that ship with it. A run that has not
converged, or is too short, writes nothing.
"""

import json
import re
import sys
import time
import zlib
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS

jax.config.update("jax_enable_x64", True)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from posteriors.models import POSTERIORS, Posterior  # noqa: E402

FILE = Path(__file__).with_name("reference.json")
NUM_CHAINS, NUM_WARMUP, NUM_SAMPLES = 8, 2_000, 8_000
MAX_R_HAT, MIN_ESS = 1.005, 10_000


def refer(name: str, posterior: Posterior) -> dict:
    """The entry of one posterior; the name is the seed of data and chains."""
    seed = zlib.crc32(name.encode())
    data = posterior.data(np.random.default_rng(seed))
    began = time.process_time()
    run = MCMC(
        NUTS(posterior.model, target_accept_prob=0.95),
        num_warmup=NUM_WARMUP,
        num_samples=NUM_SAMPLES,
        num_chains=NUM_CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    run.run(jax.random.key(seed), **data)
    draws = run.get_samples(group_by_chain=True)
    sites = {site: np.asarray(draws[site]) for site in posterior.sites}
    num_divergent = int(run.get_extra_fields()["diverging"].sum())
    entry = {
        "seed": seed,
        "num_draws": NUM_CHAINS * NUM_SAMPLES,
        "cpu_seconds": round(time.process_time() - began, 1),
        "data": {key: np.asarray(value).tolist() for key, value in data.items()},
        "moments": {site: summarise(values) for site, values in sites.items()},
    }
    ess = min(np.min(moments["ess"]) for moments in entry["moments"].values())
    r_hat = max(np.max(moments["r_hat"]) for moments in entry["moments"].values())
    print(f"{name}: {entry['cpu_seconds']} s, {num_divergent} divergent, ESS {ess:.0f}, R-hat {r_hat:.4f}", flush=True)
    assert r_hat < MAX_R_HAT, f"{name}: R-hat is {r_hat}, run longer"
    assert ess >= MIN_ESS, f"{name}: the effective sample size is {ess}, run longer"
    assert num_divergent == 0, f"{name}: {num_divergent} transitions diverged, take smaller steps"
    return entry


def summarise(values: np.ndarray) -> dict:
    """Mean and variance of draws (chain, draw, ...) with their standard errors; the worst ESS and R-hat of the two."""
    mean = values.mean(axis=(0, 1))
    squares = (values - mean) ** 2
    ess = [np.asarray(effective_sample_size(x)) for x in (values, squares)]
    errors = [x.std(axis=(0, 1)) / np.sqrt(n) for x, n in zip((values, squares), ess, strict=True)]
    r_hat = np.maximum(split_gelman_rubin(values), split_gelman_rubin(squares))
    moments = {
        "mean": mean,
        "mean_error": errors[0],
        "variance": squares.mean(axis=(0, 1)),
        "variance_error": errors[1],
        "ess": np.minimum(*ess),
        "r_hat": r_hat,
    }
    return {key: np.asarray(value).tolist() for key, value in moments.items()}


def main(names: list[str]) -> None:
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    versions = {package: metadata.version(package) for package in ("jax", "numpyro", "numpy")}
    for name in names or POSTERIORS:
        entry = {"versions": versions, **refer(name, POSTERIORS[name])}
        known[name] = entry
        text = json.dumps(known, indent=1)
        lists = re.compile(r"\[[^\[\]{}]*\]")  # those of numbers go on one line
        FILE.write_text(lists.sub(lambda found: " ".join(found.group().split()), text) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
