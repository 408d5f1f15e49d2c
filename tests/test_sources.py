"""Files against the arrays that they hold, larger than memory too; what is wrong with one is named with its place."""

from __future__ import annotations

import gc
import inspect
import io
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import tracemalloc
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from families import every
from needs import missing

from gpubatch import datasets, sources
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError, NonFiniteError, ShapeError
from gpubatch.loader import Loader, epochs_of

N = 500


def optional(module):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        missing("data", f"{module} is not installed (pip install 'gpubatch[data]')")


@pytest.fixture
def X(rng):  # noqa: N802
    return rng.normal(size=(N, 6)).astype(np.float32)


Y = np.arange(N)


class Memory:
    """The smallest possible source."""

    def __init__(self, *arrays):
        self.arrays = arrays
        self.asked = []

    def __len__(self):
        return len(self.arrays[0])

    def read(self, indices):
        self.asked.append(indices)
        found = tuple(array[indices] for array in self.arrays)
        return found if len(found) > 1 else found[0]


# --- one table of all kinds -----------------------------------------------------------------------------------------


def write_npy(folder, X):
    np.save(folder / "x.npy", X)
    np.save(folder / "y.npy", Y)
    return sources.npy(folder / "x.npy"), sources.npy(folder / "y.npy")


def write_npz(folder, X):
    np.savez(folder / "both.npz", other=np.zeros(3), x=X, y=Y)
    return sources.npz(folder / "both.npz", "x"), sources.npz(folder / "both.npz", "y")


def write_npy_files(folder, X):
    for k, part in enumerate(np.split(X, [3, 3, 200, 201, 480])):
        np.save(folder / f"x{k}.npy", part)
    np.save(folder / "y.npy", Y)
    return sources.files(folder / "x*.npy"), sources.npy(folder / "y.npy")


def write_raw(folder, X):
    (folder / "x.bin").write_bytes(b"head" + X.astype(">f4").tobytes())
    return sources.raw(folder / "x.bin", (6,), ">f4", offset=4), Y


def write_idx(folder, X):
    sizes = np.array(X.shape, ">u4").tobytes()
    (folder / "x.idx").write_bytes(bytes([0, 0, 0x0D, 2]) + sizes + X.astype(">f4").tobytes())
    return sources.idx(folder / "x.idx"), Y


def cifar_records():
    """N records; an image's number is ten times its first byte plus its label."""
    records = np.random.default_rng(0).integers(0, 256, (N, 3073), np.uint8)
    records[:, 0] = np.arange(N) % 10
    records[:, 1] = np.arange(N) // 10
    return records


def write_cifar(folder, X):
    for i, part in enumerate(np.split(cifar_records(), [100, 107, 307, 308]), 1):
        part.tofile(folder / f"data_batch_{i}.bin")
    cifar_records()[7:10].tofile(folder / "test_batch.bin")
    return sources.cifar10(folder), None


def table(X):
    pa = optional("pyarrow")
    columns = {f"c{i}": X[:, i] for i in range(X.shape[1])}
    vectors = pa.FixedSizeListArray.from_arrays(X.reshape(-1), X.shape[1])
    return pa.table({**columns, "vector": vectors, "list": pa.array(X.tolist(), pa.list_(pa.float32())), "y": Y})


def parquet_file(folder, X, **changed):
    path = folder / "t.parquet"
    made = table(X)
    for name, column in changed.items():
        made = made.set_column(made.column_names.index(name), name, column)
    optional("pyarrow.parquet").write_table(made, path, row_group_size=64)
    return path


def write_parquet(folder, X):
    return sources.parquet(parquet_file(folder, X), [f"c{i}" for i in range(6)], "y"), None


def write_parquet_files(folder, X):
    pq, whole = optional("pyarrow.parquet"), table(X)
    for k, (start, stop) in enumerate(itertools.pairwise([0, 3, 3, 200, 201, N])):
        pq.write_table(whole[start:stop], folder / f"t{k}.parquet", row_group_size=64)
    return sources.files(os.fspath(folder), columns=[f"c{i}" for i in range(6)], label="y"), None


def write_vectors(folder, X):
    return sources.parquet(parquet_file(folder, X), "vector", "y"), None


def write_lists(folder, X):
    return sources.parquet(parquet_file(folder, X), ["list"]), Y


def write_arrow(folder, X):
    pa = optional("pyarrow")
    made = table(X)
    with pa.OSFile(str(folder / "t.arrow"), "wb") as file, pa.ipc.new_file(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=50)
    return sources.arrow(folder / "t.arrow", "list", label="y"), None


