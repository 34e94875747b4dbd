"""What the noisy-label methods cost: their losses, a whole training step, the choice of a prefix, the per-example table.

    python benchmarks/noisy_labels.py [--repeats 25] [--threads 1] [--clock cpu]

Everything in a table is measured in one process, in turn, after a warm-up, in an order that alternates. Ratios are those of
the fastest and of the median measurement; a target is missed if both miss it, since other work on the machine moves the one or
the other by a few hundredths. Targets, exit code 1 if one is missed:

- `soft_cross_entropy` takes at most 1.10 of `F.cross_entropy` with probabilities as targets, the peer that torch offers, and
  gives the same loss and the same gradient bit for bit.
- A training step of the digits MLP (64-256-256-10, batch 128) with ELR takes at most 1.25 of one without a method.
- Choosing a prefix of 512 features on 2,000 examples, as a run does it after each epoch, is at least 10 times as fast as 512
  passes through the masked classifier for 10 classes, and 4 times for 100, where what remains is to find the largest of 100
  million logits; `prefix_logits` and `select_keep`, which hold all of them at once, 5 times and not slower. All count the
  same right answers.
- Moving a batch's rows of ELR's table is at least 10 times as fast as a Python loop over the batch, to the same rows, and the
  table takes 4 n C bytes and nothing else.

Two networks (ELR+, Co-teaching) cost what two networks cost; they are shown beside the others and have no target.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
from harness import Bench, parse
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.data import load
from equipoise.models.reference import MLP, ConvNet
from equipoise.noisy_labels import (
    ELR,
    PSKD,
    CoTeaching,
    ELRLoss,
    ELRPlus,
    GeneralizedCrossEntropy,
    LabelSmoothing,
    NestedDropoutMethod,
    PSKDLoss,
    elr_plus_loss,
    generalized_cross_entropy,
    prefix_logits,
    select_keep,
    soft_cross_entropy,
    update_soft_targets,
)
from equipoise.noisy_labels.nested_dropout import correct_by_prefix
from equipoise.training import Method

SOFT, ELR_STEP, LOOP = 1.10, 1.25, 10.0
STREAMING, WHOLE = {10: 10.0, 100: 4.0}, {10: 5.0, 100: 1.0}  # by number of classes


# -- losses -----------------------------------------------------------------------------------------------------------
def losses(bench: Bench, rows: int, classes: int, examples: int = 50_000) -> None:
    """Forward and backward of each loss alone; the tables have ``examples`` rows."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator, requires_grad=True)
    labels = torch.randint(classes, (rows,), generator=generator)
    index = torch.randperm(examples, generator=generator)[:rows]
    soft = torch.randn(rows, classes, generator=generator).softmax(1)
    elr = ELRLoss(examples, classes)
    ps_kd = PSKDLoss(examples, classes, total_epochs=10)
    ps_kd.set_epoch(5)

    def both(loss: Callable[[], Tensor]) -> Callable[[], None]:
        def work() -> None:
            logits.grad = None
            loss().backward()

        return work

    works = {
        "F.cross_entropy": both(lambda: F.cross_entropy(logits, labels)),
        "  with label_smoothing (label-smoothing)": both(lambda: F.cross_entropy(logits, labels, label_smoothing=0.1)),
        "generalized_cross_entropy": both(lambda: generalized_cross_entropy(logits, labels)),
        "ELRLoss": both(lambda: elr(logits, labels, index)),
        "elr_plus_loss (one network)": both(lambda: elr_plus_loss(logits, soft, soft, lam=3.0)),
        "PSKDLoss": both(lambda: ps_kd(logits, labels, index)),
    }
    seconds = bench.measure(works)
    bench.table(f"losses, N = {rows}, C = {classes}", seconds, peer="F.cross_entropy")
    peer, ours = "F.cross_entropy, probabilities", "soft_cross_entropy"
    pair = {
        peer: both(lambda: F.cross_entropy(logits, soft)),
        ours: both(lambda: soft_cross_entropy(logits, soft)),
    }
    bench.table(f"the peer, N = {rows}, C = {classes}", pair, {ours: SOFT}, peer=peer)
    gradients = []
    for work in pair.values():
        work()
        gradients.append(logits.grad)
    same = torch.equal(F.cross_entropy(logits, soft), soft_cross_entropy(logits, soft))
    bench.require("the same loss and gradient, bit for bit", same and torch.equal(*gradients))  # type: ignore[arg-type]


