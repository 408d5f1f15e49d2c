"""Files at URLs, which fsspec's file systems read: ahead of their use, or from a copy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import os
import queue
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, GpubatchError, TransferError, needed, unexpected
from gpubatch.sources.reader import InTurn

T = TypeVar("T")

PIECE = 1 << 20  # bytes of a request
LEAST = 1 << 16  # bytes of a request for fewer, since headers are read in small steps
HELD = 64  # pieces that a process holds, of all files together
AT_ONCE = 8  # requests under way at a time
TRIES = 3
PAUSE = 0.2  # seconds before the second try, and twice as many before the third
PATIENCE = 60.0  # seconds without an answer after which a file system is given up

# Two letters at least: C:// is a drive. zip://x.npy::https://host/x.zip is a chain, as fsspec calls it.
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|[A-Za-z][A-Za-z0-9+.-]+::")
# Entries of a file system's information that change with the contents of a file.
STAMPS = [
    *("ETag", "etag", "md5Hash", "Content-MD5", "Digest", "crc32c", "generation"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "modified", "created"),
]


def is_url(x: Any) -> bool:
    """Whether ``x`` is text that begins as a URL does."""
    return isinstance(x, str) and URL.match(x) is not None


def check_unchanged(path: str, identity: str, now: str) -> None:
    """Raise ``DataFormatError`` unless a file in use still has the ``identity`` that it was opened with."""
    if now != identity:
        raise unexpected(
            path, f"the file that was opened first ({identity})", f"another ({now}): it was changed while it was in use"
        )


def remote(
    url: str, *, cache: str | os.PathLike[str] | None = None, options: Mapping[str, Any] | None = None
) -> RemoteFile:
    """A file at a URL of fsspec's, such as "https://host/x.npy" or "s3://bucket/x.parquet"; needs fsspec.

    url: of a protocol that fsspec knows, whose library is installed
    cache: a folder; the first opening copies the whole file there, and samples are read from the copy
    options: of fsspec's file system, such as keys

    Messages and states have neither the options nor the parts of a URL before "@" and after "?".

    Functions that take a path take this file: ``gb.sources.parquet(gb.sources.remote(url, cache="data"), ...)``. They
    also take a URL as a string, without cache and options.

    **Without a cache** parts of the file are read when they are needed. Up to 8 requests are under way at a time, and a
    process holds up to 64 MiB of all files together. The server must serve parts of a file.

    **With a cache** the copy's name has a digest of the URL and of the file's size, time and ETag, so a file that has
    changed is copied again. A copy gets its name when it is complete; the next opening goes on with an incomplete one.
    Nothing is written outside the folder. Nothing in it is ever removed: it grows by every file, and every version of a
    file, that is opened, and its owner empties it.

    Every request is tried 3 times. Then it raises ``TransferError``, which names the URL and the byte; another reading
    goes on from there. A file whose size, time or ETag changes while it is read raises ``DataFormatError``.
    """
    return RemoteFile(url, cache, options)


def shown(url: str) -> str:
    """A URL without what may be secret: user, password and query."""
    links = []
    for link in url.split("::"):
        scheme, mark, rest = link.partition("://")
        if mark and scheme not in ("file", "local", "memory"):
            rest = re.split("[?#]", rest, maxsplit=1)[0]
            host, slash, path = rest.partition("/")
            rest = host.rpartition("@")[2] + slash + path
        links.append(scheme + mark + rest)
    return "::".join(links)


class RemoteFile:
    """A file at a URL, see :func:`remote`; an :class:`~gpubatch.sources.Opener`.

    ``by_parts``: whether parts of it are read when they are needed, and not a copy.
    """

    def __init__(
        self,
        url: str,
        cache: str | os.PathLike[str] | None = None,
        options: Mapping[str, Any] | None = None,
        path: str | None = None,
    ) -> None:
        if not is_url(url):
            raise ArgumentError(f"url must begin with a protocol, such as https://, got {type(url).__name__} {url!r}")
        if options is not None and not isinstance(options, Mapping):
            raise DTypeError(f"options must be a mapping of names to values, got {type(options).__name__}")
        self._url, self._options, self._given = url, dict(options or {}), path
        self._cache = None if cache is None else Path(cache)
        self.by_parts = cache is None
        self._process, self._system = -1, cast(Any, None)
        self.path = shown(url)
        if path is not None:
            self.path = shown(self._there()[0].unstrip_protocol(path))
        self._there()

    def __repr__(self) -> str:
        return f"<RemoteFile {self.path}>"

    def matching(self) -> list[RemoteFile]:
        """The files that match the URL as a pattern, or those in a folder; of a file itself."""
        system, path = self._there()

        # On a web server fsspec reads a whole file to look for links in it, and "?" begins a query.
        web = "http" in system.protocol
        is_folder: Callable[[str], bool] = (lambda name: name.endswith("/")) if web else system.isdir

        def look() -> list[str] | None:
            if any(mark in path for mark in ("*[" if web else "*?[")):
                return [name for name in system.glob(path) if not is_folder(name)]
            return list(system.find(path)) if is_folder(path) else None

        found = self._tried("looked up", look)
        if found is None:
            return [self]
        return [RemoteFile(self._url, self._cache, self._options, str(name)) for name in found]

    # --- as an Opener ---

    def open(self) -> BinaryIO:
        """See :class:`Opener`."""
        if self._cache is not None:
            return self._copy().open("rb", buffering=0)
        return cast(BinaryIO, _Stream(self))

    def size(self) -> int:
        """See :class:`Opener`."""
        return self.state()[0]

    def identity(self) -> str:
        """See :class:`Opener`."""
        return self.state()[1]

    def state(self) -> tuple[int, str]:
        """Its size and its identity as they are now."""
        system, path = self._there()

        def ask() -> dict[str, Any]:
            system.invalidate_cache()
            found: dict[str, Any] = system.info(path)
            return found

        info = self._tried("found", ask)
        if info.get("type") == "directory":
            raise unexpected(self.path, "a file", "a folder")
        size = info.get("size")
        if not isinstance(size, int):
            raise TransferError(f"{self.path}: the server does not tell the file's size")
        stamps = [f"{name} {info[name]}" for name in STAMPS if info.get(name) is not None]
        return size, ", ".join([f"{size} bytes", *stamps])

    # --- reading ---

    def fetch(self, start: int, stop: int, identity: str) -> bytearray:
        """The bytes from ``start`` to ``stop`` of the file with this ``identity``. Workers call it."""
        found, failed, words = bytearray(), 0, ""
        while len(found) < stop - start and failed < TRIES:
            if failed:
                time.sleep(PAUSE * 2 ** (failed - 1))
            place = start + len(found)
            try:
                some = self._bytes(place, stop)
            except GpubatchError:
                raise
            except FileNotFoundError:
                raise FileNotFoundError(f"{self.path}: no such file") from None
            except Exception as error:  # of any library
                failed, words = failed + 1, self._words(error)
                continue
            if len(some) > stop - place:
                raise TransferError(
                    f"{self.path}: expected bytes {place} to {stop - 1}, found {len(some)} bytes: the server does not "
                    "serve parts of a file; give cache="
                )
            failed, words = (0, "") if some else (failed + 1, "it stopped there")
            found += some
        if failed:
            raise TransferError(
                f"{self.path}: expected bytes {start} to {stop - 1}, found none from byte {start + len(found)} on: "
                f"{words} ({TRIES} tries)"
            )
        check_unchanged(self.path, identity, self.identity())
        return found

    def _bytes(self, start: int, stop: int) -> bytes:
        system, path = self._there()
        if "http" not in system.protocol:
            many = system.async_impl or system.protocol == "memory" or "file" in system.protocol
            with contextlib.nullcontext() if many else workers.one_by_one:  # others have one connection
                found: bytes = system.cat_file(path, start=start, end=stop)
            return found
        # cat_file would read the whole file from a server that does not serve parts.
        with system.open(path, "rb", size=max(stop, 1 + start), cache_type="none", block_size=PIECE) as file:
            try:
                some: bytes = file._fetch_range(start, stop)
            except ValueError as error:
                if "range" not in str(error):
                    raise
                raise NoPartsError(f"{self.path}: the server does not serve parts of a file; give cache=") from None
            return some

    # --- the copy ---

    def _copy(self) -> Path:
        """The complete copy in the cache, which is made or completed first where necessary."""
        assert self._cache is not None
        size, identity = self.state()
        # Where only the size of a file is known, another query may give another file.
        named = self.path if "," in identity else self._url
        digest = hashlib.sha256(f"{named}\n{identity}".encode()).hexdigest()[:32]
        name = re.sub(r"[^A-Za-z0-9._-]", "_", self.path.rstrip("/").rpartition("/")[2])[-64:]
        whole = self._cache / f"{digest}-{name}"
        if whole.is_file() and whole.stat().st_size == size:
            return whole
        self._cache.mkdir(exist_ok=True)
        with _begun(whole) as file:
            try:
                self._download(file, size, identity)
            except NoPartsError:
                self._download_at_once(file, size)
            file.flush()
            os.fsync(file.fileno())
            if (now := self.identity()) != identity:
                file.truncate(0)
                raise DataFormatError(f"{self.path}: it was changed while it was copied ({identity}, now {now})")
        return whole

    def _download(self, file: BinaryIO, size: int, identity: str) -> None:
        """Append the missing bytes to a copy."""
        done = file.seek(0, io.SEEK_END)
        if done > size:
            file.truncate(0)
            done = file.seek(0)
        starts = iter(range(done, size, PIECE))
        coming: list[Future[bytearray]] = []
        while True:
            for start in itertools.islice(starts, AT_ONCE - len(coming)):
                coming.append(workers.submit(functools.partial(self.fetch, start, min(start + PIECE, size), identity)))
            if not coming:
                return
            file.write(self._waited(coming.pop(0)))

    def _download_at_once(self, file: BinaryIO, size: int) -> None:
        """Make the copy from its beginning, since the server does not serve parts."""
        file.truncate(0)
        file.seek(0)
        system, path = self._there()
        with self._scrubbed("read"), system.open(path, "rb", block_size=0) as stream:
            while (some := self._waited(workers.submit(lambda: stream.read(PIECE)))) and file.tell() <= size:
                file.write(some)
        if (found := file.tell()) != size:
            file.truncate(0)
            raise TransferError(f"{self.path}: expected {size} bytes, found {found}: the server stopped there")

    # --- the file system ---

    def _there(self) -> tuple[Any, str]:
        """The file system, and the path in it."""
        if self._process != os.getpid():  # a forked child makes its own connections
            fsspec = needed("fsspec.core", self.path, "remote")
            try:
                self._system, self._inside = fsspec.url_to_fs(self._url, **self._options)
            except ImportError as error:
                raise ArgumentError(f"{self.path} needs a library that is not installed: {error}") from error
            except Exception as error:
                raise ArgumentError(f"{self.path} cannot be opened by fsspec: {self._words(error)}") from None
            self._process = os.getpid()
        return self._system, self._inside if self._given is None else self._given

    def _tried(self, what: str, work: Callable[[], T]) -> T:
        """The result of ``work``, after up to 3 tries."""
        for number in range(TRIES):
            try:
                with self._scrubbed(what):
                    return work() if workers.inside.value else self._waited(workers.submit(work))
            except TransferError:
                if number == TRIES - 1:
                    raise
            time.sleep(PAUSE * 2**number)
        raise AssertionError

    def _waited(self, future: Future[T]) -> T:
        try:
            return future.result(PATIENCE)
        except TimeoutError:
            if future.done():  # the file system raised it
                raise
            workers.abandon()
            raise TransferError(f"{self.path}: no answer in {PATIENCE:g} s") from None

    @contextlib.contextmanager
    def _scrubbed(self, what: str) -> Iterator[None]:
        """Raise a TransferError without secrets in place of a file system's exceptions."""
        try:
            yield
        except GpubatchError:
            raise
        except FileNotFoundError as error:
            cause = error.__cause__  # fsspec raises it for any answer of a web server
            if isinstance(cause, Exception) and getattr(cause, "status", None) not in (404, 410):
                raise TransferError(f"{self.path}: it cannot be {what}: {self._words(cause)}") from None
            raise FileNotFoundError(f"{self.path}: no such file") from None
        except Exception as error:
            raise TransferError(f"{self.path}: it cannot be {what}: {self._words(error)}") from None

    def _words(self, error: Exception) -> str:
        """The text of a file system's error, or its type where the text may hold a secret."""
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        secret = {*_texts_in(self._options), *(set(_words_of(self._url)) - set(_words_of(shown(self._url))))}
        if any(mark in text for mark in ("://", "?", "@", *secret)):
            status = getattr(error, "status", None)
            return type(error).__name__ + ("" if status is None else f" with status {status}")
        return f"{type(error).__name__}: {text}"


