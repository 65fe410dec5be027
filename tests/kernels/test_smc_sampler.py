"""SMC samplers against a conjugate posterior: a rate with counts and a probability with successes, both skewed."""

import functools
import importlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.special as sp
import scipy.stats

import bayesinf as bi
from bayesinf import errors, kernels, resampling, weights
from bayesinf.conformance import FALSE_ALARM, evidence_is_unbiased, mean_p_value
from bayesinf.kernels import MALA, NUTS, ibis, smc_sampler
from bayesinf.kernels.mutation import CORRELATION, as_mutation, largest_correlation
from bayesinf.kernels.smc_sampler import next_temperature
from bayesinf.target import Target

PRIOR = {"p": dist.Uniform(0.0, 1.0), "rate": dist.Exponential(0.5)}
DATA = {"counts": jnp.array([3.0, 5.0, 0.0]), "wins": jnp.array([4.0, 1.0])}
TRIALS = 6
LADDER = (0.1, 0.4, 1.0)


def log_likelihood(values, data):
    """Poisson counts and binomial wins, up to a constant: what compiles fast."""
    counts = data["counts"] * jnp.log(values["rate"]) - values["rate"]
    wins = data["wins"] * jnp.log(values["p"]) + (TRIALS - data["wins"]) * jnp.log1p(-values["p"])
    return jnp.concatenate([counts, wins])


def functional(values):
    rate, p = values["rate"], values["p"]
    return jnp.stack([rate, rate**2, p, p**2, rate * p])


def exact_log_evidence(data=DATA):
    counts, wins = (np.asarray(data[name], np.float64) for name in ("counts", "wins"))
    rate = np.log(0.5) + sp.gammaln(1 + counts.sum()) - (1 + counts.sum()) * np.log(0.5 + counts.size)
    return rate + sp.betaln(1 + wins.sum(), 1 + (TRIALS - wins).sum())


def exact_moments(data=DATA):
    counts, wins = (np.asarray(data[name], np.float64) for name in ("counts", "wins"))
    rate = scipy.stats.gamma(1 + counts.sum(), scale=1 / (0.5 + counts.size))
    p = scipy.stats.beta(1 + wins.sum(), 1 + (TRIALS - wins).sum())
    return np.array([rate.mean(), rate.moment(2), p.mean(), p.moment(2), rate.mean() * p.mean()])


pytestmark = pytest.mark.usefixtures("compile_fast")  # nearly all the time is compilation


class Run(eqx.Module):
    """key -> log evidence; `all` gives the variance and the means of the functional too.

    The name of a bug makes it another function for the caches of compiled ones.
    """

    options: tuple = eqx.field(static=True)
    ladder: tuple | None = eqx.field(static=True, default=LADDER)
    bug: str = eqx.field(static=True, default="")

    def result(self, key):
        options = dict(self.options)
        sampler = options.pop("sampler", "smc")
        if sampler == "ibis":
            return ibis(key, PRIOR, log_likelihood, KERNEL, data=DATA, **options)
        return smc_sampler(key, PRIOR, log_likelihood, KERNEL, data=DATA, temperatures=self.ladder, **options)

    def __call__(self, key):
        return self.result(key).log_evidence

    def all(self, key):
        result = self.result(key)
        moments = jnp.exp(result.log_weights) @ jax.vmap(functional)(result.particles)
        return result.log_evidence, result.log_evidence_variance, moments


KERNEL = functools.partial(MALA, step_size=0.15)
FIXED = {"num_moves": 2, "tune": False}
VARIANTS = {
    "standard": {"num_particles": 8, **FIXED},
    "systematic": {"num_particles": 8, "resampling": "systematic", **FIXED},
    "waste-free": {"num_particles": 12, "waste_free": True, **FIXED},
    "ibis": {"num_particles": 8, "sampler": "ibis", "ess_threshold": 1.0, **FIXED},
}


@functools.partial(jax.jit, static_argnums=0)
def _replicate(run, keys):
    return jax.lax.map(run.all, keys, batch_size=1_000)


