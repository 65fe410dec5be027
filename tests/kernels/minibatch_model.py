"""Bayesian linear regression with every batch enumerated: the exact moments of chains that are driven by minibatches.

The gradient of each batch is affine, g(x) = c - A x, with (A, c) equally likely over the product of the blocks. So a
step is a random affine map of z = (x, 1) or (x, v, 1),

    E z' = E[M] E z,      E z' z'^T = E[M (E z z^T) M^T] + Q.
"""

import itertools

import jax.numpy as jnp
import numpy as np

from bayesinf import kernels

NUM_ROWS, BATCH_SIZE, DIM = 11, 3, 2
PRIOR, NOISE = 2.0, 0.8  # standard deviations
CENTRE = np.array([0.9, -0.1])
START = np.array([1.5, -1.0])

_rng = np.random.default_rng(5)
INPUTS = _rng.exponential(size=(NUM_ROWS, DIM)) - 0.4  # skewed, so that batches differ in every moment
OUTPUTS = INPUTS @ np.array([0.7, -0.4]) + _rng.exponential(size=NUM_ROWS)

BLOCKS = [range(0, 3), range(3, 7), range(7, 11)]
MIDDLE = (1, 5, 9)

Affine = tuple[np.ndarray, np.ndarray]


def log_prior(x):
    return -0.5 * jnp.sum((x / PRIOR) ** 2)


def log_likelihood(x, row):
    return -0.5 * ((row["output"] - row["input"] @ x) / NOISE) ** 2


def target(centre=None, batch_size=BATCH_SIZE) -> kernels.Minibatch:
    data = {"input": jnp.asarray(INPUTS), "output": jnp.asarray(OUTPUTS)}
    return kernels.Minibatch(log_prior, log_likelihood, data, batch_size, centre)


CURVATURES = np.einsum("ni,nj->nij", INPUTS, INPUTS) / NOISE**2
OFFSETS = INPUTS * OUTPUTS[:, None] / NOISE**2


def full_gradient() -> Affine:
    return np.eye(DIM) / PRIOR**2 + CURVATURES.sum(0), OFFSETS.sum(0)


def batch_gradient(batch, centre=None, *, is_scaled=True, sign=1.0) -> Affine:
    """The estimate from one batch; wrongly so without the factor of each block, or with another sign of its centre."""
    sizes = np.array([len(block) if is_scaled else 1.0 for block in BLOCKS])
    A = np.einsum("s,sij->ij", sizes, CURVATURES[list(batch)])
    c = sizes @ OFFSETS[list(batch)]
    prior = np.eye(DIM) / PRIOR**2
    if centre is None:
        return prior + A, c
    at_centre = OFFSETS.sum(0) - CURVATURES.sum(0) @ centre
    return prior + A, c + sign * (at_centre - (c - A @ centre))


def batch_gradients(centre=None, **wrong) -> list[Affine]:
    return [batch_gradient(batch, centre, **wrong) for batch in itertools.product(*BLOCKS)]


def with_replacement() -> list[Affine]:
    """The estimates from rows drawn independently of all: another law of the same mean."""
    prior = np.eye(DIM) / PRIOR**2
    batches = itertools.product(range(NUM_ROWS), repeat=BATCH_SIZE)
    factor = NUM_ROWS / BATCH_SIZE
    return [(prior + factor * CURVATURES[list(b)].sum(0), factor * OFFSETS[list(b)].sum(0)) for b in batches]


def sgld_map(gradient: Affine, h: float) -> np.ndarray:
    A, c = gradient
    return np.block([[np.eye(DIM) - h * A, h * c[:, None]], [np.zeros((1, DIM)), np.ones((1, 1))]])


def sghmc_map(gradient: Affine, h: float, friction: float, u: float) -> np.ndarray:
    A, c = gradient
    eye, zero = np.eye(DIM), np.zeros((DIM, 1))
    decay = np.exp(-friction * h)
    # x' = x + h v,  v' = decay v + h u (c - A x')
    velocity = np.block([-h * u * A, decay * eye - h**2 * u * A, h * u * c[:, None]])
    return np.block([[eye, h * eye, zero], [velocity], [np.zeros((1, 2 * DIM)), np.ones((1, 1))]])


def moments(steps, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E z and E z z^T after some steps, each of them (equally likely maps M, covariance Q)."""
    mean, second = start, np.outer(start, start)
    for maps, Q in steps:
        maps = np.array(maps)
        mean = maps.mean(0) @ mean
        second = np.einsum("kij,jl,kml->im", maps, second, maps) / len(maps) + Q
    return mean, second
