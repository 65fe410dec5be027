"""Hidden Markov models with the methods of scikit-learn and the data of hmmlearn: sequences one below the other.

    hmmlearn                        here
    predict_proba, score_samples    the same: given the whole sequence, so they look ahead
    -                               filter_proba: given the past alone
    predict, decode                 the same; NaN in X is missing
    means_, covars_, transmat_      the same; of any emission, model_.emission
    lambdas_                        rates_
    monitor_.converged, .history    the same

What predicts must not look ahead: a strategy or an alarm tested on `predict_proba` has seen the future. Use
`filter_proba`, which at every time knows what had been seen by then.
"""

import inspect
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bayesinf import errors
from bayesinf.models.hmm.count_emissions import Categorical, Poisson
from bayesinf.models.hmm.emission import Emission
from bayesinf.models.hmm.forecast import hmm_forecast
from bayesinf.models.hmm.gamma_emission import Gamma
from bayesinf.models.hmm.gaussian_emission import Gaussian
from bayesinf.models.hmm.mixture_emission import Mixture
from bayesinf.models.hmm.model import HiddenMarkovModel
from bayesinf.models.hmm.observations import observe
from bayesinf.models.hmm.parameters import parameters_of
from bayesinf.models.hmm.student_t_emission import StudentT
from bayesinf.models.hmm.von_mises_emission import VonMises

__all__ = ["HMMEstimator", "HMMMonitor"]

EMISSIONS = ("gaussian", "poisson", "categorical", "gamma", "student_t", "von_mises")
ALGORITHMS = ("viterbi", "map")


class HMMMonitor(NamedTuple):
    """How the best start of EM went.

    Attributes:
        converged: whether its last iteration gained less than the tolerance.
        history: log likelihood plus log prior before every iteration.
        objectives: where each start ended.
    """

    converged: bool
    history: list[float]
    objectives: list[float]