def replicate(options, num=10_000, ladder=LADDER, bug=""):
    """Zhat / Z, V and the means of the functional in independent runs."""
    run = Run(tuple(options.items()), ladder, bug)
    log_evidence, variance, moments = _replicate(run, jax.random.split(jax.random.key(1), num))
    ratios = np.exp(np.asarray(log_evidence, np.float64) - exact_log_evidence())
    return ratios, np.asarray(variance, np.float64), np.asarray(moments, np.float64)


def p_values(ratios, variance, moments):
    """For every number of particles E[Zhat] = Z, E[Zhat mean_i f(x_i)] = Z E[f | data] and E[Zhat^2 V] = var(Zhat)."""
    found = {
        "evidence": mean_p_value(ratios, 1.0),
        "moments": mean_p_value(ratios[:, None] * moments, exact_moments()),
    }
    if not np.isnan(variance).all():
        found["variance"] = mean_p_value(ratios**2 * variance - (ratios - 1.0) ** 2, 0.0)
    return found


def some(default, names):
    """The names as parameters of a test, all but those of the default tier marked slow."""
    return [name if name in default else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("variant", some(["standard"], VARIANTS))
def test_evidence_is_unbiased_with_fixed_temperatures_and_moves(variant):
    report = evidence_is_unbiased(0, Run(tuple(VARIANTS[variant].items())), exact_log_evidence(), num_replicates=10_000)
    report.raise_if_rejected()
    assert report.notes["effective replicates"] > 1_000, report


@pytest.mark.slow
@pytest.mark.parametrize("scheme", resampling.SCHEMES)
def test_evidence_is_unbiased_for_every_scheme(scheme):
    run = Run(tuple({**VARIANTS["standard"], "resampling": scheme}.items()))
    evidence_is_unbiased(0, run, exact_log_evidence(), num_replicates=100_000).raise_if_rejected()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["smc", "ibis"])
def test_evidence_of_waste_free_is_unbiased(sampler):
    options = {"sampler": sampler, **VARIANTS["waste-free"]} | ({"ess_threshold": 1.0} if sampler == "ibis" else {})
    evidence_is_unbiased(
        0, Run(tuple(options.items())), exact_log_evidence(), num_replicates=100_000
    ).raise_if_rejected()


@pytest.mark.parametrize("variant", some(["standard", "waste-free", "ibis"], VARIANTS))
def test_evidence_moments_and_variance_estimate_are_unbiased(variant):
    found = p_values(*replicate(VARIANTS[variant]))
    assert min(found.values()) > FALSE_ALARM, found
    assert ("variance" in found) == (variant != "systematic")


# ---- planted bugs ----

SMC, IBIS, MUTATION, POSTERIOR, LINEAGE = (
    importlib.import_module(f"bayesinf.kernels.{name}")
    for name in ("smc_sampler", "ibis", "mutation", "posterior", "lineage")
)


@pytest.fixture
def plant(monkeypatch):
    """Replaces a function of a module, and makes what was compiled with the right one be forgotten."""

    def forget():
        for compiled in (SMC._run, IBIS._run):
            compiled.clear_cache()

    def replace(owner, name, wrong):
        monkeypatch.setattr(owner, name, wrong)
        forget()

    yield replace
    monkeypatch.undo()
    forget()


def powered_by_half(posterior, exponents):
    return Target(POSTERIOR.powered, (posterior, 0.5 * exponents))


def without_jacobian(laws, position):
    values = laws.constrain(position)
    return sum(jnp.sum(law.log_prob(values[name])) for name, law in laws.laws.items())


def without_inheritance(lineage, parents, scheme):
    return LINEAGE.Lineage(lineage.eves, lineage.log_correction + LINEAGE._log_correction(lineage.eves.shape[0]))


BUGS = {
    "no resampling": (MUTATION, "resample", lambda key, log_w, num, method: jnp.arange(num), "standard", "moments"),
    "every parent the same share": (
        MUTATION,
        "resample",
        lambda key, log_w, num, method: jax.random.randint(key, (num,), 0, log_w.shape[0]),
        "waste-free",
        "evidence",
    ),
    "weights not reset": (IBIS, "equal_weights", lambda log_weights: log_weights, "ibis", "variance"),
    "evidence forgets a step": (weights, "compensated_sum", lambda x: jnp.sum(x[1:]), "standard", "evidence"),
    "moves on the wrong temperature": (POSTERIOR.Posterior, "powered", powered_by_half, "standard", "moments"),
    "no Jacobian": (POSTERIOR.Laws, "log_density", without_jacobian, "standard", "moments"),
    "ancestors not inherited": (MUTATION, "descend", without_inheritance, "standard", "variance"),
    "no correction for siblings": (LINEAGE, "_log_correction", lambda num: jnp.zeros(()), "waste-free", "variance"),
}


