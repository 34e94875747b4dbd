"""One Flower project in three ways, with one result: in one process, on Ray, and as SuperLink and SuperNodes over TLS."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

pytest.importorskip("flwr")
RUN = Path(__file__).parents[2] / "examples" / "federated" / "run.py"
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(600)]


def run(way: str, out: Path) -> dict[str, Tensor]:
    arguments = [sys.executable, str(RUN), way, "--clients", "2", "--rounds", "2", "--out", str(out)]
    # A group of its own, so that no SuperLink or SuperNode outlives a test that is cut short.
    running = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told, _ = running.communicate(timeout=560)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert running.returncode == 0, told
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return run("process", tmp_path_factory.mktemp("process"))


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_simulation_on_ray_gives_the_same_model(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    pytest.importorskip("ray")
    check(run("simulation", tmp_path), expected)


def test_deployment_over_tls_gives_the_same_model(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    check(run("deployment", tmp_path), expected)
    link = (tmp_path / "superlink.log").read_text()
    assert "https://127.0.0.1" in link and link.count("Activated node_id") == 2
