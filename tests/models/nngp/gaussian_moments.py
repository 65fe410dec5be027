"""Expectations under two correlated Gaussian variables by brute force, which know nothing of closed forms."""

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)
REACH = 12.0


def panels(edges):
    """Gauss-Legendre nodes and weights between neighbouring edges of the last axis."""
    half, middle = np.diff(edges)[..., None] / 2, (edges[..., 1:] + edges[..., :-1])[..., None] / 2
    shape = (*edges.shape[:-1], -1)
    return (middle + half * NODES).reshape(shape), (half * WEIGHTS).reshape(shape)


def density(z):
    return np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)


def expectation(f, g, kinks, q, p, c):
    """E f(u) g(v), (u, v) ~ N(0, [[q, c], [c, p]]), for functions smooth between the kinks.

    The outer integral is cut at the kinks of f, and around those that g's make through the conditional mean.
    """
    rho = c / np.sqrt(q * p)
    width = np.sqrt(max((1 - rho) * (1 + rho), 0.0))
    kinks = np.asarray(kinks, float)
    edges = [-REACH, -4.0, 0.0, 4.0, REACH, *(kinks / np.sqrt(q))]
    if rho != 0:
        edges += [k / np.sqrt(p) / rho + step * width / abs(rho) for k in kinks for step in (-12, -6, -2, 0, 2, 6, 12)]
    z, weights = panels(np.unique(np.clip(edges, -REACH, REACH)))
    mean, sd = np.sqrt(p) * rho * z, np.sqrt(p) * width
    if sd == 0:
        inner = g(mean)
    else:
        cuts = np.clip((kinks - mean[:, None]) / sd, -REACH, REACH)
        fixed = np.broadcast_to([-REACH, -4.0, 0.0, 4.0, REACH], (len(z), 5))
        w, inner_weights = panels(np.sort(np.concatenate([fixed, cuts], axis=1), axis=1))
        inner = np.sum(inner_weights * density(w) * g(mean[:, None] + sd * w), axis=1)
    return float(np.sum(weights * density(z) * f(np.sqrt(q) * z) * inner))
