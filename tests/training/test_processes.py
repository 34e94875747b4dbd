"""Two gloo processes give what one gives, under both launchers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from two_processes import resumed, trainings

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent


def launch(launcher: str, folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Start the script in two processes; the tensors and records of both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = {
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"],
        "accelerate": [
            # "--multi_gpu" is what starts processes without MPI; they find no GPU and meet over gloo
            *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"),
            *("--mixed_precision=no", "--dynamo_backend=no", f"--main_process_port={port}"),
        ],
    }
    path = os.pathsep.join([str(HERE.parent.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *commands[launcher], str(HERE / "two_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in range(2)
    ]


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_processes_equal_one(launcher: str, tmp_path: Path) -> None:
    (ours, ours_record), (theirs, theirs_record) = launch(launcher, tmp_path)
    assert ours_record["processes"]["count"] == 2
    assert ours.keys() == theirs.keys()
    for key in ours:
        if "running" not in key:  # batch statistics belong to a process; those of the first are saved and broadcast
            assert torch.equal(ours[key], theirs[key]), key
    for name, run in trainings().items():
        for key, value in run.model.state_dict().items():
            torch.testing.assert_close(ours[f"{name}/{key}"], value, rtol=0, atol=1e-12)
        for record in (ours_record[name], theirs_record[name]):
            assert (record["steps"], record["total"]) == (run.global_step, run.total_steps)
            if name != "own loop":  # its halves leave an example out
                for found, wanted in zip(record["history"], run.history, strict=True):
                    assert found == pytest.approx(wanted, rel=1e-9)
        if name == "method":
            torch.testing.assert_close(ours["seen"], run.methods[0].part.seen, rtol=0, atol=1e-12)
            assert (ours["seen"] != 0).all()
    for found, record in ((ours, ours_record), (theirs, theirs_record)):
        assert record["whole"] == record["again"]
        for key in [key for key in found if key.startswith("whole/")]:
            if "running" not in key or found is ours:
                assert torch.equal(found[key], found[key.replace("whole/", "again/")]), key
    assert "at least one" in ours_record["refused"]["message"]


def test_one_process_resumes_the_same_script(tmp_path: Path) -> None:
    whole, again = resumed(tmp_path)
    assert whole.history == again.history
