"""What must end with the object that started it."""

from __future__ import annotations

import threading


def threads() -> list[threading.Thread]:
    """The running threads of gpubatch, but those that fetch from URLs, which are the process's."""
    return [t for t in threading.enumerate() if t.name.startswith("gpubatch") and t.name != "gpubatch-remote"]
