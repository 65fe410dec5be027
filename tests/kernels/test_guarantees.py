"""The truth lies under the bound, all along the run; bounds with a wrong constant are found out by the same checks."""

import closed_forms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import solve_continuous_lyapunov

from bayesinf import kernels
from bayesinf.kernels import guarantees

KERNELS = (
    kernels.LMC,
    kernels.RandomizedMidpoint,
    kernels.KineticLangevin,
    kernels.RandomizedMidpointKinetic,
)
NAMES = [cls.__name__ for cls in KERNELS]


def nowhere(x):
    return -0.5 * jnp.sum(x**2)


def check_the_truth_is_under_the_bound(cls, dim, condition, eps):
    """W2 on a Gaussian, or its lower bound, from the mode and from far away, against the bound at several times."""
    m, M = 0.3, 0.3 * condition
    spectrum = np.geomspace(m, M, dim)
    found = kernels.guarantee(cls, m=m, M=M, dim=dim, eps=eps)
    assert found.bound <= eps * np.sqrt(dim / m)
    tuned = found.build(nowhere)
    limit = largest_step_size(tuned, m, M, dim)
    for kernel in (tuned, tuned.with_step_size(0.5 * limit), tuned.with_step_size(0.98 * limit)):
        for start in (0.0, 30 / np.sqrt(spectrum)):
            distance = np.sqrt(np.sum(np.broadcast_to(start, dim) ** 2) + np.sum(1 / spectrum))
            for num_steps in (0, 1, 20, found.num_steps // 2, found.num_steps):
                truth = kernels.gaussian_error(kernel, spectrum, num_steps=num_steps, start=start).w2
                bound = kernels.wasserstein_bound(
                    kernel, m=m, M=M, dim=dim, num_steps=num_steps, initial_distance=distance
                )
                assert truth <= bound * (1 + 1e-9), (cls.__name__, dim, condition, eps, num_steps, truth / bound)


def largest_step_size(kernel, m, M, dim):
    """What the refusal of a step size that is too large advises."""
    with pytest.raises(ValueError, match="take step_size <= ") as refused:
        kernels.wasserstein_bound(kernel.with_step_size(100 / m), m=m, M=M, dim=dim, num_steps=1)
    return float(str(refused.value).split("<= ")[-1])


@pytest.mark.parametrize("dim", [2, 30, 1000])
@pytest.mark.parametrize("cls", KERNELS, ids=NAMES)
def test_the_truth_is_under_the_bound(cls, dim):
    for condition in (1.0, 10.0, 1e4):
        for eps in (0.5, 0.05):
            check_the_truth_is_under_the_bound(cls, dim, condition, eps)


@pytest.mark.parametrize("cls", KERNELS, ids=NAMES)
def test_a_contraction_too_fast_is_found_out(cls, monkeypatch):
    theorem = guarantees._THEOREMS[cls]

    def wrong(*args):
        return [r._replace(slope=tuple(a**2.5 for a in r.slope)) for r in theorem(*args)]

    monkeypatch.setitem(guarantees._THEOREMS, cls, wrong)
    with pytest.raises(AssertionError, match=cls.__name__):
        check_the_truth_is_under_the_bound(cls, 30, 10.0, 0.05)


def test_a_bias_too_small_is_found_out(monkeypatch):
    theorem = guarantees._lmc

    def wrong(*args):
        return [r._replace(offset=tuple(0.3 * b for b in r.offset)) for r in theorem(*args)]

    monkeypatch.setitem(guarantees._THEOREMS, kernels.LMC, wrong)
    with pytest.raises(AssertionError, match="LMC"):
        check_the_truth_is_under_the_bound(kernels.LMC, 2, 1.0, 0.5)


# One step, by coupling: kernel and diffusion start together from pi and are driven by one Brownian path. Their distance
# is what the proofs bound by |offset|, so this is sharp where the Wasserstein distance of whole runs is not.


def coupled_distance(cls, lam, h, g=None, u=None, displaced=0.0):
    """The L2 distance after a step on N(0, 1/lam), in the norm of the theorem; the kernel starts `displaced` off pi."""
    if g is None:
        G, sigma, norm, law = np.array([[-lam]]), np.array([np.sqrt(2)]), np.eye(1), np.array([[1 / lam]])
    else:
        G, sigma = np.array([[0.0, 1.0], [-u * lam, -g]]), np.array([0.0, np.sqrt(2 * g * u)])
        norm, law = np.array([[1.0, 0.0], [1.0, 2 / g]]), np.diag([1 / lam, u])
    np.testing.assert_allclose(solve_continuous_lyapunov(G, -np.outer(sigma, sigma)), law, atol=1e-9)
    values, vectors = np.linalg.eig(G)
    inverse = np.linalg.inv(vectors)

    def flow(t):
        return ((vectors * np.exp(values * t)) @ inverse).real

    scheme = {
        kernels.LMC: lambda: closed_forms.lmc(h, lam),
        kernels.RandomizedMidpoint: lambda: closed_forms.randomized_midpoint(h, lam),
        kernels.KineticLangevin: lambda: closed_forms.kinetic(h, lam, g, u),
        kernels.RandomizedMidpointKinetic: lambda: closed_forms.randomized_midpoint_kinetic(h, lam, g, u),
    }[cls]()
    times = closed_forms.TIMES if len(scheme) > 1 else [1.0]

    def free(t):
        """What the noise of a moment is worth t later, without the force."""
        return np.array([1.0]) if g is None else np.array([-np.expm1(-g * t) / g, np.exp(-g * t)])

    def response(s, U):
        """How the kernel's step answers the noise at s."""
        if len(scheme) == 1 or s > U * h:
            return free(h - s)
        if g is None:
            return free(h - s) - h * lam
        return free(h - s) - u * h * lam * free(U * h - s)[0] * free((1 - U) * h)

    total = 0.0
    for (weight, A, Q), U in zip(scheme, times, strict=True):
        pieces = [(0.0, U * h), (U * h, h)]
        nodes = [(a + (b - a) * t, (b - a) * w) for a, b in pieces for t, w in zip(*_quadrature(), strict=True)]
        answers = [(w, response(s, U) * sigma[-1]) for s, w in nodes]
        np.testing.assert_allclose(sum(w * np.outer(k, k) for w, k in answers), Q, rtol=1e-6, atol=1e-9)
        drift = norm @ (A - flow(h))
        total += weight * (np.trace(drift @ law @ drift.T) + np.sum((norm @ A[:, 0] * displaced) ** 2))
        for (s, w), (_, k) in zip(nodes, answers, strict=True):
            total += weight * w * np.sum((norm @ (k - flow(h - s) @ sigma)) ** 2)
    return np.sqrt(total)


def _quadrature():
    nodes, weights = np.polynomial.legendre.leggauss(12)
    return 0.5 * (nodes + 1), 0.5 * weights


def check_one_step(cls, condition, scaled):
    m, M = 0.5, 0.5 * condition
    u = 0.7
    g = np.sqrt(u * (m + M))
    parameters = () if cls in (kernels.LMC, kernels.RandomizedMidpoint) else (g, u)
    ratios = []
    for h in np.array(scaled) / (M if not parameters else g):
        recursion = guarantees._THEOREMS[cls](guarantees.Problem(m, M, 1, 0.0), h, *parameters)[0]
        for lam in (m, M):
            for displaced in (0.0, 1.0):
                # displaced from pi by a fixed vector, in x alone: |x|^2 + |x|^2 in the kinetic norm
                start = displaced * (np.sqrt(2) if parameters else 1.0)
                bound = np.linalg.norm(np.array(recursion.slope) * start + np.array(recursion.offset))
                ratio = coupled_distance(cls, lam, h, *parameters, displaced=displaced) / bound
                assert ratio <= 1, (cls.__name__, h, lam, displaced, ratio)
                ratios.append((displaced, ratio))
    return max(ratio for displaced, ratio in ratios if displaced == 0)


@pytest.mark.parametrize("cls", KERNELS, ids=NAMES)
def test_one_step_stays_within_the_recursion(cls):
    sharpest = max(check_one_step(cls, condition, (0.02, 0.2, 0.6)) for condition in (1.0, 50.0))
    assert sharpest > 0.25


@pytest.mark.parametrize("cls", KERNELS, ids=NAMES)
def test_an_offset_too_small_is_found_out(cls, monkeypatch):
    theorem = guarantees._THEOREMS[cls]

    def wrong(*args):
        return [r._replace(offset=tuple(0.25 * b for b in r.offset)) for r in theorem(*args)]

    monkeypatch.setitem(guarantees._THEOREMS, cls, wrong)
    with pytest.raises(AssertionError, match=cls.__name__):
        check_one_step(cls, 1.0, (0.02, 0.2, 0.6))


def test_the_constant_of_dalalyan_and_karagulyan_is_recovered():
    m, M, p = 0.5, 7.0, 3
    h = 2 / (m + M)
    coupled = guarantees._lmc(guarantees.Problem(m, M, p, 1.0), h)[0]
    assert coupled.contraction == pytest.approx(1 - m * h)
    assert coupled.bias <= 1.65 * M / m * np.sqrt(h * p)
    at_the_limit = guarantees._lmc(guarantees.Problem(m, M, p, 1.0), 2 / M * (1 - 1e-12))[0]
    assert at_the_limit.offset[0] / (M * h**0 * (2 / M) ** 1.5 * np.sqrt(p)) == pytest.approx(7 * np.sqrt(2) / 6)


def test_the_guarantee_is_what_it_says():
    for cls in KERNELS:
        found = kernels.guarantee(cls.__name__, m=1.0, M=20.0, dim=10, eps=0.1, initial_distance=9.0)
        kernel = found.build(nowhere)
        assert type(kernel) is cls is found.kernel
        assert found.provenance == "derived"
        assert found.num_gradients == found.num_steps * int(
            kernel.step(jax.random.key(0), kernel.init(jnp.zeros(10)))[1].num_gradients
        )

        def bound(num_steps, kernel=kernel):
            return kernels.wasserstein_bound(kernel, m=1.0, M=20.0, dim=10, num_steps=num_steps, initial_distance=9.0)

        tolerance = 0.1 * np.sqrt(10)
        assert found.bias_term < found.bound <= tolerance
        assert bound(found.num_steps) == pytest.approx(found.bound, rel=1e-4)  # the kernel's step size is float32
        assert bound(found.num_steps - 2) > tolerance * (1 - 1e-4)
        assert bound(10**12) == pytest.approx(found.bias_term, rel=1e-3)
        # no other step size is better by much
        for factor in (0.8, 1.25):
            other = guarantees._THEOREMS[cls](
                guarantees.Problem(1.0, 20.0, 10, 9.0),
                found.step_size * factor,
                *(() if found.friction is None else (found.friction, found.inverse_mass)),
            )
            assert min(r.steps_to(tolerance) for r in other) >= found.num_steps - 1


def test_units_do_not_matter():
    for cls in KERNELS:
        one = kernels.guarantee(cls, m=1.0, M=30.0, dim=7, eps=0.2)
        other = kernels.guarantee(cls, m=100.0, M=3000.0, dim=7, eps=0.2, inverse_mass=5.0)
        assert abs(one.num_steps - other.num_steps) <= 1
        assert other.bound == pytest.approx(one.bound / 10, rel=1e-2)


def test_where_no_step_is_needed_the_largest_step_size_is_taken():
    for cls in KERNELS:
        found = kernels.guarantee(cls, m=1.0, M=5.0, dim=3, eps=1.7)
        assert found.num_steps == 0
        assert found.bound <= 1.7 * np.sqrt(3)
        assert found.step_size > 0.05
        parameters = () if found.friction is None else (found.friction, found.inverse_mass)
        larger = guarantees._THEOREMS[cls](guarantees.Problem(1.0, 5.0, 3, 3**0.5), 1.5 * found.step_size, *parameters)
        assert all(recursion.bias > 1.7 * np.sqrt(3) for recursion in larger)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"m": "small"}, "m must be one number known before compilation, got 'small'"),
        ({"M": [1.0, 2.0]}, r"M must be one number .*got \[1.0, 2.0\]"),
        ({"eps": None}, "eps must be one number .*got None"),
        ({"initial_distance": "far"}, "initial_distance must be one number .*got 'far'"),
        ({"inverse_mass": "heavy"}, "inverse_mass must be one number .*got 'heavy'"),
        ({"friction": "much"}, "friction must be one number .*got 'much'"),
        ({"kernel": []}, r"for which a bound is known; got \[\]"),
        ({"kernel": kernels.KineticLangevin(nowhere, 0.1)}, "for which a bound is known"),
        ({"kernel": kernels.LMC, "friction": 3.0}, "friction is a parameter of kinetic kernels, got 3.0 for LMC"),
    ],
)
def test_bad_arguments_are_named(changed, message):
    arguments = {"kernel": "KineticLangevin", "m": 1.0, "M": 10.0, "dim": 2, "eps": 0.1}
    with pytest.raises(ValueError, match=message):
        kernels.guarantee(**(arguments | changed))


