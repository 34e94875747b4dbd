"""What SORSA costs: beside the authors' package, peft's adapters of the same rank, and automatic derivatives of its regulariser.

    python benchmarks/sorsa.py [--repeats 15] [--threads 1] [--clock cpu]

The authors' layer and regulariser are read from the package `sorsa` (`pip install --no-deps sorsa`): its file of layers alone,
since the package itself imports a trainer of an older transformers. Without it their arithmetic is written out here: the dense
product `B diag(S) A` in every pass. Targets, exit code 1 if one is missed by both the fastest and the median measurement:

- A training step of a layer 1024 -> 1024 of rank 16 on 64 rows takes at most half of the authors', at most 1.0 on 1024 rows, and
  gives the same output and gradients.
- The regulariser's gradient for 24 layers takes at most 0.7 of automatic derivatives of the authors' regulariser, and equals it.
- A step of two layers 512 -> 512 at rank 32 with the regulariser takes at most 1.2 of peft's LoRA; peft's AdaLoRA, the other
  adapter in the form of a singular value decomposition, is shown.
- Making a layer takes at most 1.05 of the authors' time.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from harness import Bench, parse
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise.finetuning.sorsa import SORSALinear, add_orthonormal_gradient, apply_sorsa, orthonormal_penalty


# -- the authors' layer -----------------------------------------------------------------------------------------------
class Dense(nn.Linear):
    """What the authors' layer computes, where the package is missing."""

    def __init__(self, in_features: int, out_features: int, r: int, bias: bool) -> None:
        super().__init__(in_features, out_features, bias)
        self.r = r

    def sorsa_init(self) -> None:
        u, s, v = torch.linalg.svd(self.weight.detach().T, full_matrices=False)
        self.sorsa_A, self.sorsa_B = (
            nn.Parameter(u[:, : self.r].T.contiguous()),
            nn.Parameter(v[: self.r].T.contiguous()),
        )
        self.sorsa_S = nn.Parameter(s[: self.r])
        self.weight.requires_grad_(False)
        self.weight -= ((self.sorsa_B * self.sorsa_S) @ self.sorsa_A).detach()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, (self.sorsa_B * self.sorsa_S) @ self.sorsa_A)


def average_defect(model: nn.Module) -> Tensor:
    """Their regulariser."""
    norms = []
    for name, p in model.named_parameters():
        if "sorsa_A" in name:
            norms.append(torch.norm(p @ p.T - torch.eye(len(p))))
        elif "sorsa_B" in name:
            norms.append(torch.norm(p.T @ p - torch.eye(p.shape[1])))
    return sum(norms[1:], start=norms[0]) / len(norms)


def authors() -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """Their layer's class and their regulariser."""
    try:  # by its metadata, since this script has its name
        path = distribution("sorsa").locate_file("sorsa/layer.py")
    except PackageNotFoundError:
        print("The package sorsa is not installed: its arithmetic stands in.")
        return Dense, average_defect
    spec = importlib.util.spec_from_file_location("sorsa_layer", str(path))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Linear, module.calc_ortho


LAYER, REGULARISER = authors()


def theirs_of(base: nn.Linear, rank: int) -> Any:
    layer = LAYER(base.in_features, base.out_features, r=rank, bias=True)
    layer.weight.data, layer.bias.data = base.weight.data.clone(), base.bias.data.clone()
    layer.bias.requires_grad_(False)
    layer.sorsa_init()
    return layer


def pair(width: int, rank: int) -> tuple[Any, SORSALinear]:
    base = nn.Linear(width, width)
    theirs, ours = theirs_of(base, rank), SORSALinear(base, rank)
    for part in ("sorsa_A", "sorsa_S", "sorsa_B"):  # the signs of singular vectors are arbitrary
        getattr(ours, part).data.copy_(getattr(theirs, part).data)
    return theirs, ours


