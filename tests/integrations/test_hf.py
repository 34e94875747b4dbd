"""Methods and adapters inside of transformers.Trainer and of a loop with Accelerate."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, SequentialSampler

import equipoise
from equipoise import Batch, Method, Output, Run
from equipoise.errors import ArgumentError, CheckpointError, MissingDependencyError, NonFiniteError
from equipoise.finetuning.adapters import LoRALinear, attach, merge_adapters
from equipoise.finetuning.ba_lora import BALoRA
from equipoise.finetuning.sorsa import SORSA
from equipoise.testing import spawn

transformers = pytest.importorskip("transformers", reason="needs the extra equipoise[hf]")
from equipoise.integrations.hf import EquipoiseTrainerMixin  # noqa: E402

torch.set_num_threads(1)
SGD = {
    "optim": "sgd",
    "learning_rate": 0.5,
}  # for comparisons: AdamW makes a step of gradients that are rounding errors
TARGET = ["query", "value", "classifier"]


def bert() -> Any:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification(config)
    # It takes num_items_in_batch and does not heed it: the Trainer would sum its loss over micro-batches and processes.
    model.accepts_loss_kwargs = False
    return model


def llama() -> Any:
    """A causal language model, whose loss is divided by the number of tokens of all micro-batches."""
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config)


def sentences(count: int = 24) -> list[dict[str, Tensor]]:
    """8 tokens each; the class is whether the second is a large number."""
    tokens = torch.randint(2, 30, (count, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[1] > 15).long()} for row in tokens]


class Ordered(transformers.Trainer):  # type: ignore[misc, name-defined]
    """Draws the examples in their order, so that another loop can do the same."""

    def _get_train_sampler(self, *args: Any) -> Any:
        return SequentialSampler(sentences())


class Trainer(EquipoiseTrainerMixin, Ordered):
    pass


def trainer(
    folder: Path | str, *methods: Method, kind: Any = Trainer, model: Any = None, data: Any = None, **options: Any
) -> Any:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = transformers.TrainingArguments(str(folder), **settings | options)
    more = {"methods": methods} if issubclass(kind, EquipoiseTrainerMixin) else {}
    data = sentences() if data is None else data
    return kind(model=model or bert(), args=arguments, train_dataset=data, eval_dataset=data, **more)


def texts() -> list[dict[str, Tensor]]:
    return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in sentences()]


def trained(folder: Path | str, *methods: Method, **options: Any) -> Any:
    made = trainer(folder, *methods, **options)
    made.train()
    return made


def equal(ours: nn.Module, theirs: nn.Module, atol: float = 0.0) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, theirs.state_dict()[name], atol=atol, rtol=0, msg=name)


class Small(Method):
    """Keeps the logits small."""

    name = "small"

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return 3.0 * output.prediction.square().mean()


# -- adapters alone ---------------------------------------------------------------------------------------------------
def test_attached_adapters_train_in_a_plain_trainer(tmp_path: Path) -> None:
    model = attach(bert(), TARGET, lambda layer: LoRALinear(layer, 2, generator=torch.Generator().manual_seed(0)))
    run = trained(tmp_path, kind=Ordered, model=model, num_train_epochs=3)
    after, before = model.state_dict(), bert().state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(after[name].abs().max() > 0 for name in after if name.endswith("lora_B"))
    expected = model(torch.arange(2, 10)[None]).logits
    run.model = merge_adapters(run.model)
    run.save_model(str(tmp_path / "merged"))
    loaded = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(loaded(torch.arange(2, 10)[None]).logits, expected, atol=1e-5, rtol=1e-5)


# -- methods in a Trainer ---------------------------------------------------------------------------------------------
def test_without_methods_it_is_the_trainer(tmp_path: Path) -> None:
    equal(trained(tmp_path, kind=Ordered).model, trained(tmp_path).model)


@pytest.mark.parametrize("make", [lambda: BALoRA(rank=2, target=TARGET), lambda: SORSA(rank=2, target=TARGET)])
def test_a_method_trains_as_in_a_loop_of_ones_own(make: Any, tmp_path: Path) -> None:
    plain = bert()
    ours = trained(tmp_path, make())
    rate = {"lr": 0.01, "weight_decay": 0.0}
    run = equipoise.start(
        bert(),
        lambda parameters: torch.optim.AdamW(parameters, **rate),
        methods=[make()],
        num_classes=2,
        total_steps=6,
        clip_norm=1.0,
    )
    for _ in range(2):
        for batch in DataLoader(sentences(), batch_size=8):  # type: ignore[arg-type]
            run.backward(run.training_loss(batch))
            run.step()
        run.end_epoch()
    run.finish()
    equal(ours.model, run.model, atol=1e-6)
    assert [type(m) for m in ours.model.modules()] == [type(m) for m in plain.modules()]
    assert list(ours.model.state_dict()) == list(plain.state_dict())
    assert (ours.model.classifier.weight - plain.classifier.weight).abs().max() > 1e-3
    if make().overrides("penalty"):
        for a, b in zip(ours.run.history, run.history, strict=True):
            assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-6)


@pytest.mark.parametrize(("make", "data"), [(bert, sentences), (llama, texts)])
def test_accumulated_penalties_are_those_of_the_whole_batch(make: Any, data: Any, tmp_path: Path) -> None:
    one = {"data": data(), **SGD}
    small = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole, parts = (
        trained(tmp_path, Small(), model=make(), **one),
        trained(tmp_path, Small(), model=make(), **one, **small),
    )
    equal(whole.model, parts.model, atol=1e-6)
    for a, b in zip(whole.run.history, parts.run.history, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-5)
    without = trained(tmp_path, model=make(), **one)
    x = torch.stack([row["input_ids"] for row in sentences()])
    assert whole.model(x).logits.square().mean() < 0.9 * without.model(x).logits.square().mean()


def test_penalties_are_no_part_of_evaluation(tmp_path: Path) -> None:
    made = trainer(tmp_path, Small(), num_train_epochs=1)
    made.train()
    plain = trainer(tmp_path, kind=Ordered, model=made.model)
    assert made.evaluate(sentences())["eval_loss"] == pytest.approx(plain.evaluate(sentences())["eval_loss"])


class Recorder(Method):
    """Notes which hook is called when, and what it sees."""

    name = "recorder"
    needs_features = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def prepare(self, run: Run) -> None:
        self.calls.append(f"prepare {run.total_steps} {run.total_epochs} {run.num_classes}")

    def configure_optimizer(self, run: Run, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self.calls.append("configure_optimizer")
        return optimizer

    def transform_batch(self, run: Run, batch: Batch) -> Batch:
        self.calls.append(f"transform_batch {len(batch)}")
        return batch

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        assert output.features is not None and output.features.shape == (len(batch), 16)
        self.calls.append(f"penalty {run.epoch} {run.global_step}")
        run.log("answer", 42.0)
        return 100 * output.prediction.mean()

    def after_backward(self, run: Run) -> None:
        assert self._norm(run) > 2
        self.calls.append("after_backward")

    def before_step(self, run: Run) -> None:
        assert self._norm(run) == pytest.approx(0.5, rel=1e-4)
        self.calls.append("before_step")

    def after_step(self, run: Run) -> None:
        self.calls.append(f"after_step {run.global_step}")

    def epoch_end(self, run: Run) -> None:
        self.calls.append(f"epoch_end {run.epoch}")

    def finish(self, run: Run) -> None:
        self.calls.append("finish")

    @staticmethod
    def _norm(run: Run) -> float:
        return float(torch.stack([p.grad.norm() for p in run.trainable_parameters() if p.grad is not None]).norm())


def test_hooks_are_called_where_a_run_calls_them(tmp_path: Path) -> None:
    recorder = Recorder()
    made = trained(tmp_path, recorder, per_device_train_batch_size=6, gradient_accumulation_steps=2, max_grad_norm=0.5)
    expected = ["prepare 4 2 2", "configure_optimizer"]
    for epoch in range(2):
        for step in (2 * epoch, 2 * epoch + 1):
            expected += ["transform_batch 6", f"penalty {epoch} {step}"] * 2
            expected += ["after_backward", "before_step", f"after_step {step + 1}"]
        expected.append(f"epoch_end {epoch}")
    assert recorder.calls == [*expected, "finish"]
    assert [record["answer"] for record in made.run.history] == [42.0, 42.0]


class Ascent(Method):
    """Replaces the loss, and trains a scale of its own."""

    name = "ascent"

    def prepare(self, run: Run) -> None:
        self.scale = run.register(self, "scale", nn.Linear(1, 1, bias=False), optimize=True)
        nn.init.ones_(self.scale.weight)

    def loss(self, run: Run, batch: Batch, output: Output) -> Tensor:
        return nn.functional.cross_entropy(output.prediction * self.scale.weight, batch.targets)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_may_be_replaced_and_a_network_of_the_method_trains(accumulation: int, tmp_path: Path) -> None:
    method = Ascent()
    sizes = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    made = trained(tmp_path, method, num_train_epochs=3, **sizes)
    assert made.run.history[-1]["train_loss"] < made.run.history[0]["train_loss"]
    assert abs(method.scale.weight.item() - 1) > 1e-3
    given = trainer(tmp_path, Ascent(), num_train_epochs=3)
    assert given.optimizer.param_groups[-1]["params"][0].shape == (1, 1)


class Counter(Method):
    """Has state: a count, and a stream of random numbers that it adds to the penalty's weight."""

    name = "counter"

    def prepare(self, run: Run) -> None:
        self.count, self.generator = 0, run.new_generator(self)

    def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
        self.count += 1
        return self.count * torch.rand((), generator=self.generator) * output.prediction.square().mean()

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        self.count = state["count"]


