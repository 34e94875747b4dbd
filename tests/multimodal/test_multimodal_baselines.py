"""The baselines: joint training, the best single modality, unimodal losses without and with a constant factor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import equipoise
from equipoise.errors import ArgumentError
from equipoise.multimodal import ARL, Aux, AuxScaled, Joint, MultimodalNet, SumFusion, Unimodal, arl_loss
from equipoise.multimodal.model import AllLogits
from equipoise.testing import check_method, check_methods_ddp, multimodal
from equipoise.training import Method, Run

torch.set_num_threads(1)
PROBLEM = multimodal()


def train(*methods: Method, **options: Any) -> Run:
    return PROBLEM.train(methods, **options)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("method", [Joint, Aux, AuxScaled])
def test_neutral_is_joint_training(method: Any) -> None:
    assert same(train(method(**method.neutral)).model, train().model)


@pytest.mark.parametrize(
    ("method", "settings"), [(Joint, {}), (Aux, {"start_epoch": 0}), (AuxScaled, {"start_epoch": 0}), (Unimodal, {})]
)
def test_the_kit(method: Any, settings: dict[str, Any]) -> None:
    check_method(method, settings=settings, problem=PROBLEM)


@pytest.mark.distributed
def test_two_processes_equal_one() -> None:
    entries = [(Aux, {"start_epoch": 0}), (AuxScaled, {"start_epoch": 0}), Unimodal]
    for report in check_methods_ddp(entries, problem=PROBLEM):
        assert report.passed == ["ddp-trains", "ddp-ranks", "ddp-equals-one"]


def by_hand(gamma: float, factor: float, start_epoch: int) -> nn.Module:
    model, data = PROBLEM.network(), PROBLEM.examples
    optimizer = PROBLEM.make_optimizer(model.parameters())
    order = torch.Generator().manual_seed(PROBLEM.seed)
    for epoch in range(PROBLEM.epochs):
        sampler = torch.utils.data.RandomSampler(data, generator=order)
        for rows in torch.tensor(list(sampler)).split(PROBLEM.batch_size):
            batch = data.take(rows)
            output = model(**batch.inputs)
            started = epoch > start_epoch
            optimizer.zero_grad()
            arl_loss(output.fused, output.unimodal, batch.targets, gamma if started else 1.0).backward()
            for parameter in model.encoders.parameters():
                parameter.grad *= factor if started else 1
            optimizer.step()
    return model


def test_aux_and_aux_scaled_are_the_loop_by_hand() -> None:
    for method, factor in ((Aux(3.0, start_epoch=1), 1.0), (AuxScaled(3.0, start_epoch=1), 1.5)):
        run = train(method)
        torch.testing.assert_close(list(run.model.parameters()), list(by_hand(3.0, factor, 1).parameters()))
        assert "entropy_left" not in run.history[-1]


def test_they_are_arl_with_other_factors() -> None:
    """At temperature 0 ARL's factors are 1 + 1/2 for two modalities: the constant of the published script."""
    assert same(train(ARL(3.0, 0.0, start_epoch=0)).model, train(AuxScaled(3.0, start_epoch=0)).model)
    assert same(train(AuxScaled(3.0, 1.0, start_epoch=0)).model, train(Aux(3.0, start_epoch=0)).model)
    assert not same(train(ARL(3.0, 8.0, start_epoch=0)).model, train(AuxScaled(3.0, start_epoch=0)).model)


# -- the best single modality -----------------------------------------------------------------------------------------
def net(seed: int = 0) -> MultimodalNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoders = {
            "left": nn.Sequential(nn.Linear(4, 5), nn.ReLU()),
            "right": nn.Sequential(nn.Linear(3, 5), nn.ReLU()),
        }
        return MultimodalNet(encoders, SumFusion([5, 5], 3))


class Alone(nn.Module):
    """One modality's encoder and layer by themselves."""

    def __init__(self, name: str, number: int) -> None:
        super().__init__()
        whole = net()
        self.name, self.encoder, self.fc = name, whole.encoders[name], whole.fusion.fcs[number]

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.fc(self.encoder(inputs[self.name]))


def test_each_modality_trains_as_if_alone_and_the_best_predicts() -> None:
    options = PROBLEM.options()
    run = equipoise.fit(net(), PROBLEM.examples, methods=[Unimodal()], **options)
    inputs = PROBLEM.validation.take(torch.arange(11)).inputs
    accuracies = []
    for number, name in enumerate(("left", "right")):
        alone = equipoise.fit(Alone(name, number), PROBLEM.examples, **options).model
        torch.testing.assert_close(run.model(**inputs).unimodal[number], alone(**inputs))
        accuracies.append((alone(**inputs).argmax(1) == PROBLEM.validation.targets).float().mean().item())
    assert accuracies[0] != accuracies[1]
    best = int(accuracies[1] > accuracies[0])
    prediction, _ = run.predict(PROBLEM.validation)
    assert torch.equal(prediction, run.model(**inputs).unimodal[best])
    logits, _ = run.predict(PROBLEM.validation, AllLogits(run.inference_model))
    assert torch.equal(logits[:, 0], prediction) and logits.shape == (11, 3, 3)


def test_the_choice_follows_the_validation_data() -> None:
    inputs = PROBLEM.validation.inputs
    assert isinstance(inputs, dict)
    for number, other in enumerate(("right", "left")):
        blind = equipoise.Examples({**inputs, other: torch.zeros_like(inputs[other])}, PROBLEM.validation.targets)
        run = equipoise.fit(net(), PROBLEM.examples, methods=[Unimodal()], **PROBLEM.options(validation=blind))
        assert run.inference_model.modality == number


def test_the_choice_is_saved(tmp_path: Any) -> None:
    method = Unimodal()
    run = train(method, checkpoint=tmp_path)
    method.load_state_dict({"modality": 1})
    assert run.inference_model.modality == 1 == method.state_dict()["modality"]
    again = Unimodal()
    resumed = train(again, checkpoint=tmp_path, resume=True)  # nothing is left to train
    assert resumed.inference_model.modality == train(Unimodal()).inference_model.modality


def test_loss_is_the_sum_of_the_modalities() -> None:
    run = equipoise.start(
        PROBLEM.network(),
        PROBLEM.make_optimizer,
        data=PROBLEM.examples,
        validation=PROBLEM.validation,
        methods=[Unimodal()],
    )
    batch = PROBLEM.examples.take(torch.arange(8))
    output = PROBLEM.network()(**batch.inputs)
    expected = sum(F.cross_entropy(u, batch.targets) for u in output.unimodal)
    torch.testing.assert_close(run.training_loss(batch), expected)


def test_bad_settings() -> None:
    with pytest.raises(ArgumentError, match="validation = None: must be given, to choose the modality by"):
        train(Unimodal(), validation=None)
    with pytest.raises(ArgumentError, match=r"factor = 0.0: must be a number in \(0, inf\)"):
        AuxScaled(factor=0.0)
    with pytest.raises(ArgumentError, match=r"gamma = -1\.0"):
        Aux(gamma=-1.0)
