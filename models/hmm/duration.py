"""How long a hidden semi-Markov chain stays in a state: laws on 1, ..., D.

A law asks for what EM can give: the expected number of stays of each duration, and answers with the parameters that
maximise sum_d counts_d log p(d), as an emission does with its rows.

References:
    Guédon (2003), doi:10.1198/1061860032030.
"""

import abc
import dataclasses
import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from bayesinf import errors
from bayesinf.models.hmm.emission import draw_rows, ratio
from bayesinf.models.hmm.recursion import log_normalize, log_or_never

__all__ = ["CategoricalDuration", "Duration", "NegativeBinomialDuration"]

# of the shape that is learnt: below, nearly all stays are of one step; above, it is a Poisson law to within rounding
SHAPES = (1e-2, 1e4)


class Duration(eqx.Module):
    """The laws of the durations in each of K states; subclass it for laws of your own."""

    @abc.abstractmethod
    def log_prob(self) -> Float[Array, "k d"]:
        """Log probabilities of 1, ..., D."""

    @abc.abstractmethod
    def maximize(self, counts: Float[Array, "k d"]) -> "Duration":
        """The law whose weighted log probability, with the log prior, is largest; or no smaller than before.

        Args:
            counts: how many stays lasted 1, ..., D steps in each state.
        """

    def draw(self, key: Key[Array, ""], counts: Float[Array, "k d"]) -> "Duration":
        """The parameters given how many stays lasted 1, ..., D steps in each state, at random."""
        raise ValueError(
            f"{type(self).__name__} has no conjugate prior: sample its parameters by gradients with "
            "HiddenSemiMarkovModel.target, or take CategoricalDuration"
        )

    def log_prior(self) -> Float[Array, ""]:
        """Log density of the parameters, up to a constant; 0 without a prior."""
        return jnp.zeros(())


class CategoricalDuration(Duration):
    """A probability for every duration.

    With K D of them short series say little of each: a prior above 1, or `NegativeBinomialDuration`, steadies the fit.

    Attributes:
        probs: probabilities of 1, ..., D, shape (K, D). Those that are zero stay zero.
        prior: concentration of the Dirichlet law of every row, scalar or shape (D,) or (K, D); None for a flat one.

    Raises:
        ValueError: probs has another shape, or its rows do not sum to one.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> hmm.CategoricalDuration(jnp.array([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])).log_prob().shape
        (2, 3)
    """

    probs: Float[Array, "k d"] = eqx.field(converter=errors.as_array("probs", is_floating=True))
    prior: Float[Array, "..."] | None = eqx.field(
        default=None, converter=errors.as_array("prior", is_optional=True, is_floating=True)
    )

    def __check_init__(self):
        if self.probs.ndim != 2:
            raise ValueError(f"probs must have shape (K, D), got {self.probs.shape}")
        if errors.is_concrete(self.probs):
            values = np.asarray(self.probs)
            slack = values.shape[1] * float(jnp.finfo(self.probs.dtype).eps) ** 0.5
            if np.any(values < 0) or np.any(np.abs(values.sum(1) - 1) > slack):
                raise ValueError(f"probs must hold probabilities that sum to 1 in every row, got {values}")
        if self.prior is not None:
            errors.check_positive("prior", self.prior)

    def log_prob(self) -> Float[Array, "k d"]:
        return log_or_never(self.probs)

    def maximize(self, counts: Float[Array, "k d"]) -> "CategoricalDuration":
        extra = 0.0 if self.prior is None else self.prior - 1.0
        counts = jnp.where(self.probs > 0, jnp.maximum(counts + extra, 0.0), 0.0)
        return dataclasses.replace(self, probs=ratio(counts, jnp.sum(counts, axis=1, keepdims=True), self.probs))

    def draw(self, key: Key[Array, ""], counts: Float[Array, "k d"]) -> "CategoricalDuration":
        is_free = self.probs > 0
        concentration = counts + (1.0 if self.prior is None else self.prior)
        return dataclasses.replace(self, probs=draw_rows(key, jnp.where(is_free, concentration, 1.0), is_free))

    def log_prior(self) -> Float[Array, ""]:
        if self.prior is None:
            return jnp.zeros(())
        return jnp.sum(jnp.where(self.probs > 0, (self.prior - 1.0) * self.log_prob(), 0.0))


