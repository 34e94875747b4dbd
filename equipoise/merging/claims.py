"""The claims of the merging papers."""

from equipoise.merging.claims_pcb_merging import CLAIMS

__all__ = ["CLAIMS"]
