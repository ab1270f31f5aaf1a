"""Tensors in, tensors out: no state, no Lightning."""

from .advantage import has_siblings, leave_one_out
from .kl import k3, kl_to_go, log_ratio, vocabulary_kl
from .linear import linear
from .logprobs import log_distribution, masked_sum, token_logprobs
from .loss import policy_gradient_loss
from .objective import objective, scalarize
from .pareto import (
    expected_utility,
    hypervolume,
    mean_inner_product,
    non_dominated,
    spearman,
)
from .simplex import (
    check_alpha,
    check_weights,
    parse_weights,
    sample_weights,
    simplex_grid,
    write_weights,
)
from .steering import (
    consistency,
    cross_fitted_envy,
    dial_criteria,
    dial_passes,
    envy,
    has_dial,
    predicted_gain,
    steering_gain,
    value_matrix,
)

__all__ = [
    "check_alpha",
    "check_weights",
    "consistency",
    "cross_fitted_envy",
    "dial_criteria",
    "dial_passes",
    "envy",
    "expected_utility",
    "has_dial",
    "has_siblings",
    "hypervolume",
    "k3",
    "kl_to_go",
    "leave_one_out",
    "linear",
    "log_distribution",
    "log_ratio",
    "masked_sum",
    "mean_inner_product",
    "non_dominated",
    "objective",
    "parse_weights",
    "policy_gradient_loss",
    "predicted_gain",
    "sample_weights",
    "scalarize",
    "simplex_grid",
    "spearman",
    "steering_gain",
    "token_logprobs",
    "value_matrix",
    "vocabulary_kl",
    "write_weights",
]
