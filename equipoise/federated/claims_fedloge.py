"""The claims of FedLoGe, as they can be checked on Fashion-MNIST.

A long tail of 600 to 6 training images (classes in an order that each seed draws), dealt out to 10 clients by Dirichlet(0.5)
shares; 40 rounds of 2 epochs, SGD at 0.03 with momentum 0.5, batches of 16; an MLP 784-128-64-10; 3000 test images, in which each
class counts the same. The fixed classifier is optimised for 1000 steps of Adam at 1e-3 to rows of norm 0.1, and scaled to 3:
shorter rows leave the backbone undertrained in so few rounds. Personal accuracy: test images weighed by a client's shares of the
classes, the classes that it lacks left out of the prediction; the mean over clients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from equipoise.comparison.claims import Claim
from equipoise.federated.algorithm import Client
from equipoise.federated.claims_fashion import Fashion
from equipoise.federated.fedloge import HEAD, global_realign
from equipoise.federated.task_long_tail import FederatedLongTail, personal_accuracy
from equipoise.training import Examples, Method, Problem
from equipoise.training.metrics import balanced_accuracy
from equipoise.training.task import Config

if TYPE_CHECKING:
    from equipoise.federated.simulation import FederatedRun


@dataclass(frozen=True)
class FashionTail(FederatedLongTail, Fashion):
    """The federated long-tail task on Fashion-MNIST, with the accuracies of each head by itself.

    ``averaged_accuracy`` is the global accuracy of the averaged head (FedAvg's own, FedLoGe's auxiliary one),
    ``realigned_accuracy`` that of the same head realigned; ``personal_averaged`` and ``personal_head`` are the personal accuracies
    of the averaged head and of the client's own, each alone.
    """

    name: ClassVar[str] = "federated-fashion-tail"

    # A dataclass takes defaults from its first base, those it inherited included.
    dataset: str = "fashion-mnist"
    clip_norm: float = 0.0
    lr_decay: float = 1.0
    validation: float = 0.02
    ratio: float | None = 100.0
    alpha: float = 0.5
    rounds: int = 40
    epochs: int = 2
    batch_size: int = 16
    test_examples: int = 3000
    momentum: float = 0.5

    def cost(self, method: type[Method], config: Config, seed: int) -> None:  # type: ignore[override]
        """Left out: the claims compare accuracies."""

    def personal(self, method: Method, client: Client, examples: Examples, shares: Tensor) -> dict[str, float]:
        found = super().personal(method, client, examples, shares)
        model: Any = client.model
        if HEAD in client.state:
            with torch.no_grad():
                features = model.eval().forward_features(examples.inputs)
                averaged = model.head.auxiliary(features)
            own = F.linear(features, client.state[HEAD]["weight"], client.state[HEAD]["bias"])
            found["personal_averaged"] = personal_accuracy(averaged, examples.targets, shares)
            found["personal_head"] = personal_accuracy(own, examples.targets, shares)
        return found

    def examine(self, problem: Problem, run: FederatedRun) -> dict[str, float]:
        found = super().examine(problem, run)
        model: Any = run.model
        head = getattr(model.head, "auxiliary", model.head)
        with torch.no_grad():
            features = model.eval().forward_features(problem.test.inputs)
            averaged, realigned = head(features), F.linear(features, global_realign(head.weight), head.bias)
        found["test_averaged_accuracy"] = balanced_accuracy(averaged, problem.test.targets)
        found["test_realigned_accuracy"] = balanced_accuracy(realigned, problem.test.targets)
        return found


TRAINING = {"lr": 0.03, "weight_decay": 0.0}
ARMS = (
    ("fedavg", "fedavg", TRAINING),
    ("fedloge", "fedloge", {**TRAINING, "fedloge.norm": 3.0}),
    ("dense simplex", "fedloge", {**TRAINING, "fedloge.norm": 3.0, "fedloge.sparsity": 0.0}),
)
claim = partial(
    Claim,
    slug="fedloge",
    number=59,
    source="Xiao et al., ICLR 2024 (official logs: CIFAR-100-LT, factor 0.01, Dirichlet 0.5: 0.379 to 0.417 global)",
    task=FashionTail,
    settings={},
    arms=ARMS,
    method="fedloge",
    reference="fedavg",
    metric="last.test_global_accuracy",
    seeds=5,
    scale=100.0,
    unit="points of global test accuracy",
)

CLAIMS = [
    claim(
        claim="A backbone trained against the fixed sparse classifier predicts at least 5 points better than FedAvg.",
        at_least=5.0,
        remarks=(
            "FedAvg reaches as much without it: its own head, realigned after training, has 61.0 % on average, the fixed "
            "classifier 60.2 %, FedLoGe's realigned head 61.4 %, FedAvg 54.8 %. With a dense simplex the fixed classifier has"
            " 55.6 %."
        ),
    ),
    claim(
        name="realign",
        claim="Realigning the rows of the averaged auxiliary head raises its global accuracy by at least 4 points.",
        reference="fedloge",
        metric="last.test_realigned_accuracy",
        reference_metric="last.test_averaged_accuracy",
        at_least=4.0,
    ),
    claim(
        name="realign-fedavg",
        claim="Realigning the rows of FedAvg's own head raises its global accuracy by at least 4 points.",
        method="fedavg",
        metric="last.test_realigned_accuracy",
        reference_metric="last.test_averaged_accuracy",
        at_least=4.0,
    ),
    claim(
        name="personal",
        claim="The realigned personal models are at least 3 points better on their clients' mix than the averaged head.",
        reference="fedloge",
        metric="last.test_personal_accuracy",
        reference_metric="last.test_personal_averaged",
        at_least=3.0,
        unit="points of personal test accuracy",
        remarks=(
            "The clients' own heads, without realignment, have 89.0 % on average, the realigned models 88.8 %, the averaged "
            "head 86.7 %, FedAvg 86.0 %: what helps a client is the head that it keeps."
        ),
    ),
]
