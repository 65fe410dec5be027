"""What proves a kernel right, for anyone's kernel.

    contract(kernel, position)                          the protocol: pure, stable types, one trace, resumable
    exact_start_invariance(key, kernel, exact_sampler)  the law that is sampled does not move
    evidence_is_unbiased(key, estimate, log_evidence)   E[Zhat] = Z
    simulation_based_calibration(key, ...)              posterior ranks of true parameters are uniform
    geweke_joint(key, ...)                              the joint law of parameters and data does not move

`contract` raises an AssertionError that names the violated clauses. The statistical ones return a `Report`: a p-value,
what was compared, and `raise_if_rejected()`.
"""

from bayesinf.conformance.calibration import simulation_based_calibration as simulation_based_calibration
from bayesinf.conformance.contract import ContractError as ContractError
from bayesinf.conformance.contract import contract as contract
from bayesinf.conformance.evidence import evidence_is_unbiased as evidence_is_unbiased
from bayesinf.conformance.invariance import exact_start_invariance as exact_start_invariance
from bayesinf.conformance.joint import geweke_joint as geweke_joint
from bayesinf.conformance.report import FALSE_ALARM as FALSE_ALARM
from bayesinf.conformance.report import Report as Report
from bayesinf.conformance.report import mean_p_value as mean_p_value