class HMMEstimator:
    """A hidden Markov model as an estimator of scikit-learn: `clone` and `GridSearchCV` take it, and it needs neither.

    X holds sequences one below the other, shape (n,) or (n, d), and `lengths` says how long each is; without it X is
    one sequence. NaN is missing. Arrays come back as NumPy's. Precision is JAX's: single, unless `jax_enable_x64` is
    set.

    Cross-validation that takes rows out of the middle of a sequence, as `KFold` does, joins what had been apart: use
    `TimeSeriesSplit`.

    Args:
        n_components: K.
        emission: "gaussian" and "poisson", of numbers or vectors; "categorical", whole numbers from 0; "gamma",
            "student_t" and "von_mises", of numbers; or an `Emission`, which is the first start.
        covariance: of Gaussians: "diagonal", "full" or "tied".
        prior: of the emission, such as `GaussianPrior`, `GammaPrior`, or the concentration of categories.
        initial_prior: concentration of the Dirichlet law of the first state.
        transition_prior: of transitions; `sticky` makes one that holds on to a state.
        n_starts: of EM.
        max_iterations: of every start.
        tolerance: gain of an iteration below which a start has ended.
        algorithm: of `predict`: "viterbi", the most probable path, or "map", the most probable state of every time.
        random_state: a seed.

    Attributes:
        model_: the fitted `HiddenMarkovModel`.
        startprob_: probabilities of the first state, shape (K,).
        transmat_: of transitions, shape (K, K).
        means_, covars_: of Gaussians, the second variances, shape (K,) or (K, d), or covariances, shape (K, d, d), or
            (d, d) where tied.
        rates_: of Poisson laws.
        emissionprob_: of categories, shape (K, M).
        monitor_: how EM went.

    Example:
        >>> from bayesinf.datasets import earthquakes
        >>> from bayesinf.models import hmm
        >>> counts = earthquakes().counts
        >>> estimator = hmm.HMMEstimator(n_components=2, emission="poisson").fit(counts)
        >>> sorted(round(float(rate)) for rate in estimator.rates_), round(estimator.score(counts), 1)
        ([15, 26], -341.9)
    """

    model_: HiddenMarkovModel

    def __init__(
        self,
        n_components: int = 2,
        emission: str | Emission = "gaussian",
        *,
        covariance: Literal["diagonal", "full", "tied"] = "diagonal",
        prior: Any = None,
        initial_prior: Any = 1.0,
        transition_prior: Any = 1.0,
        n_starts: int = 10,
        max_iterations: int = 500,
        tolerance: float = 1e-4,
        algorithm: Literal["viterbi", "map"] = "viterbi",
        random_state: int = 0,
    ):
        # as they are, and checked by `fit`: `clone` compares them with what it gave
        self.n_components = n_components
        self.emission = emission
        self.covariance: Literal["diagonal", "full", "tied"] = covariance
        self.prior = prior
        self.initial_prior = initial_prior
        self.transition_prior = transition_prior
        self.n_starts = n_starts
        self.max_iterations = max_iterations
        self.tolerance = tolerance
        self.algorithm = algorithm
        self.random_state = random_state

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "HMMEstimator":
        """Changes arguments of the constructor, and returns the estimator.

        Raises:
            ValueError: there is no argument of a name.
        """
        if unknown := set(params) - set(self.get_params()):
            raise ValueError(f"params must be of {sorted(self.get_params())}, got {sorted(unknown)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, X: Any, lengths: Any = None) -> "HMMEstimator":
        """Learns the parameters by EM from several starts.

        Args:
            X: sequences one below the other, shape (n,) or (n, d); NaN where missing.
            lengths: of the sequences; their sum is n.

        Returns:
            The estimator itself.

        Raises:
            ValueError: a shape or an argument is wrong.
            InitializationError: no start explains the data.

        Warns:
            SamplingWarning: the best start has not converged.
        """
        key_start, key_fit = jax.random.split(
            jax.random.key(errors.check_count("random_state", self.random_state, minimum=0))
        )
        rows = _rows(X)
        emission = self._emission(rows)
        series, counts = _cut(_of_event(rows, emission), lengths)
        if isinstance(self.emission, str):  # no start of the user's
            data = observe(emission, series, lengths=counts)
            flat = data.ys.reshape(-1, *data.ys.shape[2:])
            emission = eqx.filter_jit(emission.guess)(key_start, flat, data.is_seen.reshape(-1), None)
        priors = {"initial_prior": self.initial_prior, "transition_prior": self.transition_prior}
        found = HiddenMarkovModel(emission, **priors).fit(
            key_fit,
            series,
            lengths=counts,
            num_starts=self.n_starts,
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
        )
        self.model_ = found.model
        self._shape_in = rows.shape[1:]
        history = np.asarray(found.history)[: int(found.num_iterations)]
        self.monitor_ = HMMMonitor(bool(found.is_converged), history.tolist(), np.asarray(found.objectives).tolist())
        self.startprob_, self.transmat_ = np.asarray(found.model.initial), np.asarray(found.model.transition)
        self._name_parameters(found.model.emission)
        return self

    def predict(self, X: Any, lengths: Any = None) -> np.ndarray:
        """States, shape (n,), given the whole sequences; -1 where the data are impossible. See `algorithm`."""
        return self.decode(X, lengths)[1]

    def decode(self, X: Any, lengths: Any = None, algorithm: str | None = None) -> tuple[float, np.ndarray]:
        """States given the whole sequences, and how good they are.

        Args:
            X, lengths: as of `fit`.
            algorithm: "viterbi" or "map"; by default what the estimator was made with.

        Returns:
            The log joint density of path and data for "viterbi", the expected number of right states for "map"; and
            states, shape (n,).
        """
        algorithm = self.algorithm if algorithm is None else algorithm
        errors.check_choice("algorithm", algorithm, ALGORITHMS)
        series, counts = self._series(X, lengths)
        if algorithm == "viterbi":
            best = self.model_.viterbi(series, lengths=counts)
            return float(jnp.sum(best.log_joint)), _join(best.path, counts)
        proba = self.predict_proba(X, lengths)
        return float(proba.max(1).sum()), np.where(proba.sum(1) > 0, proba.argmax(1), -1).astype(np.int32)

    def predict_proba(self, X: Any, lengths: Any = None) -> np.ndarray:
        """P(x_t = k | the whole sequence), shape (n, K): it looks ahead; `filter_proba` does not."""
        series, counts = self._series(X, lengths)
        return _join(jnp.exp(self.model_.smooth(series, lengths=counts).log_smoothed), counts)

    def filter_proba(self, X: Any, lengths: Any = None) -> np.ndarray:
        """P(x_t = k | the sequence until t), shape (n, K): what was known at the time."""
        series, counts = self._series(X, lengths)
        return _join(jnp.exp(self.model_.filter(series, lengths=counts).log_filtered), counts)

    def forecast(self, X: Any, horizon: int, lengths: Any = None) -> np.ndarray:
        """Probabilities of the states after the end of X.

        The mean of the next observations is their product with `means_`.

        Args:
            X, lengths: as of `fit`.
            horizon: how many steps ahead.

        Returns:
            Shape (horizon, K); of several sequences, (len(lengths), horizon, K).
        """
        series, counts = self._series(X, lengths)
        log_filtered = self.model_.filter(series, lengths=counts).log_filtered
        last = jnp.take_along_axis(log_filtered, (counts - 1)[:, None, None], axis=1)[:, 0]
        ahead = np.exp(np.asarray(hmm_forecast(last, self.model_.log_transition, horizon)))
        return ahead[0] if lengths is None else ahead

    def score(self, X: Any, lengths: Any = None) -> float:
        """Log likelihood of all sequences together."""
        series, counts = self._series(X, lengths)
        return float(jnp.sum(self.model_.log_prob(series, lengths=counts)))

    def score_samples(self, X: Any, lengths: Any = None) -> tuple[float, np.ndarray]:
        """`score` and `predict_proba` by one pass."""
        series, counts = self._series(X, lengths)
        smoothed = self.model_.smooth(series, lengths=counts)
        return float(jnp.sum(smoothed.log_evidence)), _join(jnp.exp(smoothed.log_smoothed), counts)

    def sample(self, n_samples: int = 1, random_state: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A sequence simulated: (X, states)."""
        self._check_fitted()
        states, ys = self.model_.simulate(self.random_state if random_state is None else random_state, n_samples)
        return np.asarray(ys).reshape(n_samples, *self._shape_in), np.asarray(states)

    def aic(self, X: Any, lengths: Any = None) -> float:
        """Akaike's criterion on X: the lower the better."""
        return -2 * self.score(X, lengths) + 2 * self._num_free()

    def bic(self, X: Any, lengths: Any = None) -> float:
        """Schwarz's criterion on X, whose rows that are missing do not count: the lower the better."""
        series, counts = self._series(X, lengths)
        num_rows = int(observe(self.model_.emission, series, lengths=counts).is_seen.sum())
        return -2 * self.score(X, lengths) + float(np.log(num_rows)) * self._num_free()

    def __repr__(self) -> str:
        given = inspect.signature(type(self)).parameters
        params = {name: value for name, value in self.get_params().items() if value is not given[name].default}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in params.items())})"

    def __sklearn_tags__(self) -> Any:
        # who calls this has it
        from sklearn.utils import InputTags, Tags, TargetTags  # pyright: ignore[reportMissingImports]

        return Tags(None, TargetTags(required=False), input_tags=InputTags(one_d_array=True, allow_nan=True))

    def _emission(self, rows: np.ndarray) -> Emission:
        if isinstance(self.emission, Emission):
            if self.emission.needs_covariates:
                raise ValueError("emission must need no covariates; with them use HiddenMarkovModel")
            if self.emission.num_states != self.n_components:
                raise ValueError(
                    f"emission must have n_components={self.n_components} states, got {self.emission.num_states}"
                )
            return self.emission
        errors.check_choice("emission", self.emission, EMISSIONS)
        num_states = errors.check_count("n_components", self.n_components)
        shape = (num_states, *rows.shape[1:])
        ones = np.ones(shape)
        if self.emission == "gaussian":
            d = shape[-1]
            trils = {"diagonal": ones, "full": np.broadcast_to(np.eye(d), (*shape, d)), "tied": np.eye(d)}
            errors.check_choice("covariance", self.covariance, tuple(trils))
            return Gaussian(np.zeros(shape), trils[self.covariance], self.prior, covariance=self.covariance)
        if self.emission == "poisson":
            return Poisson(ones, self.prior)
        every = np.ones(num_states)
        if self.emission == "categorical":
            return Categorical(np.full((num_states, _num_categories(rows)), 1.0 / _num_categories(rows)), self.prior)
        if self.prior is not None:
            raise ValueError(f"prior must be None for emission={self.emission!r}, which has none, got {self.prior!r}")
        if self.emission == "gamma":
            return Gamma(every, every)
        if self.emission == "student_t":
            return StudentT(5.0 * every, 0.0 * every, every)
        return VonMises(0.0 * every, every)

    def _series(self, X: Any, lengths: Any) -> tuple[Array, Array]:
        self._check_fitted()
        rows = _rows(X)
        if rows.shape[1:] != self._shape_in:
            raise ValueError(f"X must have rows of shape {self._shape_in}, as in fit, got {rows.shape[1:]}")
        return _cut(_of_event(rows, self.model_.emission), lengths)

    def _check_fitted(self) -> None:
        if not hasattr(self, "model_"):
            raise ValueError("the estimator must be fitted before it is used: call fit")

    def _name_parameters(self, emission: Emission) -> None:
        named: dict[str, Array] = {}
        if isinstance(emission, Gaussian):
            tril = emission.scale_tril
            covars = tril**2 if emission.covariance == "diagonal" else tril @ jnp.swapaxes(tril, -1, -2)
            named = {"means_": emission.mean, "covars_": covars}
        elif isinstance(emission, Poisson):
            named = {"rates_": emission.rate}
        elif isinstance(emission, Categorical):
            named = {"emissionprob_": emission.probs}
        for name, value in named.items():
            setattr(self, name, np.asarray(value))

    def _num_free(self) -> int:
        num_states = self.model_.num_states
        return num_states - 1 + num_states * (num_states - 1) + _num_free(self.model_.emission)


