"""Small hidden chains of which everything is known by enumeration of all paths, in float64 whatever JAX's precision."""

from itertools import product
from typing import NamedTuple

import numpy as np

__all__ = ["Enumerated", "asymmetric", "enumerate_paths"]


class Enumerated(NamedTuple):
    """The law of the path, and what follows from it."""

    paths: np.ndarray  # (K^T, T)
    log_joint: np.ndarray  # (K^T,)
    log_evidence: float
    smoothed: np.ndarray  # (T, K)
    pairs: np.ndarray  # (T - 1, K, K)


def asymmetric(seed: int, num_steps: int, num_states: int, *, is_varying: bool = False):
    """(log_init, log_trans, log_lik) drawn at random, with no symmetry."""
    rng = np.random.default_rng(seed)
    shape = (num_steps - 1, num_states) if is_varying else (num_states,)
    log_init = np.log(rng.dirichlet(np.full(num_states, 0.7)))
    log_trans = np.log(rng.dirichlet(np.full(num_states, 0.7), shape))
    return log_init, log_trans, rng.normal(-1.0, 2.0, (num_steps, num_states))


def enumerate_paths(log_init, log_trans, log_lik) -> Enumerated:
    """By the definition."""
    log_init, log_trans, log_lik = (np.asarray(x, np.float64) for x in (log_init, log_trans, log_lik))
    num_steps, num_states = log_lik.shape
    every = np.broadcast_to(log_trans, (num_steps - 1, num_states, num_states))
    paths = np.array(list(product(range(num_states), repeat=num_steps)))
    times = np.arange(num_steps)
    with np.errstate(divide="ignore"):
        log_joint = (
            log_init[paths[:, 0]]
            + log_lik[times, paths].sum(-1)
            + every[times[:-1], paths[:, :-1], paths[:, 1:]].sum(-1)
        )
        log_evidence = np.logaddexp.reduce(log_joint)
    law = np.exp(log_joint - log_evidence) if np.isfinite(log_evidence) else np.zeros_like(log_joint)
    smoothed, pairs = np.zeros((num_steps, num_states)), np.zeros((num_steps - 1, num_states, num_states))
    for t in times:
        np.add.at(smoothed[t], paths[:, t], law)
        if t:
            np.add.at(pairs[t - 1], (paths[:, t - 1], paths[:, t]), law)
    return Enumerated(paths, log_joint, float(log_evidence), smoothed, pairs)