def test_resuming_restores_adapters_and_methods(tmp_path: Path) -> None:
    def methods() -> list[Method]:
        return [SORSA(rank=2, target=TARGET), Counter()]

    whole = trained(tmp_path, *methods(), save_strategy="steps", save_steps=4)
    resumed = trainer(tmp_path, *methods())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    equal(whole.model, resumed.model)
    assert resumed.run.methods[1].count == 6
    other = trainer(tmp_path, SORSA(rank=2, target=TARGET))
    with pytest.raises(CheckpointError, match=r"made with the methods \['sorsa', 'counter'\], here are \['sorsa'\]"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_the_best_checkpoint_is_loaded_before_the_model_is_merged(tmp_path: Path) -> None:
    made = trained(
        tmp_path,
        SORSA(rank=2, target=TARGET),
        num_train_epochs=3,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the last epoch is not the best
        learning_rate=0.3,
    )
    losses = [record["eval_loss"] for record in made.state.log_history if "eval_loss" in record]
    assert max(losses) > losses[-1] + 1e-3
    assert made.evaluate()["eval_loss"] == pytest.approx(max(losses), abs=1e-4)
    assert not any(hasattr(module, "merged_weight") for module in made.model.modules())


def test_what_is_refused(tmp_path: Path) -> None:
    class Chooser(Method):
        name = "chooser"

        def configure_sampler(self, run: Run, sampler: Any) -> Any:
            return sampler

    class Broken(Small):
        name = "broken"

        def penalty(self, run: Run, batch: Batch, output: Output) -> Tensor:
            return output.prediction.mean() / 0

    with pytest.raises(ArgumentError, match="chooser: must leave the choice of examples to the Trainer"):
        trainer(tmp_path, Chooser())
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ArgumentError, match="model_init: must be None"):
        Trainer(model_init=bert, args=arguments, methods=[Small()])
    made = trained(tmp_path, Small(), max_steps=1)
    with pytest.raises(ArgumentError, match="the methods have finished the model"):
        made.train()
    with pytest.raises(NonFiniteError, match="step 0: the penalty of broken is"):
        trained(tmp_path, Broken())


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "equipoise.integrations.hf")
    with pytest.raises(MissingDependencyError, match=r"pip install 'equipoise\[hf\]'"):
        importlib.import_module("equipoise.integrations.hf")


