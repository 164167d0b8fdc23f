"""`python -m fusedact` and the `fusedact` script."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0, 2 where it was asked for something impossible, 130 after Ctrl-C."""
    missing = [name for name in ("typer", "rich", "matplotlib") if find_spec(name) is None]
    if missing:
        print(f"fusedact: {', '.join(missing)} not found: pip install fusedact[cli]", file=sys.stderr)
        return 2
    try:
        from fusedact.cli import run

        return run(args)
    except KeyboardInterrupt:  # while it imports
        return 130


if __name__ == "__main__":
    sys.exit(main())
