"""Targets: evaluation, NumPyro models, starting points."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pandas
import pytest
from numpyro import handlers
from numpyro.infer import MCMC, NUTS
from numpyro.infer.util import log_density

import bayesinf as bi
from bayesinf.conformance import FALSE_ALARM
from bayesinf.errors import InitializationError

Y = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(sigma, y=None):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * z)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.fixture(scope="module")
def schools():
    return bi.Target.from_numpyro(eight_schools, SIGMA, y=Y)


def test_data_are_arguments():
    target = bi.Target(lambda x, data: -0.5 * jnp.sum((x - data["y"]) ** 2), {"y": jnp.array([1.0, 2.0])})
    evaluation = target.evaluate(jnp.zeros(2), order=1)
    assert float(evaluation.logdensity) == -2.5
    assert np.array_equal(evaluation.grad, [1.0, 2.0])
    assert target.evaluate(jnp.zeros(2)).grad is None
    assert jax.tree.leaves(target)[0].shape == (2,)


def test_a_function_is_a_target_to_a_kernel():
    kernel = bi.kernels.MALA(lambda x: -0.5 * jnp.sum(x**2), step_size=0.1)
    assert isinstance(kernel.target, bi.Target)
    with pytest.raises(ValueError, match="target must be a Target or a function of the position, got int"):
        bi.kernels.MALA(3, step_size=0.1)


def test_logdensity_of_a_model_has_the_jacobian(schools):
    position = {"mu": jnp.array(1.0), "tau": jnp.array(0.3), "z": jnp.linspace(-1.0, 1.0, 8)}
    tau = float(np.exp(0.3))
    theta = 1.0 + tau * np.linspace(-1.0, 1.0, 8)
    expected = (
        dist.Normal(0.0, 5.0).log_prob(1.0)
        + dist.HalfCauchy(5.0).log_prob(tau)
        + 0.3  # log |d tau / d log tau|
        + dist.Normal(0.0, 1.0).log_prob(jnp.linspace(-1.0, 1.0, 8)).sum()
        + dist.Normal(theta, SIGMA).log_prob(Y).sum()
    )
    assert np.allclose(schools.logdensity(position), expected, rtol=1e-5)


def test_constrain_and_back(schools):
    position = schools.init(0, 1)
    one = jax.tree.map(lambda leaf: leaf[0], position)
    values = schools.constrain(one)
    assert set(values) == {"mu", "tau", "z", "theta"}
    assert np.allclose(values["theta"], values["mu"] + values["tau"] * values["z"])
    back = schools.unconstrain(values)
    assert all(np.allclose(back[name], one[name], atol=1e-5) for name in one)


def test_bounded_and_dependent_supports():
    def model():
        low = numpyro.sample("low", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Uniform(low, low + 2.0))
        numpyro.sample("p", dist.Dirichlet(jnp.ones(3)))

    target = bi.Target.from_numpyro(model)
    position = target.init(3, 5)
    values = jax.vmap(target.constrain)(position)
    assert np.all(values["x"] > values["low"])
    assert np.all(values["x"] < values["low"] + 2.0)
    assert position["p"].shape == (5, 2)
    assert np.allclose(values["p"].sum(axis=1), 1.0, atol=1e-5)


def test_labels_come_from_plates(schools):
    assert schools.dims == {"z": ["school"], "theta": ["school"], "y": ["school"]}
    assert schools.coords == {"school": list(range(8))}
    named = schools.with_labels(coords={"school": list("ABCDEFGH")})
    assert named.coords["school"] == list("ABCDEFGH")
    assert named.dims == schools.dims


def test_new_data_hash_alike(schools):
    """What jit sees: the static part is equal, the data are leaves."""
    other = bi.Target.from_numpyro(eight_schools, SIGMA + 1.0, y=Y)
    assert jax.tree.structure(schools) == jax.tree.structure(other)
    assert hash(jax.tree.structure(schools)) == hash(jax.tree.structure(other))


def test_init_is_finite_and_reproducible(schools):
    position = schools.init(jax.random.key(1), 4)
    again = schools.init(1, 4)
    assert all(np.array_equal(position[name], again[name]) for name in position)
    assert np.all(np.isfinite(jax.vmap(schools.logdensity)(position)))
    assert np.all(np.abs(position["z"]) <= 2.0)


def test_init_redraws_what_is_not_finite():
    target = bi.Target(lambda x: jnp.where(x[0] > 1.5, -x[0], -jnp.inf))
    assert np.all(target.init(0, 20, template=jnp.zeros(1)) > 1.5)


def test_init_names_the_site_that_fails():
    def model(y):
        rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
        numpyro.sample("good", dist.Normal(rate, 1.0), obs=jnp.ones(2))
        numpyro.sample("counts", dist.Normal(rate, 1.0), obs=y)

    target = bi.Target.from_numpyro(model, jnp.array([1.0, jnp.nan]))
    with pytest.raises(InitializationError, match=r"100 tries.*not finite: 'counts' \("):
        target.init(0, 2)


def test_init_names_the_leaf_whose_gradient_fails():
    target = bi.Target(lambda x: -jnp.abs(x["a"]) + 0.0 * jnp.sqrt(x["b"] * 0.0))
    with pytest.raises(InitializationError, match=r"gradient is not, at position\['b'\]"):
        target.init(0, 1, template={"a": jnp.zeros(()), "b": jnp.zeros(())}, max_tries=3)


@pytest.mark.usefixtures("unchecked")
class TestBadInput:
    def test_discrete_sites_are_named(self):
        def model():
            numpyro.sample("kind", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(0.0, 1.0))

        with pytest.raises(ValueError, match=r"\['kind'\] are discrete"):
            bi.Target.from_numpyro(model)

    def test_nothing_to_infer(self):
        with pytest.raises(ValueError, match="no latent site"):
            bi.Target.from_numpyro(lambda: numpyro.sample("y", dist.Normal(0.0, 1.0), obs=1.0))

    def test_not_a_function(self):
        with pytest.raises(ValueError, match="logdensity must be a function"):
            bi.Target(3.0)
        with pytest.raises(ValueError, match="model must be a function"):
            bi.Target.from_numpyro(3.0)

    def test_not_a_scalar(self):
        with pytest.raises(ValueError, match=r"must return a scalar, got shape \(2,\)"):
            bi.Target(lambda x: -(x**2)).evaluate(jnp.zeros(2))

    def test_not_floating(self):
        with pytest.raises(ValueError, match="must return a floating-point number, got int32"):
            bi.Target(lambda x: jnp.asarray(0, jnp.int32)).evaluate(jnp.zeros(2), order=1)

    def test_nothing_returned(self):
        with pytest.raises(ValueError, match=r"must return a number, got NoneType; is a return missing\?"):
            bi.Target(lambda x: None).evaluate(jnp.zeros(2), order=1)

    def test_order(self):
        with pytest.raises(ValueError, match="order must be 0 or 1, got 2"):
            bi.Target(lambda x: -jnp.sum(x**2)).evaluate(jnp.zeros(2), order=2)

    @pytest.mark.parametrize(
        ("function", "data", "message"),
        [
            (lambda: 0.0, None, r"called as logdensity\(position\), but it has \(\)"),
            (lambda x, y: 0.0, None, r"called as logdensity\(position\), but it has \(x, y\)"),
            (lambda x: 0.0, jnp.zeros(2), r"called as logdensity\(position, data\), but it has \(x\)"),
        ],
    )
    def test_arguments_of_the_function(self, function, data, message):
        with pytest.raises(ValueError, match=message):
            bi.Target(function, data)

    def test_arguments_of_a_model(self):
        def model(y):
            numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=y)

        table = pandas.DataFrame({"y": [1.0, 2.0]})
        with pytest.raises(ValueError, match=r"got a DataFrame; pass its columns as arrays"):
            bi.Target.from_numpyro(model, table)
        with pytest.raises(ValueError, match="must be arrays or hashable, got set"):
            bi.Target.from_numpyro(model, {1.0, 2.0})
        with pytest.raises(ValueError, match="must be a number or an array of numbers"):
            bi.Target.from_numpyro(model, np.array(["a"]))
        of_column = bi.Target.from_numpyro(model, table["y"])
        of_array = bi.Target.from_numpyro(model, jnp.array([1.0, 2.0]))
        position = {"x": jnp.asarray(0.3)}
        assert of_column.logdensity(position) == of_array.logdensity(position)

    def test_data_are_not_numbers(self):
        with pytest.raises(ValueError, match=r"data\['a'\] must be an array of numbers"):
            bi.Target(lambda x, data: 0.0, {"a": np.array(["x"])})

    def test_template_is_needed(self):
        with pytest.raises(ValueError, match="template is needed"):
            bi.Target(lambda x: -(x**2)).init(0, 2)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"num_chains": 0}, "num_chains"), ({"radius": -1.0}, "radius"), ({"max_tries": 0}, "max_tries")],
    )
    def test_counts(self, schools, options, message):
        with pytest.raises(ValueError, match=message):
            schools.init(0, **options)


def test_same_posterior_as_numpyros_own_nuts(schools):
    """Eight schools, non-centred: means of ours and of NumPyro's NUTS agree within their Monte Carlo errors."""
    import arviz_stats
    import scipy.stats

    theirs = MCMC(NUTS(eight_schools), num_warmup=500, num_samples=1_500, num_chains=2, progress_bar=False,
                  chain_method="vectorized")  # fmt: skip
    theirs.run(jax.random.key(0), SIGMA, y=Y)
    reference = {name: np.asarray(value) for name, value in theirs.get_samples(group_by_chain=True).items()}

    kernel = bi.kernels.MALA(schools, step_size=0.3)
    draws = bi.sample(1, kernel, schools.init(2, 8), num_samples=3_000, num_warmup=1_000, thin=20, progress=False)

    p_values = []
    for name in ("mu", "tau", "theta", "z"):
        for power in (1, 2):
            ours, other = draws[name] ** power, reference[name] ** power
            for i in np.ndindex(ours.shape[2:]):
                one, two = ours[(..., *i)], other[(..., *i)]
                error = np.hypot(arviz_stats.mcse(one), arviz_stats.mcse(two))
                p_values.append(2 * scipy.stats.norm.sf(abs(one.mean() - two.mean()) / error))
    assert min(p_values) * len(p_values) > FALSE_ALARM