MAIN_BUGS = [
    "no resampling",
    "weights not reset",
    "evidence forgets a step",
    "moves on the wrong temperature",
    "no correction for siblings",
]


@pytest.mark.parametrize("bug", some(MAIN_BUGS, BUGS))
def test_planted_bugs_are_rejected(bug, plant):
    *where, variant, what = BUGS[bug]
    plant(*where)
    found = p_values(*replicate(VARIANTS[variant], bug=bug))
    assert found[what] < FALSE_ALARM, found


# ---- adaptive runs ----

ADAPTIVE = {
    "default": {"num_particles": 1_000},
    "waste-free": {"num_particles": 1_000, "num_moves": 9, "waste_free": True},
    "ibis": {"num_particles": 1_000, "sampler": "ibis"},
}


@pytest.mark.parametrize("name", some(["default"], ADAPTIVE))
def test_adaptive_runs_agree_with_the_exact_posterior(name):
    # their bias is of order 1 / N, that of a mean over 100 runs of order 1 / sqrt(100 N): at N = 1000 a tenth of it
    ratios, variance, moments = replicate(ADAPTIVE[name], num=100, ladder=None)
    assert mean_p_value(ratios, 1.0) > FALSE_ALARM
    assert mean_p_value(moments, exact_moments()) > FALSE_ALARM
    assert mean_p_value(ratios**2 * variance - (ratios - 1.0) ** 2, 0.0) > FALSE_ALARM


# One compiled program serves all these calls: only what is an array differs.
def run_once(key=0, step_size=0.1, rate=0.5, data=DATA, ess_target=0.9, **options):
    prior = {"p": dist.Uniform(0.0, 1.0), "rate": dist.Exponential(rate)}
    kernel = functools.partial(MALA, step_size=step_size)
    options = {"num_particles": 500, "num_moves": 10, **options}
    return smc_sampler(key, prior, log_likelihood, kernel, data=data, ess_target=ess_target, **options)


def test_temperatures_keep_the_effective_sample_size():
    result = run_once()
    assert result.num_steps == result.temperatures.size > 5
    np.testing.assert_allclose(result.ess[:-1], 450.0, rtol=1e-3)
    assert result.ess[-1] >= 450.0
    assert np.all(np.diff(result.temperatures) > 0)
    assert result.temperatures[-1] == 1.0


def test_nothing_is_compiled_again():
    first = run_once()
    before = SMC._run._cache_size()
    other = jax.tree.map(lambda leaf: leaf + 1.0, DATA)
    again = run_once(1, step_size=0.3, rate=0.7, data=other, ess_target=0.7)
    assert SMC._run._cache_size() == before
    assert abs(again.log_evidence - first.log_evidence) > 1.0


def solve(log_likelihood, temperature=0.0, ess_target=0.5):
    dtype = log_likelihood.dtype
    return jax.jit(next_temperature)(log_likelihood, jnp.asarray(temperature, dtype), ess_target)


@pytest.mark.parametrize("scale", [1e-3, 1e1, 1e3, 1e8, 1e25])
def test_the_solver_meets_its_target_at_any_scale(scale):
    log_likelihood = -scale * jax.random.exponential(jax.random.key(0), (500,)) ** 2
    found, wrong = solve(log_likelihood), solve(-log_likelihood)
    if scale < 0.1:
        assert found == 1.0
    else:
        np.testing.assert_allclose(weights.ess(found * log_likelihood), 250.0, rtol=1e-3)
        # the likelihoods are skewed, so that an exponent of the wrong sign shows
        assert abs(weights.ess(wrong * log_likelihood) - 250.0) > 100.0


