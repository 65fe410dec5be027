"""Draws: what `sample` returns, with the bridges to ArviZ and to disk."""

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import PyTree

from bayesinf.target import Target

if TYPE_CHECKING:  # slow to import, so imported where they are used
    import pandas
    import xarray

__all__ = ["Draws", "statistics", "variables"]

# our names of statistics, where ArviZ's schema has another
_ARVIZ_STATS = {"is_divergent": "diverging", "logdensity": "lp", "num_integration_steps": "n_steps"}


@dataclasses.dataclass(frozen=True, eq=False)
class Draws:
    """Draws of several chains.

    Attributes:
        samples: the collected values, a pytree of numpy arrays with leading axes (chain, draw); of zarr arrays after
            `sample(..., store=)`.
        stats: statistics of every draw by name, (chain, draw, ...): acceptance_rate, is_accepted, is_divergent,
            num_gradients, logdensity, and what else the kernel reports.
        final_state: the state of every chain after its last step; `final_state.position` continues the run.
        tuned: what warm-up found, with a leading chain axis; None without adaptation.
        reduced: results of the reducers, each with a leading chain axis.
        status: "complete", "interrupted", or why the run failed.
        seconds: wall time of "compile", "warmup" and "sampling".
        target: the target, where the kernel has one; it gives names, observed data and pointwise log likelihood.
        observed: data by name, of kernels that hold them without such a target, such as the series of a filter.
        attrs: what else is known of the run: key, counts, versions.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import bayesinf as bi
        >>> kernel = bi.kernels.MALA(bi.Target(lambda x: -0.5 * jnp.sum(x**2)), step_size=0.5)
        >>> draws = bi.sample(0, kernel, jnp.zeros((4, 2)), num_samples=100, progress=False)
        >>> draws["x"].shape
        (4, 100, 2)
        >>> list(draws.summary().index)
        ['x[0]', 'x[1]']
        >>> sorted(draws.to_arviz().children)
        ['posterior', 'sample_stats']
    """

    samples: PyTree
    stats: dict[str, np.ndarray]
    final_state: Any = None
    tuned: Any = None
    reduced: tuple[Any, ...] = ()
    status: str = "complete"
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    target: Target | None = None
    observed: PyTree = None
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """The samples by name: keys of nested dicts joined by dots; a bare array is called "x"."""
        return variables(self.samples)

    def __getitem__(self, name: str) -> Any:
        variables = self.variables
        name = _plain(name)
        if name not in variables:
            raise KeyError(f"no variable {name!r}; there are {sorted(variables)}")
        return variables[name]

    @property
    def num_chains(self) -> int:
        return self.stats["acceptance_rate"].shape[0]

    @property
    def num_samples(self) -> int:
        """Draws a chain."""
        return self.stats["acceptance_rate"].shape[1]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(leaf.shape[2:]) or ''}" for name, leaf in self.variables.items())
        text = f"{self.num_chains} chains x {self.num_samples} draws of {shapes}; {self.status}"
        if self.num_samples:
            divergent = int(np.sum(self.stats["is_divergent"]))
            text += f"; acceptance {np.mean(self.stats['acceptance_rate']):.2f}, {divergent} divergent"
        return f"Draws({text})"

    def to_arviz(self, *, log_likelihood: bool = True) -> "xarray.DataTree":
        """The draws as an xarray.DataTree in ArviZ's schema, read by arviz 1.x as it is.

        For arviz 0.23 wrap it: `arviz.InferenceData.from_datatree(tree)`. A slash in a name, as of NumPyro's `scope`,
        becomes a dot: to xarray it would be a path. Draws on disk, of `sample(..., store=)`, are read into memory.

        Args:
            log_likelihood: compute the pointwise log likelihood, where the target is a NumPyro model whose sites the
                samples hold.

        Returns:
            Groups posterior, sample_stats, and observed_data and log_likelihood where they are known.
        """
        import arviz_base

        posterior = {name: _readable(value) for name, value in self.variables.items()}
        groups: dict[str, Mapping[str, Any]] = {
            "posterior": posterior,
            "sample_stats": statistics(self.stats),
        }
        if self.tuned is not None:
            tuned = np.asarray(self.tuned.step_size)[:, None]  # (chain, 1), or (chain, 1, replica)
            step_size = np.broadcast_to(tuned, (*self.stats["is_accepted"].shape, *tuned.shape[2:]))
            groups["sample_stats"] = {**groups["sample_stats"], "step_size": step_size}
        observed = {name: np.asarray(value) for name, value in variables(self.observed).items()}
        model = self.target.model if self.target is not None else None
        if model is not None and self.target is not None:
            data = variables(model.observed(self.target.data))
            observed = {name: value for name, value in data.items() if value.size}  # a factor observes nothing
            sites = model.template(self.target.data)
            has_sites = set(map(_plain, sites)) <= set(posterior)
            if observed and log_likelihood and has_sites:
                pointwise = _log_likelihood(self.target, {site: posterior[_plain(site)] for site in sites})
                groups["log_likelihood"] = {
                    name: np.asarray(value) for name, value in variables(pointwise).items() if name in observed
                }
        if observed:
            groups["observed_data"] = observed
        dims = self.target.dims if self.target is not None else {}
        coords = self.target.coords if self.target is not None else {}
        times = {f"{phase}_time": seconds for phase, seconds in self.seconds.items()}
        attrs = {"inference_library": "bayesinf", "status": self.status, **times, **self.attrs}
        return arviz_base.from_dict(
            groups,
            dims={_plain(name): list(map(_plain, axes)) for name, axes in dims.items()},
            coords={_plain(name): values for name, values in coords.items()},
            attrs={"posterior": attrs},
            check_conventions=False,
        )

    def summary(self, var_names: list[str] | None = None) -> "pandas.DataFrame":
        """Mean, sd, 94% highest-density interval, bulk and tail ESS, rank-normalised split R-hat and the MCSE.

        Args:
            var_names: which variables; all by default.

        Returns:
            A row for every component, with columns mean, sd, hdi_3%, hdi_97%, ess_bulk, ess_tail, r_hat, mcse_mean,
            mcse_sd.

        Raises:
            ValueError: there are no draws.
        """
        import arviz_stats

        if self.num_samples == 0:
            raise ValueError(f"there are no draws to summarise; the run was {self.status}")

        tree = self.to_arviz(log_likelihood=False)
        return arviz_stats.summary(
            tree,
            var_names=var_names,
            kind="all",
            ci_kind="hdi",
            ci_prob=0.94,
            round_to="none",  # pyright: ignore[reportArgumentType]
        ).rename(columns={"hdi94_lb": "hdi_3%", "hdi94_ub": "hdi_97%"})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything `to_arviz` gives as netCDF, which xarray and both lines of arviz read.

        Args:
            path: the file; one that is there is replaced.
        """
        self.to_arviz().to_netcdf(path, engine="h5netcdf")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Draws":
        """Reads what `save` wrote.

        Args:
            path: the file.

        Returns:
            Draws whose samples are a flat dict by name; without final state, target, and what else ArviZ does not hold.
            Tuned step sizes are the statistic "step_size".
        """
        import xarray

        ours = {theirs: name for name, theirs in _ARVIZ_STATS.items()}
        with xarray.open_datatree(path, engine="h5netcdf") as tree:
            posterior = {str(name): value.to_numpy() for name, value in tree["posterior"].data_vars.items()}
            stats = {ours.get(str(name), str(name)): v.to_numpy() for name, v in tree["sample_stats"].data_vars.items()}
            attrs = {str(name): value for name, value in tree["posterior"].attrs.items()}
            groups = tree["observed_data"].data_vars if "observed_data" in tree.children else {}
            observed = {str(name): value.to_numpy() for name, value in groups.items()}
        times = [name for name in attrs if name.endswith("_time")]
        seconds = {name.removesuffix("_time"): float(attrs.pop(name)) for name in times}
        status = attrs.pop("status", "complete")
        return Draws(posterior, stats, status=status, seconds=seconds, observed=observed or None, attrs=attrs)


def variables(samples: PyTree) -> dict[str, Any]:
    """The leaves of a pytree by name: keys joined by dots, slashes in them too; a bare array is called "x"."""
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(samples):
        name = _plain(".".join(map(_key_name, path))) or "x"
        if name in named:
            raise ValueError(f"two values are called {name!r} once their keys are joined by dots; rename one of them")
        named[name] = leaf
    return named


def statistics(stats: dict[str, PyTree]) -> dict[str, Any]:
    """The leaves of the statistics by their names in ArviZ's schema."""
    return {_ARVIZ_STATS.get(name, name): leaf for name, leaf in variables(stats).items()}


def _readable(value: Any) -> np.ndarray:
    """A numpy array: zarr arrays are read, and types that numpy lacks, such as bfloat16, widened."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _plain(name: str) -> str:
    """A name without slashes, which stand for a path in xarray, netCDF and zarr."""
    return name.replace("/", ".")


def _key_name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


@eqx.filter_jit
def _log_likelihood(target: Target, values: dict[str, Any]) -> dict[str, Any]:
    assert target.model is not None
    pointwise = target.model.log_likelihood
    # one chain at a time: the result is as large as the draws times the data
    return jax.lax.map(jax.vmap(lambda draw: pointwise(draw, target.data)), values)
