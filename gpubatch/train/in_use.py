"""A folder of checkpoints belongs to one run at a time."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpubatch.errors import ArgumentError

NAME = ".in-use"
fcntl: Any = importlib.import_module("fcntl") if os.name == "posix" else None


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Lock the folder for this run; raises ArgumentError if another run, perhaps on another machine, holds it.

    The lock ends with the process, however that ends. Where the file system has no locks there is none.
    """
    file = locked(folder / NAME)
    try:
        yield
    finally:
        if file is not None:
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()
            os.close(file)


def locked(path: Path) -> int | None:
    """The file, open and locked, with what holds it in words; None where it cannot be locked."""
    while fcntl is not None:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:  # the folder cannot be written to, which is said elsewhere
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace") or "another process"
            os.close(file)
            raise ArgumentError(
                f"{path.parent} is in use by another run, {holder}: wait for its end, or take another folder"
            ) from None
        except OSError:
            os.close(file)
            return None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file), path.stat()):  # not one that its holder removed meanwhile
                os.truncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return file
        os.close(file)
    return None
