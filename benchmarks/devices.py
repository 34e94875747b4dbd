"""Every method on an accelerator: trained on the conformance kit's tiny problem, it gives the CPU's losses and predictions.

    python benchmarks/devices.py [--jobs 8] [--only elr,sbcl] [--tolerance 1e-2]

Each method trains in a process of its own, since an error on a GPU spoils the process: first on the CPU, then on the device that
accelerate chooses; federated ones (where Flower is installed) on seven clients with the model there. Shown are the largest relative
difference of the training losses and of the finished model's predictions.
Exit code 1 if a method fails there, or differs by more than the tolerance (draws on the device, such as dropout's, are other
draws than the CPU's: such methods are listed with their reason). Without an accelerator there is nothing to do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests" / "testing"
DRAWS = {
    "ccvr": "virtual features lie along eigenvectors, whose signs follow from the last digits",
    "co-teaching": "the second network's weights are drawn on the device",
    "elr-plus": "the second network's weights are drawn on the device",
}


def one(slug: str) -> dict[str, float]:
    """Both runs of a method, compared."""
    sys.path.insert(0, str(TESTS))
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState
    from kit_library import METHODS, PROBLEMS, case_of

    torch.backends.cuda.matmul.allow_tf32 = False
    case = case_of(slug)
    problem = PROBLEMS[case.problem]
    seen = {}
    for cpu in (True, False):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.manual_seed(0)
        run = problem.train([METHODS[slug](**case.settings)], accelerator=Accelerator(cpu=cpu))
        prediction, _ = run.predict(problem.validation)
        seen[cpu] = [torch.tensor([r["train_loss"] for r in run.history]), prediction.cpu().float()]
        device = str(run.device)
    apart = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(*seen.values(), strict=True)]
    return {"losses": apart[0], "predictions": apart[1], "device": device}  # type: ignore[dict-item]


FEDERATED: dict[str, dict[str, Any]] = {
    **{key: {"density": 0.6} for key in ("magnitude-mask", "random-mask")},
    "fedtiny": {"density": 0.6, "num_candidates": 2, "interval": 1},
    "fedloge": {"etf_steps": 100},
    **{key: {"f": 1} for key in ("trimmed-mean", "krum", "multi-krum", "bulyan")},
}


def federated_one(slug: str) -> dict[str, float]:
    """Both runs of a federated method, compared."""
    import torch
    from torch import nn

    from equipoise import catalogue
    from equipoise.federated import LocalTraining, simulate
    from equipoise.federated.algorithm import predict

    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    centres = torch.randn(3, 1, 4, 4)
    labels = [torch.arange(24 + number) % 3 for number in range(7)]
    clients = [(centres[y] + 0.7 * torch.randn(len(y), 1, 4, 4), y) for y in labels]
    layers = nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    model, seen = nn.Sequential(*layers), []
    local = LocalTraining(lr=0.1, batch_size=8, least_batch=2)
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    for device in (torch.device("cpu"), accelerator):
        method = catalogue.find("method", slug).load()(**FEDERATED.get(slug, {}))
        run = simulate(method, model.to(device), clients, 3, local=local)
        if run.faults:
            raise SystemExit(f"{device}: {run.faults[0]}")
        prediction, _ = predict(run.model, clients[0])
        seen.append([torch.tensor([record["loss"] for record in run.history]), prediction.cpu()])
    apart = [float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(*seen, strict=True)]
    return {"losses": apart[0], "predictions": apart[1], "device": str(accelerator)}  # type: ignore[dict-item]


def federated_slugs() -> list[str]:
    """The federated methods, if Flower is installed."""
    from equipoise import catalogue

    if find_spec("flwr") is None:
        return []
    return sorted(e.slug for e in catalogue.methods().values() if e.module.startswith("equipoise.federated."))


def child(slug: str) -> tuple[str, dict[str, float] | str]:
    command = [sys.executable, __file__, "--one", slug]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return slug, json.loads(lines[-1]) if done.returncode == 0 else (lines or ["died"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=8)
    parser.add_argument("--only", default="", help="methods, separated by commas")
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        run = federated_one if chosen.one in federated_slugs() else one
        print(json.dumps(run(chosen.one)))
        return 0
    import torch

    if not torch.accelerator.is_available():
        print("No accelerator here: nothing to compare.")
        return 0
    sys.path.insert(0, str(TESTS))
    from kit_library import available

    slugs = chosen.only.split(",") if chosen.only else [*sorted(available()), *federated_slugs()]
    failed = 0
    with ThreadPoolExecutor(chosen.jobs) as pool:
        for slug, found in pool.map(child, slugs):
            if isinstance(found, str):
                failed += 1
                print(f"{slug:30} FAILED: {found}")
                continue
            good = max(found["losses"], found["predictions"]) <= chosen.tolerance
            reason = "" if good else DRAWS.get(slug, "DIFFERS")
            failed += reason == "DIFFERS"
            print(
                f"{slug:30} {found['device']:8} losses {found['losses']:8.1e}  predictions {found['predictions']:8.1e}  {reason}"
            )
    print(f"\n{failed} of {len(slugs)} methods fail or differ." if failed else "\nAll methods give the CPU's figures.")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
