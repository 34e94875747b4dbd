"""Run the project of this folder in one of three ways, with the same result:

    python examples/federated/run.py process        # in this process
    python examples/federated/run.py simulation     # Flower's simulation engine, on Ray
    python examples/federated/run.py deployment     # a SuperLink and SuperNodes as processes of their own, with TLS

The last prints the commands that it runs, which are those of a real deployment; there each SuperNode runs on its own machine, and
the certificates are your own. Needs ``pip install 'equipoise[federated]'``, and openssl for the certificates.

A run saves to ``--out`` after each round. One that was cut short goes on from there, with the same result, if it is started again
with the same ``--out`` and ``--resume``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
BIN = Path(sysconfig.get_path("scripts"))
ALONE = "--disable-runtime-dependency-installation"  # the apps run with the packages that are installed
Config = dict[str, Any]


def process(config: Config, out: Path) -> None:
    """The apps on ``InProcessGrid``."""
    sys.path.insert(0, str(HERE))
    os.environ.update(own(out))
    from digits_federation.apps import client, server
    from flwr.app import Context, RecordDict

    from equipoise.integrations.flower import InProcessGrid

    default = tomllib.loads((HERE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config = {**default, **config}
    server(InProcessGrid(client, config["clients"], config), Context(1, 0, {}, RecordDict(), config))


def simulation(config: Config, out: Path) -> None:
    """Flower's simulation engine: a local SuperLink that runs the clients on Ray."""
    port = free_port()
    link = command("flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1", "--port", port, ALONE)
    with started(link, out, "superlink"):
        submit(port, "insecure = true", config, out, f"num-supernodes={config['clients']} client-resources-num-cpus=1")


def deployment(config: Config, out: Path) -> None:
    """A SuperLink, and a SuperNode for each client, over TLS."""
    port, tls = free_port(), certificates(out / "tls")
    with contextlib.ExitStack() as stack:
        stack.enter_context(started(superlink(port, tls), out, "superlink"))
        for number in range(config["clients"]):
            node = supernode(port, tls, number, config["clients"])
            stack.enter_context(started(node, out, f"node-{number}"))
        submit(port, trust(tls), config, out)


def superlink(port: str, tls: Path) -> list[str]:
    return command("flower-superlink", *identity(tls), "--host", "127.0.0.1", "--port", port, ALONE)


def supernode(port: str, tls: Path, number: int, clients: int) -> list[str]:
    address = ["--superlink", f"127.0.0.1:{port}", "--root-certificates", tls / "ca.crt", "--port", free_port()]
    config = f"partition-id={number} num-partitions={clients}"
    return command("flower-supernode", *address, *identity(tls), "--node-config", config)


def identity(tls: Path) -> list[object]:
    return [
        "--ssl-ca-certfile",
        tls / "ca.crt",
        "--ssl-certfile",
        tls / "server.crt",
        "--ssl-keyfile",
        tls / "server.key",
    ]


def trust(tls: Path) -> str:
    return f'root-certificates = "{tls / "ca.crt"}"'


def command(name: str, *arguments: object) -> list[str]:
    return [str(BIN / name), *map(str, arguments)]


def submit(port: str, security: str, config: Config, out: Path, federation: str = "") -> None:
    """Run the project on a SuperLink, until the end."""
    run = submission(port, security, config, out, federation)
    print("$", shlex.join(run), flush=True)
    subprocess.run(run, env=environment(out), check=True, timeout=600)


def submission(port: str, security: str, config: Config, out: Path, federation: str = "") -> list[str]:
    """``flwr run``: build the project, send it to the SuperLink, and show the log until the end."""
    address = f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\n{security}\n'
    (out / "home" / "config.toml").write_text(address)
    run = command("flwr", "run", HERE, "here", "--stream")
    run += ["--run-config", " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())]
    return [*run, "--federation-config", federation] if federation else run


@contextlib.contextmanager
def started(arguments: list[str], out: Path, log: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process for the length of the block; for a SuperLink, wait until it listens."""
    print("$", shlex.join(arguments), "&", flush=True)
    (out / "home").mkdir(parents=True, exist_ok=True)
    with (out / f"{log}.log").open("w") as file:
        running = subprocess.Popen(arguments, env=environment(out), stdout=file, stderr=file)
    try:
        if Path(arguments[0]).name == "flower-superlink":
            wait(int(arguments[arguments.index("--port") + 1]), running)
        yield running
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
    return {**os.environ, "PATH": path, "FLWR_HOME": str(out / "home"), **quiet, **own(out)}


def own(out: Path) -> dict[str, str]:
    """Where clients keep their state; in a real deployment each on its own machine."""
    return {"DIGITS_STATE": str(out / "state")}


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
    options.add_argument("--resume", action="store_true", help="go on with the run that was cut short in --out")
    chosen = options.parse_args()
    if chosen.resume and chosen.out is None:
        options.error("--resume: needs the --out of the run to go on with")
    out = (chosen.out or Path(tempfile.mkdtemp(prefix="federated-"))).resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = {"rounds": chosen.rounds, "clients": chosen.clients, "out": str(out), "resume": chosen.resume}
    config["checkpoint"] = str(out / "checkpoint")
    {"process": process, "simulation": simulation, "deployment": deployment}[chosen.way](config, out)
    if not (out / "model.safetensors").exists():
        raise SystemExit(f"the run left no model: see the logs in {out}")
    print(f"the model is {out / 'model.safetensors'}")


if __name__ == "__main__":
    main()
