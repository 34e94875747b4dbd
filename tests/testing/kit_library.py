"""The library's own methods, as they are found: on which tiny problem each is checked, and the checks that its idea excludes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from torch.nn import functional as F

from equipoise.catalogue import methods
from equipoise.data.augment import Jitter
from equipoise.testing import TinyProblem, classification, multimodal, regression
from equipoise.training import Method

METHODS = {slug: entry.load() for slug, entry in methods().items() if entry.module.startswith("equipoise.")}
OPTIONAL = {
    "soap": "libauc",
    "fairlearn-reductions": "fairlearn",
    **dict.fromkeys(("contrastive", "triplet", "proxy-anchor", "arcface"), "pytorch_metric_learning"),
}
PROBLEMS: dict[str, TinyProblem] = {
    "classes": classification(),
    "two classes": classification(classes=2),
    "views": replace(classification(), augment=Jitter()),
    "values": replace(regression(), loss=F.l1_loss),
    "modalities": multimodal(),
}


@dataclass(frozen=True)
class Case:
    """A method under test: settings other than its defaults, the problem, and the reason by name of a skipped check."""

    settings: dict[str, Any] = field(default_factory=dict)
    problem: str = "classes"
    skip: dict[str, str] = field(default_factory=dict)


def micro(reason: str) -> dict[str, str]:
    return {"accumulation": reason}


PAIRS = micro("pairs are formed within each micro-batch")
# The methods that need more than the defaults on the default problem.
CASES: dict[str, Case] = {
    "elr-plus": Case(skip={"ddp-equals-one": "mixup pairs the rows of each process's share"}),
    "co-teaching": Case(
        skip={
            "modes": "stage two freezes BatchNorm (freeze_norm=False is checked by itself)",
            "permuted-rows": "the halves of a batch are chosen by position",
            "accumulation": "the small losses are chosen within each micro-batch",
            "ddp-equals-one": "the small losses are chosen within each process's share",
        }
    ),
    "sbcl": Case(
        {"warm_up": 1, "step": 1, "min_size": 4, "projection": 4},
        "views",
        {**PAIRS, "data-order": "every position stands in the batch once for each view"},
    ),
    "anyloss": Case(problem="two classes", skip=micro("the score of a batch is no mean over its examples")),
    "tuned-threshold": Case(problem="two classes"),
    "soap": Case(problem="two classes", skip=PAIRS),
    "l1": Case(problem="values"),
    "mse": Case(problem="values"),
    "lds": Case({"bin_width": 0.5}, "values"),
    "fds": Case({"bin_width": 0.5}, "values"),
    "balanced-mse": Case(problem="values", skip=micro("the sum runs over the labels of each micro-batch")),
    "conr": Case({"window": 0.5, "temperature": 0.5}, "values", PAIRS),
    **dict.fromkeys(
        ("tcm", "contrastive-penalty", "contrastive", "triplet", "proxy-anchor", "arcface"), Case(skip=PAIRS)
    ),
    **dict.fromkeys(
        ("distance-covariance", "jdcov", "dcov"),
        Case(skip=micro("the measure of a batch is no mean over its micro-batches")),
    ),
    "fairlearn-reductions": Case(
        {"iterations": 2, "epochs": 1},
        "two classes",
        {
            "accumulation": "the mixture is trained in whole batches",
            "random-state": "its trainings are runs of their own, which seed torch's generator and put it back",
        },
    ),
    "joint": Case(problem="modalities"),
    "unimodal": Case(problem="modalities"),
    "ogm-ge": Case(problem="modalities"),
    "arl": Case({"start_epoch": 0}, "modalities", micro("the factors are those of each micro-batch")),
    "aux": Case({"start_epoch": 0}, "modalities"),
    "aux-scaled": Case({"start_epoch": 0}, "modalities"),
}
# Settings under which a method takes another path than by default.
VARIANTS: list[tuple[str, Case]] = [
    ("elr-plus", Case({"reweight_labels": True, "ramp_steps": 5, "mixup_alpha": 0.0})),
    ("nested-dropout", Case({"sigma": 3.0})),
    ("nested-dropout", Case({"dropout": 0.3}, skip={"space": "plain dropout has no sigma"})),
    (
        "co-teaching",
        Case({"pretrain_epochs": 0, "split_batch": False, "num_gradual": 2}, skip=CASES["co-teaching"].skip),
    ),
    ("generalized-cross-entropy", Case({"q": 1.0})),
    ("class-balanced", Case({"beta": 1.0})),
    ("focal", Case({"gamma": 1.0, "beta": 0.99})),
    ("conr", Case({**CASES["conr"].settings, "weights": "inverse"}, "values", PAIRS)),
    ("balanced-mse", Case({"learn": False}, "values", CASES["balanced-mse"].skip)),
    ("backdoor-adjustment", Case({"space": "probs", "adapter": 0})),
    ("anyloss", Case({"metric": "gmean"}, "two classes", CASES["anyloss"].skip)),
]


def case_of(slug: str) -> Case:
    return CASES.get(slug, Case())


def missing(slug: str) -> str | None:
    """The optional package that a method needs and that is not installed."""
    package = OPTIONAL.get(slug)
    return package if package is not None and find_spec(package) is None else None


def available() -> dict[str, type[Method]]:
    """The methods whose packages are installed."""
    return {slug: method for slug, method in METHODS.items() if missing(slug) is None}