def _num_free(emission: Emission) -> int:
    """How many numbers of the emission are learnt freely."""
    if isinstance(emission, Mixture):
        return emission.probs.size - emission.num_states + _num_free(emission.components)
    if isinstance(emission, Categorical):
        return emission.probs.size - emission.num_states
    if isinstance(emission, Gaussian) and emission.covariance != "diagonal":
        d = emission.mean.shape[-1]
        return emission.mean.size + d * (d + 1) // 2 * (emission.scale_tril.size // d**2)
    fixed = emission.num_states if isinstance(emission, StudentT) and emission.is_df_fixed else 0
    return sum(value.size for value in parameters_of(emission).values()) - fixed


def _rows(X: Any) -> np.ndarray:
    try:
        rows = np.asarray(X, float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"X must be an array of numbers, shape (n,) or (n, d), got {type(X).__name__}") from error
    if rows.ndim not in (1, 2) or not rows.size:
        raise ValueError(
            f"X must have shape (n,) or (n, d), sequences one below the other with their lengths, got {rows.shape}"
        )
    return rows


def _of_event(rows: np.ndarray, emission: Emission) -> np.ndarray:
    """Rows as the emission takes them: a single column may stand for numbers, and numbers for a single column."""
    if emission.event_ndim == 0 and rows.ndim == 2:
        if rows.shape[1] != 1:
            raise ValueError(f"X must have one column for {type(emission).__name__} of numbers, got {rows.shape[1]}")
        return rows[:, 0]
    return rows[:, None] if rows.ndim == emission.event_ndim == 1 else rows


