"""`python -m bayesinf`: stochastic volatility of the oil price, from the posterior to a plot.

    x_0 ~ N(mu, sigma^2 / (1 - phi^2)),   x_t | x_{t-1} ~ N(mu + phi (x_{t-1} - mu), sigma^2),
    y_t | x_t ~ N(0, exp(x_t))

Particle Gibbs over (theta, path): conditional SMC moves the path, Hamiltonian Monte Carlo moves theta given the path
and given its innovations. Then Parisian particle Gibbs (PPG) smooths the volatility exp(x_t / 2) at the posterior mean
of theta. `python -m bayesinf info` prints what a bug report needs.
"""

import argparse
import platform
import time
from functools import partial
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

import bayesinf as bi
from bayesinf import datasets, kernels, models
from bayesinf.draws import Draws

THETA = ["mean", "persistence", "scale"]


def prior() -> None:
    """The prior of Kim, Shephard and Chib (1998) on phi; weak ones on mu, a log variance in percent^2, and sigma."""
    numpyro.sample("mean", dist.Normal(0.0, 2.0))
    numpyro.sample("persistence", dist.TransformedDistribution(dist.Beta(20.0, 1.5), AFFINE))
    numpyro.sample("scale", dist.HalfNormal(0.5))


AFFINE = dist.transforms.AffineTransform(-1.0, 2.0, domain=dist.constraints.unit_interval)


def build(theta: dict[str, jax.Array]) -> models.StochasticVolatility:
    """The model at theta."""
    return models.StochasticVolatility(**{name: theta[name] for name in THETA})


def volatility(num_steps: int) -> kernels.AdditiveFunctional:
    """exp(x_t / 2) at every t at once, as a sum over time of vectors with one entry each."""

    def at(t, x):
        return jnp.where(jnp.arange(num_steps) == t, jnp.exp(x / 2), 0.0)

    return kernels.AdditiveFunctional(initial=lambda x: at(0, x), increment=lambda x_prev, x, t: at(t, x))