# -- a loop with Accelerate, and two processes ------------------------------------------------------------------------
def accelerated(batch_size: int) -> dict[str, Tensor]:
    """A loop of one's own, as Accelerate's documentation writes it; each process gets its share of the batches."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(sentences(), batch_size=batch_size))  # type: ignore[arg-type]
    run = equipoise.start(
        bert(),
        lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        methods=[SORSA(rank=2, target=TARGET), Small()],
        num_classes=2,
        accelerator=accelerator,
        clip_norm=1.0,
    )
    for _ in range(2):
        for batch in loader:
            run.backward(run.training_loss(batch))
            run.step()
        run.end_epoch()
    return dict(run.finish().state_dict())


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    folder = str(tmp_path)

    def work() -> Iterator[Any]:
        yield accelerated(4)
        made = trained(folder, SORSA(rank=2, target=TARGET), Small(), per_device_train_batch_size=4, **SGD)
        yield dict(made.model.state_dict())

    one = [accelerated(8), dict(trained(folder, SORSA(rank=2, target=TARGET), Small(), **SGD).model.state_dict())]
    ranks = spawn(work)
    assert not [result for rank in ranks for result in rank if "error" in result], ranks
    for rank in ranks:
        for two, single in zip(rank, one, strict=True):
            assert two.keys() == single.keys()
            for name, tensor in single.items():
                torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=0, msg=name)
