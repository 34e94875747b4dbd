"""The library's own methods, as they are found, and the checks that their ideas exclude."""

from __future__ import annotations

from equipoise.catalogue import methods

METHODS = {slug: entry.load() for slug, entry in methods().items() if entry.module.startswith("equipoise.")}

# Settings under which a method takes another path than by default.
VARIANTS: list[tuple[str, dict[str, object], dict[str, str]]] = [
    ("elr-plus", {"reweight_labels": True, "ramp_steps": 5, "mixup_alpha": 0.0}, {}),
    ("nested-dropout", {"sigma": 3.0}, {}),
    ("nested-dropout", {"dropout": 0.3}, {"space": "plain dropout has no sigma"}),
    ("co-teaching", {"pretrain_epochs": 0, "split_batch": False, "num_gradual": 2}, {}),
    ("generalized-cross-entropy", {"q": 1.0}, {}),
]

SKIPS: dict[str, dict[str, str]] = {
    "elr-plus": {"ddp-equals-one": "mixup pairs the rows of each process's share"},
    "co-teaching": {
        "modes": "stage two freezes BatchNorm (freeze_norm=False is checked by itself)",
        "permuted-rows": "the halves of a batch are chosen by position",
        "accumulation": "the small losses are chosen within each micro-batch",
        "ddp-equals-one": "the small losses are chosen within each process's share",
    },
}
