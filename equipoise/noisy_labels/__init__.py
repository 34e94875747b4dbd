"""Noisy labels: part of the training labels is wrong."""

from equipoise.noisy_labels.baselines import (
    CrossEntropy,
    GCELoss,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    generalized_cross_entropy,
)
from equipoise.noisy_labels.elr import (
    ELR,
    ELRLoss,
    ELRPlus,
    elr_penalty,
    elr_plus_loss,
    sigmoid_rampup,
    update_soft_targets,
)
from equipoise.noisy_labels.nested_dropout import (
    CoTeaching,
    NestedDropout,
    NestedDropoutMethod,
    PrefixSelection,
    forget_rate_schedule,
    nested_dropout_probs,
    prefix_logits,
    select_keep,
    small_loss_indices,
)
from equipoise.noisy_labels.ps_kd import PSKD, PSKDLoss, refine_targets, soft_cross_entropy
from equipoise.noisy_labels.task import NoisyLabels
from equipoise.noisy_labels.two_networks import LogitAverage

__all__ = [
    "ELR",
    "PSKD",
    "CoTeaching",
    "CrossEntropy",
    "ELRLoss",
    "ELRPlus",
    "GCELoss",
    "GeneralizedCrossEntropy",
    "LabelSmoothing",
    "LogitAverage",
    "NestedDropout",
    "NestedDropoutMethod",
    "NoisyLabels",
    "PSKDLoss",
    "PrefixSelection",
    "elr_penalty",
    "elr_plus_loss",
    "forget_rate_schedule",
    "generalized_cross_entropy",
    "nested_dropout_probs",
    "prefix_logits",
    "refine_targets",
    "select_keep",
    "sigmoid_rampup",
    "small_loss_indices",
    "soft_cross_entropy",
    "update_soft_targets",
]
