"""Functional Tucker decomposition: its Markov processes against dense algebra, and Gibbs sampling by Geweke's test."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import block_diag
from scipy.special import gammainc
from scipy.stats import gamma, kstest

from bayesinf.conformance import FALSE_ALARM, contract, geweke_joint, mean_p_value
from bayesinf.models import gp
from bayesinf.models.gp.markov import draw_between, draw_path, moves_of
from bayesinf.models.gp.sde import as_sde, noise_trils

RNG = np.random.default_rng(0)
KERNELS = {
    "Matern32": gp.Matern32(0.7),
    "Matern52": 2.0 * gp.Matern52(0.7),
    "sum": gp.Matern12(1.0) + 0.5 * gp.Matern32(0.3),
}
GRID = np.array([-1.0, -0.2, -0.15, 0.4, 2.0])


def noise_of_matern(p, u):
    """Of unit variance, term by term: the response A(s) b is exp(-s) times polynomials of s."""
    drift = np.eye(p + 1, k=1)
    drift[-1] = [-math.comb(p + 1, j) for j in range(p + 1)]
    powers = [np.linalg.matrix_power(drift + np.eye(p + 1), k)[:, -1] / math.factorial(k) for k in range(p + 1)]
    scale = 2.0 ** (2 * p + 1) * math.factorial(p) ** 2 / math.factorial(2 * p)

    def integral(coefficients):
        terms = (c * math.factorial(k) * gammainc(k + 1, 2 * u) / 2 ** (k + 1) for k, c in enumerate(coefficients))
        return scale * sum(terms)

    return np.array([[integral(np.convolve(a, b)) for a in np.transpose(powers)] for b in np.transpose(powers)])


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(("p", "kind"), list(enumerate((gp.Matern12, gp.Matern32, gp.Matern52))))
def test_the_noise_of_a_move_is_accurate_however_short(p, kind, x64):
    """Relative to the variances of its own components, to the roundings of 14 squares, their sum and a reflection."""
    with jax.enable_x64(x64):
        gaps = jnp.asarray([1e-6, 1e-3, 0.1, 1.0, 2.2, 2.4, 4.0, 10.0, 80.0])
        trils = np.asarray(jax.jit(noise_trils)(kind(1.3), gaps), float)
        for tril, gap in zip(trils, np.asarray(gaps, float), strict=True):
            expected = noise_of_matern(p, gap * math.sqrt(2 * p + 1) / float(gaps.dtype.type(1.3)))
            scale = np.sqrt(np.diag(expected))
            errors = (tril @ tril.T - expected) / scale[:, None] / scale
            assert np.max(np.abs(errors)) < 3 * 14 * float(jnp.finfo(gaps.dtype).eps)


def dense_law(K, precision, information):
    """Mean and covariance of u, (m r), with independent rows of prior covariance K: (K^{-1} + B)^{-1} b."""
    rank = information.shape[1]
    prior, B = np.kron(K, np.eye(rank)), block_diag(*precision)
    covariance = np.linalg.solve(np.eye(len(prior)) + prior @ B, prior)
    return covariance @ information.ravel(), covariance


@functools.partial(jax.jit, static_argnums=2)
def law_of_path(kernel, gaps, order, precision, information):
    """Mean of the states, and the matrix that normals are multiplied with; draws are linear in these."""
    moves = moves_of(kernel, gaps)
    shape = (*information.shape, order)

    def draw(normals):
        return draw_path(moves, precision, information, normals.reshape(shape))

    zeros = jnp.zeros(math.prod(shape))
    return draw(zeros), jax.jacobian(draw)(zeros), moves.observation


def local_data():
    """At five points: two directions, one of them, none, both again, and a hundred times as precise."""
    a = RNG.normal(size=(4, 3, 2))
    a[1, 1:] = 0.0
    precision = np.einsum("inr,ins->irs", a, a)
    precision = np.insert(precision, 2, 0.0, axis=0) * np.array([1.0, 1.0, 1.0, 1.0, 1e4])[:, None, None]
    information = np.einsum("irs,is->ir", precision, RNG.normal(size=(5, 2)))
    return precision, information


@pytest.mark.parametrize("name", list(KERNELS))
def test_paths_have_the_law_of_dense_algebra(name):
    precision, information = local_data()
    with jax.enable_x64(True):
        kernel = jax.tree.map(lambda leaf: leaf.astype(float), KERNELS[name])
        gaps = jnp.asarray(np.concatenate([[np.inf], np.diff(GRID), [np.inf]]))
        order = as_sde(kernel, gaps[1:2], 1).observation.shape[0]
        mean, root, h = law_of_path(kernel, gaps, order, jnp.asarray(precision), jnp.asarray(information))
        expected_mean, expected = dense_law(np.asarray(kernel(GRID)), precision, information)
        np.testing.assert_allclose((mean @ h).ravel(), expected_mean, rtol=1e-9, atol=1e-10)
        root = jnp.einsum("mrdj,d->mrj", root, h).reshape(10, -1)
        np.testing.assert_allclose(root @ root.T, expected, atol=1e-10)


@pytest.mark.parametrize("name", list(KERNELS))
def test_predictions_from_a_path_are_those_of_gaussian_process_regression(name):
    """One function, observed itself: all new values, jointly, beyond the data, in gaps and on the grid."""
    new = np.array([-3.0, -1.5, -1.0, -0.3, -0.17, 0.4, 0.41, 2.5, 4.0])
    y, noise = RNG.normal(size=5), 0.01
    with jax.enable_x64(True):
        kernel = jax.tree.map(lambda leaf: leaf.astype(float), KERNELS[name])
        gaps = jnp.asarray(np.concatenate([[np.inf], np.diff(GRID), [np.inf]]))
        order = as_sde(kernel, gaps[1:2], 1).observation.shape[0]
        data = jnp.full((5, 1, 1), 1 / noise), jnp.asarray(y[:, None] / noise)
        mean, root, h = law_of_path(kernel, gaps, order, *data)

        # columns: the mean, what each normal of the path does, and what each normal of the new points does
        num_path, num_new = root.shape[-1], len(new) * order
        states = jnp.concatenate([mean[None], jnp.moveaxis(root, -1, 0), jnp.zeros((num_new, *mean.shape))])
        normals = jnp.zeros((len(new), len(states), 1, order))
        places = np.arange(num_new)
        normals = normals.at[places // order, 1 + num_path + places, 0, places % order].set(1.0)
        f = np.asarray(draw_between(kernel, GRID, states, new, normals) @ h)[:, :, 0]

        process = gp.GP(kernel, jnp.asarray(GRID), noise=noise, solver=gp.dense(jitter=0.0))
        np.testing.assert_allclose(f[:, 0], process.condition(y, new).mean, rtol=1e-9)
        cross = np.asarray(kernel(new, GRID))
        gain = np.linalg.solve(np.asarray(kernel(GRID)) + noise * np.eye(5), cross.T).T
        np.testing.assert_allclose(f[:, 1:] @ f[:, 1:].T, kernel(new) - gain @ cross.T, atol=1e-10)


def test_a_fine_grid_in_single_precision():
    """Steps of 1/10,000 of the length scale: the mean of the path stays that of double precision."""
    n, laws = 400, []
    y = np.sin(np.arange(n)) + np.arange(n) / n
    for x64 in (False, True):
        with jax.enable_x64(x64):
            moves = moves_of(gp.Matern52(1.0), jnp.asarray(np.r_[np.inf, np.full(n - 1, 1e-4), np.inf]))
            data = jnp.ones((n, 1, 1)), jnp.asarray(y[:, None])
            laws.append(np.asarray(draw_path(moves, *data, jnp.zeros((n, 1, 3))), float)[:, 0, 0])
    # a sum of n terms of order one, each known to sqrt(n) roundings, relative to their precision n
    assert np.max(np.abs(laws[0] - laws[1])) < math.sqrt(n) * float(jnp.finfo(jnp.float32).eps)


INDICES = np.array([[0.0, 0.5], [0.3, 0.5], [0.3, 0.9], [1.0, 0.1], [0.0, 0.9], [0.3, 0.5], [1.0, 0.5]])
PRIOR = gp.FunctionalTucker([gp.Matern12(0.5), 0.7 * gp.Matern32(0.4)], (2, 1), 1.5, 3.0, 2.0)


def test_gibbs_sampling_leaves_the_joint_law_alone():
    """Entries at repeated indices, one of them missing; parameters, factors and data with their products."""
    blank = gp.TuckerGibbs(PRIOR, INDICES, np.full(7, np.nan))

    def simulate(key, position):
        noise = jnp.sqrt(position["noise"]) * jax.random.normal(key, (7,))
        return blank.evaluate(position) + noise

    def transition(key, position, y):
        gibbs = gp.TuckerGibbs(PRIOR, INDICES, y.at[3].set(jnp.nan))
        return gibbs.step(key, gibbs.init(position))[0].position

    report = geweke_joint(0, blank.sample_prior, simulate, transition, num_chains=20_000, num_rounds=3)
    report.raise_if_rejected()


def whiten(x, precision, information):
    """Standard normal, if x has the Gaussian law of this precision and information; a batch of each."""
    tril = np.linalg.cholesky(precision)
    return np.einsum("sji,sj->si", tril, x - np.linalg.solve(precision, information[..., None])[..., 0])


def test_each_block_has_the_law_of_dense_algebra_given_the_others():
    """4,000 steps from one position: all draws whitened by the law given what was drawn before, and what was not."""
    num, y = 4_000, RNG.normal(size=7)
    prior = gp.FunctionalTucker([gp.Matern12(0.5), 0.7 * gp.Matern12(0.4)], (2, 2), 1.5, 3.0, 0.05)
    gibbs = gp.TuckerGibbs(prior, INDICES, np.where(np.arange(7) == 4, np.nan, y))
    state = gibbs.init(gibbs.sample_prior(3) | {"noise": jnp.asarray(0.3, gibbs.y.dtype)})

    @jax.jit
    def steps(keys):
        return jax.lax.map(lambda key: gibbs.step(key, state)[0].position, keys)

    ends = steps(jax.random.split(jax.random.key(0), num))
    old, new = ({name: np.asarray(leaf, float) for name, leaf in at.items()} for at in (state.position, ends))
    is_seen, noise = np.arange(7) != 4, float(old["noise"])
    distinct = [np.unique(column, return_inverse=True) for column in INDICES.T]
    at = [np.eye(len(grid))[row] for grid, row in distinct]
    first, second = (np.einsum("nm,smrd->snr", at[k], new[f"factor_{k}"]) for k in (0, 1))
    before = np.broadcast_to(at[1] @ old["factor_1"][..., 0], (num, 7, 2))
    designs = {
        "factor_0": np.einsum("nm,ab,snb->snma", at[0], old["core"], before),
        "factor_1": np.einsum("nm,ab,sna->snmb", at[1], old["core"], first),
        "core": np.einsum("sna,snb->snab", first, second),
    }
    priors = {"core": 1.5 * np.eye(4)}
    for k, (grid, _) in enumerate(distinct):
        priors[f"factor_{k}"] = np.kron(np.asarray(prior.kernels[k](grid), float), np.eye(2))
    for name, design in designs.items():
        X = design.reshape(num, 7, -1)[:, is_seen]
        precision = np.linalg.inv(priors[name]) + X.mT @ X / noise
        white = whiten(new[name].reshape(num, -1), precision, np.einsum("snj,n->sj", X, y[is_seen]) / noise)
        assert mean_p_value(white, 0.0) > FALSE_ALARM, name
        assert mean_p_value(white[:, :, None] * white[:, None, :], np.eye(white.shape[1])) > FALSE_ALARM, name
    residuals = (y - np.einsum("snab,sab->sn", designs["core"], new["core"]))[:, is_seen]
    precision = (0.05 + 0.5 * np.sum(residuals**2, axis=1)) / new["noise"]
    assert kstest(precision, gamma(3.0 + 6 / 2).cdf).pvalue > FALSE_ALARM


def test_predictions_at_the_data_are_the_function_there():
    """Three modes, indices in another order and repeated; with noise, of its variance."""
    indices = np.stack([RNG.integers(0, 4, 12), RNG.uniform(size=12), RNG.integers(0, 2, 12)], axis=1)
    model = gp.FunctionalTucker([gp.Matern32(2.0), gp.Matern12(0.3), gp.Matern12(5.0)], (2, 2, 3))
    gibbs = gp.TuckerGibbs(model, indices, np.zeros(12))
    like = jax.eval_shape(gibbs.sample_prior, jax.random.key(0))
    shapes = {name: (6, *leaf.shape) for name, leaf in like.items()}
    samples = {name: jnp.asarray(RNG.normal(size=shape) ** 2, gibbs.y.dtype) for name, shape in shapes.items()}
    functions = gibbs.functions(samples)
    rows = [np.unique(column, return_inverse=True)[1] for column in indices.T]
    factors = [samples["core"], *[values[:, row] for values, row in zip(functions, rows, strict=True)]]
    expected = jnp.einsum("sabc,sna,snb,snc->sn", *factors)
    size = jnp.einsum("sabc,sna,snb,snc->sn", *map(jnp.abs, factors))  # 12 terms, of three products each, both ways
    order = np.r_[RNG.permutation(12), 3, 3]
    rounding = 2 * 15 * float(jnp.finfo(size.dtype).eps) * float(jnp.max(size))
    np.testing.assert_allclose(
        gibbs.evaluate({name: leaf[4] for name, leaf in samples.items()}), expected[4], atol=rounding
    )
    many = {name: jnp.stack([leaf] * 800) for name, leaf in samples.items()}
    found = gibbs.predict(1, many, indices[order])
    np.testing.assert_allclose(found, jnp.stack([expected[:, order]] * 800), atol=rounding)
    noise = gibbs.predict(2, many, indices[order], is_noisy=True) - found
    assert mean_p_value(noise**2, samples["noise"][:, None]) > FALSE_ALARM


def test_the_kernel_keeps_its_contract():
    gibbs = gp.TuckerGibbs(gp.FunctionalTucker([gp.Matern12()], (1,)), INDICES[:, :1], np.zeros(7))
    contract(gibbs, gibbs.sample_prior(0))


def tucker(kernels=PRIOR.kernels, ranks=(2, 1), **rest):
    return gp.FunctionalTucker(kernels, ranks, **rest)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: tucker(gp.Matern12()), "kernels must be a list"),
        (lambda: tucker((), ()), "kernels must hold one"),
        (lambda: tucker(ranks=(2,)), "ranks must be 2 numbers"),
        (lambda: tucker(ranks=(2, 0)), r"ranks\[1\] must be at least 1"),
        (lambda: tucker((gp.RBF(), gp.Matern12())), r"kernels\[0\]: kernel must be made of Matern12"),
        (lambda: tucker((gp.Matern12(), gp.Matern12() + 1.0)), r"kernels\[1\]: kernel must be made of Matern12"),
        (lambda: tucker((gp.Matern12(), gp.Matern12(jnp.ones((2, 1))))), "lengthscale must be one number"),
        (lambda: tucker(core_variance=0.0), "core_variance must be finite and positive"),
        (lambda: tucker(noise_shape=-1.0), "noise_shape must be finite and positive"),
        (lambda: tucker(noise_rate=jnp.ones(2)), "noise_rate must be a scalar"),
        (lambda: gp.TuckerGibbs(gp.Matern12(), INDICES, np.ones(7)), "model must be a FunctionalTucker"),
        (lambda: gp.TuckerGibbs(PRIOR, INDICES[:, :1], np.ones(7)), r"indices must have shape \(n, 2\)"),
        (lambda: gp.TuckerGibbs(PRIOR, np.full((3, 2), np.nan), np.ones(3)), "indices must be finite"),
        (lambda: gp.TuckerGibbs(PRIOR, INDICES, np.ones(3)), r"y must have shape \(7,\)"),
        (lambda: gp.TuckerGibbs(PRIOR, INDICES, np.full(7, np.inf)), "y must be finite"),
        (lambda: jax.jit(lambda i: gp.TuckerGibbs(PRIOR, i, np.ones(7)).y)(INDICES), "indices must be known"),
        (lambda: gp.TuckerGibbs(PRIOR, INDICES, np.ones(7)).initial(0, 0), "num_chains must be at least 1"),
        (lambda: gp.TuckerGibbs(PRIOR, INDICES, np.ones(7)).init({}), "position must have shapes"),
    ],
)
def test_bad_arguments_are_named(build, match):
    with pytest.raises(ValueError, match=match):
        build()
