"""The claims of the papers on several modalities."""

from equipoise.multimodal.claims_arl import CLAIMS

__all__ = ["CLAIMS"]
