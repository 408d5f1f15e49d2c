"""Files as sources read them: wherever they are, they are opened, read by place, closed, and opened again."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import BinaryIO, Generic, NoReturn, Protocol, TypeVar
from urllib.parse import unquote

from gpubatch.sources.reader import refuse_pickling
from gpubatch.sources.remote import RemoteFile, check_unchanged, is_url

AT_ONCE = 1 << 20  # bytes that a system is asked to read ahead: Linux does not heed what is beyond a device's limit


class Opener(Protocol):
    """A file that can be opened: on this machine a :class:`LocalFile`, or one elsewhere.

    Whatever opens a file by its path takes such an object instead, too. ``path`` is its path or URL, which messages
    name, and by whose end :func:`gpubatch.sources.files` knows the format.
    """

    path: str

    def open(self) -> BinaryIO:
        """A new file object at its start, which the caller closes: ``read``, ``readinto``, ``seek``, ``tell``.

        One thread at a time uses it. If it has a method ``expect(start, stop)``, that is told which bytes will be read
        soon.
        """

    def size(self) -> int:
        """Its size in bytes."""

    def identity(self) -> str:
        """Text that is another one when the contents are: of size and time, or an ETag.

        It is asked for whenever the file is opened, and compared when a run is resumed.
        """


class LocalFile:
    """A file of this machine."""

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
    """A file of this machine that closes its descriptor when it is garbage, too.

    A source that is in a circle with its user is collected in any order. Python would warn of a file that is collected
    before what closes it.
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
    """What opens the file that a user gives."""
    if isinstance(path, str) and is_url(path):
        return RemoteFile(unquoted(path))
    return LocalFile(path) if isinstance(path, (str, bytes, os.PathLike)) else path


def unquoted(url: str) -> str:
    """A URL; of a file on this machine without %20 and the like, as fsspec takes it, unless its name has them."""
    path = url.removeprefix("file://")
    return url if path == url or "%" not in path or os.path.exists(path) else f"file://{unquote(path)}"


class Closable(Protocol):
    """What has something to close."""

    def close(self) -> None:
        """Close it."""


T = TypeVar("T", bound=Closable)


class Reopened(Generic[T]):
    """What is made of a file by opening it: made now, and again when it is next used after :meth:`close`.

    It is made again in a forked child, too, which must not share its place in the file. ``DataFormatError`` where the
    file is another one by then.
    """

    def __init__(self, file: Opener, make: Callable[[], T]) -> None:
        self._file, self._make, self.identity = file, make, file.identity()
        self._made: T | None = make()
        self._process = os.getpid()

    def use(self) -> T:
        """What was made."""
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
    """A file object whose bytes are read by place."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self._positional = isinstance(file, io.FileIO) and hasattr(os, "preadv")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill ``view`` with the bytes from ``offset`` on; how many there were, fewer only where the file ends."""
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
        """Have bytes read ahead, while others are used."""
        if hasattr(self._file, "expect"):
            self._file.expect(start, stop)
        elif isinstance(self._file, io.FileIO) and hasattr(os, "posix_fadvise"):
            for piece in range(start, stop, AT_ONCE):
                os.posix_fadvise(self._file.fileno(), piece, min(AT_ONCE, stop - piece), os.POSIX_FADV_WILLNEED)