class NegativeBinomialDuration(Duration):
    """A negative binomial law of the steps after the first, up to D in all.

        p(d) is proportional to Gamma(d - 1 + shape) / (Gamma(shape) (d - 1)!) (1 - stop)^(d - 1),    d = 1, ..., D

    With shape 1 it is the geometric law of an ordinary hidden Markov chain that leaves the state with probability
    `stop`; above 1 stays have a typical length; as the shape grows it becomes a Poisson law.

    Attributes:
        shape: > 0, shape (K,).
        stop: in (0, 1), shape (K,).
        max_duration: D.

    Raises:
        ValueError: a parameter is out of its range.

    Example:
        >>> import jax.numpy as jnp
        >>> from bayesinf.models import hmm
        >>> law = hmm.NegativeBinomialDuration(shape=jnp.array([1.0, 5.0]), stop=jnp.array([0.5, 0.5]), max_duration=40)
        >>> [round(p, 3) for p in jnp.exp(law.log_prob()[0, :3]).tolist()]
        [0.5, 0.25, 0.125]

    References:
        Guédon (2003), doi:10.1198/1061860032030.
    """

    shape: Float[Array, " k"] = eqx.field(converter=errors.as_array("shape", is_floating=True))
    stop: Float[Array, " k"] = eqx.field(converter=errors.as_array("stop", is_floating=True))
    max_duration: int = eqx.field(static=True, converter=partial(errors.check_count, "max_duration"))

    def __check_init__(self):
        if self.shape.ndim != 1 or self.shape.shape != self.stop.shape:
            raise ValueError(f"shape and stop must both have shape (K,), got {self.shape.shape} and {self.stop.shape}")
        errors.check_positive("shape", self.shape)
        errors.check_fraction("stop", self.stop)

    def log_prob(self) -> Float[Array, "k d"]:
        return _log_pmf(jnp.log(self.shape), _logit(self.stop), self.max_duration)

    def maximize(self, counts: Float[Array, "k d"]) -> "NegativeBinomialDuration":
        # For a given shape the law is an exponential family in log(1 - stop), maximal where the means agree, which is
        # found by bisection; the maximum over the shape by ever finer grids.
        number = jnp.sum(counts, axis=1)
        steps = jnp.arange(self.max_duration, dtype=counts.dtype)
        mean = ratio(jnp.matmul(counts, steps, precision="highest"), number, jnp.zeros_like(number))

        def best_stop(log_shape: Array) -> Array:
            def halve(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
                low, high = bracket
                middle = 0.5 * (low + high)
                is_long = jnp.sum(jnp.exp(_log_pmf(log_shape, middle, self.max_duration)) * steps, axis=-1) > mean
                return jnp.where(is_long, middle, low), jnp.where(is_long, high, middle)

            bracket = jnp.full_like(log_shape, -16.0), jnp.full_like(log_shape, 16.0)
            low, high = jax.lax.fori_loop(0, 30, halve, bracket)
            return 0.5 * (low + high)

        def score(log_shape: Array, logit_stop: Array) -> Array:
            return jnp.sum(counts * _log_pmf(log_shape, logit_stop, self.max_duration), axis=-1)

        def refine(_: Array, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
            center, width = bracket
            grid = center + width * jnp.linspace(-1.0, 1.0, 17, dtype=counts.dtype)[:, None]
            grid = jnp.clip(grid, math.log(SHAPES[0]), math.log(SHAPES[1]))
            best = jnp.argmax(score(grid, best_stop(grid)), axis=0)
            return jnp.take_along_axis(grid, best[None], axis=0)[0], width / 8

        middle, width = 0.5 * math.log(SHAPES[0] * SHAPES[1]), 0.5 * math.log(SHAPES[1] / SHAPES[0])
        log_shape, _ = jax.lax.fori_loop(
            0, 6, refine, (jnp.full_like(number, middle), jnp.asarray(width, counts.dtype))
        )
        logit_stop = best_stop(log_shape)
        # a state that nobody stays in keeps its law, as does one where the grid is too coarse to gain
        own = jnp.log(self.shape), _logit(self.stop)
        is_better = (number > 0) & (score(log_shape, logit_stop) > score(*own))
        return dataclasses.replace(
            self,
            shape=jnp.where(is_better, jnp.exp(log_shape), self.shape),
            stop=jnp.where(is_better, jax.nn.sigmoid(logit_stop), self.stop),
        )


def _log_pmf(log_shape: Float[Array, "*k"], logit_stop: Float[Array, "*k"], max_duration: int) -> Float[Array, "*k d"]:
    steps = jnp.arange(max_duration, dtype=log_shape.dtype)
    # log of (shape)_n / n!, as a sum: a difference of log gammas cancels where the shape is large
    growth = jnp.logaddexp(log_shape[..., None], jnp.log(jnp.maximum(steps[:-1], 1e-30))) - jnp.log(steps[1:])
    log_binomial = jnp.concatenate([jnp.zeros((*log_shape.shape, 1), log_shape.dtype), jnp.cumsum(growth, -1)], -1)
    return log_normalize(log_binomial + steps * jax.nn.log_sigmoid(-logit_stop)[..., None])


def _logit(p: Array) -> Array:
    return jnp.log(p) - jnp.log1p(-p)