def test_the_solver_always_moves_on():
    wild = jnp.array([0.0, -1e30, -2e30, -3e30])
    assert 0.5 < solve(wild, 0.5) < 0.5 + 1e-6
    assert solve(wild, jnp.nextafter(jnp.ones(()), jnp.zeros(()))) == 1.0
    # one of four can explain the data: the least step drops the others
    one = jnp.array([-5.0, -jnp.inf, -jnp.inf, -jnp.inf])
    assert 0.0 < solve(one) < 1e-30
    assert solve(jnp.zeros(4)) == 1.0


def test_step_sizes_are_tuned_from_far_off():
    for step_size in (1e-4, 50.0):
        assert abs(run_once(step_size=step_size).acceptance_rates[-1] - 0.574) < 0.1


def test_moves_go_on_until_parents_are_forgotten():
    options = {"tune": False, "num_moves": "auto", "ess_target": 0.5, "max_moves": 200}
    counts = [run_once(step_size=step_size, **options).num_moves[-1] for step_size in (0.3, 0.02)]
    assert 1 < counts[0] < counts[1] < 200
    with pytest.warns(errors.SamplingWarning, match="copies of few"):
        stuck = run_once(step_size=1e4, **options)
    assert stuck.num_moves[-1] == 200
    assert stuck.step_sizes is None


def test_the_correlation_that_stops_the_moves():
    x, y = np.random.default_rng(0).standard_normal((2, 50, 3))
    expected = max(np.corrcoef(x[:, j], y[:, j])[0, 1] for j in range(3))
    np.testing.assert_allclose(largest_correlation(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-4)
    assert (
        largest_correlation(
            {"a": jnp.asarray(x), "b": jnp.ones((50, 2))}, {"a": jnp.asarray(y), "b": jnp.ones((50, 2))}
        )
        == 1
    )
    assert 0 < CORRELATION < 1


SCALES = np.array([1.0, 10.0, 100.0])
CORRELATED = np.linalg.inv(np.outer(SCALES, SCALES) * (0.1 * np.eye(3) + 0.9 * np.ones((3, 3))))


@pytest.mark.parametrize("tune", [pytest.param(True, marks=pytest.mark.slow), "dense"])
def test_the_metric_follows_the_particles(tune):
    """A Gaussian posterior with scales from 1 to 100, correlated for the dense metric, is reached in few moves."""
    precision = CORRELATED if tune == "dense" else np.diag(SCALES**-2.0)
    posterior = np.linalg.inv(precision + np.eye(3) / 300.0**2)

    def run(wrap, tune, num_runs):
        def one(key):
            return smc_sampler(
                key,
                dist.Normal(jnp.zeros(3), 300.0).to_event(1),
                lambda x, precision: -0.5 * x @ precision @ x,
                lambda target: wrap(MALA(target, 1.0)),
                data=jnp.asarray(precision, float),
                num_particles=500,
                tune=tune,
            )

        result = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_runs))
        return result, result.num_moves.sum(axis=1).mean()

    tuned, num = run(kernels.Precondition, tune, 30)
    _, num_plain = run(lambda kernel: kernel, True, 2)
    assert 5 * num < num_plain
    whitened = np.asarray(tuned.particles, np.float64) @ np.linalg.inv(np.linalg.cholesky(posterior)).T
    assert mean_p_value((whitened**2).mean(axis=1), 1.0) > FALSE_ALARM
    exact = 0.5 * np.linalg.slogdet(posterior)[1] - 3 * np.log(300.0)
    assert mean_p_value(np.exp(np.asarray(tuned.log_evidence, np.float64) - exact), 1.0) > FALSE_ALARM


