"""Run the project of this folder in one of three ways, with the same result:

    python examples/federated/run.py process        # in this process
    python examples/federated/run.py simulation     # Flower's simulation engine, on Ray
    python examples/federated/run.py deployment     # a SuperLink and SuperNodes as processes of their own, with TLS

The last prints the commands that it runs, which are those of a real deployment; there each SuperNode runs on its own machine, and
the certificates are your own. Needs ``pip install 'equipoise[federated]'``, and openssl for the certificates.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
BIN = Path(sysconfig.get_path("scripts"))
ALONE = "--disable-runtime-dependency-installation"  # the apps run with the packages that are installed


def process(clients: int, rounds: int, out: Path) -> None:
    """The apps on ``InProcessGrid``."""
    sys.path.insert(0, str(HERE))
    from digits_federation.apps import client, server
    from flwr.app import Context, RecordDict

    from equipoise.integrations.flower import InProcessGrid

    config = {"rounds": rounds, "clients": clients, "out": str(out)}
    server(InProcessGrid(client, clients, config), Context(1, 0, {}, RecordDict(), config))


def simulation(clients: int, rounds: int, out: Path) -> None:
    """Flower's simulation engine: a local SuperLink that runs the clients on Ray."""
    port = free_port()
    link = command("flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port, ALONE)
    with started(link, out):
        submit(port, "insecure = true", clients, rounds, out, f"num-supernodes={clients} client-resources-num-cpus=1")


def deployment(clients: int, rounds: int, out: Path) -> None:
    """A SuperLink, and a SuperNode for each client, over TLS."""
    port, tls = free_port(), certificates(out / "tls")
    own = [
        "--ssl-ca-certfile",
        tls / "ca.crt",
        "--ssl-certfile",
        tls / "server.crt",
        "--ssl-keyfile",
        tls / "server.key",
    ]
    link = command("flower-superlink", *own, "--host", "127.0.0.1", "--port", port, ALONE)
    with contextlib.ExitStack() as stack:
        stack.enter_context(started(link, out))
        for number in range(clients):
            config = f"partition-id={number} num-partitions={clients}"
            address = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", tls / "ca.crt", "--port", free_port()]
            node = command("flower-supernode", *address, *own, "--node-config", config)
            stack.enter_context(started(node, out, f"node-{number}"))
        submit(port, f'root-certificates = "{tls / "ca.crt"}"', clients, rounds, out)


def command(name: str, *arguments: object) -> list[str]:
    return [str(BIN / name), *map(str, arguments)]


def submit(port: str, security: str, clients: int, rounds: int, out: Path, federation: str = "") -> None:
    """``flwr run``: build the project, send it to the SuperLink, and wait for the end."""
    address = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n{security}\n'
    (out / "home" / "config.toml").write_text(address)
    run = command("flwr", "run", HERE, "here", "--stream")
    run += ["--run-config", f'rounds={rounds} clients={clients} out="{out}"']
    run += ["--federation-config", federation] if federation else []
    print("$", shlex.join(run), flush=True)
    subprocess.run(run, env=environment(out), check=True, timeout=600)


@contextlib.contextmanager
def started(arguments: list[str], out: Path, log: str = "superlink") -> Iterator[None]:
    """A process for the length of the block; for a SuperLink, wait until it listens."""
    print("$", shlex.join(arguments), "&", flush=True)
    (out / "home").mkdir(parents=True, exist_ok=True)
    with (out / f"{log}.log").open("w") as file:
        running = subprocess.Popen(arguments, env=environment(out), stdout=file, stderr=file)
    try:
        if log == "superlink":
            wait(int(arguments[arguments.index("--port") + 1]), running)
        yield
    finally:
        running.terminate()
        try:
            running.wait(10)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def wait(port: int, running: subprocess.Popen[bytes], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and running.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise SystemExit("the SuperLink did not start: see superlink.log")


def environment(out: Path) -> dict[str, str]:
    """Flower's own files go to a folder of this run."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**os.environ, "PATH": path, "FLWR_HOME": str(out / "home"), **quiet}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def certificates(folder: Path) -> Path:
    """A certificate authority of our own, and the certificate of 127.0.0.1 that it signs."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
    made = "req -newkey rsa:2048 -nodes"
    for arguments in (
        f"{made} -x509 -keyout ca.key -out ca.crt -days 7 -subj /CN=authority",
        f"{made} -keyout server.key -out server.csr -subj /CN=localhost",
        "x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out server.crt -days 7 -extfile names",
    ):
        subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)
    return folder


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("way", choices=("process", "simulation", "deployment"))
    options.add_argument("--clients", type=int, default=3)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--out", type=Path, help="folder for the model and the logs, by default a temporary one")
    chosen = options.parse_args()
    out = (chosen.out or Path(tempfile.mkdtemp(prefix="federated-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    {"process": process, "simulation": simulation, "deployment": deployment}[chosen.way](
        chosen.clients, chosen.rounds, out
    )
    if not (out / "model.safetensors").exists():
        raise SystemExit(f"the run left no model: see the logs in {out}")
    print(f"the model is {out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