def demo(options: argparse.Namespace) -> None:
    """Runs the whole analysis and writes `draws.nc` and `demo.png`."""
    began = time.perf_counter()
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    series = datasets.wti_crude_oil()
    ys = jnp.asarray(series.returns - series.returns.mean())
    key_start, key_run, key_evidence, key_smooth = jax.random.split(jax.random.key(options.seed), 4)
    print(f"{len(ys)} daily returns of WTI crude oil, {series.dates[1]} to {series.dates[-1]}, in percent")

    print(f"\nParticle Gibbs over (theta, path): {options.chains} chains, {options.particles} particles")
    kernel = kernels.ParticleGibbs(
        build,
        bi.Target.from_numpyro(prior),
        ys,
        num_particles=options.particles,
        parameter_kernel=lambda target: kernels.HMC(target, step_size=0.02, num_integration_steps=20),
        interweave=True,
        innovation_kernel=lambda target: kernels.HMC(target, step_size=0.01, num_integration_steps=10),
    )
    checkpoint = out / "checkpoint"
    if options.resume and not (checkpoint / "state.npz").exists():
        print(f"nothing to continue in {checkpoint}: a new run")
    if not options.resume:
        for file in [*checkpoint.glob("draws-*.npz"), *checkpoint.glob("state.npz")]:
            file.unlink()
    draws = bi.sample(
        key_run,
        kernel,
        kernel.initial(key_start, options.chains),
        num_samples=options.samples,
        num_warmup=options.warmup,
        checkpoint=checkpoint,
    )
    if draws.status == "interrupted":
        print(f"interrupted after {draws.num_samples} draws; --resume continues")
        return
    draws.save(out / "draws.nc")
    table = draws.summary(var_names=THETA)
    print(table.to_string(float_format=lambda value: f"{value:.4g}"))

    theta = {name: jnp.asarray(draws[name].mean()) for name in THETA}
    model = build(theta)
    log_evidence, error = evidence(key_evidence, model, ys)
    print(f"\nlog evidence of the returns at the posterior mean: {log_evidence:.2f} (standard error {error:.2f})")

    clock = time.perf_counter()
    smoothed = kernels.ppg(
        key_smooth, model, ys, volatility(len(ys)), num_particles=options.particles, num_sweeps=20, burn_in=5
    )
    print(f"PPG smoothing of the volatility: 20 sweeps, {time.perf_counter() - clock:.1f} s with compilation")

    plotted = plot(out / "demo.png", series, draws, np.asarray(smoothed.estimate))
    seconds = {**draws.seconds, "in all": time.perf_counter() - began}
    print("\nseconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))
    print(f"written: {out / 'draws.nc'}" + (f", {out / 'demo.png'}" if plotted else ""))
    worst = float(np.max(table["r_hat"].to_numpy()))
    if not worst < 1.05:
        print(f"R-hat reaches {worst:.3f}: the chains have not mixed; run more --samples")


def evidence(key: jax.Array, model: models.StateSpaceModel, ys: jax.Array) -> tuple[float, float]:
    """Log of the mean of 16 unbiased evidence estimates, and its standard error by the delta method."""

    def estimate(key: jax.Array) -> jax.Array:
        return kernels.particle_filter(key, model, ys, num_particles=1_000, store="none").log_evidence

    logs = np.asarray(jax.lax.map(estimate, jax.random.split(key, 16)), np.float64)
    ratios = np.exp(logs - logs.max())
    error = ratios.std(ddof=1) / np.sqrt(len(ratios)) / ratios.mean()
    return float(logs.max() + np.log(ratios.mean())), float(error)


def plot(path: Path, series: datasets.PriceSeries, draws: Draws, smoothed: np.ndarray) -> bool:
    """Returns under the smoothed volatility with its posterior band, and the traces; False without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("no plot: matplotlib is missing; pip install 'bayesinf[plots]'")
        return False

    dates = series.dates[1:]
    paths = np.exp(draws["path"].reshape(-1, len(dates)) / 2)
    low, high = np.quantile(paths, [0.05, 0.95], axis=0)
    figure = plt.figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.add_gridspec(4, 2, width_ratios=[3, 1], height_ratios=[3, 1, 1, 1])

    top = figure.add_subplot(grid[0, :])
    top.bar(dates, series.returns, width=1.5, color="0.75", label="daily return of WTI crude oil")
    for sign in (-1, 1):
        top.fill_between(dates, sign * low, sign * high, color="C0", alpha=0.35, lw=0)
        top.plot(dates, sign * smoothed, color="C0", lw=1.2)
    top.plot([], [], color="C0", label="smoothed volatility (PPG), 90% posterior band")
    top.set_ylabel("percent")
    top.set_title("Stochastic volatility by particle Gibbs")
    top.legend(loc="upper right", frameon=False, ncols=2)
    top.margins(x=0.01)

    symbols = {"mean": r"mean $\mu$", "persistence": r"persistence $\varphi$", "scale": r"scale $\sigma$"}
    for row, name in enumerate(THETA, start=1):
        trace = figure.add_subplot(grid[row, 0])
        density = figure.add_subplot(grid[row, 1])
        for chain in draws[name]:
            trace.plot(chain, lw=0.5, alpha=0.8)
            density.hist(chain, bins=40, density=True, histtype="step", lw=1)
        trace.set_ylabel(symbols[name])
        trace.margins(x=0.01)
        density.set_yticks([])
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def info() -> None:
    """Versions, devices and dtypes."""
    print(f"bayesinf {bi.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for name in ("jax", "jaxlib", "numpyro", "equinox", "blackjax", "optax", "numpy", "scipy", "xarray", "arviz-stats"):
        print(f"  {name} {metadata.version(name)}")
    print(f"backend {jax.default_backend()}, devices {[str(device) for device in jax.devices()]}")
    print(f"default dtypes {jnp.result_type(float)}, {jnp.result_type(int)}; x64 {jax.config.jax_enable_x64}")  # type: ignore[attr-defined]


def count(text: str, minimum: int = 1, below: int = 2**31) -> int:
    """A whole number in a range."""
    if not text.isdecimal() or not minimum <= int(text) < below:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, below {below}, got {text!r}")
    return int(text)


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m bayesinf", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", nargs="?", default="demo", choices=["demo", "info"], help="default: demo")
    parser.add_argument(
        "--particles",
        type=partial(count, minimum=2),
        default=32,
        help="particles of conditional SMC and PPG (%(default)s)",
    )
    parser.add_argument("--samples", type=count, default=1_500, help="draws kept of each chain (%(default)s)")
    parser.add_argument("--warmup", type=count, default=500, help="sweeps discarded first (%(default)s)")
    parser.add_argument("--chains", type=count, default=4, help="chains (%(default)s)")
    parser.add_argument(
        "--seed",
        type=partial(count, minimum=0, below=2**32),
        default=1,
        help="seed of all random numbers (%(default)s)",
    )
    parser.add_argument("--output", default="bayesinf-demo", help="folder of the results (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="continue the unfinished run in the output folder")
    options = parser.parse_args(arguments)
    if Path(options.output).exists() and not Path(options.output).is_dir():
        parser.error(f"argument --output: {options.output} is a file, not a folder")
    info() if options.command == "info" else demo(options)


if __name__ == "__main__":
    main()
