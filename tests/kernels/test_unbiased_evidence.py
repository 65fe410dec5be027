"""E[Zhat] = Z for every filter, every scheme of resampling and every threshold, on a model that nothing is special of.

Regimes that switch and states that they drive (`switching_laws`): the evidence is known by the sum over all paths of
regimes, and four particles are few enough for whatever is wrong to show. The grid is whole in the slow tier; in the
default one every filter is met, and every scheme twice.
"""

import equinox as eqx
import jax.numpy as jnp
import pytest
import switching_laws as exact
from jaxtyping import Array
from planted.peers import planted
from switching_models import Adapted, Crude, Driven, Regimes

from bayesinf import resampling
from bayesinf.conformance import FALSE_ALARM, Report, evidence_is_unbiased
from bayesinf.kernels import filter_steps, online_filter, particle_filter
from bayesinf.models import Marginalized, StateSpaceModel

THRESHOLDS = (0.0, 0.5, 1.0)  # never, sometimes and always

# model, proposal, lookahead
FILTERS = {
    "bootstrap": (Adapted(), "bootstrap", False),
    "guided": (Crude(), "guided", False),
    "auxiliary": (Crude(), "bootstrap", True),
    "auxiliary, guided": (Crude(), "guided", True),
    "exact lookahead alone": (Adapted(), "bootstrap", True),
    "fully adapted": (Adapted(), "guided", True),
    "particles of regimes": (Marginalized(Regimes(), "transition"), "guided", False),
    "of regimes, guided": (Marginalized(Regimes(), "guided"), "guided", False),
    "of regimes, optimal": (Marginalized(Regimes(), "optimal"), "guided", False),
    "of regimes, fully adapted": (Marginalized(Regimes(), "optimal"), "guided", True),
    "of states": (Marginalized(Driven(), "transition"), "guided", False),
    "of states, guided": (Marginalized(Driven(), "guided"), "guided", False),
}


pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation


class LogEvidence(eqx.Module):
    """key -> log evidence; one compilation for all thresholds."""

    model: StateSpaceModel
    ess_threshold: Array
    proposal: str = eqx.field(static=True)
    lookahead: bool = eqx.field(static=True)
    resampling: str = eqx.field(static=True)

    def __call__(self, key):
        ys = jnp.asarray(exact.SERIES)
        return particle_filter(
            key,
            self.model,
            ys[:, None] if isinstance(self.model, Marginalized) else ys,
            num_particles=4,
            proposal=self.proposal,
            lookahead=self.lookahead,
            resampling=self.resampling,
            ess_threshold=self.ess_threshold,
            store="none",
        ).log_evidence


def report(name: str, scheme: str, ess_threshold: float) -> Report:
    model, proposal, lookahead = FILTERS[name]
    estimate = LogEvidence(model, jnp.asarray(ess_threshold), proposal, lookahead, scheme)
    return evidence_is_unbiased(7, estimate, exact.LOG_EVIDENCE, num_replicates=20_000)


# every filter with every scheme; the default tier has a diagonal of the first six filters, and another of the rest
GRID = [
    pytest.param(name, scheme, marks=[] if j == (i + 2 * (i // 6)) % 6 else pytest.mark.slow)
    for i, name in enumerate(FILTERS)
    for j, scheme in enumerate(resampling.SCHEMES)
]


@pytest.mark.parametrize(("name", "scheme"), GRID)
def test_the_evidence_is_unbiased(name, scheme):
    for ess_threshold in THRESHOLDS:
        found = report(name, scheme, ess_threshold).raise_if_rejected()
        assert found.notes["effective replicates"] > 5_000


def by_nothing(key, log_weights, num_samples, method, resample=filter_steps.resample):
    """Ancestors with no regard to their weights."""
    return resample(key, jnp.zeros_like(log_weights), num_samples, method)


def forgets_what_is_carried(*args, choose=online_filter.choose_ancestors, **kwargs):
    """All start from equal weights, also those that were not resampled."""
    ancestors, log_carried, is_resampled = choose(*args, **kwargs)
    return ancestors, jnp.full_like(log_carried, -jnp.log(log_carried.shape[0])), is_resampled


def keeps_what_is_carried(key, log_weights, choose=online_filter.choose_ancestors, **kwargs):
    """Offspring start from the weights of their parents, by which they were chosen already."""
    ancestors, _, is_resampled = choose(key, log_weights, **kwargs)
    return ancestors, log_weights[ancestors], is_resampled


@pytest.mark.parametrize(
    ("name", "scheme", "ess_threshold", "module", "wrong"),
    [
        ("bootstrap", "ssp", 1.0, filter_steps, {"resample": by_nothing}),
        ("of states", "stratified", 1.0, filter_steps, {"resample": by_nothing}),
        ("guided", "systematic", 0.5, online_filter, {"choose_ancestors": forgets_what_is_carried}),
        ("bootstrap", "multinomial", 0.5, online_filter, {"choose_ancestors": keeps_what_is_carried}),
        ("fully adapted", "killing", 1.0, online_filter, {"choose_ancestors": forgets_what_is_carried}),
    ],
)
def test_planted_mistakes_are_found(name, scheme, ess_threshold, module, wrong):
    with planted(module, **wrong):
        assert report(name, scheme, ess_threshold).p_value < FALSE_ALARM