def passes(layer: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return lambda: torch.autograd.grad(layer(x).sum(), [x, *parameters])


# -- the tables -------------------------------------------------------------------------------------------------------
def layers(bench: Bench) -> None:
    base = nn.Linear(512, 512)
    works = {"sorsa": lambda: theirs_of(base, 32), "SORSALinear": lambda: SORSALinear(base, 32)}
    bench.table("making a layer 512 -> 512, rank 32", works, 1.05)
    theirs, ours = pair(1024, 16)
    for rows, target in ((64, 0.5), (1024, 1.0)):
        x = torch.randn(rows, 1024).requires_grad_()
        works = {"sorsa": passes(theirs, x), "SORSALinear": passes(ours, x)}
        bench.table(f"forward and backward, 1024 -> 1024, rank 16, {rows} rows", works, target)
    pairs = [(theirs(x), ours(x)), *zip(*(passes(layer, x)() for layer in (theirs, ours)), strict=True)]
    found = [((a - b).norm() / a.norm()).item() for a, b in pairs]
    bench.require("the same output and gradients, to 1e-4", max(found) < 1e-4)


def regulariser(bench: Bench) -> None:
    parts = [pair(256, 16) for _ in range(24)]
    for theirs, ours in parts:
        for name in ("sorsa_A", "sorsa_B"):
            getattr(ours, name).data.add_(0.1 * torch.randn(getattr(ours, name).shape))
            getattr(theirs, name).data.copy_(getattr(ours, name).data)
    theirs, ours = nn.ModuleList(t for t, _ in parts), nn.ModuleList(o for _, o in parts)
    works = {
        "sorsa, automatic derivatives": lambda: REGULARISER(theirs).backward(),
        "orthonormal_penalty, automatic derivatives": lambda: orthonormal_penalty(ours).backward(),
        "add_orthonormal_gradient": lambda: add_orthonormal_gradient(ours, 1.0),
    }
    bench.table("the regulariser's gradient, 24 layers 256 -> 256, rank 16", works, 0.7)
    for model, work in ((theirs, "sorsa, automatic derivatives"), (ours, "add_orthonormal_gradient")):
        model.zero_grad()
        works[work]()
    names = ("sorsa_A", "sorsa_B")
    grads = [(getattr(t, n).grad, getattr(o, n).grad) for t, o in zip(theirs, ours, strict=True) for n in names]
    bench.require("the same gradients, to 1e-5", all(torch.allclose(a, b, atol=1e-5) for a, b in grads))


def steps(bench: Bench) -> None:
    inputs, labels = torch.randn(64, 512), torch.arange(64) % 10
    base = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    target = ["0", "2"]
    lora = get_peft_model(copy.deepcopy(base), LoraConfig(r=32, target_modules=target))
    adalora = get_peft_model(
        copy.deepcopy(base), AdaLoraConfig(init_r=32, target_r=32, total_step=10**6, target_modules=target)
    )
    ours = apply_sorsa(copy.deepcopy(base), 32, target=target)

    def step(model: Any, loss: Callable[[Any], Tensor], after: Callable[[], object]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.0)

        def work() -> None:
            optimizer.zero_grad()
            loss(model(inputs)).backward()
            after()
            optimizer.step()

        return work

    def task(z: Tensor) -> Tensor:
        return F.cross_entropy(z, labels)

    def orthogonal(z: Tensor) -> Tensor:
        """AdaLoRA's own regulariser, which peft adds where the model returns a loss."""
        loss = task(z)
        for name, p in adalora.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                loss = loss + 0.5 / 4 * torch.norm(gram - torch.eye(len(gram)))
        return loss

    works = {
        "peft, LoRA": step(lora, task, lambda: None),
        "peft, AdaLoRA with its regulariser": step(adalora, orthogonal, lambda: None),
        "SORSA, gamma 0": step(ours, task, lambda: None),
        "SORSA": step(ours, task, lambda: add_orthonormal_gradient(ours, 0.1)),
    }
    bench.table("a step: 2 layers 512 -> 512, rank 32, batch 64", works, 1.2)


def main() -> int:
    torch.manual_seed(0)
    _, bench = parse(__doc__)
    layers(bench)
    regulariser(bench)
    steps(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
