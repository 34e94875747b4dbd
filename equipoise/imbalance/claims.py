"""The claims of the papers on skewed data; each paper's stand in a file of their own."""

from equipoise.imbalance import claims_anyloss, claims_backdoor_adjustment, claims_conr, claims_sbcl

CLAIMS = [*claims_sbcl.CLAIMS, *claims_conr.CLAIMS, *claims_anyloss.CLAIMS, *claims_backdoor_adjustment.CLAIMS]
