"""The command `vmcr2`, also as `python -m vmcr2`."""

from __future__ import annotations

import sys


def main() -> int:
    """Runs the command line and returns its exit code; if an extra is missing, says which one to install."""
    try:
        from vmcr2.lab.cli import main as run

        return run()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vmcr2":
            raise
        print(f"vmcr2: the command needs {error.name}, which is missing: pip install 'vmcr2[lab]'", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
