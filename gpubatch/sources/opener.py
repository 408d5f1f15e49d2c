"""Files of sources, here or elsewhere: opened, read by place, closed, and opened again."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import BinaryIO, Generic, NoReturn, Protocol, TypeVar
from urllib.parse import unquote

from gpubatch.sources.reader import refuse_pickling
from gpubatch.sources.remote import RemoteFile, check_unchanged, is_url

AT_ONCE = 1 << 20  # bytes of a request to read ahead: Linux ignores what exceeds a device's limit


class Opener(Protocol):
    """A file that can be opened: a :class:`LocalFile`, or a file elsewhere.

    Every function that opens a file by its path takes such an object instead. ``path`` is its path or URL: messages
    name it, and its suffix tells :func:`gpubatch.sources.files` the format.
    """

    path: str

    def open(self) -> BinaryIO:
        """A new file object at its start: ``read``, ``readinto``, ``seek``, ``tell``. The caller closes it.

        One thread uses it at a time. A method ``expect(start, stop)``, if it has one, announces bytes that will be read
        soon.
        """

    def size(self) -> int:
        """Its size in bytes."""

    def identity(self) -> str:
        """Text that changes with the contents: size and time, or an ETag.

        Every opening of the file asks for it, and a resumed run compares it.
        """


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.expanduser(os.fsdecode(path))

    def open(self) -> BinaryIO:
        """See :class:`Opener`."""
        return _ClosesItself(self.path)

    def size(self) -> int:
        """See :class:`Opener`."""
        return os.path.getsize(self.path)

    def identity(self) -> str:
        """See :class:`Opener`."""
        found = os.stat(self.path)
        return f"{found.st_size} bytes of {found.st_mtime_ns} ns"


class _ClosesItself(io.FileIO):
    """A file on this machine that closes its descriptor when it is collected as garbage, too.

    Python collects a circle of a source and its user in any order, and would warn of a file that is collected before
    the object that closes it.
    """

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            io.FileIO.__init__(self, self._descriptor, closefd=False)
        except OSError as error:  # a folder
            os.close(self._descriptor)
            raise OSError(error.errno, error.strerror, path) from None
        self.name = path

    def close(self) -> None:
        if not self.closed:
            io.FileIO.close(self)
            os.close(self._descriptor)


def opener_of(path: str | os.PathLike[str] | Opener) -> Opener:
    """The opener of a file that a user gives."""
    if isinstance(path, str) and is_url(path):
        return RemoteFile(unquoted(path))
    return LocalFile(path) if isinstance(path, (str, bytes, os.PathLike)) else path


def unquoted(url: str) -> str:
    """A URL; that of a file on this machine without %20 and the like, unless the file's name has them."""
    path = url.removeprefix("file://")
    return url if path == url or "%" not in path or os.path.exists(path) else f"file://{unquote(path)}"


class Closable(Protocol):
    """An object that can be closed."""

    def close(self) -> None:
        """Close it."""


T = TypeVar("T", bound=Closable)


class Reopened(Generic[T]):
    """An object that ``make`` makes of an open file: now, and again at the first use after :meth:`close`.

    A forked child makes its own, since it must not share a place in the file. Raises ``DataFormatError`` if the file
    has changed by then.
    """

    def __init__(self, file: Opener, make: Callable[[], T]) -> None:
        self._file, self._make, self.identity = file, make, file.identity()
        self._made: T | None = make()
        self._process = os.getpid()

    def use(self) -> T:
        """The object, for use at once."""
        if self._made is None or self._process != os.getpid():
            check_unchanged(self._file.path, self.identity, self._file.identity())
            self._made, self._process = self._make(), os.getpid()
        return self._made

    def close(self) -> None:
        """Close it until it is next used."""
        made, self._made = self._made, None
        if made is not None:
            made.close()

    def __reduce__(self) -> NoReturn:
        refuse_pickling()

    def __del__(self) -> None:
        if hasattr(self, "_made"):
            self.close()


class BytesByPlace:
    """An open file whose bytes are read by place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self._positional = isinstance(file, io.FileIO) and hasattr(os, "preadv")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` with the bytes from ``offset`` on; return their number, smaller only where the file ends."""
        done = 0
        while done < len(view) and (count := self._some(view[done:], offset + done)):
            done += count
        return done

    def _some(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of ``view`` by one call of the system."""
        if self._positional:
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # seeking and reading are two calls
            self._file.seek(offset)
            return self._file.readinto(view) or 0  # type: ignore[attr-defined]

    def expect(self, start: int, stop: int) -> None:
        """Start reading bytes ahead, while others are used."""
        if hasattr(self._file, "expect"):
            self._file.expect(start, stop)
        elif isinstance(self._file, io.FileIO) and hasattr(os, "posix_fadvise"):
            for piece in range(start, stop, AT_ONCE):
                os.posix_fadvise(self._file.fileno(), piece, min(AT_ONCE, stop - piece), os.POSIX_FADV_WILLNEED)
