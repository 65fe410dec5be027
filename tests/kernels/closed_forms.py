"""Exact laws of the Langevin discretisations on Gaussians, in float64 and by other routes than the kernels take.

On pi = N(0, 1/lam) every scheme is a linear map with a random matrix A and Gaussian noise of covariance Q, so that the
moments of K steps follow:  m' = E[A] m,   S' = E[A S A^T] + E[Q],   S = E[z z^T]. The mean over the random time of the
randomized midpoint is a Gauss-Legendre sum.
"""

import itertools
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from scipy.linalg import block_diag

import bayesinf as bi
from bayesinf.conformance import mean_p_value

NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)
TIMES, WEIGHTS = 0.5 * (NODES + 1.0), 0.5 * WEIGHTS

Scheme = list[tuple[float, np.ndarray, np.ndarray]]  # (probability, A, Q)


def decay_and_reach(t, g):
    return np.exp(-g * t), -np.expm1(-g * t) / g


def free_covariance(t, g, u):
    """C(t), as it stands in the literature."""
    e = np.exp(-g * t)
    c_xx = u / g**2 * (2 * g * t - 3 + 4 * e - e**2)
    c_xv = u / g * (1 - e) ** 2
    return np.array([[c_xx, c_xv], [c_xv, u * (1 - e**2)]])


def lmc(h, lam) -> Scheme:
    return [(1.0, np.array([[1 - h * lam]]), np.array([[2 * h]]))]


def randomized_midpoint(h, lam) -> Scheme:
    z = h * lam
    # x' = x - z x_U + sqrt(2h) W(1) with x_U = (1 - U z) x + sqrt(2h) W(U)
    return [
        (w, np.array([[1 - z + U * z**2]]), np.array([[2 * h * (1 - 2 * z * U + z**2 * U)]]))
        for U, w in zip(TIMES, WEIGHTS, strict=True)
    ]


def parallel_midpoint(h, lam, num_nodes, num_sweeps, num_times=4) -> Scheme:
    """Every point of the sweeps as coefficients of (x, increment 1, ..., increment R + 1)."""
    nodes, weights = np.polynomial.legendre.leggauss(num_times)
    edges = np.arange(num_nodes) / num_nodes
    scheme = []
    for choice in itertools.product(range(num_times), repeat=num_nodes):
        times = edges + (0.5 * nodes[list(choice)] + 0.5) / num_nodes
        weight = np.prod(0.5 * weights[list(choice)])
        brownian = np.tri(num_nodes + 1)  # W at the times and at the end
        x = np.eye(1, num_nodes + 2)[0]
        points = [x] * num_nodes
        for _ in range(num_sweeps - 1):
            points = [
                x + np.concatenate([[0.0], brownian[r]])
                - h * lam * sum(min(1 / num_nodes, max(times[r] - edges[j], 0.0)) * points[j] for j in range(num_nodes))
                for r in range(num_nodes)
            ]  # fmt: skip
        end = x + np.concatenate([[0.0], brownian[-1]]) - h * lam * sum(points) / num_nodes
        variances = 2 * h * np.diff(np.concatenate([[0.0], times, [1.0]]))
        scheme.append((weight, np.array([[end[0]]]), np.array([[np.sum(end[1:] ** 2 * variances)]])))
    return scheme


def kinetic(h, lam, g, u) -> Scheme:
    e, psi = decay_and_reach(h, g)
    A = np.array([[1 - u * lam * (h - psi) / g, psi], [-u * lam * psi, e]])
    return [(1.0, A, free_covariance(h, g, u))]


def randomized_midpoint_kinetic(h, lam, g, u) -> Scheme:
    scheme = []
    e, psi_h = decay_and_reach(h, g)
    for U, w in zip(TIMES, WEIGHTS, strict=True):
        a, d = U * h, (1 - U) * h
        (e_a, psi_a), (e_d, psi_d) = decay_and_reach(a, g), decay_and_reach(d, g)
        c = 1 - u * lam * (a - psi_a) / g
        w_x, w_v = u * h * lam * psi_d, u * h * lam * e_d
        A = np.array([[1 - w_x * c, psi_h - w_x * psi_a], [-w_v * c, e - w_v * psi_a]])
        # Shen and Lee's three noises: of the midpoint, of the new position, of the new velocity
        c_12 = 2 * u / g * (a - psi_a - e_d * psi_a + e_d * (1 - e_a**2) / (2 * g))
        c_13 = u / g * e_d * (1 - e_a) ** 2
        (c_22, c_23), (_, c_33) = free_covariance(h, g, u)
        C = np.array([[free_covariance(a, g, u)[0, 0], c_12, c_13], [c_12, c_22, c_23], [c_13, c_23, c_33]])
        L = np.array([[-w_x, 1.0, 0.0], [-w_v, 0.0, 1.0]])
        scheme.append((w, A, L @ C @ L.T))
    return scheme


