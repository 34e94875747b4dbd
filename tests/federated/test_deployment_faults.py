"""Faults of a real deployment (SuperLink and SuperNodes as processes of their own, over TLS): processes are killed in mid-run."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import torch
from safetensors.torch import load_file

from equipoise.training import checkpoint as checkpoints

pytest.importorskip("flwr")
RUN = Path(__file__).parents[2] / "examples" / "federated" / "run.py"
CLIENTS, ROUNDS = 2, 2
PATIENCE = 240  # seconds to wait for anything, on a machine that is busy
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


def example() -> Any:
    spec = importlib.util.spec_from_file_location("federated_example", RUN)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = example()


class Deployment:
    """The processes of one run, and what they have left on disk so far."""

    def __init__(self, out: Path, stack: contextlib.ExitStack) -> None:
        self.out, self.stack = out, stack
        self.port, self.tls = run.free_port(), run.certificates(out / "tls")

    def start(self, command: list[str], log: str) -> subprocess.Popen[bytes]:
        return self.stack.enter_context(run.started(command, self.out, log))

    def link(self, log: str = "superlink") -> subprocess.Popen[bytes]:
        return self.start(run.superlink(self.port, self.tls), log)

    def node(self, number: int, log: str) -> subprocess.Popen[bytes]:
        return self.start(run.supernode(self.port, self.tls, number, CLIENTS), log)

    def submit(self, log: str, resume: bool = False) -> subprocess.Popen[bytes]:
        config = {"rounds": ROUNDS, "clients": CLIENTS, "out": str(self.out), "resume": resume}
        config["checkpoint"] = str(self.out / "checkpoint")
        return self.start(run.submission(self.port, run.trust(self.tls), config, self.out), log)

    def log(self, name: str) -> str:
        return (self.out / f"{name}.log").read_text()

    def trained(self, number: int) -> int:
        """The last round in which a client has trained, by the state that it keeps; the server need not have heard of it."""
        folder = self.out / "state" / str(number)
        with contextlib.suppress(checkpoints.CheckpointError):
            return checkpoints.load(folder)["stamp"]["round"]
        return 0

    def saved(self) -> dict[str, Any]:
        return checkpoints.load(self.out / "checkpoint")

    def until(self, reached: Callable[[], bool], what: str, *alive: subprocess.Popen[bytes]) -> None:
        """Wait for something, as long as the processes live that are to bring it about."""
        end = time.monotonic() + PATIENCE
        while not reached():
            if time.monotonic() > end or any(process.poll() is not None for process in alive):
                logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.out.glob("*.log"))
                pytest.fail(f"{what}: not reached\n{logs}")
            time.sleep(0.1)


def processes(out: Path) -> list[psutil.Process]:
    """All processes of a run, also those whose parents are gone: they have its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLWR_HOME") == str(out / "home"):
                found.append(process)
    return found


def kill(victims: list[psutil.Process]) -> None:
    """SIGKILL to all at once, as in a power cut."""
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    psutil.wait_procs(victims, timeout=10)


def family(parent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        found = psutil.Process(parent.pid)
        return [found, *found.children(recursive=True)]
    return []


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificates, is not installed")
    for name in ("flower-superlink", "flower-supernode", "flwr"):
        if not (run.BIN / name).exists():
            pytest.skip(f"{name}, which Flower installs, is not in {run.BIN}")
    with contextlib.ExitStack() as stack:
        try:
            yield Deployment(tmp_path, stack)
        finally:
            kill(processes(tmp_path))


def test_a_killed_node_is_named_and_left_out_and_may_come_back(deployment: Deployment) -> None:
    """Flower takes a node for dead a minute after its last heartbeat; until then, or its timeout, the round waits for it."""
    deployment.link()
    deployment.node(0, "node-0")
    victim = deployment.node(1, "node-1")
    submitted = deployment.submit("run")
    deployment.until(lambda: "Receiving: train" in deployment.log("node-1"), "training", submitted, victim)
    kill(family(victim))
    back = deployment.node(1, "node-1-again")
    deployment.until(lambda: submitted.poll() is not None, "the end of the run", back)
    told, saved = deployment.log("run"), deployment.saved()
    assert submitted.returncode == 0, told
    assert [record["clients"] for record in saved["history"]] == [[0], [0, 1]]
    assert {(round, client) for round, client, _ in saved["faults"] if client >= 0} == {(1, 1)}
    assert "round 1: client 1 is left out" in told
    assert (deployment.out / "model.safetensors").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run leaves."""
    out = tmp_path_factory.mktemp("whole")
    process = [sys.executable, RUN, "process", "--clients", CLIENTS, "--rounds", ROUNDS, "--out", out]
    subprocess.run([str(part) for part in process], check=True, capture_output=True, timeout=PATIENCE)
    return out


@pytest.mark.parametrize("victim", ["serverapp", "superlink"])
def test_a_killed_server_goes_on_with_the_same_result(
    victim: str, deployment: Deployment, whole: Path, tmp_path: Path
) -> None:
    """The ServerApp alone, under a SuperLink and SuperNodes that live on; or all of the server, after which all start anew."""
    link = deployment.link()
    nodes = [deployment.node(number, f"node-{number}") for number in range(CLIENTS)]
    submitted = deployment.submit("run-1")
    # The server has accepted round 1, and a client has trained in round 2, which it is to undo.
    deployment.until(lambda: max(map(deployment.trained, range(CLIENTS))) == 2, "round 2", submitted, *nodes)
    victims = family(link)
    if victim == "serverapp":
        victims = [found for found in victims if any("flwr-serverapp" in part for part in found.cmdline())]
    assert victims
    kill(victims)
    assert deployment.saved()["round"] == 1 and not (tmp_path / "model.safetensors").exists()

    if (
        victim == "superlink"
    ):  # without a database it does not know its nodes again, so that they stop, and are started anew
        deployment.link("superlink-again")
        for node in nodes:
            kill(family(node))
        nodes = [deployment.node(number, f"node-{number}-again") for number in range(CLIENTS)]
    again = deployment.submit("run-2", resume=True)
    deployment.until(lambda: again.poll() is not None, "the end of the run", *nodes)
    assert again.returncode == 0, deployment.log("run-2")
    found, expected = load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert deployment.saved()["history"] == checkpoints.load(whole / "checkpoint")["history"]
    assert deployment.saved()["faults"] == []