def test_the_metric_of_a_population():
    flat = np.random.default_rng(0).gamma(2.0, size=(40, 3)) @ np.array([[1.0, 0, 0], [5, 1, 0], [0, 0, 1e-4]])
    population = {"a": jnp.asarray(flat[:, 0]), "b": jnp.asarray(flat[:, 1:])}
    mutation = lambda tune: as_mutation(  # noqa: E731
        lambda target: kernels.Precondition(MALA(target, 0.1)),
        Target(lambda x: -0.5 * x["a"] ** 2 - jnp.sum(x["b"] ** 2)),
        40,
        num_moves=1,
        max_moves=1,
        waste_free=False,
        tune=tune,
        resampling="systematic",
        batch_size=None,
    )
    covariance = np.cov(flat, rowvar=False, bias=True)
    np.testing.assert_allclose(mutation(True).metric(population), np.diag(covariance), rtol=1e-4)
    expected = np.where(np.eye(3) == 1, covariance, 40 / 45 * covariance)
    np.testing.assert_allclose(mutation("dense").metric(population), expected, rtol=1e-3, atol=1e-9)
    assert mutation(False).metric(population) is None
    same = {"a": jnp.ones(40), "b": population["b"]}  # of what does not vary nothing is known
    found = mutation("dense").metric(same)
    np.testing.assert_array_equal(found[0], [1.0, 0.0, 0.0])
    assert np.all(np.linalg.eigvalsh(found) > 0)
    few = mutation("dense").metric(jax.tree.map(lambda leaf: leaf[:2], population))
    assert np.all(np.linalg.eigvalsh(np.asarray(few, np.float64)) > 0)


# ---- what may be passed ----


def numpyro_model(counts, wins):
    rate = numpyro.sample("rate", dist.Exponential(0.5))
    p = numpyro.sample("p", dist.Uniform(0.0, 1.0))
    with numpyro.plate("days", counts.shape[0]):
        numpyro.sample("counts", dist.Poisson(rate), obs=counts)
    with numpyro.handlers.scale(scale=2.0):
        numpyro.sample("wins", dist.Binomial(TRIALS, p), obs=wins)
    numpyro.factor("tilt", -rate)


def test_a_numpyro_model_is_taken_apart_into_prior_and_likelihood():
    target = Target.from_numpyro(numpyro_model, DATA["counts"], wins=DATA["wins"])
    posterior = POSTERIOR.as_posterior(target, None, None)
    position = {"rate": jnp.asarray(0.3), "p": jnp.asarray(-0.7)}
    values = target.constrain(position)
    terms = jnp.concatenate(
        [
            dist.Poisson(values["rate"]).log_prob(DATA["counts"]),
            2.0 * dist.Binomial(TRIALS, values["p"]).log_prob(DATA["wins"]),
            -values["rate"][None],
        ]
    )
    np.testing.assert_allclose(posterior.log_likelihood(position), terms, rtol=1e-5)
    np.testing.assert_allclose(
        posterior.prior.log_density(position), target.logdensity(position) - terms.sum(), rtol=1e-4
    )
    same = POSTERIOR.as_posterior(PRIOR, log_likelihood, DATA)
    np.testing.assert_allclose(posterior.prior.log_density(position), same.prior.log_density(position), rtol=1e-5)
    np.testing.assert_allclose(
        same.powered(jnp.asarray(0.25)).logdensity(position),
        same.prior.log_density(position) + 0.25 * same.log_likelihood(position).sum(),
        rtol=1e-5,
    )


def test_a_numpyro_model_runs_as_it_is():
    def model(wins):
        p = numpyro.sample("p", dist.Uniform(0.0, 1.0))
        numpyro.sample("wins", dist.Binomial(TRIALS, p), obs=wins)
        numpyro.deterministic("odds", p / (1 - p))

    target = Target.from_numpyro(model, DATA["wins"])
    exact = np.log(sp.binom(TRIALS, DATA["wins"])).sum() + sp.betaln(6, 8)
    result = smc_sampler(0, target, None, KERNEL, num_particles=2_000)
    assert abs(result.log_evidence - exact) < 5 * np.sqrt(result.log_evidence_variance)
    assert set(result.particles) == {"p", "odds"}
    p, odds = result.particles["p"], result.particles["odds"]
    np.testing.assert_allclose(odds, p / (1 - p), rtol=1e-5)
    np.testing.assert_allclose(p, jax.vmap(target.constrain)(result.positions)["p"], rtol=1e-5)


def gaussian(x):
    return -0.5 * (x - 1.0) ** 2


GAUSSIAN_PRIORS = {
    "pair": (jax.random.normal, lambda x: -0.5 * x**2),
    "target": (jax.random.normal, Target(lambda x, s: -0.5 * x**2 * s, jnp.ones(()))),
    "law": dist.Normal(0.0, 1.0),
}


