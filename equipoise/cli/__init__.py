"""The command line. ``main`` turns every error that a user can cause into one line and exit code 2."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the ``equipoise`` command. Exit codes: 0 done, 1 a run failed, 2 usage, 130 interrupted."""
    from equipoise.cli.app import app
    from equipoise.errors import EquipoiseError

    try:
        app()
    except EquipoiseError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


__all__ = ["main"]
