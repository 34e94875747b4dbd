"""What a practitioner tries first: normalised softmax, contrastive, triplet, proxy-anchor and ArcFace losses.

TCM must be held against these, tuned as carefully as itself. With unit embeddings z, a unit direction w_c for each class and
the cosine s of a pair:

    normalised softmax     cross-entropy of the logits  scale <z, w_c>                          the retrieval task's own loss
    contrastive penalty    mean over all positive pairs of max(m+ - s, 0) + mean over all negative pairs of max(s - m-, 0)
    contrastive            max(||z - z'|| - m+, 0) for positive and max(m- - ||z - z'||, 0) for negative pairs
    triplet                max(||a - p|| - ||a - n|| + margin, 0) for anchors a, positives p and negatives n
    proxy-anchor           softplus of the log-sum-exp of all a proxy's positives, and of all its negatives
    ArcFace                normalised softmax with a margin added to the angle of the right class

The contrastive penalty is TCM but for one thing: its means run over all pairs, so that its pull fades as fewer are hard. It
tells what TCM's means over the hard pairs are worth. The losses from "contrastive" on are those of pytorch-metric-learning,
`pip install 'equipoise[peers]'`.

## When to use
Normalised softmax first: one setting that matters, the scale, and strong where classes have few examples or many. Proxy-anchor
and ArcFace for many classes; contrastive and triplet losses where there are only pairs, or classes too many for proxies.

## When not
Contrastive and triplet losses on batches in which no class occurs twice: they then teach nothing. ArcFace with a large margin on
little data: training may not start.

## Cost
Normalised softmax: N x C cosines. Contrastive: N^2 distances. Triplet: all N^2 K triplets of a batch are listed. Proxy losses:
N x C cosines and C x D further weights.

## In a distributed run
The embeddings of all processes are gathered, with gradient, and the gradients of proxies averaged: 2 processes equal 1.

## Source
Zhai, Wu: Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019, arXiv:1811.12649. Hadsell, Chopra, LeCun, CVPR
2006. Schroff, Kalenichenko, Philbin, CVPR 2015, arXiv:1503.03832. Kim, Kim, Cho, Kwak, CVPR 2020, arXiv:2003.13911. Deng, Guo,
Xue, Zafeiriou, CVPR 2019, arXiv:1801.07698. On tuning them alike: Musgrave, Belongie, Lim, ECCV 2020, arXiv:2003.08505.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.errors import MissingDependencyError, check_choice, check_range, refuse
from equipoise.retrieval.tcm import TCM, check_margins, hinges, mean_over
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import Choice, LogUniform, Space, Uniform

PEERS = ("contrastive", "triplet", "proxy-anchor", "arcface")
MINING = ("all", "semihard")


def installed() -> bool:
    """Whether pytorch-metric-learning can be imported."""
    return find_spec("pytorch_metric_learning") is not None


# -- the functional core ----------------------------------------------------------------------------------------------
def contrastive_penalty(
    embeddings: Tensor,
    labels: Tensor,
    *,
    pos_margin: float = 0.9,
    neg_margin: float = 0.5,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
) -> Tensor:
    """The contrastive loss on cosines, averaged over all pairs, a scalar. Arguments as for ``tcm_loss``."""
    check_margins(pos_margin, neg_margin, pos_weight, neg_weight)
    (positive, _, too_far), (negative, _, too_near) = hinges(embeddings, labels, pos_margin, neg_margin)
    return pos_weight * mean_over(too_far, positive) + neg_weight * mean_over(too_near, negative)


# -- the methods ------------------------------------------------------------------------------------------------------
class NormalisedSoftmax(Method):
    """The retrieval task's own loss and nothing else: cross-entropy of scaled cosines.

    Has no hooks and no settings; the scale is tuned with the task's other settings, for every arm.
    """

    name = "normalised-softmax"
    paper = Paper(
        "Classification is a Strong Baseline for Deep Metric Learning",
        "Zhai, Wu",
        "BMVC 2019",
        "https://arxiv.org/abs/1811.12649",
    )
    neutral: ClassVar[Mapping[str, Any] | None] = {}


class ContrastivePenalty(TCM):
    """TCM's margins with means over all pairs instead of the hard ones: the contrastive loss on cosines as a penalty.

    Settings as for ``TCM``; its weights are tuned over a wider range, since its means are smaller.
    """

    name = "contrastive-penalty"
    paper = Paper(
        "Dimensionality Reduction by Learning an Invariant Mapping",
        "Hadsell, Chopra, LeCun",
        "CVPR 2006",
    )
    space: ClassVar[Space] = {**TCM.space, "pos_weight": LogUniform(0.3, 30.0), "neg_weight": LogUniform(0.3, 30.0)}

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None  # the run captures them, since needs_features
        return contrastive_penalty(*gather_rows(output.features, batch.targets), **self.settings())


class _Peer(Method):
    """A loss of pytorch-metric-learning on the features that enter the head, in place of the task's loss.

    None has a neutral setting, since none is the task's loss at any. After ``prepare``, ``criterion`` is the loss.
    """

    needs_features = True
    proxy_rate: float = 1.0
    criterion: nn.Module

    def __init__(self) -> None:
        if not installed():
            raise MissingDependencyError(
                f"{self.name} needs pytorch-metric-learning, which is not installed: pip install 'equipoise[peers]'"
            )

    def build(self, classes: int, width: int) -> nn.Module:
        """The loss for so many classes and coordinates."""
        raise NotImplementedError

    def prepare(self, run: Run) -> None:
        weight = getattr(run.head(), "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            refuse(
                "head", type(run.head()).__name__, f"have a weight (classes, features), which {self.name} is sized by"
            )
        seed = int(torch.randint(2**31, (), generator=run.new_generator(self)))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            part = self.build(*weight.shape)
        proxies = any(True for _ in part.parameters())
        self.criterion = run.register(self, "criterion", part.to(weight.dtype), optimize=proxies)

    def configure_optimizer(self, run: Run, optimizer: Optimizer) -> Optimizer:
        if self.proxy_rate != 1:
            proxies = set(self.criterion.parameters())
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p not in proxies]
            optimizer.add_param_group(
                {"params": list(proxies), "lr": self.proxy_rate * optimizer.param_groups[0]["lr"]}
            )
        return optimizer

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None  # the run captures them, since needs_features
        value = self.criterion(*gather_rows(output.features, batch.targets))
        return value + 0 * output.prediction.sum()  # DistributedDataParallel waits for a gradient of the head too

    def after_backward(self, run: Run) -> None:
        if run.accelerator.num_processes > 1:
            for proxies in self.criterion.parameters():
                proxies.grad = run.accelerator.reduce(proxies.grad, "mean")


class Contrastive(_Peer):
    """Contrastive loss: same-class pairs nearer than one distance, others farther than another.

    pos_margin, neg_margin: Euclidean distances of unit embeddings in [0, 2], pos_margin < neg_margin. Averaged over the pairs on
    the wrong side. Replaces the task's loss, so that there is no neutral setting; needs the extra ``equipoise[peers]``.
    """

    name = "contrastive"
    paper = Paper("Dimensionality Reduction by Learning an Invariant Mapping", "Hadsell, Chopra, LeCun", "CVPR 2006")
    space: ClassVar[Space] = {"pos_margin": Uniform(0.0, 0.6), "neg_margin": Uniform(0.7, 1.3)}

    def __init__(self, pos_margin: float = 0.0, neg_margin: float = 1.0) -> None:
        check_range("pos_margin", pos_margin, 0, 2)
        check_range("neg_margin", neg_margin, pos_margin, 2, open_low=True)
        self.pos_margin, self.neg_margin = pos_margin, neg_margin
        super().__init__()

    def build(self, classes: int, width: int) -> nn.Module:
        from pytorch_metric_learning.losses import ContrastiveLoss

        return ContrastiveLoss(self.pos_margin, self.neg_margin)


class Triplet(_Peer):
    """Triplet loss: each example nearer to its own class than to any other by a margin.

    margin: of Euclidean distances of unit embeddings, in [0, 2]. mining: which of the triplets that violate it count, "all" or
    "semihard" (the negative still farther than the positive). Replaces the task's loss, so that there is no neutral setting;
    needs the extra ``equipoise[peers]``.
    """

    name = "triplet"
    paper = Paper(
        "FaceNet: A Unified Embedding for Face Recognition and Clustering",
        "Schroff, Kalenichenko, Philbin",
        "CVPR 2015",
        "https://arxiv.org/abs/1503.03832",
    )
    space: ClassVar[Space] = {"margin": LogUniform(0.05, 0.8), "mining": Choice(MINING)}

    def __init__(self, margin: float = 0.2, mining: str = "all") -> None:
        check_range("margin", margin, 0, 2)
        check_choice("mining", mining, MINING)
        self.margin, self.mining = margin, mining
        super().__init__()

    def build(self, classes: int, width: int) -> nn.Module:
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import TripletMarginMiner

        return _Mined(TripletMarginLoss(self.margin), TripletMarginMiner(self.margin, type_of_triplets=self.mining))


class _Mined(nn.Module):
    """A loss on the tuples that a miner finds."""

    def __init__(self, loss: nn.Module, miner: nn.Module) -> None:
        super().__init__()
        self.of, self.miner = loss, miner

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return self.of(embeddings, labels, self.miner(embeddings, labels))


class ProxyAnchor(_Peer):
    """Proxy-anchor loss: one learned proxy a class, which pulls and pushes hard examples most.

    margin: of cosines, in [0, 1]. alpha: sharpness, > 0. proxy_rate: learning rate of the proxies as a multiple of the model's,
    > 0; the paper uses 100. Replaces the task's loss, so that there is no neutral setting; needs the extra ``equipoise[peers]``.
    """

    name = "proxy-anchor"
    paper = Paper(
        "Proxy Anchor Loss for Deep Metric Learning",
        "Kim, Kim, Cho, Kwak",
        "CVPR 2020",
        "https://arxiv.org/abs/2003.13911",
    )
    space: ClassVar[Space] = {
        "margin": Uniform(0.05, 0.4),
        "alpha": LogUniform(8.0, 64.0),
        "proxy_rate": LogUniform(1.0, 100.0),
    }

    def __init__(self, margin: float = 0.1, alpha: float = 32.0, proxy_rate: float = 100.0) -> None:
        check_range("margin", margin, 0, 1)
        check_range("alpha", alpha, 0, open_low=True)
        check_range("proxy_rate", proxy_rate, 0, open_low=True)
        self.margin, self.alpha, self.proxy_rate = margin, alpha, proxy_rate
        super().__init__()

    def build(self, classes: int, width: int) -> nn.Module:
        from pytorch_metric_learning.losses import ProxyAnchorLoss

        return ProxyAnchorLoss(classes, width, margin=self.margin, alpha=self.alpha)


class ArcFace(_Peer):
    """ArcFace: normalised softmax with a margin added to the angle between an embedding and its class.

    margin: degrees in [0, 90]; 28.6 (half a radian) is the paper's. scale: of the cosines, > 0. Replaces the task's loss with
    proxies of its own, so that there is no neutral setting; needs the extra ``equipoise[peers]``.
    """

    name = "arcface"
    paper = Paper(
        "ArcFace: Additive Angular Margin Loss for Deep Face Recognition",
        "Deng, Guo, Xue, Zafeiriou",
        "CVPR 2019",
        "https://arxiv.org/abs/1801.07698",
    )
    space: ClassVar[Space] = {"margin": Uniform(3.0, 30.0), "scale": LogUniform(8.0, 64.0)}

    def __init__(self, margin: float = 28.6, scale: float = 64.0) -> None:
        check_range("margin", margin, 0, 90)
        check_range("scale", scale, 0, open_low=True)
        self.margin, self.scale = margin, scale
        super().__init__()

    def build(self, classes: int, width: int) -> nn.Module:
        from pytorch_metric_learning.losses import ArcFaceLoss

        return ArcFaceLoss(classes, width, margin=self.margin, scale=self.scale)
