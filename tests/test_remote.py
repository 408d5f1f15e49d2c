"""Files at URLs against the same files on this machine: the same batches, and what happens when a server fails."""

from __future__ import annotations

import contextlib
import http.server
import inspect
import sys
import tempfile
import threading
import traceback
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from families import drawn, every
from hypothesis import strategies as st
from needs import missing

import gpubatch as gb
from gpubatch import sources
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, TransferError

try:
    import fsspec
except ImportError:
    missing("remote", "fsspec is not installed (pip install 'gpubatch[remote]')")

remote_module = sys.modules["gpubatch.sources.remote"]

N, FEATURES = 3000, 10
X = np.random.default_rng(0).normal(size=(N, FEATURES)).astype(np.float32)
Y = np.arange(N)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a test are smaller than a piece is, and nobody waits between two tries."""
    for name, value in (("PIECE", 1 << 13), ("LEAST", 1 << 10), ("HELD", 8), ("PAUSE", 0.0)):
        monkeypatch.setattr(remote_module, name, value)
    monkeypatch.setattr(remote_module, "held", type(remote_module.held)())  # other tests' files may still be open


# --- a file system that fails ---------------------------------------------------------------------------------------


class Flaky(fsspec.AbstractFileSystem):
    """Files in memory. ``rule(start, end, data)`` is what a read gives; it may raise, wait, or give less."""

    protocol = "flaky"
    cachable = False
    async_impl = True  # several reads may be under way
    files: ClassVar[dict[str, bytes]] = {}
    stamps: ClassVar[dict[str, str]] = {}
    reads: ClassVar[list[tuple[int, int]]] = []
    rule: ClassVar[Callable[[int, int, bytes], bytes] | None] = None

    def __init__(self, token: str = "", **options: Any) -> None:
        fsspec.AbstractFileSystem.__init__(self, **options)
        self.token = token

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        name = self._strip_protocol(path)
        if name not in Flaky.files:
            raise FileNotFoundError(f"flaky://{name}?token={self.token}")
        return {"name": name, "size": len(Flaky.files[name]), "type": "file", "ETag": Flaky.stamps.get(name, "1")}

    def cat_file(self, path: str, start: int = 0, end: int = 0, **options: Any) -> bytes:
        found = Flaky.files[self._strip_protocol(path)][start:end]
        Flaky.reads.append((start, end))
        return found if Flaky.rule is None else Flaky.rule(start, end, found)


@pytest.fixture(autouse=True)
def flaky() -> Iterator[type[Flaky]]:
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.files, Flaky.stamps, Flaky.reads, Flaky.rule = {}, {}, [], None
    yield Flaky
    Flaky.rule = None


def put(name: str, content: bytes) -> str:
    Flaky.files[Flaky._strip_protocol(f"flaky://{name}")] = content
    return f"flaky://{name}"


# --- a server of HTTP -----------------------------------------------------------------------------------------------


class Serving(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, by parts; the standard library's own serves them whole."""

    parts = True
    answer = 200  # of all requests
    asked: ClassVar[list[str | None]] = []  # of all requests, the parts that they are for

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.asked.append(wanted)
        if self.answer != 200:
            self.send_error(self.answer)
            return
        path = Path(self.translate_path(self.path))
        if wanted is None or not self.parts or not path.is_file():
            http.server.SimpleHTTPRequestHandler.do_GET(self)
            return
        start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        content = path.read_bytes()
        found = content[start : end + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(found) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)


@contextlib.contextmanager
def served(folder: Path, parts: bool = True) -> Iterator[str]:
    handler = type("Handler", (Serving,), {"parts": parts})
    Serving.asked.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- the same batches -----------------------------------------------------------------------------------------------