def test_improper_priors_and_factors():
    def model(y):
        x = numpyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
        numpyro.factor("penalty", -x)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    target = bi.Target.from_numpyro(model, jnp.array([1.0, 2.0]))
    x = jnp.exp(0.3)
    expected = -x - 0.5 * (1 - x) ** 2 - 0.5 * (2 - x) ** 2 - jnp.log(2 * jnp.pi) + 0.3
    np.testing.assert_allclose(target.logdensity({"x": jnp.asarray(0.3)}), expected, rtol=1e-6)
    draws = bi.sample(0, bi.kernels.MALA(target, 0.1), target.init(1, 2), num_samples=5, progress=False)
    tree = draws.to_arviz()
    assert list(tree["observed_data"].data_vars) == list(tree["log_likelihood"].data_vars) == ["y"]


def test_observed_sites_have_names_under_jit():
    """A factor's value is made by the model, and is traced although the data are not."""

    def model(y):
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("penalty", -x)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    target = bi.Target.from_numpyro(model, jnp.array([1.0, 2.0]))
    seen = []
    jax.jit(lambda: seen.append(sorted(target.model.observed(target.data))))()
    assert seen == [["penalty", "y"]]


def test_log_likelihood_is_numpyros(schools):
    one = jax.tree.map(lambda leaf: leaf[0], schools.init(0, 1))
    pointwise = schools.model.log_likelihood(schools.constrain(one), schools.data)["y"]
    sites = handlers.substitute(eight_schools, data={n: v for n, v in schools.constrain(one).items() if n != "theta"})
    _, trace = log_density(sites, (SIGMA,), {"y": Y}, {})
    assert np.allclose(pointwise, trace["y"]["fn"].log_prob(Y), rtol=1e-5)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("position", "match"),
    [
        ({"s": jnp.zeros(())}, "'w' is missing"),
        ({"s": jnp.zeros(()), "w": jnp.zeros(2), "z": jnp.zeros(())}, "'z' is no latent site"),
        ({"s": jnp.zeros((2, 3)), "w": jnp.zeros(2)}, r"'s' has shape \(2, 3\) instead of \(\)"),
        (jnp.zeros(3), "must be a dict of the sites"),
    ],
)
def test_positions_of_another_structure_are_refused(position, match):
    def model(y):
        scale = numpyro.sample("s", dist.HalfNormal(1.0))
        w = numpyro.sample("w", dist.Normal(0.0, scale).expand([2]).to_event(1))
        numpyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)

    target = bi.Target.from_numpyro(model, jnp.ones(3))
    for function in (target.logdensity, target.constrain, bi.kernels.MALA(target, 0.1).init):
        with pytest.raises(ValueError, match=match):
            function(position)