def _texts_in(options: Any) -> Iterator[str]:
    """The values in options, at any depth, as texts."""
    if isinstance(options, Mapping):
        options = list(options.values())
    if isinstance(options, (list, tuple, set)):
        for value in options:
            yield from _texts_in(value)
    elif not isinstance(options, bool) and options is not None and str(options):
        yield str(options)


def _words_of(url: str) -> list[str]:
    return [word for word in re.split("[/?#&=@:]+", url) if word]


class NoPartsError(TransferError):
    """The server does not serve parts of a file."""


@contextlib.contextmanager
def _begun(whole: Path) -> Iterator[BinaryIO]:
    """The open file of a copy, with the bytes that it has; it gets its name when the block ends without an error.

    One of several processes goes on with an incomplete copy. The others make copies of their own.
    """
    begun = whole.with_name(f"{whole.name}.part")
    file = begun.open("ab")
    own = not _locked(file, begun)
    if own:
        file.close()
        begun = whole.with_name(f"{whole.name}.part-{os.getpid()}-{threading.get_ident()}")
        file = begun.open("wb")
    try:
        with file:
            yield file
        os.replace(begun, whole)
    except FileNotFoundError:  # another process has completed and renamed it meanwhile
        if not whole.is_file():
            raise
    finally:
        if own:
            begun.unlink(missing_ok=True)