def optional(module: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        missing("data", f"{module} is not installed (pip install 'gpubatch[data]')")


def npy(path: Path) -> Callable[[Any], Any]:
    with path.open("wb") as file:
        np.save(file, X)
    return sources.npy


def raw(path: Path) -> Callable[[Any], Any]:
    X.tofile(path)
    return lambda file: sources.raw(file, (FEATURES,), "float32")


def idx(path: Path) -> Callable[[Any], Any]:
    path.write_bytes(bytes([0, 0, 0x0D, 2]) + np.array(X.shape, ">u4").tobytes() + X.astype(">f4").tobytes())
    return sources.idx


def parquet(path: Path) -> Callable[[Any], Any]:
    pa = optional("pyarrow")
    table = pa.table({f"c{i}": X[:, i] for i in range(FEATURES)})
    optional("pyarrow.parquet").write_table(table, path, row_group_size=250)
    return lambda file: sources.parquet(file, None)


def arrow(path: Path, stream: bool = False) -> Callable[[Any], Any]:
    pa = optional("pyarrow")
    table = pa.table({f"c{i}": X[:, i] for i in range(FEATURES)})
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=250)
    return lambda file: sources.arrow(file, None)


def arrow_stream(path: Path) -> Callable[[Any], Any]:
    return arrow(path, stream=True)


def npz(path: Path) -> Callable[[Any], Any]:
    with path.open("wb") as file:
        np.savez(file, x=X)
    return lambda file: sources.npz(file, "x")


def hdf5(path: Path) -> Callable[[Any], Any]:
    with optional("h5py").File(path, "w") as file:
        file.create_dataset("x", data=X, chunks=(250, FEATURES), compression="gzip")
    return lambda file: sources.hdf5(file, "x")


FORMATS = {made.__name__: made for made in (npy, npz, raw, idx, parquet, arrow, arrow_stream, hdf5)}
ROWS = ["npy", "raw", "idx"]
PLACES = ["memory", "file", "http", "flaky"]


def test_every_format_is_in_the_table() -> None:
    functions = {name: getattr(sources, name) for name in sources.__all__ if inspect.isfunction(getattr(sources, name))}
    annotations = {name: inspect.get_annotations(made) for name, made in functions.items()}
    taking = {name for name, of in annotations.items() if "Opener" in str(of) and of["return"] == "Source"}
    assert taking - {"files"} == {"npy", "npz", "raw", "idx", "parquet", "arrow", "hdf5"}
    assert {name.removesuffix("_stream") for name in FORMATS} == taking - {"files"}


@contextlib.contextmanager
def at(place: str, path: Path) -> Iterator[str]:
    """The URL of a copy of a local file."""
    if place == "http":
        optional_http()
        with served(path.parent) as url:
            yield f"{url}/{path.name}"
    elif place == "file":
        yield f"file://{path}"
    elif place == "memory":
        fsspec.filesystem("memory").pipe_file("/folder/x", path.read_bytes())
        yield "memory://folder/x"
    else:
        yield put("x", path.read_bytes())


def optional_http() -> None:
    try:
        __import__("aiohttp")
    except ImportError:
        missing("remote", "aiohttp is not installed (pip install 'gpubatch[remote]')")


def batches(source: Any, **options: Any) -> list[bytes]:
    options = {"batch_size": 64, "window": 700, "seed": 3, "backend": "cpu", **options}
    return [array.tobytes() for batch in gb.Loader(source, Y, **options) for array in batch]


