"""TCM: the threshold-consistent margin loss, and OPIS, which measures what it is for.

A search or verification service has one distance threshold below which two items match. Metric learning gives classes of very
different spread, so that the same threshold accepts too much of one class and too little of another. TCM adds to any embedding
loss a penalty on the pairs that lie on the wrong side of two absolute cosine margins, the same for all classes.

With unit embeddings `z = e / ||e||`, cosines `s_ij = <z_i, z_j>`, positive pairs (equal label, i != j) and negative pairs,

    H+  =  positive pairs with s <= m+          H-  =  negative pairs with s >= m-          (the hard pairs)
    L   =  lambda+ * mean over H+ of (m+ - s)  +  lambda- * mean over H- of (s - m-)

A mean over no pair is 0. The mean is over the hard pairs only: the pull on each grows as fewer are hard, so that the last
unruly classes are not forgotten.

OPIS, the operating-point inconsistency score, looks at the result. For class i and threshold d let `psi_i(d)` be the share of
pairs within the class at distance <= d (1 - false rejects), and `phi_i(d)` the share of pairs of a member and a non-member at
distance > d (1 - false accepts). Then

    U_i(d)  =  (1 + c^2) phi psi / (c^2 phi + psi)                                      the class's utility, an F-score
    OPIS    =  mean over classes i of the mean over d in [d_min, d_max] of (U_i(d) - mean over classes of U(d))^2

over the thresholds that matter, by default those between which the false accept rate of all pairs is 1 % and 10 %. It lies in
[0, 1/4]; 0 says that all classes behave alike at every threshold.

## When to use
Open-world retrieval and verification behind one global threshold: faces, products, animals, signatures, duplicates. The classes
at test time are new, and each must be accepted and rejected alike.

## When not
Retrieval by rank, without a threshold. Before the scale of a softmax loss has been tuned: in the evidence here a lower scale
lowers OPIS as much as TCM does, at more recall. On a base loss that works on pairs itself (supervised contrastive), where no gain
was seen. Embeddings that do not transfer: from scratch on 22 classes of rotated images TCM raised the OPIS of unseen classes by
28 %. Batches in which no class occurs twice have no positive pairs: draw P classes x K examples
(`equipoise.training.sampler.ClassBatches`).

A low OPIS is no merit by itself: a model that maps everything to one point has OPIS 0. Read it beside recall, and over one
range of thresholds shared by all models as well as over each model's own, since a model can lower its OPIS by moving its range.

## Cost
The loss: one product of the batch's embeddings, O(N^2 D), and elementwise work on N x N numbers; no state. OPIS: O(n^2 (D +
log G)) for n test examples and G thresholds, once an evaluation, in blocks of rows: memory O(n) times the block.

## In a distributed run
`TCMLoss` gathers the embeddings of all processes, with gradient, so that pairs across processes count: 2 processes equal 1.
Reference embeddings are taken as they are, since proxies and memories are the same on every process.

## Source
Zhang, Xu, Tang, Fang, Wu, Tighe, Xing: Threshold-Consistent Margin Loss for Open-World Deep Metric Learning. ICLR 2024,
arXiv:2307.04047. Margins and weights as in the paper; the Euclidean distance, the trapezoid rule and the form of epsilon-OPIS
are this library's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from equipoise.errors import check_integer, check_range, refuse
from equipoise.retrieval.pairs import PairDistances, check_pairs, unit_rows
from equipoise.training.batch import Batch, Output
from equipoise.training.gather import gather_rows
from equipoise.training.losses import precise
from equipoise.training.method import Method, Paper
from equipoise.training.run import Run
from equipoise.training.space import LogUniform, Space, Uniform


# -- the functional core: the loss ------------------------------------------------------------------------------------
def hinges(
    embeddings: Tensor,
    labels: Tensor,
    pos_margin: float,
    neg_margin: float,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """What the losses with two cosine margins are made of: for positive pairs, then for negative ones, three (N, M) tensors.

    pairs: which of the pairs they are. hard: those on the wrong side of the margin. hinge: by how much, 0 for all others.
    The arguments are those of ``tcm_loss``.
    """
    check_pairs(embeddings, labels)
    rows = unit_rows(precise(embeddings))
    if (ref_embeddings is None) != (ref_labels is None):
        absent = "ref_labels" if ref_labels is None else "ref_embeddings"
        refuse(absent, None, "be given with the other: references are embeddings and their labels")
    if ref_embeddings is not None and ref_labels is not None:
        check_pairs(ref_embeddings, ref_labels, "ref_")
        if ref_embeddings.shape[1] != embeddings.shape[1]:
            refuse("ref_embeddings", tuple(ref_embeddings.shape), f"have {embeddings.shape[1]} columns, as embeddings")
        columns = unit_rows(ref_embeddings.to(rows.dtype))
        same = labels[:, None] == ref_labels
        positive, negative = same, ~same
    else:
        columns = rows
        same = labels[:, None] == labels
        positive, negative = same & ~torch.eye(len(labels), dtype=torch.bool, device=same.device), ~same
    with torch.autocast(rows.device.type, enabled=False):  # bfloat16 has three digits, too few for a margin
        cosines = rows @ columns.T
    # "Not above" instead of "below": a NaN is hard, and shows.
    too_far, too_near = positive & ~(cosines > pos_margin), negative & ~(cosines < neg_margin)
    return (
        (positive, too_far, torch.where(too_far, pos_margin - cosines, 0)),
        (negative, too_near, torch.where(too_near, cosines - neg_margin, 0)),
    )


def mean_over(values: Tensor, pairs: Tensor) -> Tensor:
    """The sum of all values over the number of ``pairs``; 0, with zero gradient, where there is none."""
    return values.sum() / pairs.sum().clamp(min=1)


def tcm_loss(
    embeddings: Tensor,
    labels: Tensor,
    *,
    pos_margin: float = 0.9,
    neg_margin: float = 0.5,
    pos_weight: float = 1.0,
    neg_weight: float = 1.0,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
) -> Tensor:
    """The threshold-consistent margin loss, a scalar in [0, (1 + pos_margin) pos_weight + (1 - neg_margin) neg_weight].

    >>> embeddings = torch.tensor([[0.0, 1.0], [0.43, 0.9], [1.0, 0.0], [0.5, 0.5]])
    >>> round(tcm_loss(embeddings, torch.tensor([0, 0, 1, 1])).item(), 6)
    0.517876

    embeddings: (N, D), of any norm. labels: (N,) integers. pos_margin, neg_margin: cosines in [-1, 1], pos_margin > neg_margin.
    pos_weight, neg_weight: >= 0. ref_embeddings, ref_labels: (M, D) and (M,), proxies or a memory; the pairs are then those of
    a batch row and a reference row, all N x M of them (do not pass the batch itself). Half precision is computed in float32.
    Raises ``ArgumentError`` for anything else.
    """
    check_margins(pos_margin, neg_margin, pos_weight, neg_weight)
    positive, negative = hinges(embeddings, labels, pos_margin, neg_margin, ref_embeddings, ref_labels)
    return pos_weight * mean_over(positive[2], positive[1]) + neg_weight * mean_over(negative[2], negative[1])


def check_margins(pos_margin: float, neg_margin: float, pos_weight: float, neg_weight: float) -> None:
    """Refuse margins that are no cosines or in the wrong order, and negative weights."""
    check_range("pos_margin", pos_margin, -1, 1)
    check_range("neg_margin", neg_margin, -1, 1)
    if pos_margin <= neg_margin:
        refuse("pos_margin", pos_margin, f"be greater than neg_margin = {neg_margin!r}")
    check_range("pos_weight", pos_weight, 0)
    check_range("neg_weight", neg_weight, 0)


# -- the functional core: OPIS ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class OPISResult:
    """What ``opis`` found for T classes at G thresholds, in float64.

    opis: the score, in [0, 1/4], lower is better. per_class: (T,) the terms of which it is the mean. thresholds: (G,) distances.
    utility: (T, G) in [0, 1]. classes: (T,) labels, ascending. calibration_range: the first and last threshold.
    """

    opis: float
    per_class: Tensor
    thresholds: Tensor
    utility: Tensor
    classes: Tensor
    calibration_range: tuple[float, float]

    def epsilon(self, eps: float = 0.1) -> float:
        """epsilon-OPIS: the mean term of the ``ceil(eps * T)`` classes that deviate most. eps: in (0, 1]; 1 gives ``opis``."""
        check_range("eps", eps, 0, 1, open_low=True)
        count = max(1, math.ceil(eps * len(self.per_class) - 1e-9))  # 0.1 * 70 is a little more than 7
        return self.per_class.topk(count).values.mean().item()


@torch.no_grad()
def opis(
    embeddings: Tensor,
    labels: Tensor,
    *,
    calibration_range: tuple[float, float] | None = None,
    far_range: tuple[float, float] = (0.01, 0.1),
    num_thresholds: int = 101,
    c: float = 1.0,
    distance: str = "euclidean",
) -> OPISResult:
    """The operating-point inconsistency score of embeddings (n, D) with integer labels (n,).

    calibration_range: the distances between which the score is taken; by default those at which the share ``far_range`` of all
        negative pairs is accepted (linearly interpolated quantiles, exact for any n).
    num_thresholds: G >= 2, equally spaced, both ends included.
    c: weight of specificity against sensitivity in the utility, > 0; 1 is their harmonic mean.
    distance: "euclidean", ``sqrt(2 - 2 s)`` of unit embeddings, or "cosine", ``1 - s``; both in [0, 2].

    Classes of one example are negatives of the others and have no curve of their own. A zero embedding has cosine 0 to all.
    Where the range has no width (all negatives equally far) the mean over it is the value there. Computed in float64.
    Raises ``ArgumentError`` for fewer than 2 classes with at least 2 examples, and for anything else than the above.
    """
    check_range("c", c, 0, open_low=True)
    check_integer("num_thresholds", num_thresholds, 2)
    if not (len(far_range) == 2 and 0 < far_range[0] < far_range[1] < 1):
        refuse("far_range", far_range, "be a pair with 0 < low < high < 1")
    if calibration_range is not None and not (
        len(calibration_range) == 2 and 0 <= calibration_range[0] < calibration_range[1]
    ):
        refuse("calibration_range", calibration_range, "be a pair of distances with 0 <= low < high")
    pairs = PairDistances(embeddings, labels, distance)
    thresholds = equally_spaced(calibration_range or pairs.negative_quantiles(far_range), num_thresholds).to(pairs.unit)
    return consistency(pairs.classes, thresholds, *pairs.curves(thresholds), c=c)


def equally_spaced(ends: Sequence[float], count: int) -> Tensor:
    """``count`` thresholds from the first to the second of ``ends``, float64."""
    return torch.linspace(ends[0], ends[1], count, dtype=torch.float64)


def consistency(
    classes: Tensor, thresholds: Tensor, sensitivity: Tensor, specificity: Tensor, c: float = 1.0
) -> OPISResult:
    """OPIS from the curves (T, G) of T classes at G equally spaced thresholds."""
    mixed = c**2 * specificity + sensitivity
    utility = torch.where(mixed > 0, (1 + c**2) * specificity * sensitivity / mixed, 0)
    trapezoid = torch.full_like(thresholds, 1 / (len(thresholds) - 1))
    trapezoid[[0, -1]] /= 2
    per_class = (utility - utility.mean(0)) ** 2 @ trapezoid
    ends = (thresholds[0].item(), thresholds[-1].item())
    return OPISResult(per_class.mean().item(), per_class, thresholds, utility, classes, ends)


# -- the module -------------------------------------------------------------------------------------------------------
class TCMLoss(nn.Module):
    """``tcm_loss`` as a module, over the embeddings of all processes; add it to the loss that trains the embedding.

    pos_margin, neg_margin, pos_weight, neg_weight: as for ``tcm_loss``.
    """

    def __init__(
        self,
        *,
        pos_margin: float = 0.9,
        neg_margin: float = 0.5,
        pos_weight: float = 1.0,
        neg_weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_margins(pos_margin, neg_margin, pos_weight, neg_weight)
        self.pos_margin, self.neg_margin = pos_margin, neg_margin
        self.pos_weight, self.neg_weight = pos_weight, neg_weight

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_embeddings: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of embeddings (N, D) with labels (N,), against references (M, D), (M,) if given."""
        check_pairs(embeddings, labels)
        embeddings, labels = gather_rows(embeddings, labels)
        return tcm_loss(
            embeddings,
            labels,
            pos_margin=self.pos_margin,
            neg_margin=self.neg_margin,
            pos_weight=self.pos_weight,
            neg_weight=self.neg_weight,
            ref_embeddings=ref_embeddings,
            ref_labels=ref_labels,
        )

    def extra_repr(self) -> str:
        names = ("pos_margin", "neg_margin", "pos_weight", "neg_weight")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


