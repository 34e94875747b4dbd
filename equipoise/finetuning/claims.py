"""The claims of the papers on fine-tuning and compression."""

from equipoise.finetuning import (
    claims_allora,
    claims_ba_lora,
    claims_gradnormlorp,
    claims_mosa,
    claims_pela,
    claims_sara,
    claims_sorsa,
)

MODULES = (claims_ba_lora, claims_sara, claims_gradnormlorp, claims_sorsa, claims_allora, claims_mosa, claims_pela)
CLAIMS = [claim for module in MODULES for claim in module.CLAIMS]

__all__ = ["CLAIMS"]