def _locked(file: BinaryIO, path: Path) -> bool:
    """Whether this process has the lock of the file, which still has its path."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (ImportError, OSError):  # Windows has none
        return False


# --- reading ahead --------------------------------------------------------------------------------------------------


class _Inside(threading.local):
    value = False


class _Workers:
    """Threads that wait for file systems, up to ``AT_ONCE`` in each process.

    They are daemons: the end of a process does not wait for a server that does not answer.
    """

    def __init__(self) -> None:
        self.inside = _Inside()  # whether the current thread is one of them
        self._begin()

    def _begin(self) -> None:
        self._tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock, self.one_by_one = threading.Lock(), threading.Lock()
        self._threads, self._process = 0, os.getpid()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """The future result of ``work``."""
        if self._process != os.getpid():
            self._begin()
        future: Future[T] = Future()
        with self._lock:
            self._tasks.put((future, work))
            if self._threads < AT_ONCE:
                self._threads += 1
                threading.Thread(target=self._work, args=(self._tasks,), name="gpubatch-remote", daemon=True).start()
        return future

    def abandon(self) -> None:
        """Abandon threads that get no answer; new ones take their place."""
        with self._lock:
            for _ in range(self._threads):
                self._tasks.put(None)
        self._begin()

    def _work(self, tasks: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
        self.inside.value = True
        while (task := tasks.get()) is not None:
            future, work = task
            try:
                future.set_result(work())
            except BaseException as error:  # the thread that waits gets it
                future.set_exception(error)
            del task, future, work


workers = _Workers()


@dataclasses.dataclass(eq=False)
class _Piece:
    """Bytes of a file that are on their way or have come. Nobody will wait for ``spent`` ones again."""

    start: int
    stop: int
    spent: bool
    future: Future[bytearray]


class _Pieces:
    """The pieces of all open files that a process holds, oldest first."""

    def __init__(self) -> None:
        self._pieces: dict[_Piece, list[_Piece]] = {}
        self._turn = InTurn()  # a thread that has it may need it again, where a file is closed as garbage

    def has_room(self, of_file: list[_Piece]) -> bool:
        """Whether a file has fewer pieces ahead than its share, which is equal for all files that have any."""
        with self._turn:
            ahead = Counter(id(file) for piece, file in list(self._pieces.items()) if not piece.spent)
        own = ahead.pop(id(of_file), 0)
        return own < max(1, HELD // (1 + len(ahead)))

    def add(self, piece: _Piece, of_file: list[_Piece]) -> None:
        """Hold a piece, also in the list of its file.

        If there are too many, a spent one is dropped, or the oldest of the file that has the most.
        """
        with self._turn:
            while len(self._pieces) >= HELD:
                there = list(self._pieces)
                oldest = max(there, key=lambda each: len(self._pieces.get(each, ())))
                self.drop(next((each for each in there if each.spent), oldest))
            self._pieces[piece] = of_file
            of_file.append(piece)

    def drop(self, piece: _Piece) -> None:
        """Hold a piece no longer."""
        with self._turn:
            of_file = self._pieces.pop(piece, None)
            if of_file is not None:
                of_file.remove(piece)


held = _Pieces()


class _Stream(io.RawIOBase):
    """An open file at a URL. It reads bytes ahead that :meth:`expect` announces."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place, self._pieces = file, 0, list[_Piece]()
        self._size, self._identity = file.state()

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """The place of the next byte."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place."""
        self._place = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence])
        return self._place

    def close(self) -> None:
        """Drop the pieces of this file."""
        for piece in list(self._pieces):
            held.drop(piece)
        io.RawIOBase.close(self)

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, unless the file ends before."""
        with memoryview(buffer).cast("B") as view:
            first = place = self._place
            stop = min(place + len(view), self._size)
            while place < stop:
                ahead = self._at(place)
                piece = ahead or self._ask(place, max(stop, min(place + LEAST, self._size)), spent=True)
                self.expect(piece.stop, stop)
                try:
                    some = self._file._waited(piece.future)
                except BaseException as error:
                    held.drop(piece)
                    if ahead is None or not isinstance(error, TransferError):
                        raise
                    continue  # the request ahead failed: a new one may succeed
                end = min(stop, piece.stop)
                view[place - first : end - first] = some[place - piece.start : end - piece.start]
                if end == piece.stop:
                    piece.spent = True
                    if piece.stop - piece.start > LEAST:
                        held.drop(piece)
                place = end
        self._place = max(place, first)
        return self._place - first

    def expect(self, start: int, stop: int) -> None:
        """Request the bytes from ``start`` to ``stop``, as far as there is room for them."""
        stop = min(stop, self._size)
        while start < stop and (
            piece := self._at(start) or (self._ask(start, stop) if held.has_room(self._pieces) else None)
        ):
            start = piece.stop

    def _at(self, place: int) -> _Piece | None:
        return next((piece for piece in self._pieces if piece.start <= place < piece.stop), None)

    def _ask(self, start: int, stop: int, spent: bool = False) -> _Piece:
        """Request a piece from ``start`` on, at most to ``stop`` or to the next piece."""
        later = (piece.start for piece in self._pieces if piece.start > start)
        stop = min(stop, start + PIECE, *later)
        piece = _Piece(start, stop, spent, workers.submit(lambda: self._file.fetch(start, stop, self._identity)))
        held.add(piece, self._pieces)
        return piece