@every("place", PLACES, ["flaky"])
@every("name", FORMATS, ["npy", "parquet"])
@pytest.mark.parametrize("cached", [False, True])
def test_batches_are_those_of_the_local_file(place: str, name: Any, cached: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    read = name(path)
    expected = batches(read(path))
    if name.__name__ in ROWS:
        assert expected == batches(X, window=700)
    with at(place, path) as url:
        cache = tmp_path / "cache" if cached else None
        if name is hdf5 and not cached:
            with pytest.raises(
                ArgumentError, match=r"HDF5 is read from a copy .* since h5py has a lock while it reads"
            ):
                read(sources.remote(url))
            return
        file = sources.remote(url, cache=cache)
        assert batches(read(file)) == expected
        assert batches(read(url if not cached else file), shuffle=False) == batches(read(path), shuffle=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == (["cache", "x"] if cached else ["x"])


def test_by_default_parts_are_read_in_windows_and_copies_sample_by_sample(tmp_path: Path) -> None:
    npy(tmp_path / "x")
    url = put("x", (tmp_path / "x").read_bytes())
    loaders = [gb.Loader(sources.npy(of), Y, backend="cpu") for of in (url, sources.remote(url, cache=tmp_path))]
    assert [loader.window > 0 for loader in loaders] == [True, False]


def test_each_part_is_fetched_once_and_ahead(tmp_path: Path) -> None:
    npy(tmp_path / "x")
    url = put("x", (tmp_path / "x").read_bytes())
    list(gb.Loader(sources.raw(url, (FEATURES,), "float32", 128), Y, batch_size=64, window=1500, backend="cpu"))
    fetched = sum(end - start for start, end in Flaky.reads)
    assert X.nbytes <= fetched < 1.03 * X.nbytes
    loader = gb.Loader(sources.raw(url, (FEATURES,), "float32", 128), Y, window=1500, backend="cpu")
    begun, two = threading.Semaphore(0), threading.Event()

    def wait_for_another(start: int, end: int, data: bytes) -> bytes:
        if begun.acquire(blocking=False):
            two.set()
        begun.release()
        assert two.wait(60)
        return data

    Flaky.rule = wait_for_another
    next(iter(loader))
    assert two.is_set()


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A file of 8 MB of which at most 8 pieces of 8 KiB are held, and those on their way."""
    url = put("x", bytes(8 << 20))
    with sources.remote(url).open() as file:
        file.seek(0)
        tracemalloc.start()
        try:
            place = 0
            buffer = bytearray(1000)
            while file.readinto(buffer):  # type: ignore[attr-defined]
                file.expect(place, place + (1 << 20))  # type: ignore[attr-defined]
                place += 64 * 1000
                file.seek(place)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 * (8 + 8) * (1 << 13)


# --- failures -------------------------------------------------------------------------------------------------------


def stops_at(place: int) -> Callable[[int, int, bytes], bytes]:
    def rule(start: int, end: int, data: bytes) -> bytes:
        if start >= place:
            raise ConnectionResetError("connection lost to flaky://user:hunter2@host/x?token=hunter2")
        return data[: place - start]

    return rule


@pytest.mark.parametrize("name", [npy, parquet], ids=["npy", "parquet"])
def test_a_server_that_stops_is_an_error_with_the_place_and_a_retry_goes_on_there(name: Any, tmp_path: Path) -> None:
    read = name(tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    options: Any = {"batch_size": 64, "window": 700, "seed": 3, "backend": "cpu", "prefetch": 0, "shuffle": False}
    expected = [x.tobytes() for x, _ in gb.Loader(read(tmp_path / "x"), Y, **options)]
    loader = gb.Loader(read(put("x", content)), Y, **options)
    middle = len(content) // 2
    Flaky.rule = stops_at(middle)
    seen = []
    message = rf"flaky://x: expected bytes \d+ to \d+, found none from byte {middle} on: ConnectionResetError \(3 t"
    with pytest.raises(TransferError, match=message) as caught:  # noqa: PT012
        for x, _ in loader:
            seen.append(x.tobytes())
    assert any(note.startswith("while reading samples ") for note in caught.value.__notes__)
    assert seen == expected[: len(seen)]
    state, Flaky.rule = loader.state_dict(), None
    assert state["batch"] == len(seen) < len(expected)
    loader.load_state_dict(state)
    assert [x.tobytes() for x, _ in loader] == expected[len(seen) :]


def test_a_copy_that_was_broken_off_is_gone_on_with(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(300_000)
    file = sources.remote(put("folder/x.bin", content), cache=tmp_path / "cache")
    Flaky.rule = stops_at(123_456)
    with pytest.raises(TransferError, match=r"flaky://folder/x\.bin: .* found none from byte 123456 on"):
        file.open()
    (begun,) = (tmp_path / "cache").iterdir()
    assert begun.name.endswith("-x.bin.part")
    assert begun.stat().st_size == 123_456 // (1 << 13) * (1 << 13)  # whole pieces, and never the name of a whole copy
    Flaky.rule, Flaky.reads = None, []
    with file.open() as opened:
        assert opened.read() == content
    assert min(start for start, _ in Flaky.reads) > 100_000
    (whole,) = (tmp_path / "cache").iterdir()
    assert whole.name == begun.name.removesuffix(".part")
    Flaky.reads = []
    with file.open() as opened:  # from the copy
        assert opened.read() == content
    assert Flaky.reads == []


def test_a_file_that_was_changed_is_copied_anew_and_never_mixed(tmp_path: Path) -> None:
    url = put("x", bytes(100_000))
    file = sources.remote(url, cache=tmp_path)
    file.open().close()
    Flaky.files["x"], Flaky.stamps["x"] = b"1" * 100_000, "2"  # of the same size
    with file.open() as opened:
        assert opened.read() == b"1" * 100_000
    assert len(list(tmp_path.iterdir())) == 2

    def change(start: int, end: int, data: bytes) -> bytes:
        Flaky.stamps["x"] = str(start)
        return data

    Flaky.stamps["x"], Flaky.rule = "3", change
    with pytest.raises(DataFormatError, match=r"the file that was opened first \(100000 bytes, ETag 3\), found"):
        file.open()
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".part"]) == 2
    source = sources.raw(url, (100,), "uint8")
    with pytest.raises(DataFormatError, match="it was changed while it was in use"):
        list(gb.Loader(source, window=100, backend="cpu"))


def test_a_copy_that_became_shorter_is_not_taken(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(50_000)
    file = sources.remote(put("x", content), cache=tmp_path)
    file.open().close()
    (whole,) = tmp_path.iterdir()
    whole.write_bytes(content[:20_000])
    with file.open() as opened:
        assert opened.read() == content


def test_several_threads_make_one_copy(tmp_path: Path) -> None:
    content = np.random.default_rng(1).bytes(200_000)
    file, found = sources.remote(put("x", content), cache=tmp_path), []

    def read() -> None:
        with file.open() as opened:
            found.append(opened.read() == content)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 6
    assert [path.read_bytes() == content for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize("name", ["../../x", "..", "a\\b", "x" * 500, "sp ace\n"])
def test_nothing_is_written_outside_the_cache(name: str, tmp_path: Path) -> None:
    """Whatever a URL is called."""
    folder = tmp_path / "in" / "cache"
    folder.parent.mkdir()
    file = sources.remote(put(f"deep/down/{name}", b"12345"), cache=folder)
    with file.open() as opened:
        assert opened.read() == b"12345"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == list(folder.iterdir())
    assert len(list(folder.iterdir())) == 1


@pytest.mark.exhaustive
def test_a_server_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    url, going_on = put("x", bytes(100_000)), threading.Event()
    source = sources.raw(url, (100,), "uint8")

    def stall(start: int, end: int, data: bytes) -> bytes:
        going_on.wait(60)
        return data

    Flaky.rule = stall
    monkeypatch.setattr(remote_module, "PATIENCE", 3.0)
    try:
        with pytest.raises(TransferError, match=r"flaky://x: no answer in 3 s"):
            source.read(np.arange(3))
    finally:
        Flaky.rule = None
        monkeypatch.setattr(remote_module, "PATIENCE", 60.0)
        assert source.read(np.arange(3)).shape == (3, 100)  # other threads took their place
        going_on.set()


def test_a_server_that_serves_no_parts_is_read_from_a_copy_only(tmp_path: Path) -> None:
    optional_http()
    (tmp_path / "served").mkdir()
    npy(tmp_path / "served" / "x.npy")
    with served(tmp_path / "served", parts=False) as url:
        with pytest.raises(TransferError, match=r"x\.npy: the server does not serve parts of a file; give cache="):
            list(gb.Loader(sources.npy(f"{url}/x.npy"), Y, backend="cpu"))
        file = sources.remote(f"{url}/x.npy", cache=tmp_path / "cache")
        assert batches(sources.npy(file)) == batches(X)
        with pytest.raises(FileNotFoundError, match=r"/nothing: no such file"):
            sources.npy(f"{url}/nothing?secret=hunter2")


@pytest.mark.parametrize(("answer", "tries"), [(401, 3), (403, 3), (500, 3), (503, 3), (404, 1), (None, 3)])
def test_what_a_web_server_answers_is_told(answer: int | None, tries: int, monkeypatch: Any, tmp_path: Path) -> None:
    """fsspec says that there is no such file, whatever it is that fails."""
    optional_http()
    monkeypatch.setattr(remote_module, "PAUSE", 0.0)
    asked: list[Any] = []
    with served(tmp_path) as url:
        monkeypatch.setattr(Serving, "answer", answer or 200)
        monkeypatch.setattr(Serving, "asked", asked)
        if answer is not None:
            wanted = (FileNotFoundError, "no such file") if answer == 404 else (TransferError, f"status {answer}")
            with pytest.raises(wanted[0], match=rf"x\.npy: .*{wanted[1]}"):
                sources.npy(f"{url}/x.npy?secret=hunter2")
            assert len(asked) == tries
    if answer is None:  # no server is there any more
        with pytest.raises(TransferError, match=r"x\.npy: it cannot be found: ClientConnectorError"):
            sources.npy(f"{url}/x.npy")


def test_a_web_server_is_never_asked_for_a_whole_file(tmp_path: Path) -> None:
    """fsspec asks for one to know whether it is a folder; a query is no pattern."""
    optional_http()
    npy(tmp_path / "x.npy")
    with served(tmp_path) as url:
        for given in (f"{url}/x.npy", f"{url}/x.npy?sig=1", [f"{url}/x.npy"]):
            assert batches(sources.files(given, "npy")) == batches(X)
        assert Serving.asked
        assert None not in Serving.asked


@drawn(4, 400, seed=st.integers(0, 2**32), cached=st.booleans(), format_=st.sampled_from(["npy", "parquet", "arrow"]))
def test_any_failures_are_documented_errors(seed: int, cached: bool, format_: str) -> None:
    """Reads that fail, stop, give too much, too little or nothing, and files that change: at random, at any place."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        read = FORMATS[format_](path)
        content = path.read_bytes()
        url = put("x", content)
        lock, rate = threading.Lock(), rng.choice([0.01, 0.1, 0.5])

        def rule(start: int, end: int, data: bytes) -> bytes:
            with lock:
                kind, size = (rng.integers(0, 7), rng.integers(0, len(data) + 1)) if rng.random() < rate else (9, 0)
            if kind == 0:
                raise OSError("the network is down")
            if kind == 1:
                raise ValueError("an answer that is no answer")
            if kind == 2:
                Flaky.stamps["x"] = "another"
            if kind == 6:
                raise TimeoutError
            return {3: data[:size], 4: data + b"more", 5: b""}.get(int(kind), data)

        def run() -> list[bytes]:
            return batches(read(sources.remote(url, cache=Path(folder) / "cache" if cached else None)))

        Flaky.stamps, Flaky.rule = {"x": "one"}, rule
        expected, found = batches(read(path)), None
        with contextlib.suppress(TransferError, DataFormatError, FileNotFoundError):
            found = run()
        assert found in (None, expected)
        Flaky.stamps, Flaky.rule = {"x": "one"}, None
        assert run() == expected


# --- secrets and arguments ------------------------------------------------------------------------------------------


def test_secrets_are_in_no_message_and_no_state(tmp_path: Path) -> None:
    npy(tmp_path / "x")
    put("x", (tmp_path / "x").read_bytes())
    url, options = "flaky://x?sig=hunter2", {"token": {"nested": ["Bearer hunter3"]}}
    Flaky.files["x?sig=hunter2"] = Flaky.files["x"]
    file = sources.remote(url, options=options)
    assert (file.path, repr(file)) == ("flaky://x", "<RemoteFile flaky://x>")
    assert sources.remote("https://me:hunter2@host/a/x.npy?sig=hunter2#hunter2").path == "https://host/a/x.npy"
    source = sources.npy(file)
    net = gb.mlp([FEATURES, 4, 2], backend="cpu")
    loader = gb.Loader(source, Y % 2, batch_size=64, backend="cpu", window=700)
    gb.fit(net, loader, gb.Adam(net.parameters), epochs=1, checkpoint=tmp_path / "run", progress=False)
    for path in (tmp_path / "run").rglob("*"):
        assert path.is_dir() or b"hunter2" not in path.read_bytes()
    assert "hunter2" not in f"{loader.state_dict()} {loader!r} {loader.plan}"
    texts = []

    def tell_it(start: int, end: int, data: bytes) -> bytes:
        raise OSError("refused, with the signature hunter2 and Bearer hunter3")

    Flaky.rule = tell_it
    for make in (lambda: list(loader), lambda: sources.npy(file), lambda: sources.remote(url, cache=tmp_path).open()):
        with pytest.raises(TransferError) as caught:
            make()
        texts += traceback.format_exception(caught.value)
    del Flaky.files["x?sig=hunter2"]
    with pytest.raises(FileNotFoundError, match="flaky://x: no such file") as missed:
        sources.npy(file)
    texts += traceback.format_exception(missed.value)
    assert "flaky://x: " in "".join(texts)
    assert "hunter" not in "".join(line for line in texts if "test_remote.py" not in line)


WRONG = {
    "pattern": (lambda: sources.files("memory://parts/x*.npy"), FileNotFoundError, "no file is at 'memory://parts/x"),
    "protocol": (lambda: sources.npy("nowhere://x.npy"), ArgumentError, "nowhere://x.npy cannot be opened by fsspec"),
    "library": (lambda: sources.npy("gdrive2://x.npy"), ArgumentError, "gdrive2://x.npy needs a library that is not"),
    "no url": (lambda: sources.remote("x.npy"), ArgumentError, "url must begin with a protocol, such as https://"),
    "drive": (lambda: sources.npy("C://x.npy"), FileNotFoundError, "C://x.npy"),
    "options": (lambda: sources.remote("memory://x", options=["a"]), DTypeError, "options must be a mapping of names"),
    "folder": (lambda: sources.npy("memory://folder"), DataFormatError, "expected a file, found a folder"),
    "not there": (lambda: sources.npy("memory://nothing.npy"), FileNotFoundError, "memory://nothing.npy: no such file"),
    "cache": (lambda: sources.remote("memory://folder/x", cache="no/such/folder").open(), FileNotFoundError, "no/such"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told(name: str) -> None:
    fsspec.filesystem("memory").pipe_file("/folder/x", b"123")
    fsspec.register_implementation("gdrive2", "no_such_library_anywhere.System", clobber=True, errtxt="pip install it")
    make, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        make()


def test_fsspec_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ArgumentError, match=r"memory://x needs fsspec.*pip install 'gpubatch\[remote\]'"):
        sources.npy("memory://x")


def test_folders_and_patterns_of_files_are_one_source(tmp_path: Path) -> None:
    """In their natural order, by parts and from copies, with no secret in the name of the whole."""
    memory = fsspec.filesystem("memory")
    for number, rows in ((2, slice(0, 700)), (10, slice(700, 1500)), (1, slice(1500, N))):
        path = tmp_path / "part"
        with path.open("wb") as file:
            np.save(file, X[rows])
        memory.pipe_file(f"/parts/part-{number}.npy", path.read_bytes())
    memory.pipe_file("/parts/_SUCCESS", b"")
    memory.pipe_file("/parts/.part-1.npy.crc", b"crc")
    expected = np.concatenate([X[1500:], X[:1500]])
    for given in ("memory://parts/part-*.npy", "memory://parts"):
        assert batches(sources.files(given), shuffle=False) == batches(expected, shuffle=False)
        assert batches(given, shuffle=False) == batches(expected, shuffle=False)
    copied = [
        file
        for url in ("memory://parts/part-1.npy", "memory://parts/part-?.npy", "memory://parts/part-10.npy")
        for file in sources.remote(url, cache=tmp_path / "cache").matching()
    ]
    assert [file.path.rpartition("-")[2] for file in copied[:1]] == ["1.npy"]
    whole = sources.files([copied[0], copied[2], copied[3]])
    assert batches(whole, shuffle=False) == batches(expected, shuffle=False)
