"""The claims of the papers on federated training; each paper's stand in a file of their own."""

from equipoise.federated import (
    claims_ccvr,
    claims_fedloge,
    claims_fedspeed,
    claims_fedtiny,
    claims_flag_aggregator,
    claims_gifd,
)

MODULES = (claims_fedspeed, claims_ccvr, claims_fedloge, claims_fedtiny, claims_flag_aggregator, claims_gifd)
CLAIMS = [claim for module in MODULES for claim in module.CLAIMS]

__all__ = ["CLAIMS"]