def test_unmet_conditions_are_named():
    lmc = kernels.LMC(nowhere, 0.25)
    with pytest.raises(ValueError, match=r"no guaranteed contraction at step_size = 0.25 .* take step_size <= 0.2"):
        kernels.wasserstein_bound(lmc, m=1.0, M=8.1, dim=2, num_steps=10)
    for cls in KERNELS[2:]:
        with pytest.raises(ValueError, match=r"friction\^2 > inverse_mass \* M.*take friction = .*3.317"):
            kernels.guarantee(cls, m=1.0, M=10.0, dim=2, eps=0.1, friction=2.0)
        with pytest.raises(ValueError, match="friction"):
            kernels.wasserstein_bound(cls(nowhere, 0.1, friction=2.0), m=1.0, M=10.0, dim=2, num_steps=10)
    with pytest.raises(ValueError, match="at most M"):
        kernels.guarantee(kernels.LMC, m=2.0, M=1.0, dim=2, eps=0.1)
    with pytest.raises(ValueError, match="m must be finite and positive"):
        kernels.guarantee(kernels.LMC, m=0.0, M=1.0, dim=2, eps=0.1)
    with pytest.raises(ValueError, match="eps must be finite and positive"):
        kernels.guarantee(kernels.LMC, m=1.0, M=1.0, dim=2, eps=-0.1)
    with pytest.raises(ValueError, match="out of reach"):
        kernels.guarantee(kernels.LMC, m=1.0, M=1e4, dim=2, eps=1e-9)
    with pytest.raises(ValueError, match="for which a bound is known"):
        kernels.guarantee(kernels.MALA, m=1.0, M=1.0, dim=2, eps=0.1)
    with pytest.raises(ValueError, match="for which a bound is known"):
        kernels.wasserstein_bound(kernels.MALA(nowhere, 0.1), m=1.0, M=1.0, dim=2, num_steps=1)
    with pytest.raises(ValueError, match="initial_distance"):
        kernels.guarantee(kernels.LMC, m=1.0, M=1.0, dim=2, eps=0.1, initial_distance=-1.0)