# -- the method -------------------------------------------------------------------------------------------------------
class TCM(Method):
    """Penalise pairs beyond two absolute cosine margins, so that one distance threshold suits every class.

    pos_margin, neg_margin: cosines in [-1, 1] above which a positive pair, and below which a negative one, is left alone.
    pos_weight, neg_weight: >= 0; with both 0 training is that of the task's loss alone. Added to the task's loss, on the
    features that enter the head; needs classes as targets, and batches in which some classes occur twice.
    """

    name = "tcm"
    paper = Paper(
        "Threshold-Consistent Margin Loss for Open-World Deep Metric Learning",
        "Zhang, Xu, Tang, Fang, Wu, Tighe, Xing",
        "ICLR 2024",
        "https://arxiv.org/abs/2307.04047",
    )
    space: ClassVar[Space] = {
        "pos_margin": Uniform(0.8, 0.95),
        "neg_margin": Uniform(0.3, 0.5),
        "pos_weight": LogUniform(0.3, 3.0),
        "neg_weight": LogUniform(0.3, 3.0),
    }
    neutral: ClassVar[Mapping[str, Any] | None] = {"pos_weight": 0.0, "neg_weight": 0.0}
    needs_features = True

    def __init__(
        self, pos_margin: float = 0.9, neg_margin: float = 0.5, pos_weight: float = 1.0, neg_weight: float = 1.0
    ) -> None:
        self.pos_margin, self.neg_margin = pos_margin, neg_margin
        self.pos_weight, self.neg_weight = pos_weight, neg_weight
        self.criterion = TCMLoss(**self.settings())

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None  # the run captures them, since needs_features
        return self.criterion(output.features, batch.targets)
