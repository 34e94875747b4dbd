"""Every Python block of the docs and the README runs, page by page, in a folder of its own."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    if not blocks:
        pytest.skip("no Python block")
    if "from transformers" in text:
        pytest.importorskip("transformers")
    if "simulate(" in text:
        pytest.importorskip("flwr")
    module = types.ModuleType("docs_page")
    monkeypatch.setitem(sys.modules, "docs_page", module)  # dataclasses and pickling look their module up
    namespace = vars(module)
    for block in blocks:
        line = text[: block.start()].count("\n") + 1
        # Leading newlines make a traceback point at the line in the page.
        exec(compile("\n" * line + block.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_exist(page: Path) -> None:
    """Every ``equipoise COMMAND`` in a shell block is a command, and its long options exist."""
    from typer.main import get_command

    from equipoise.catalogue import tasks
    from equipoise.cli.app import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = line.split("#")[0].split()
            if not words or words[0] != "equipoise" or len(words) == 1:
                continue
            assert words[1] in commands, f"{page.name}: {line}"
            options = {o for p in commands[words[1]].params for o in p.opts}
            if words[1] == "compare":
                from dataclasses import fields

                options |= {"--" + f.name.replace("_", "-") for f in fields(tasks()[words[2]].load())}
            for word in words[2:]:
                if word.startswith("--"):
                    assert word.split("=")[0] in options, f"{page.name}: {line}: {word}"
