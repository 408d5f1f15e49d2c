"""``python -m gpubatch`` and the command ``gpubatch``: errors become one line and an exit code."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import warnings


def main() -> None:
    """Run the command line.

    Exit codes: 0; 1 for an error in data, training or the machine; 2 for a wrong option or value; 130 after Ctrl-C, 143
    after SIGTERM, 129 after SIGHUP.
    """
    missing = [name for name in ("typer", "rich") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"the command line needs {' and '.join(missing)}: pip install 'gpubatch[cli]'", file=sys.stderr)
        sys.exit(1)
    # Only here: without the extra these cannot be imported.
    from gpubatch.cli import app
    from gpubatch.errors import ArgumentError, DataFormatError, GpubatchError
    from gpubatch.parallel import launched_rank

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    rank = launched_rank(os.environ)
    try:
        with contextlib.ExitStack() as stack:
            if rank:  # of the processes that a launcher started, one writes for all
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            app()
    except (GpubatchError, OSError) as error:
        if not rank:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) and not isinstance(error, DataFormatError) else 1)


if __name__ == "__main__":
    main()
