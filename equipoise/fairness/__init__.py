"""Fairness: predictions that are alike for the groups of protected attributes, and for their intersections.

The function ``distance_covariance`` is that of the module of the same name, which stays a module here.
"""

from equipoise.fairness.baselines import FairlearnReductions, Mixture, Reweighing, Unconstrained, reweighing_weights
from equipoise.fairness.distance_covariance import (
    CCdCov,
    DCov,
    DistanceCovarianceLoss,
    JdCov,
    PermutationTest,
    ccdcov,
    distance_correlation,
    independence_test,
    jdcov,
    u_centered,
)
from equipoise.fairness.generators import gerrymandering, hiring
from equipoise.fairness.metrics import (
    jensen_shannon_divergence,
    parity_gap,
    ranked_probability_score,
    unfairness,
)
from equipoise.fairness.protected import ProtectedEncoder
from equipoise.fairness.task import Fairness

__all__ = [
    "CCdCov",
    "DCov",
    "DistanceCovarianceLoss",
    "FairlearnReductions",
    "Fairness",
    "JdCov",
    "Mixture",
    "PermutationTest",
    "ProtectedEncoder",
    "Reweighing",
    "Unconstrained",
    "ccdcov",
    "distance_correlation",
    "gerrymandering",
    "hiring",
    "independence_test",
    "jdcov",
    "jensen_shannon_divergence",
    "parity_gap",
    "ranked_probability_score",
    "reweighing_weights",
    "u_centered",
    "unfairness",
]
