"""Tempered and transformed kernels with one bug each."""

from bayesinf.kernels import Temper


class UntemperedEvaluation(Temper):
    """Takes the evaluation that the state holds, which is of the target, for that of the tempered target."""

    def step(self, key, state):
        after, info = self._tempered().step(key, state)
        return self._untempered(after), info
