"""A package of somebody else's brings a method and a task: installed in an environment of its own, both are found and run."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import equipoise

METHOD = '''"""A plugin."""
from equipoise import Method


class Shrink(Method):
    """Pull all weights to zero."""

    name = "shrink"
    neutral = {"strength": 0.0}

    def __init__(self, strength: float = 1e-4) -> None:
        self.strength = strength

    def penalty(self, run, batch, output):
        return self.strength * sum(p.square().sum() for p in run.model.parameters())
'''
TASK = '''from dataclasses import dataclass
from typing import ClassVar

import torch

from equipoise import Examples
from equipoise.training import Problem, SupervisedTask


@dataclass(frozen=True)
class Halves(SupervisedTask):
    """Whether the first half of a row is larger than the second."""

    name: ClassVar[str] = "halves"
    baseline: ClassVar[str] = "cross-entropy"
    methods: ClassVar[tuple[str, ...]] = ("shrink",)
    epochs: int = 2

    def problem(self, seed: int) -> Problem:
        x = torch.randn(120, 4, generator=torch.Generator().manual_seed(seed))
        y = (x[:, :2].sum(1) > x[:, 2:].sum(1)).long()
        parts = [Examples(x[a:b], y[a:b], num_classes=2) for a, b in ((0, 80), (80, 100), (100, 120))]
        return Problem(*parts, (4,), 2)
'''
PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "shrinker"
version = "0.1"

[project.entry-points."equipoise.methods"]
shrink = "shrinker.method:Shrink"

[project.entry-points."equipoise.tasks"]
halves = "shrinker.task:Halves"
"""


@pytest.mark.slow
def test_entry_points_of_an_installed_package(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    package = tmp_path / "package" / "shrinker"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "method.py").write_text(METHOD)
    (package / "task.py").write_text(TASK)
    (package.parent / "pyproject.toml").write_text(PROJECT)

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    site = next((tmp_path / "env" / "lib").glob("python*/site-packages"))
    # The new environment sees this one's packages, so that nothing is installed twice or downloaded.
    (site / "host.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n{Path(equipoise.__file__).parent.parent}\n")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", package.parent]
    subprocess.run(install, check=True)

    listed = subprocess.run([python, "-m", "equipoise", "methods"], check=True, capture_output=True, text=True).stdout
    assert "shrink" in listed and "Pull all weights to zero." in listed
    options = ["--seeds", "2", "--configs", "1", "--no-timing", "--json", "--out", tmp_path / "out"]
    done = subprocess.run(
        [python, "-m", "equipoise", "compare", "halves", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "shrink"' in done.stdout
