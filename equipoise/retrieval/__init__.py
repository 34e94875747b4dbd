"""Retrieval: find and verify examples of classes that training has not seen, behind one distance threshold."""

from equipoise.retrieval.baselines import (
    ArcFace,
    Contrastive,
    ContrastivePenalty,
    NormalisedSoftmax,
    ProxyAnchor,
    Triplet,
    contrastive_penalty,
)
from equipoise.retrieval.metrics import map_at_r, recall_at_k, retrieval_metrics, threshold_spread
from equipoise.retrieval.open_world import open_world
from equipoise.retrieval.task import Retrieval
from equipoise.retrieval.tcm import TCM, OPISResult, TCMLoss, opis, tcm_loss

__all__ = [
    "TCM",
    "ArcFace",
    "Contrastive",
    "ContrastivePenalty",
    "NormalisedSoftmax",
    "OPISResult",
    "ProxyAnchor",
    "Retrieval",
    "TCMLoss",
    "Triplet",
    "contrastive_penalty",
    "map_at_r",
    "open_world",
    "opis",
    "recall_at_k",
    "retrieval_metrics",
    "tcm_loss",
    "threshold_spread",
]