@pytest.mark.parametrize("kind", some(["target"], GAUSSIAN_PRIORS))
def test_kinds_of_priors(kind):
    # N(0, 1) times exp(-(x - 1)^2 / 2)
    result = smc_sampler(0, GAUSSIAN_PRIORS[kind], gaussian, KERNEL, num_particles=2_000)
    assert abs(result.log_evidence - (-0.5 * np.log(2.0) - 0.25)) < 5 * np.sqrt(result.log_evidence_variance)
    assert abs(result.particles.mean() - 0.5) < 0.1


def blackjax_mala(target):
    import blackjax

    return blackjax.mala(target.logdensity, 0.3)


KERNELS = {
    "kernel": MALA(Target(gaussian), 0.3),
    "composition": bi.kernels.Repeat(MALA(Target(gaussian), 0.3), 2),
    "nuts": functools.partial(NUTS, step_size=0.5),
    "blackjax": blackjax_mala,
}


@pytest.mark.parametrize("kind", some(["composition", "blackjax"], KERNELS))
def test_kinds_of_mutations(kind):
    result = smc_sampler(0, dist.Normal(0.0, 1.0), gaussian, KERNELS[kind], num_particles=500, num_moves=3)
    assert abs(result.log_evidence - (-0.5 * np.log(2.0) - 0.25)) < 5 * np.sqrt(result.log_evidence_variance)
    assert abs(result.particles.mean() - 0.5) < 0.2
    assert abs(result.particles.var() - 0.5) < 0.2


def test_batches_jit_and_vmap_give_the_same_run():
    whole, parts = run_once(), run_once(batch_size=130)
    np.testing.assert_allclose(whole.log_evidence, parts.log_evidence, rtol=1e-4)
    np.testing.assert_allclose(whole.temperatures, parts.temperatures, rtol=1e-3)

    batch = jax.jit(jax.vmap(lambda key: run_once(key)))(jax.random.split(jax.random.key(0), 2))
    assert batch.temperatures.shape == (2, 1_000)
    for i, key in enumerate(jax.random.split(jax.random.key(0), 2)):
        alone = run_once(key)
        np.testing.assert_allclose(batch.log_evidence[i], alone.log_evidence, rtol=1e-4)
        assert batch.num_steps[i] == alone.num_steps


def test_ibis_scores_every_prediction():
    result = ibis(0, PRIOR, log_likelihood, KERNEL, data=DATA, num_particles=5_000)
    assert result.is_resampled.any()
    totals = np.cumsum(result.log_evidence_increments)
    # after the counts alone, and after one of the wins
    for num_counts, num_wins in ((1, 0), (3, 0), (3, 1), (3, 2)):
        data = {"counts": DATA["counts"][:num_counts], "wins": DATA["wins"][:num_wins]}
        error = totals[num_counts + num_wins - 1] - exact_log_evidence(data)
        assert abs(error) < 5 * np.sqrt(result.log_evidence_variance)
    np.testing.assert_allclose(totals[-1], result.log_evidence, rtol=1e-5)
    assert np.all(np.isnan(result.acceptance_rates) == ~result.is_resampled)


# ---- what goes wrong ----


def broken(x, data):
    """exp(-x) above a bound, and something else below; one compiled program for all that may be wrong with it."""
    return jnp.where(x > data["bound"], -x, data["below"])


def run_broken(bound, below, sampler=smc_sampler, **options):
    data = {"bound": jnp.asarray(bound), "below": jnp.asarray(below)}
    return sampler(0, dist.Normal(0.0, 1.0), broken, KERNEL, data=data, num_particles=2_000, **options)


def error_of(result, bound):
    """Of the log evidence of exp(-x) on x > bound, in standard errors."""
    exact = 0.5 + scipy.stats.norm.logsf(bound + 1.0)
    return (result.log_evidence - exact) / np.sqrt(result.log_evidence_variance)


def test_a_likelihood_that_rules_out_most_of_the_prior():
    result = run_broken(2.0, -np.inf)  # 46 of 2000 draws are expected there
    assert result.temperatures[0] < 1e-30
    assert result.particles.min() > 2.0
    assert abs(error_of(result, 2.0)) < 5.0