# -- whole training steps ---------------------------------------------------------------------------------------------
NONE = "no method"
METHODS: dict[str, Callable[[], list[Method]]] = {
    NONE: list,
    "label-smoothing": lambda: [LabelSmoothing()],
    "generalized-cross-entropy": lambda: [GeneralizedCrossEntropy()],
    "elr": lambda: [ELR()],
    "ps-kd": lambda: [PSKD()],
    "nested-dropout (without the choice)": lambda: [NestedDropoutMethod()],
    "elr-plus (two networks)": lambda: [ELRPlus()],
    "co-teaching, stage two (two networks)": lambda: [CoTeaching(pretrain_epochs=0)],
}


def steps(
    bench: Bench, title: str, make: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, target: float | None
) -> None:
    """A step of training through ``equipoise.start``, the mean over an epoch, for every method in turn."""

    def trainer(methods: list[Method]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = make()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        if methods and methods[0].name in ("elr-plus", "co-teaching"):  # whose second network is made later
            optimizer = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=5e-4)  # noqa: E731
        run = equipoise.start(
            model, optimizer, methods=methods, data=(inputs, labels), batch_size=128, epochs=1_000, num_classes=10
        )

        def epoch() -> None:
            for batch in run.batches():
                run.backward(run.training_loss(batch))
                run.step()
            run.end_epoch()

        return epoch

    seconds = bench.measure({name: trainer(methods()) for name, methods in METHODS.items()})
    count = -(-len(labels) // 128)
    seconds = {name: [s / count for s in measured] for name, measured in seconds.items()}
    bench.table(title, seconds, {} if target is None else {"elr": target}, peer=NONE)


# -- the choice of a prefix -------------------------------------------------------------------------------------------
def masked_passes(features: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """What the name says: the classifier on the features with all but the first k set to 0, for k = 1 .. D."""
    channel = torch.arange(features.shape[1])
    correct = [
        (head(features * (channel < k)).max(1).indices == targets).sum() for k in range(1, features.shape[1] + 1)
    ]
    return torch.stack(correct)


@torch.no_grad()
def prefixes(bench: Bench, classes: int, rows: int = 2_000, width: int = 512) -> None:
    """Whole numbers as features and weights make every sum exact, so that all ways must count the same."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(0, 9, (rows, width), generator=generator).float()
    head = nn.Linear(width, classes)
    head.weight.copy_(torch.randint(-8, 9, (classes, width), generator=generator))
    head.bias.copy_(torch.randint(-8, 9, (classes,), generator=generator))
    targets = torch.randint(classes, (rows,), generator=generator)
    naive, streaming = f"{width} masked passes", "correct_by_prefix (as a run does it)"
    whole = f"prefix_logits + select_keep ({4 * rows * width * classes / 2**20:.0f} MiB)"
    works: dict[str, Callable[[], object]] = {
        naive: lambda: masked_passes(features, head, targets),
        streaming: lambda: correct_by_prefix([features], [head], targets),
        whole: lambda: select_keep(prefix_logits(features, head.weight, head.bias), targets),
    }
    title = f"prefixes, D = {width}, N = {rows}, C = {classes}"
    wanted = {streaming: STREAMING[classes], whole: WHOLE[classes]}
    bench.table(title, works, at_least=wanted, peer=naive, repeats=3)
    counts = correct_by_prefix([features], [head], targets)
    selection = select_keep(prefix_logits(features, head.weight, head.bias), targets)
    same = torch.equal(counts, masked_passes(features, head, targets))
    same &= torch.equal(selection.accuracy, counts.double() / rows)
    bench.require("the same number of right answers for every prefix", same)


# -- the per-example table --------------------------------------------------------------------------------------------
BETA, EPS = 0.7, 1e-4


@torch.no_grad()
def loop_over_rows(table: Tensor, index: Tensor, logits: Tensor) -> None:
    """The update written for one example at a time."""
    for i, z in zip(index.tolist(), logits, strict=True):
        p = z.softmax(0).clamp(EPS, 1 - EPS)
        table[i] = BETA * table[i] + (1 - BETA) * p / p.sum()


@torch.no_grad()
def new_table(table: Tensor, index: Tensor, logits: Tensor) -> Tensor:
    """The update of the rows at once, but into a copy of the table."""
    p = logits.softmax(1).clamp(EPS, 1 - EPS)
    rows = BETA * table[index] + (1 - BETA) * p / p.sum(1, keepdim=True)
    return table.index_copy(0, index, rows)


def tables(bench: Bench, classes: int, rows: int = 128, examples: int = 50_000) -> None:
    """The update of ELR's table beside the slow ways to write it, and the table's size."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, classes, generator=generator)
    index = torch.randperm(examples, generator=generator)[:rows]
    table = torch.zeros(examples, classes)
    loop, copy, ours = "Python loop over the rows", "a new table in each step", "update_soft_targets"
    works: dict[str, Callable[[], object]] = {
        loop: lambda: loop_over_rows(table, index, logits),
        copy: lambda: new_table(table, index, logits),
        ours: lambda: update_soft_targets(table, index, logits, beta=BETA, eps=EPS),
    }
    title = f"table of {examples} x {classes}, N = {rows}"
    bench.table(title, works, at_least={ours: LOOP}, peer=loop)
    mine, theirs = torch.zeros(2, examples, classes)
    for _ in range(3):
        update_soft_targets(mine, index, logits, beta=BETA, eps=EPS)
        loop_over_rows(theirs, index, logits)
    bench.require("the same rows, to 1e-6", torch.allclose(mine, theirs, rtol=0, atol=1e-6))
    elr, ps_kd = (
        sum(buffer.nbytes for buffer in part.buffers())
        for part in (ELRLoss(examples, classes), PSKDLoss(examples, classes, 1))
    )
    print(f"memory: ELRLoss {elr / 2**20:.2f} MiB, PSKDLoss {ps_kd / 2**20:.2f} MiB (also a flag for each example)")
    bench.require("ELRLoss keeps 4 n C bytes", elr == 4 * examples * classes)


# -- all of it --------------------------------------------------------------------------------------------------------
def peers() -> None:
    """Say which relatives are installed; none of them has a part that could be timed against ours."""
    print()
    for package, what in {
        "cleanlab": "finds label errors in predictions; has no training loss",
        "sentence-transformers": "MatryoshkaLoss trains a few fixed widths in each step, all of them, for embeddings",
    }.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        print(f"relative, not timed: {package} ({found}): {what}")


def main() -> int:
    _, bench = parse(__doc__, 25)
    for rows, classes in ((128, 10), (128, 100), (1024, 1000)):
        losses(bench, rows, classes)
    digits = load("digits")
    inputs, labels = torch.as_tensor(digits.inputs), torch.as_tensor(digits.targets)
    steps(bench, "a step: digits MLP, batch 128", lambda: MLP((64,), 10), inputs.flatten(1), labels, ELR_STEP)
    images = inputs.reshape(-1, 1, 8, 8)[:384]
    steps(bench, "a step: CNN on digits, batch 128", lambda: ConvNet((1, 8, 8), 10), images, labels[:384], None)
    for classes in (10, 100):
        prefixes(bench, classes)
    for classes in (10, 100):
        tables(bench, classes)
    peers()
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
