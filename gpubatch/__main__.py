"""``python -m gpubatch`` and the command ``gpubatch``: errors become one line and an exit code."""

from __future__ import annotations

import importlib.util
import sys
import warnings


def main() -> None:
    """Run the command line; 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the command line needs {' and '.join(missing)}: pip install 'gpubatch[cli]'", file=sys.stderr)
        sys.exit(1)
    # Only here: without the extra these cannot be imported.
    from gpubatch.cli import app
    from gpubatch.errors import GpubatchError

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        app()
    except (GpubatchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