@pytest.mark.parametrize("sampler", [smc_sampler, ibis])
def test_a_likelihood_of_zero_everywhere_is_an_error(sampler):
    with pytest.raises(errors.DegenerateWeightsError, match=r"weights vanished|all weights are zero") as caught:
        run_broken(100.0, -np.inf, sampler)
    quiet = run_broken(100.0, -np.inf, sampler, throw=False)
    for result in (caught.value.result, quiet):
        assert result.log_evidence == -np.inf
        assert np.all(np.isneginf(result.log_weights))
        assert np.isnan(result.log_evidence_variance)


def test_a_likelihood_that_is_nowhere_a_number_says_so():
    with pytest.raises(errors.DegenerateWeightsError, match="NaN or \\+inf at all 2000"):
        run_broken(100.0, np.nan)


@pytest.mark.parametrize("invalid", [np.nan, np.inf])
def test_half_of_the_likelihood_invalid_warns(invalid):
    with pytest.warns(errors.SamplingWarning, match="NaN"):
        result = run_broken(0.0, invalid)
    assert 900 < result.num_invalid < 1_100
    assert result.particles.min() > 0.0
    assert abs(error_of(result, 0.0)) < 5.0


def test_a_run_that_does_not_arrive_is_an_error():
    with pytest.raises(errors.DegenerateWeightsError, match="max_temperatures") as caught:
        run_once(max_temperatures=3)
    assert np.isnan(caught.value.result.log_evidence)
    assert caught.value.result.num_steps == 3


NORMAL = dist.Normal(0.0, 1.0)
BAD = {
    "num_particles": ((NORMAL, gaussian, KERNEL), {"num_particles": 1}),
    "mutation": ((NORMAL, gaussian, 3.0), {}),
    "prior": (("normal", gaussian, KERNEL), {}),
    "prior must be continuous": ((dist.Poisson(1.0), gaussian, KERNEL), {}),
    r"pass \(sample, target\)": ((Target(gaussian), gaussian, KERNEL), {}),
    "log_likelihood must be a function": ((NORMAL, None, KERNEL), {}),
    "log_likelihood must return": ((NORMAL, lambda x: jnp.ones((2, 2)) * x, KERNEL), {}),
    "ess_target must": ((NORMAL, gaussian, KERNEL), {"ess_target": 1.0}),
    "take more particles": ((NORMAL, gaussian, KERNEL), {"num_particles": 2}),
    "temperatures must rise": ((NORMAL, gaussian, KERNEL), {"temperatures": [0.5, 0.4, 1.0]}),
    "temperatures must rise strictly from above 0 to exactly 1": (
        (NORMAL, gaussian, KERNEL),
        {"temperatures": [0.2, 0.9]},
    ),
    "temperatures must be a number or an array": ((NORMAL, gaussian, KERNEL), {"temperatures": "few"}),
    "prior must be proper": ((dist.ImproperUniform(dist.constraints.real, (), ()), gaussian, KERNEL), {}),
    r"log_likelihood must be called as log_likelihood\(values\)": ((NORMAL, lambda x, data: -(x**2), KERNEL), {}),
    r"log_likelihood must be called as log_likelihood\(values, data\)": (
        (NORMAL, gaussian, KERNEL),
        {"data": np.ones(3)},
    ),
    "log_likelihood must return a scalar.*got None": ((NORMAL, lambda x: None, KERNEL), {}),
    "ess_target must lie in .*got half": ((NORMAL, gaussian, KERNEL), {"ess_target": "half"}),
    "num_moves must be a number or": ((NORMAL, gaussian, KERNEL), {"num_moves": "all"}),
    "num_moves must be a number for waste_free": ((NORMAL, gaussian, KERNEL), {"waste_free": True}),
    "multiple of num_moves": ((NORMAL, gaussian, KERNEL), {"waste_free": True, "num_moves": 6}),
    "tune must be": ((NORMAL, gaussian, KERNEL), {"tune": "diagonal"}),
    "tune='dense' needs a kernel with a metric, and MALA has none": ((NORMAL, gaussian, KERNEL), {"tune": "dense"}),
    "resampling must be one of": ((NORMAL, gaussian, KERNEL), {"resampling": "best"}),
    "batch_size": ((NORMAL, gaussian, KERNEL), {"batch_size": 0}),
    "key": ((NORMAL, gaussian, KERNEL), {"key": -1}),
}