def grouped(group, y):
    with numpyro.plate("groups", int(group.max()) + 1):
        effect = numpyro.sample("effect", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(effect[group], 1.0), obs=y)


@pytest.mark.parametrize("as_array", [np.array, jnp.array])
def test_a_model_may_size_its_plates_by_the_data(as_array):
    y = as_array([0.5, 1.0, -1.0, 2.0])
    target = bi.Target.from_numpyro(grouped, as_array([0, 1, 1, 2]), y)
    position = {"effect": jnp.array([0.3, -0.2, 1.0])}
    expected, _ = log_density(grouped, (np.array([0, 1, 1, 2]), np.asarray(y)), {}, position)
    np.testing.assert_allclose(jax.jit(lambda t, x: t.logdensity(x))(target, position), expected, rtol=1e-6)
    assert [leaf.shape for leaf in jax.tree.leaves(target.data)] == [(4,)]  # y still travels
    other = bi.Target.from_numpyro(grouped, as_array([0, 1, 1, 0]), y)
    assert other.init(0)["effect"].shape == (4, 2)
    same = bi.Target.from_numpyro(grouped, as_array([0, 1, 1, 2]), y + 1)
    assert jax.tree.structure(same) == jax.tree.structure(target) != jax.tree.structure(other)


def test_a_model_may_look_at_all_of_its_data():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        law = dist.Normal if y.max() < 10 else dist.Cauchy
        numpyro.sample("y", law(0.0, scale), obs=y)

    for y, law in ((np.ones(3), dist.Normal), (np.full(3, 20.0), dist.Cauchy)):
        target = bi.Target.from_numpyro(model, y)
        found = target.model.log_likelihood({"scale": jnp.array(2.0)}, target.data)["y"]
        np.testing.assert_allclose(found, law(0.0, 2.0).log_prob(y), rtol=1e-6)


def test_a_model_that_looks_at_its_parameters_is_refused():
    def model():
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("fold", -x if x > 0 else x)

    with pytest.raises(ValueError, match="model must be traceable"):
        bi.Target.from_numpyro(model)
