"""The library's own methods, as they are found: on which tiny problem each is checked, and the checks that its idea excludes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.catalogue import methods
from equipoise.data.augment import Jitter
from equipoise.testing import TinyProblem, classification, multimodal, regression
from equipoise.training import Method

# Federated methods train on clients, not in ``fit``: tests/federated has checks of their own.
METHODS = {
    slug: entry.load()
    for slug, entry in methods().items()
    if entry.module.startswith("equipoise.") and not entry.module.startswith("equipoise.federated.")
}
OPTIONAL = {
    "soap": "libauc",
    "fairlearn-reductions": "fairlearn",
    **dict.fromkeys(("contrastive", "triplet", "proxy-anchor", "arcface"), "pytorch_metric_learning"),
    **dict.fromkeys(("lora", "rslora", "pissa", "dora"), "peft"),
}


class ResidualNetwork(nn.Module):
    """A linear layer, a residual branch (the feed-forward part that some adapters need), and a linear head: (N, 6) -> (N, 3)."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Linear(6, 8)
            self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
            self.branch = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
            self.head = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Tensor:
        h = self.norm(self.body(values))
        return self.head(h + self.branch(h))


PROBLEMS: dict[str, TinyProblem] = {
    "classes": classification(),
    "two classes": classification(classes=2),
    "views": replace(classification(), augment=Jitter()),
    "values": replace(regression(), loss=F.l1_loss),
    "modalities": multimodal(),
    "residual": replace(classification(), network=ResidualNetwork, norm_network=partial(ResidualNetwork, norm=True)),
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
    **dict.fromkeys(("lora", "rslora", "pissa", "dora"), Case({"rank": 2})),
    "ba-lora": Case({"rank": 2, "k": 2}, skip=micro("covariance and spectrum are those of each micro-batch")),
    "sorsa": Case({"rank": 2}),
    "allora": Case({"rank": 2}),
    "sara": Case({"threshold": 0.2, "lr": 0.05, "lambda_rank": 0.0}),
    "gradnormlorp": Case({"rank": 2}),
    "mosa": Case({"bottleneck": 4, "dropout": 0.0}, "residual"),
    **dict.fromkeys(("pela", "svd-only", "svd-finetune", "svd-distill", "low-rank-scratch"), Case(problem="residual")),
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
    ("lora", Case({"rank": 1, "alpha": 2.0, "dropout": 0.2, "target": ["body"]})),
    (
        "ba-lora",
        Case(
            {"rank": 2, "task": "nlg", "k": 2, "top_k": 2, "alpha": 1.0},
            skip={
                "accumulation": "the spectrum is that of each micro-batch",
                "ddp-equals-one": "the spectrum is that of each process's share",
            },
        ),
    ),
    ("sorsa", Case({"rank": 1, "gamma": 0.05, "dropout": 0.3, "alpha": 2.0})),
    ("allora", Case({"rank": 1, "eta": float("inf"), "target": ["body"]})),
    ("mosa", Case({"bottleneck": 4, "share": "none", "add_weight": 0.5}, "residual")),
    ("mosa", Case({"bottleneck": 4, "num_experts": 1, "reg_weight": 0.0}, "residual")),
    ("pcb-merging", Case({"form": "softmax", "coefficients": 1.5})),
    ("pcb-merging", Case({"inter": "pairwise", "clip": 0.01, "exclude": ("head",)})),
    ("dare", Case({"elect_sign": True})),
    ("sara", Case({"threshold": 0.2, "lr": 0.05, "lambda_rank": 0.0, "sparse": False})),
    ("gradnormlorp", Case({"rank": 2, "update_gap": 4, "side": "both", "target": ["body"]})),
    ("gradnormlorp", Case({"rank": 2, "mode": "adapter"})),
    ("pela", Case({"intermediate_steps": 4, "beta": 1.0, "eps": 0.0}, "residual")),
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