def splitting(word, h, lam, g, u) -> Scheme:
    A, Q = np.eye(2), np.zeros((2, 2))
    for letter in word:
        t = h / word.count(letter)
        e, psi = decay_and_reach(t, g)
        piece, noise = {
            "A": (np.array([[1, t], [0, 1]]), np.zeros((2, 2))),
            "B": (np.array([[1, 0], [-t * u * lam, 1]]), np.zeros((2, 2))),
            "O": (np.diag([1, e]), np.diag([0, u * (1 - e**2)])),
            "U": (np.array([[1, psi], [0, e]]), free_covariance(t, g, u)),
        }[letter]
        A, Q = piece @ A, piece @ Q @ piece.T + noise
    return [(1.0, A, Q)]


def stationary(scheme: Scheme) -> np.ndarray:
    """S = E[A S A^T] + E[Q]."""
    size = scheme[0][1].shape[0]
    E_AA = sum(w * np.kron(A, A) for w, A, _ in scheme)
    E_Q = sum(w * Q for w, _, Q in scheme)
    return np.linalg.solve(np.eye(size**2) - E_AA, E_Q.ravel()).reshape(size, size)


def moments(scheme: Scheme, start: np.ndarray, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """(E z, E z z^T) after `num_steps` from the point `start`."""
    mean, second = np.asarray(start, float), np.outer(start, start)
    for _ in range(num_steps):
        mean = sum(w * A @ mean for w, A, _ in scheme)
        second = sum(w * (A @ second @ A.T + Q) for w, A, Q in scheme)
    return mean, second


# how a kernel is held against them

EIGENVALUES = (0.5, 2.0)
ANGLE = 0.6
ROTATION = np.array([[np.cos(ANGLE), -np.sin(ANGLE)], [np.sin(ANGLE), np.cos(ANGLE)]])
MEAN = np.array([1.0, -0.5])
START = np.array([1.5, -2.0])  # in the eigenvectors' coordinates


def gaussian() -> bi.Target:
    """N(MEAN, R diag(1/EIGENVALUES) R^T)."""
    data = (jnp.asarray(MEAN), jnp.asarray(ROTATION * np.array(EIGENVALUES) @ ROTATION.T))
    return bi.Target(lambda x, data: -0.5 * (x - data[0]) @ data[1] @ (x - data[0]), data)


def law_p_value(
    kernel: Any, scheme_at: Callable[[float], Scheme], num_steps: int = 40, num_chains: int = 40_000
) -> float:
    """The p-value of the first and all second moments of `num_steps` steps, of position and velocity, on `gaussian()`.

    The chains start at one point and at rest. The two directions have the random time of a step in common, which shows
    in their joint moments.
    """
    schemes = [scheme_at(lam) for lam in EIGENVALUES]
    joint = [(w, block_diag(A, B), block_diag(Q, P)) for (w, A, Q), (_, B, P) in zip(*schemes, strict=True)]
    size = schemes[0][0][1].shape[0]
    start = np.concatenate([[y, 0.0][:size] for y in START])
    mean, second = moments(joint, start, num_steps)

    state = run(kernel, jnp.asarray(MEAN + ROTATION @ START, jnp.float32), num_steps, num_chains)
    y = (np.asarray(state.position, np.float64) - MEAN) @ ROTATION
    z = y if size == 1 else np.stack([y, np.asarray(state.velocity, np.float64) @ ROTATION], -1).reshape(num_chains, -1)
    upper = np.triu_indices(z.shape[1])
    products = z[:, upper[0]] * z[:, upper[1]]
    return mean_p_value(np.concatenate([z, products], axis=1), np.concatenate([mean, second[upper]]))


@partial(jax.jit, static_argnums=(2, 3))
def run(kernel: Any, position: Any, num_steps: int, num_chains: int) -> Any:
    """The states of independent chains after some steps from one position."""

    def chain(key):
        return jax.lax.fori_loop(
            0, num_steps, lambda t, state: kernel.step(jax.random.fold_in(key, t), state)[0], kernel.init(position)
        )

    return jax.vmap(chain)(jax.random.split(jax.random.key(7), num_chains))


def one_step_p_values(kernel: Any, scheme: Scheme, start: float, num_chains: int = 100_000) -> list[float]:
    """P-values of the whole law of one step on N(0, 1) from `start` at rest: a mixture of normals over the random time.

    The moments of `law_p_value` are the same if the random time U is taken for 1 - U somewhere; the law is not.
    """
    state = run(kernel, jnp.asarray(start, jnp.float32), 1, num_chains)
    components = [state.position, state.velocity] if hasattr(state, "velocity") else [state.position]

    def cdf(i: int, x: np.ndarray) -> np.ndarray:
        return sum(w * scipy.stats.norm.cdf(x, A[i, 0] * start, np.sqrt(Q[i, i])) for w, A, Q in scheme)

    return [
        scipy.stats.kstest(np.asarray(values, np.float64), partial(cdf, i)).pvalue
        for i, values in enumerate(components)
    ]


def work_p_value(
    kernel: Any, position_of: Callable[[Any], Any] = lambda x: x[0], num_steps: int = 2, num_chains: int = 100_000
) -> float:
    """The p-value of E[exp(weight)] = 1 for paths of a kernel on a target of the one or two scalars x.

    Starts are drawn from N(-0.4, 1) and the end is weighed by N(0.2, 0.7^2), neither of which need be the kernel's law:

        weight = log N(x_n; 0.2, 0.7^2) - log N(x_0; -0.4, 1) + sum log_work,      and likewise for the velocity.
    """
    size = len(jax.tree.leaves(position_of(jnp.zeros(2))))
    weights = _weigh(kernel, position_of, size, num_steps, num_chains)
    return weights_p_value(np.asarray(weights, np.float64))


def weights_p_value(weights: np.ndarray) -> float:
    """The p-value of mean 1; weights of the wrong sign have no variance, and a t-test of them would say nothing."""
    assert np.std(weights) / np.sqrt(weights.size) < 0.03, "the weights vary more than those of a right kernel do"
    return mean_p_value(weights, 1.0)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _weigh(kernel, position_of, size, num_steps, num_chains):
    def log_normal(tree, mean, scale):
        return sum(jnp.sum(jax.scipy.stats.norm.logpdf(leaf, mean, scale)) for leaf in jax.tree.leaves(tree))

    def log_velocity(state):
        return log_normal(state.velocity, 0.0, jnp.sqrt(kernel.inverse_mass)) if hasattr(state, "velocity") else 0.0

    def path(key):
        key_start, key_velocity, *keys = jax.random.split(key, 2 + num_steps)
        x = -0.4 + jax.random.normal(key_start, (size,))
        state = kernel.init(position_of(x))
        if hasattr(state, "velocity"):
            state = kernel.refresh(key_velocity, state)
        weight = -log_normal(x, -0.4, 1.0) - log_velocity(state)
        for key_step in keys:
            state, info = kernel.step(key_step, state)
            weight += info.log_work
        return jnp.exp(weight + log_normal(state.position, 0.2, 0.7) + log_velocity(state))

    return jax.vmap(path)(jax.random.split(jax.random.key(3), num_chains))


def quartic() -> bi.Target:
    """A skewed target of one scalar with light tails."""
    return bi.Target(lambda x: -0.05 * x**4 - 0.5 * (x - 0.3) ** 2 + 0.3 * jnp.sin(2 * x))


def num_programs(kernels: Iterable[Any], position: Any) -> int:
    """How many programs the steps of these kernels from `position` take, when kernel and state are arguments."""
    step = jax.jit(lambda kernel, key, state: kernel.step(key, state))
    for kernel in kernels:
        step(kernel, jax.random.key(0), kernel.init(position))
    return step._cache_size()


def num_evaluations(function: Callable[..., Any], *args: Any) -> int:
    """How often the derivative of `counted`'s log density occurs in the program of `function`."""

    def count(node: Any) -> int:
        if hasattr(node, "jaxpr"):
            return count(node.jaxpr)
        if hasattr(node, "eqns"):
            return sum((eqn.primitive.name == "cosh") + sum(map(count, eqn.params.values())) for eqn in node.eqns)
        return sum(map(count, node)) if isinstance(node, tuple | list) else 0

    return count(jax.make_jaxpr(function)(*args))


def counted() -> bi.Target:
    """A target whose gradient is counted by `num_evaluations`."""
    return bi.Target(lambda x, a: -jnp.sum(a * x**2) + 1e-3 * jnp.sinh(sum(jnp.ravel(x))), jnp.asarray(0.5))
