"""Whether the weights of a filter can be trusted: how heavy their tails are, at every time.

An effective sample size is itself an estimate by the weights, and looks well where the few particles that matter were
not drawn. The tail index k of a Pareto law fitted to the largest weights sees it coming: their variance is finite for
k < 1/2, and above about 0.7 no number of particles that one can pay for is enough.

References:
    Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72).
"""

import numpy as np
from jaxtyping import Float

from bayesinf import errors, weights
from bayesinf.kernels.genealogy import history_of
from bayesinf.kernels.online_filter import FilterState
from bayesinf.kernels.paris import ParisState
from bayesinf.kernels.particle_filter import FilterResult

__all__ = ["tail_index"]


def tail_index(filtered: FilterResult | FilterState | ParisState) -> Float[np.ndarray, " t"] | float:
    """The Pareto index k of the weights at every stored time, or now; on the host.

    Below 0.5 all is well; above 0.7 the filter is not to be trusted at this time: take proposal="guided", an
    observation law with heavier tails, or `lookahead=True`. Equal weights, as a fully adapted filter's, have no tail.

    Args:
        filtered: of `particle_filter(..., store="full")`, or "window"; or the state of a `ParticleFilter` or `Paris`,
            which needs no history.

    Returns:
        k at the T stored times, or of a state one number; -inf where weights are equal, +inf where fewer than 25 are
        positive.

    Raises:
        ValueError: the filter did not store its history, or is a batch of filters.

    Example:
        >>> import bayesinf as bi
        >>> model = bi.models.LinearGaussian.scalar(0.9, 0.5)
        >>> _, ys = bi.models.simulate(0, model, num_steps=20)
        >>> filtered = bi.kernels.particle_filter(1, model, ys, num_particles=1_000, store="full")
        >>> bool((bi.kernels.tail_index(filtered) < 0.7).all())
        True
        >>> stream = bi.kernels.ParticleFilter(model, num_particles=1_000)
        >>> state, _ = stream.init(1, ys[0])
        >>> bi.kernels.tail_index(state) < 0.7
        True

    References:
        Vehtari, Simpson, Gelman, Yao and Gabry (2024), JMLR 25(72).
    """
    if isinstance(filtered, ParisState):
        filtered = filtered.filter
    if not isinstance(filtered, FilterResult | FilterState):
        raise ValueError(
            "filtered must be of particle_filter, or the state of a ParticleFilter or Paris, got "
            f"{type(filtered).__name__}"
        )
    shape = np.shape(filtered.log_weights)
    if not errors.is_concrete(filtered.log_weights) or len(shape) != 1:
        raise ValueError(
            f"filtered must be a single filter outside of compiled functions, got weights of shape {shape}"
        )
    if isinstance(filtered, FilterState):
        return weights.pareto_k(np.asarray(filtered.log_weights))
    log_weights = np.asarray(history_of(filtered, is_whole=False).log_weights)
    return np.array([weights.pareto_k(row) for row in log_weights])