@pytest.mark.parametrize("match", BAD)
@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_named(match):
    args, options = BAD[match]
    with pytest.raises(ValueError, match=match):
        smc_sampler(options.pop("key", 0), *args, **{"num_particles": 100, **options})


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda t: kernels.LMC(t, 0.1), "LMC"),
        (lambda t: kernels.Repeat(kernels.Splitting("BAOAB", t, 0.1), 2), "Splitting"),
        (lambda t: kernels.ItoChain(jax.grad(t.logdensity), lambda x: jnp.sqrt(2.0), step_size=0.1), "ItoChain"),
        (lambda t: kernels.Cycle([kernels.MALA(t, 0.1), kernels.KineticLangevin(t, 0.1)]), "KineticLangevin"),
    ],
)
def test_a_mutation_with_a_bias_is_told_of(build, name):
    with pytest.warns(
        errors.SamplingWarning, match=f"{name} as a mutation leaves its target invariant only up to a bias"
    ):
        smc_sampler(0, NORMAL, gaussian, build, num_particles=20, temperatures=(0.5, 1.0), **FIXED)
    adjusted = kernels.Metropolize(kernels.Repeat(kernels.LMC(Target(gaussian), 0.1), 2))
    smc_sampler(0, NORMAL, gaussian, adjusted, num_particles=20, temperatures=(0.5, 1.0), **FIXED)


VARIANCES = jnp.array([0.2, 1.0])
KINETIC = {
    "GHMC": lambda t: kernels.GHMC(t, 0.3),
    "Metropolize": lambda t: kernels.Metropolize(kernels.Splitting("BAOAB", t, 0.3)),
    "Precondition": lambda t: kernels.Precondition(kernels.GHMC(t, 0.5), jnp.sqrt(VARIANCES)),
    "Cycle": lambda t: kernels.Cycle([kernels.GHMC(t, 0.3), kernels.GHMC(t, 0.1)]),
    "Mixture": lambda t: kernels.Mixture([kernels.GHMC(t, 0.3), kernels.GHMC(t, 0.1)]),
    "Gibbs": lambda t: kernels.Gibbs({0: kernels.GHMC(t, 0.3), 1: kernels.GHMC(t, 0.3)}),
}


@pytest.mark.parametrize("name", some(["GHMC", "Cycle", "Gibbs"], KINETIC))
def test_kinetic_kernels_leave_a_population_as_it_is(name, monkeypatch):
    """Particles drawn from the target keep its law over two moves; if they were started at rest they would contract."""
    target = Target(lambda x: -0.5 * (x[0] ** 2 / VARIANCES[0] + x[1] ** 2 / VARIANCES[1]))
    start = [jnp.sqrt(v) * jax.random.normal(jax.random.key(i), (20_000,)) for i, v in enumerate(VARIANCES)]
    start = start if name == "Gibbs" else jnp.stack(start, axis=1)

    def p_value():
        mutation = as_mutation(
            KINETIC[name], target, 20_000, num_moves=2, max_moves=2, waste_free=False, tune=False,
            resampling="systematic", batch_size=None,
        )  # fmt: skip
        moved, _ = mutation._move(jax.random.key(5), target, start, None)
        moved = np.stack(moved, axis=1) if name == "Gibbs" else np.asarray(moved)
        return mean_p_value(moved**2, np.asarray(VARIANCES))

    assert p_value() > FALSE_ALARM
    monkeypatch.setattr(
        importlib.import_module("bayesinf.kernels.mutation"), "refreshed", lambda kernel, key, state: state
    )
    assert p_value() < FALSE_ALARM


def test_a_model_with_observed_sites_has_its_likelihood():
    target = Target.from_numpyro(numpyro_model, DATA["counts"], wins=DATA["wins"])
    with pytest.raises(ValueError, match="observes"):
        smc_sampler(0, target, log_likelihood, KERNEL, num_particles=100)


def test_a_prior_with_parameters_that_are_traced():
    @jax.jit
    def run(scale):
        prior = dist.Normal(jnp.zeros(2), scale).to_event(1)
        return smc_sampler(0, prior, gaussian, KERNEL, num_particles=20, temperatures=(0.5, 1.0), **FIXED).log_evidence

    assert run(jnp.array(1.0)) != run(jnp.array(3.0))
