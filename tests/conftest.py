"""Shared by all tests: one thread, because two test processes share the machine and because bits depend on the number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equipoise.data import shakespeare

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes by default lands in the repository, and no log level leaks between tests."""
    monkeypatch.chdir(str(tmp_path))


@pytest.fixture
def plays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with every play of Shakespeare as numbered words, the Folio's in capitals; with a title, a speaker, a direction."""
    folder = tmp_path / "plays"
    folder.mkdir()
    for genre, named in shakespeare.PLAYS.items():
        for modern, folio in named.items():
            words = [f"{genre[0]}{modern[:3]}{i}" for i in range(400)]
            lines = "\n".join(" ".join(words[i : i + 8]) for i in range(0, 400, 8))
            text = "T" * 2_000 + f"\nHor.\n[Exit.]\n{lines}\n"
            (folder / f"{modern}_gut.txt").write_text(text)
            (folder / f"{folio or modern}_gut_f.txt").write_text(text.replace(lines, lines.upper()))
    monkeypatch.setenv(shakespeare.VARIABLE, str(folder))
    return folder