def _cut(rows: np.ndarray, lengths: Any) -> tuple[Array, Array]:
    """Sequences side by side, shape (B, T, ...), with NaN after the end of the shorter ones, and their lengths."""
    counts = np.asarray([len(rows)] if lengths is None else lengths)
    is_whole = counts.ndim == 1 and np.issubdtype(counts.dtype, np.integer) and counts.size
    if not is_whole or np.any(counts < 1) or counts.sum() != len(rows):
        raise ValueError(
            f"lengths must be whole numbers of at least 1 that sum to the {len(rows)} rows of X, got {lengths}"
        )
    series = np.full((len(counts), counts.max(), *rows.shape[1:]), np.nan)
    series[np.arange(counts.max()) < counts[:, None]] = rows
    return jnp.asarray(series), jnp.asarray(counts)


def _join(values: Array, counts: Array) -> np.ndarray:
    """Sequences one below the other again."""
    every = np.asarray(values)
    return every[np.arange(every.shape[1]) < np.asarray(counts)[:, None]]


def _num_categories(rows: np.ndarray) -> int:
    seen = rows[~np.isnan(rows)]
    if not seen.size or np.any(seen < 0) or np.any(seen != np.round(seen)):
        raise ValueError("X must hold whole numbers from 0 for emission='categorical', NaN where missing")
    return int(seen.max()) + 1