def write_stream(folder, X):
    pa = optional("pyarrow")
    made = table(X).append_column("word", pa.array(["a", "b"] * (N // 2)).dictionary_encode())
    with pa.OSFile(str(folder / "t.arrows"), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=50)
    return sources.arrow(folder / "t.arrows", [f"c{i}" for i in range(6)], label="y"), None


def write_hdf5(folder, X):
    with optional("h5py").File(folder / "t.h5", "w") as file:
        file.create_dataset("x", data=X, chunks=(32, 6), compression="gzip")
        file["labels/y"] = Y
    return sources.hdf5(folder / "t.h5", "x", "labels/y"), None


def write_map(folder, X):
    X.tofile(folder / "x.map")
    return np.memmap(folder / "x.map", np.float32, "r", shape=X.shape), Y


def write_own(folder, X):
    return Memory(X, Y), None


SINGLE = [
    write_npy,
    write_npz,
    write_npy_files,
    write_raw,
    write_idx,
    write_cifar,
    write_map,
    write_own,
]  # single samples are read as well
KINDS = [*SINGLE, write_parquet, write_parquet_files, write_vectors, write_lists, write_arrow, write_stream, write_hdf5]


def test_every_kind_of_file_is_in_the_table():
    functions = {name: getattr(sources, name) for name in sources.__all__ if inspect.isfunction(getattr(sources, name))}
    opened = {name for name, function in functions.items() if function.__annotations__["return"] == "Source"}
    assert opened == {"npy", "npz", "raw", "idx", "cifar10", "parquet", "arrow", "hdf5", "files", "huggingface"}
    text = "".join(map(inspect.getsource, KINDS))
    assert all(f"sources.{name}(" in text for name in opened - {"huggingface"})  # in test_chunked.py


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shuffle": False},
        {"window": 100},
        {"window": "3 KB", "prefetch": 0},
        {"window": 10**6, "scale": 0.5},
        {"window": 300, "shuffle": False, "rank": 1, "world_size": 3},
        {"replacement": True},
        {"dtype": "float64", "drop_last": True, "scale": 2.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_the_arrays(kind, arguments, tmp_path, X):
    x, y = kind(tmp_path, X)
    loader = Loader(x, y, batch_size=33, seed=5, backend="cpu", **arguments)
    window, scale = arguments.get("window", loader.window), arguments.get("scale", 1)
    truth, labels_of_all, number = X, Y, lambda x, y: y
    if kind is write_cifar:
        truth, labels_of_all = cifar_records()[:, 1:], cifar_records()[:, 0].astype(np.int64)
        number = lambda x, y: y + 10 * (x[:, 0] / scale).astype(int)  # noqa: E731
    if kind in SINGLE:
        assert (loader.window > 0) == ("window" in arguments)
        expected = list(Loader(truth, labels_of_all, batch_size=33, seed=5, backend="cpu", **arguments))
    else:  # the blocks of the file
        assert (loader.window > 0) == ("replacement" not in arguments)
        assert loader.window <= max(N + loader.block - 1, 1) if window else True
        expected = None
    for _ in range(2):
        seen = []
        for k, (batch, labels) in enumerate(loader):
            assert batch.dtype == (arguments.get("dtype") or "float32")
            assert batch.flags.c_contiguous
            assert batch.flags.writeable
            numbers = number(batch, labels)
            assert np.array_equal(batch, truth[numbers] * batch.dtype.type(scale))
            assert np.array_equal(labels, labels_of_all[numbers])
            assert labels.dtype == np.int64
            if expected is not None and loader.epoch == 0:
                assert np.array_equal(labels, expected[k][1])
            batch[...] = 0  # a delivered batch belongs to the caller
            seen += numbers.tolist()
        if not arguments.get("replacement"):
            assert len(set(seen)) == len(seen) == loader.stats.samples
        if not arguments.get("shuffle", True):
            assert seen == sorted(seen)
    assert loader.stats.batches == len(loader)
    assert loader.stats.bytes_read >= loader.stats.samples * (truth[0].nbytes + Y.itemsize)
    assert np.array_equal(epochs_of(loader).peek()[0], next(iter(loader))[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("window", [None, 100])
def test_what_is_not_converted_keeps_its_bits(window, dtype, X):
    x = X.astype(dtype)
    x[:, 0] = [(-0.0, np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max)[i % 3] for i in range(N)]
    for source in (x, Memory(x)):
        for batch, labels in Loader(source, Y, batch_size=33, window=window, backend="cpu"):
            assert batch.tobytes() == x[labels].tobytes()


def test_a_source_may_give_any_layout(X):
    class Columns(Memory):
        def read(self, indices):
            return np.asfortranarray(Memory.read(self, indices))

    for x in Loader(Columns(X), batch_size=33, shuffle=False, backend="cpu"):
        assert x.flags.c_contiguous


def test_row_groups_are_decoded_once(tmp_path, X):
    path = parquet_file(tmp_path, X)
    source = sources.parquet(path, "vector", "y")
    decoded = []
    original = source._decode
    source._decode = lambda group: decoded.append(group) or original(group)
    loader = Loader(source, batch_size=33, window=260, backend="cpu")
    assert (loader.window, loader.block) == (128, 64)
    decoded.clear()
    source._group = -1  # the one that the loader looked at is still there
    list(loader)
    assert sorted(decoded) == list(range(8))


@pytest.mark.parametrize("compression", [None, "lz4"])
@pytest.mark.parametrize("kind", ["file", "stream"])
def test_rows_of_an_arrow_file_are_counted_without_reading_a_batch(kind, compression, tmp_path, monkeypatch):
    pa = optional("pyarrow")
    batches = [pa.record_batch({"a": np.arange(n, dtype=np.float32), "y": np.arange(n)}) for n in (7, 0, 300, 1)]
    options, path = pa.ipc.IpcWriteOptions(compression=compression), tmp_path / "t.arrow"
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as file, make(file, batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    read, original = [], sources.opener.BytesByPlace.read_into
    monkeypatch.setattr(
        sources.opener.BytesByPlace,
        "read_into",
        lambda self, view, place: read.append(len(view)) or original(self, view, place),
    )
    source = sources.arrow(path, None, "y")
    assert len(source) == 308
    assert sum(read) < 1000  # the schema of a stream
    x, y = source.read(np.array([306, 0, 307]))
    assert (x.tolist(), y.tolist()) == ([[299], [0], [0]], [299, 0, 0])
    os.truncate(path, 3000)
    with pytest.raises(DataFormatError, match=r"t\.arrow: expected "):
        sources.arrow(path, None, "y").read(np.array([100]))


class Elsewhere:
    """A file in memory, which is opened as one of another machine is."""

    def __init__(self, path):
        self.path, self.data, self.opened = path.name, path.read_bytes(), []

    def open(self):
        self.opened.append(io.BytesIO(self.data))
        return self.opened[-1]

    def size(self):
        return len(self.data)

    def identity(self):
        return f"{len(self.data)} bytes"


@pytest.mark.parametrize(
    "kind", [write_npy, write_raw, write_idx, write_vectors, write_arrow, write_stream, write_hdf5]
)
def test_a_file_may_be_given_by_what_opens_it_and_is_opened_again_when_it_was_closed(kind, tmp_path, X, monkeypatch):
    files = []
    for name in ("rows", "tables"):
        module = sys.modules[f"gpubatch.sources.{name}"]
        monkeypatch.setattr(module, "opener_of", lambda path: files.append(Elsewhere(Path(path))) or files[-1])
    source, _ = kind(tmp_path, X)
    file, index = files[0], np.array([499, 3, 3, 77])
    found = source.read(index)
    assert np.array_equal(found[0] if isinstance(found, tuple) else found, X[index])
    source.close()
    assert all(opened.closed for opened in file.opened)
    again = source.read(index)
    assert np.array_equal(again[0] if isinstance(again, tuple) else again, X[index])
    source.close()
    file.data += b"0"
    with pytest.raises(DataFormatError, match="it was changed while it was in use"):
        source.read(index)


def test_single_samples_are_read_alone_and_neighbours_together(tmp_path, X, monkeypatch):
    source, _ = write_npy(tmp_path, X)
    calls, original = [], sources.opener.BytesByPlace.read_into
    monkeypatch.setattr(
        sources.opener.BytesByPlace,
        "read_into",
        lambda self, view, place: calls.append(len(view)) or original(self, view, place),
    )
    assert np.array_equal(source.read(np.array([7, 8, 9, 3, 3, 499])), X[[7, 8, 9, 3, 3, 499]])
    assert calls == [72, 24, 24, 24]


def test_reading_is_spread_over_the_batches():
    source = Memory(np.arange(4000.0)[:, None])
    loader = Loader(source, batch_size=20, window=640, prefetch=0, backend="cpu")
    source.asked.clear()
    read = []
    for _ in loader:
        read.append(sum(map(len, source.asked)))
        source.asked.clear()
    assert read[0] == 340  # the first half, and of the second as much as was used of the first
    assert set(read[1:176]) == {20}
    assert sum(read) == 4000


class Filling(Memory):
    """A source that reads into a given array, and is told what will be read next."""

    def __init__(self, *arrays):
        super().__init__(*arrays)
        self.told = []

    def read_into(self, indices, out):
        self.asked.append(indices)
        for place, array in zip(out if isinstance(out, tuple) else (out,), self.arrays, strict=True):
            assert place.flags.c_contiguous
            np.take(array, indices, axis=0, out=place, mode="clip")

    def expect(self, indices):
        self.told.append(indices)


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_source_that_fills_what_it_is_given_hears_of_blocks_before_it_reads_them(world_size, X):
    arguments = {"batch_size": 33, "window": 100, "seed": 4, "rank": world_size - 1, "world_size": world_size}
    arguments |= {"prefetch": 0, "backend": "cpu"}
    source = Filling(X, Y)
    loader = Loader(source, **arguments)
    source.asked.clear()
    for (x, y), (expected, labels) in zip(loader, Loader(Memory(X, Y), **arguments), strict=True):
        assert np.array_equal(x, expected)
        assert np.array_equal(y, labels)
        read, told = sum(map(len, source.asked)), sum(map(len, source.told))
        assert read <= told <= read + 2 * 2 * loader.block  # two blocks ahead, in this window and the next
    assert np.array_equal(np.concatenate(source.told), np.concatenate(source.asked))
    assert loader.stats.bytes_read == len(np.concatenate(source.asked)) * (X.itemsize * 6 + Y.itemsize)
    X[321, 2] = np.nan
    with pytest.raises(NonFiniteError, match=r"sample 321 has nan at \[2\]"):
        list(Loader(source, window=100, backend="cpu"))


@every("kind", {"Memory": Memory, "Filling": Filling}, ["Filling"])
@every("features", {"2": 2, "400": 400}, ["2"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 40_000},
        {"window": 640},  # the list of blocks is the largest part
        *(
            pytest.param(arguments, marks=pytest.mark.exhaustive)
            for arguments in (
                {"window": 40_000, "shuffle": False},
                {"window": 200_000},  # two halves are all
                {"window": 10**6},
                {"window": 40_000, "rank": 1, "world_size": 3},
            )
        ),
    ],
    ids=str,
)
def test_the_plan_has_what_is_held_of_a_window_and_of_its_order(kind, features, arguments):
    n = 200_000
    source = kind(np.zeros((n, features), np.uint8 if features > 2 else np.float32), np.zeros(n, np.int64))
    loader = Loader(source, batch_size=100, prefetch=0, backend="cpu", **arguments)
    epochs_of(loader).peek()
    small = kind(np.zeros((400, 2), np.float32), np.zeros(400, np.int64))
    deque(
        Loader(small, batch_size=100, prefetch=0, backend="cpu", window=200), maxlen=0
    )  # what is imported at first use
    source.asked = source.told = deque(maxlen=0)
    tracemalloc.start()
    try:
        deque(loader, maxlen=0)  # which keeps no batch while it asks for the next
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    plan, few = loader.plan, 60_000  # Python's own remaining objects
    absent = plan.needed - plan.parts["window"]  # batches may not be there when the window's peak is
    assert 0.995 * peak - few < plan.needed < 1.005 * peak + few + absent


def test_a_file_in_a_circle_is_closed_without_a_word(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    file = sources.LocalFile(tmp_path / "x").open()
    circle = [file]
    circle.append(circle)
    descriptor = file.fileno()
    assert (file.read(), file.name) == (b"abc", str(tmp_path / "x"))
    del file, circle
    gc.collect()  # a warning would be an error
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(descriptor)
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        sources.LocalFile(tmp_path).open()


def test_a_source_is_read_while_the_consumer_computes():
    read = threading.Semaphore(0)

    class Told(Memory):
        def read(self, indices):
            found = Memory.read(self, indices)
            read.release()
            return found

    loader = Loader(Told(np.zeros((64 * 10, 4), np.float32)), batch_size=64, backend="cpu")
    while read.acquire(blocking=False):
        pass  # samples that the loader read when created
    batches = iter(loader)
    next(batches)
    assert read.acquire(timeout=60)
    for _ in range(2):  # ahead of the consumer, who asks for none of them
        assert read.acquire(timeout=60)
    batches.close()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in (write_map, write_own)])
def test_a_source_of_files_refuses_to_be_pickled_in_words(kind, tmp_path, X):
    for source in kind(tmp_path, X):
        if not isinstance(source, np.ndarray | None):
            with pytest.raises(DTypeError, match=r"a source cannot be pickled.*give the other process the path"):
                pickle.dumps(source)


def test_arrays_that_np_savez_wrote_otherwise(tmp_path, X):
    np.savez_compressed(tmp_path / "packed.npz", x=X)
    with pytest.raises(
        DataFormatError, match=r"packed\.npz: expected an array 'x' that is read by place, found a compr"
    ):
        sources.npz(tmp_path / "packed.npz", "x")
    with pytest.raises(ArgumentError, match=r"packed\.npz has the arrays x; got 'z'"):
        sources.npz(tmp_path / "packed.npz", "z")
    np.save(tmp_path / "x.npy", X)
    with pytest.raises(DataFormatError, match=r"x\.npy: expected an \.npz file, found damage"):
        sources.npz(tmp_path / "x.npy", "x")


def test_larger_than_memory(tmp_path):
    """A file of 300 MB, in an address space with room for half of it."""
    if not sys.platform.startswith("linux"):
        pytest.skip("ulimit -v is Linux's")
    rows, width = 300_000, 1000
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (rows, width)})
        row = np.zeros((10_000, width), np.uint8)
        for start in range(0, rows, 10_000):
            row[:, :4] = np.arange(start, start + 10_000, dtype=np.uint32)[:, None].view(np.uint8)
            row.tofile(file)
    code = f"""if True:
        import resource, numpy as np, gpubatch as gb
        from gpubatch import sources
        next(iter(gb.Loader(np.zeros((4, 4), np.uint8), scale=0.5, backend="cpu", batch_size=2)))
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 150 * 2**20,) * 2)
        for window in ("32 MiB", None):
            loader = gb.Loader(sources.npy({os.fspath(tmp_path / "x.npy")!r}), batch_size=500, window=window,
                               dtype="float32", backend="cpu")
            seen = np.zeros({rows}, bool)
            for x in loader:
                number = x[:, :4].astype(np.uint32) @ (256 ** np.arange(4, dtype=np.uint32))
                assert not seen[number].any()
                seen[number] = True
            assert seen.all()
        print("complete", loader.stats.bytes_read)
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["complete", str(rows * width)], done.stderr


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit on address space is Linux's")
def test_the_script_that_measures_files_checks_what_it_reads(tmp_path):
    script = Path(__file__).parent.parent / "bench" / "files.py"
    small = ["--gigabytes", "0.005", "--window", "1 MiB", "--rounds", "1", "--folder", tmp_path]
    command = [sys.executable, script, *small, "--out", tmp_path / "out.json"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = json.loads((tmp_path / "out.json").read_text())["files"]
    assert files.keys() == {"uint8", "float32"}
    for found in files.values():
        assert found["samples"] == 5_000_000 // 1024
        assert found["peak_resident_bytes"] < found["peak_bytes"] < 10**9
        assert found["block_bytes"] == 2**20 // 64
        for rows in found["states"].values():
            assert [row["contender"] for row in rows] == ["shuffled", "in order", "in order, no window", "blocks"]
            assert rows[0]["shuffled_ratio"] == 1
    refused = subprocess.run([*map(str, command), "--limit", "10 MB"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "shuffled failed" in refused.stderr


# --- errors name the file and the position --------------------------------------------------------------------------


def consume(*arguments, **keywords):
    list(Loader(*arguments, batch_size=33, backend="cpu", **keywords))


def test_an_empty_source(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((0, 3)))
    with pytest.raises(ShapeError, match=r"X must hold at least one sample, .*x\.npy has none"):
        consume(sources.npy(tmp_path / "x.npy"))
    with pytest.raises(ShapeError, match=r"X \(Memory\) has none"):
        consume(Memory(np.zeros((0, 3))))
    path = parquet_file(tmp_path, np.zeros((N, 6), np.float32))
    pq = optional("pyarrow.parquet")
    pq.write_table(pq.read_table(path)[:0], path)
    with pytest.raises(ShapeError, match=r"t\.parquet has none"):
        consume(sources.parquet(path, "c0"))


def test_different_lengths(tmp_path, X):
    x, _ = write_npy(tmp_path, X)
    with pytest.raises(ShapeError, match=r"X of shape \(500, 6\) with 500 along axis 0 and Y of shape \(499,\)"):
        consume(x, Y[1:])
    with optional("h5py").File(tmp_path / "t.h5", "w") as file:
        file["x"], file["y"] = X, Y[1:]
    with pytest.raises(ShapeError, match=r"t\.h5: .* '/x' of shape \(500, 6\) and '/y' of shape \(499,\)"):
        sources.hdf5(tmp_path / "t.h5", "x", "y")


@pytest.mark.parametrize("window", [None, 100])
def test_a_file_that_shrinks_while_it_is_read(window, tmp_path, X):
    x, y = write_npy(tmp_path, X)
    loader = Loader(x, y, batch_size=33, shuffle=False, window=window, backend="cpu")
    with pytest.raises(DataFormatError, match=r"x\.npy: expected 500 samples.* before sample 250 is complete"):  # noqa: PT012
        for k, _ in enumerate(loader):
            if k == 0:
                os.truncate(tmp_path / "x.npy", 128 + 24 * 250 + 5)


def test_a_file_that_is_too_short_when_it_is_opened(tmp_path, X):
    write_npy(tmp_path, X)
    os.truncate(tmp_path / "x.npy", 1000)
    with pytest.raises(DataFormatError, match=r"x\.npy: expected 12128 bytes for float32 \(500, 6\), found 1000"):
        sources.npy(tmp_path / "x.npy")


@pytest.mark.parametrize("window", [None, 100])
def test_a_label_that_is_none(window, tmp_path, X):
    source, _ = write_cifar(tmp_path, X)
    with open(tmp_path / "data_batch_3.bin", "r+b") as file:
        file.seek(3073 * 123)
        file.write(b"\x0c")
    with pytest.raises(DataFormatError, match=r"data_batch_3\.bin: expected labels 0 to 9, found 12 at 123\n"):
        consume(source, window=window)


def test_cifar_10_that_is_damaged_or_not_there(tmp_path, X):
    with pytest.raises(FileNotFoundError, match=r"no data_batch_1\.bin, .*, data_batch_5\.bin in"):
        sources.cifar10(tmp_path)
    source, _ = write_cifar(tmp_path, X)
    with pytest.raises(ArgumentError, match="part must be one of 'train', 'test', got 'valid'"):
        sources.cifar10(tmp_path, "valid")
    os.truncate(tmp_path / "data_batch_3.bin", 3073 * 150 + 7)
    with pytest.raises(DataFormatError, match=r"data_batch_3\.bin: .* it ends before sample 150 is complete"):
        consume(source, shuffle=False)
    with pytest.raises(
        DataFormatError, match=r"data_batch_3\.bin: expected records of 3073 bytes.* found 460957 bytes"
    ):
        sources.cifar10(tmp_path)
    assert len(sources.cifar10(tmp_path, "test")) == 3  # which needs no other file


def test_cifar_10_is_that_of_datasets(tmp_path, X):
    write_cifar(tmp_path, X)
    for part, (images, labels) in zip(["train", "test"], datasets.cifar10(tmp_path, flatten=False), strict=True):
        x, y = sources.cifar10(tmp_path, part, flatten=False).read(np.arange(len(images)))
        assert (x.dtype, y.dtype, x.shape[1:]) == (images.dtype, labels.dtype, (3, 32, 32))
        assert np.array_equal(x, images)
        assert np.array_equal(y, labels)


def test_a_row_of_another_shape():
    class Ragged(Memory):
        def read(self, indices):
            return np.ones((len(indices), 3 if 321 in indices else 2))

    with pytest.raises(
        DataFormatError, match=r"X \(Ragged\): expected float64 \(1, 2\) for sample 321, found float64 \(1, 3\)"
    ):
        consume(Ragged(np.zeros((N, 2))))


def test_what_a_source_raises_says_where():
    class Broken(Memory):
        def read(self, indices):
            if 321 in indices:
                raise OSError("unreadable sector")
            return Memory.read(self, indices)

    with pytest.raises(OSError, match="unreadable sector") as caught:
        consume(Broken(np.zeros((N, 2))), shuffle=False)
    assert caught.value.__notes__ == ["while reading samples 297 to 329 of X (Broken)"]


def test_a_list_of_another_length_in_a_parquet_file(tmp_path, X):
    pa = optional("pyarrow")
    lists = X.tolist()
    lists[321].pop()
    path = parquet_file(tmp_path, X, list=pa.array(lists, pa.list_(pa.float32())))
    with pytest.raises(DataFormatError, match=r"t\.parquet: .*6 numbers in column 'list', found 5 in sample 321"):
        consume(sources.parquet(path, "list"))


def test_missing_values_in_a_parquet_file(tmp_path, X):
    pa = optional("pyarrow")
    path = parquet_file(tmp_path, X, c3=pa.array([None if i == 400 else 1.0 for i in range(N)]))
    with pytest.raises(DataFormatError, match=r"t\.parquet: .* missing value in column 'c3', sample 400"):
        consume(sources.parquet(path, ["c0", "c3"]))


def test_a_corrupt_parquet_file(tmp_path, X):
    path = parquet_file(tmp_path, X)
    data = bytearray(path.read_bytes())
    metadata = optional("pyarrow.parquet").ParquetFile(path).metadata
    column = metadata.row_group(4).column(6)
    start = column.dictionary_page_offset or column.data_page_offset
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    with pytest.raises(DataFormatError, match=r"t\.parquet: expected whole samples 256 to 319, found damage"):
        consume(sources.parquet(path, "vector"))
    path.write_bytes(data[:1000])
    with pytest.raises(DataFormatError, match=r"t\.parquet: expected a Parquet file, found damage"):
        sources.parquet(path, "vector")


def test_a_corrupt_hdf5_file(tmp_path, X):
    write_hdf5(tmp_path, X)
    path = tmp_path / "t.h5"
    with optional("h5py").File(path) as file:
        chunk = file["x"].id.get_chunk_info(5)
    data = bytearray(path.read_bytes())
    data[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\xff" * chunk.size
    path.write_bytes(data)
    with pytest.raises(DataFormatError, match=r"t\.h5: expected samples 160 to 191 of '/x', found damage"):
        consume(sources.hdf5(path, "x"), window=70, shuffle=False)
    (tmp_path / "short.h5").write_bytes(data[:500])
    with pytest.raises(DataFormatError, match=r"short\.h5: expected an HDF5 file, found damage"):
        sources.hdf5(tmp_path / "short.h5", "x")


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(value, window, tmp_path, X):
    X[321, 4] = value
    x, _ = write_npy(tmp_path, X)
    message = re.escape(f"samples must be finite, but sample 321 has {value!r} at [4]")
    with pytest.raises(NonFiniteError, match=rf"x\.npy: {message}"):
        consume(x, window=window)


def test_values_beyond_the_batches_range(tmp_path):
    np.save(tmp_path / "x.npy", np.array([1.0, 1e300]))
    consume(sources.npy(tmp_path / "x.npy"))
    with pytest.raises(NonFiniteError, match=r"sample 1 has 1e\+300, beyond the range of the batches"):
        consume(sources.npy(tmp_path / "x.npy"), dtype="float32")


class Other(Memory):
    def read(self, indices):
        return [[1.0]] * len(indices)


OPENING = [
    (lambda f: sources.npy(f / "junk"), DataFormatError, "junk: expected an .npy file"),
    (lambda f: sources.npy(f / "missing"), FileNotFoundError, "missing"),
    (lambda f: sources.npy(f / "fortran.npy"), DataFormatError, "found Fortran order"),
    (lambda f: sources.npy(f / "one.npy"), DataFormatError, "found a single number"),
    (lambda f: sources.npy(f / "text.npy"), DTypeError, "text.npy must hold integers"),
    (
        lambda f: sources.raw(f / "junk", (7,), "f4"),
        DataFormatError,
        "junk: expected samples of 28 bytes, float32 (7,)",
    ),
    (lambda f: sources.raw(f / "junk", (7,), "f4", 10**6), DataFormatError, "found -"),
    (lambda f: sources.idx(f / "junk"), DataFormatError, "junk: expected the magic number of IDX"),
    (lambda f: sources.idx(f / "packed"), DataFormatError, "packed: expected an IDX file, found a gzip file"),
    (lambda f: consume(sources.npy(f / "x.npy"), sample_axis=1), ArgumentError, "X is a source of rows"),
    (lambda f: consume(np.zeros(3), Memory(Y[:3], Y[:3])), ArgumentError, "Y (Memory) alone gives 2 for Y"),
    (lambda f: consume(Memory(Y, Y), Y), ArgumentError, "X (Memory) alone gives 2 for X"),
    (lambda f: consume(Other(Y)), DTypeError, "X (Other): read must return NumPy arrays, got list"),
    (lambda f: consume(Memory(Y[:3].astype(str))), DTypeError, "X (Memory) must hold integers"),
]


@pytest.mark.parametrize(("make_it", "error", "message"), OPENING, ids=lambda v: v if isinstance(v, str) else "")
def test_errors(make_it, error, message, tmp_path):
    (tmp_path / "junk").write_bytes(b"not what it should be")
    (tmp_path / "packed").write_bytes(b"\x1f\x8b and more")
    np.save(tmp_path / "x.npy", np.zeros((4, 2)))
    np.save(tmp_path / "fortran.npy", np.zeros((4, 2), order="F"))
    np.save(tmp_path / "one.npy", np.float64(1))
    np.save(tmp_path / "text.npy", np.array(["a"]))
    with pytest.raises(error, match=re.escape(message)):
        make_it(tmp_path)


def test_columns_that_are_not_there_or_no_numbers(tmp_path, X):
    pa = optional("pyarrow")
    path = parquet_file(tmp_path, X, c1=pa.array(["a"] * N))
    with pytest.raises(ArgumentError, match=r"t\.parquet has the columns c0, .*; got 'd'"):
        sources.parquet(path, ["c0", "d"])
    with pytest.raises(ArgumentError, match="columns must name at least one column"):
        sources.parquet(path, [])
    with pytest.raises(DTypeError, match=r"t\.parquet: column 'c1' must hold numbers.* got string"):
        consume(sources.parquet(path, "c1"))
    write_hdf5(tmp_path, X)
    with pytest.raises(ArgumentError, match=r"t\.h5 has the datasets labels/y, x; got 'z'"):
        sources.hdf5(tmp_path / "t.h5", "z")


@pytest.mark.parametrize(
    ("library", "open_it"),
    [("pyarrow", lambda: sources.parquet("t", "c0")), ("h5py", lambda: sources.hdf5("t", "x"))],
)
def test_a_library_that_is_missing(library, open_it, monkeypatch):
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ArgumentError, match=rf"needs {library}.*pip install 'gpubatch\[data\]'"):
        open_it()


class Slices:
    """An array that is read by slices, as zarr's and netCDF4's are."""

    def __init__(self, array, chunks=None):
        self.array, self.shape, self.dtype, self.most = array, array.shape, array.dtype, 0
        if chunks is not None:
            self.chunks = chunks

    def __getitem__(self, key):
        self.most = max(self.most, key.stop - key.start)
        return self.array[key]


@pytest.mark.parametrize("chunks", [None, (16, 3), ((16, 16, 16, 13), (3,))], ids=["none", "zarr", "dask"])
def test_arrays_that_are_read_by_slices_are_sources(chunks):
    X, Y = np.arange(61 * 3).reshape(61, 3), np.arange(61) % 4
    given = Slices(X, chunks), Slices(Y)
    batches = list(Loader(*given, batch_size=8, window=32, backend="cpu"))
    found = np.concatenate([np.c_[x, y] for x, y in batches])
    assert np.array_equal(found[found[:, 0].argsort()], np.c_[X, Y])
    assert given[0].most < 61  # never all
    whole = list(Loader(*given, batch_size=8, shuffle=False, backend="cpu"))
    assert np.array_equal(np.concatenate([x for x, _ in whole]), X)


def test_a_mask_of_what_is_read_is_not_lost():
    X = np.ma.masked_array(np.ones((9, 2)), np.arange(18).reshape(9, 2) == 7)
    source = type("Masked", (), {"__len__": lambda _: 9, "read": lambda _, indices: X[indices]})
    for given in (Slices(X), source()):
        with pytest.raises(NonFiniteError, match=r"1 of its .* elements are masked"):
            list(Loader(given, batch_size=9, shuffle=False, backend="cpu"))


def test_images_in_files_may_be_flattened(tmp_path):
    images = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    np.save(tmp_path / "x.npy", images)
    (tmp_path / "x.idx").write_bytes(bytes([0, 0, 8, 3]) + np.array(images.shape, ">u4").tobytes() + images.tobytes())
    with optional("h5py").File(tmp_path / "x.h5", "w") as file:
        file["x"], file["y"], file["s"] = images, np.arange(5), 3
    index = np.array([4, 0, 2])
    for made in (sources.npy(tmp_path / "x.npy", flatten=True), sources.idx(tmp_path / "x.idx", flatten=True)):
        assert np.array_equal(made.read(index), images.reshape(5, 12)[index])
    x, y = sources.hdf5(tmp_path / "x.h5", "x", "y", flatten=True).read(index)
    assert np.array_equal(x, images.reshape(5, 12)[index])
    assert np.array_equal(y, index)
    with pytest.raises(DataFormatError, match="expected samples, found a single number in 's'"):
        sources.hdf5(tmp_path / "x.h5", "s")
    with pytest.raises(ArgumentError, match="has the datasets x, y; got 'z'"):
        sources.hdf5(tmp_path / "x.h5", "z")


def test_columns_of_a_table_are_each_one(tmp_path):
    pa, pq = optional("pyarrow"), optional("pyarrow.parquet")
    arrays = [pa.array([1.0, 2.0]), pa.array([3.0, 4.0]), pa.array([0, 1])]
    pq.write_table(pa.Table.from_arrays(arrays, names=["a", "b", "y"]), tmp_path / "t.parquet")
    pq.write_table(pa.Table.from_arrays(arrays, names=["a", "a", "y"]), tmp_path / "twice.parquet")
    x, y = sources.parquet(tmp_path / "t.parquet", None, "y").read(np.arange(2))
    assert (x.tolist(), y.tolist()) == ([[1.0, 3.0], [2.0, 4.0]], [0, 1])
    with pytest.raises(DataFormatError, match="expected one column 'a', found 2"):
        sources.parquet(tmp_path / "twice.parquet", "a")
    with pytest.raises(DataFormatError, match="expected a file, found a folder"):
        sources.parquet(tmp_path, "a")
