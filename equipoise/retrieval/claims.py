"""The claims that the retrieval family checks, of all its papers."""

from equipoise.retrieval.claims_tcm import CLAIMS

__all__ = ["CLAIMS"]
