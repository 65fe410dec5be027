"""Tempered and transformed kernels with one bug each."""

import dataclasses

import bayesinf as bi
from bayesinf.kernels import ReplicaExchange, Temper, Transformed, transformed


class UntemperedEvaluation(Temper):
    """Takes the evaluation that the state holds, which is of the target, for that of the tempered target."""

    def step(self, key, state):
        after, info = self._tempered().step(key, state)
        return self._untempered(after), info


class SwapsUphill(ReplicaExchange):
    """Exchanges with the sign of the log ratio turned."""

    def _log_ratios(self, positions, evaluations):
        return -super()._log_ratios(positions, evaluations)


class SwapsPositionsAlone(ReplicaExchange):
    """Leaves the evaluations behind when it exchanges positions."""

    def _swap(self, is_swapped, positions, evaluations):
        return super()._swap(is_swapped, positions, evaluations)[0], evaluations


class ForgetsBeta(ReplicaExchange):
    """Moves every replica on the target itself, and exchanges them as if they had been tempered."""

    def _move(self, kernel, *args):
        return super()._move(dataclasses.replace(kernel, beta=1.0), *args)


class WithoutJacobian(Transformed):
    """Moves z by the density of x."""

    def _pulled(self):
        target = self.target

        def density(z, data):
            return data[0].logdensity(transformed._apply(data[1], z)[0])

        return self.kernel.with_target(bi.Target(density, (target, self.transform)))
