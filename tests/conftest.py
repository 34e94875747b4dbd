"""Shared by all tests: one thread, because two test processes share the machine and because bits depend on the number."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _quiet_folder(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing a test writes by default lands in the repository, and no log level leaks between tests."""
    monkeypatch.chdir(str(tmp_path))
