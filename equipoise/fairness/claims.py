"""The claims of the fairness papers."""

from equipoise.fairness.claims_distance_covariance import CLAIMS

__all__ = ["CLAIMS"]
