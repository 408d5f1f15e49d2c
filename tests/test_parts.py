"""Folders, lists and patterns of files as one source: against the arrays in them; what differs is refused by name."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter, deque
from pathlib import Path

import numpy as np
import pytest
from families import drawn, every
from hypothesis import strategies as st
from needs import missing
from stand_in import queued_backend

import gpubatch as gb
import gpubatch.loader.order
from gpubatch import sources
from gpubatch.loader import Loader, epochs_of
from gpubatch.loader.order import EpochOf, UnevenBlocks, UnevenOrder
from gpubatch.sources import parts as parts_module, tables

CUTS = [0, 130, 130, 131, 330, 500]  # rows of the files; the second has none
N = CUTS[-1]
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
X[:, 0] = np.arange(N)
Y = np.arange(N) * 3 % 7


def optional(module):
    try:
        return __import__(module, fromlist=["_"])
    except ImportError:
        missing("data", f"{module} is not installed (pip install 'gpubatch[data]')")


# --- one table of all formats ---------------------------------------------------------------------------------------


def put_npy(path, x, y):
    np.save(path, x)


def put_raw(path, x, y):
    path.write_bytes(x.astype(">f4").tobytes())


def put_idx(path, x, y):
    path.write_bytes(bytes([0, 0, 0x0D, 2]) + np.array(x.shape, ">u4").tobytes() + x.astype(">f4").tobytes())


def table_of(x, y):
    pa = optional("pyarrow")
    return pa.table({**{f"c{i}": x[:, i] for i in range(x.shape[1])}, "y": y})


def put_parquet(path, x, y):
    optional("pyarrow.parquet").write_table(table_of(x, y), path, row_group_size=50)


def put_lists(path, x, y):
    pa = optional("pyarrow")
    made = pa.table({"x": pa.array(x.tolist(), pa.list_(pa.float32())), "y": y})
    optional("pyarrow.parquet").write_table(made, path, row_group_size=50)


def put_arrow(path, x, y):
    pa = optional("pyarrow")
    make = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table_of(x, y).schema) as writer:
        writer.write_table(table_of(x, y), max_chunksize=50)


def put_hdf5(path, x, y):
    with optional("h5py").File(path, "w") as file:
        file.create_dataset("x", data=x, maxshape=(None, 3), chunks=(40, 3), compression="gzip")
        file.create_dataset("y", data=y, maxshape=(None,), chunks=(40,))


# The suffix, what writes a file, and the options.
FORMATS = {
    "npy": (".npy", put_npy, {}),
    "raw": (".bin", put_raw, {"format": "raw", "sample_shape": (3,), "dtype": ">f4"}),
    "idx": ("-idx2-ubyte", put_idx, {}),
    "parquet": (".parquet", put_parquet, {"label": "y"}),
    "arrow": (".arrow", put_arrow, {"label": "y"}),
    "arrow stream": (".arrows", put_arrow, {"label": "y"}),
    "hdf5": (".h5", put_hdf5, {"dataset": "x", "label": "y"}),
}
LABELLED = {name for name, (_, _, options) in FORMATS.items() if "label" in options}


def written(folder, name, cuts=CUTS):
    """Files of a format in a folder, named so that their natural order is not that of their characters."""
    suffix, put, _ = FORMATS[name]
    folder.mkdir(exist_ok=True)
    for k, (start, stop) in enumerate(itertools.pairwise(cuts)):
        put(folder / f"part-{8 + k}{suffix}", X[start:stop], Y[start:stop])
    return folder


def opened(folder, name):
    return sources.files(folder, **FORMATS[name][2])


def batches(source, **arguments):
    labels = () if isinstance(source, sources.parts.Parts) and source.forms and len(source.forms) > 1 else (Y,)
    return list(Loader(source, *labels, batch_size=33, seed=5, backend="cpu", **arguments))


def test_every_format_is_in_the_table():
    assert {name.split()[0] for name in FORMATS} == parts_module.FORMATS.keys()


@every("name", FORMATS.keys(), ["npy", "parquet"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shuffle": False},
        {"window": 120},
        {"window": 20},  # less than what is decoded at once
        {"window": "2 KB", "prefetch": 0, "scale": 0.5},
        {"window": 120, "rank": 1, "world_size": 3},
        {"replacement": True},
    ],
    ids=str,
)
def test_batches_are_those_of_the_rows_in_all_files(name, arguments, tmp_path):
    source, seen = opened(written(tmp_path, name), name), []
    assert len(source) == N
    for x, y in batches(source, **arguments):
        numbers = (x[:, 0] / arguments.get("scale", 1)).astype(int)
        assert np.array_equal(x, X[numbers] * np.float32(arguments.get("scale", 1)))
        assert np.array_equal(y, Y[numbers])
        seen += numbers.tolist()
    share = range(arguments.get("rank", 0), N, arguments.get("world_size", 1))
    assert len(seen) == len(share)
    if "replacement" not in arguments:
        assert len(set(seen)) == len(seen)
    if not arguments.get("shuffle", True):
        assert seen == sorted(seen)


def test_files_of_single_rows_are_shuffled_as_one_array(tmp_path):
    for (x, y), (expected, labels) in zip(batches(opened(written(tmp_path, "npy"), "npy")), batches(X), strict=True):
        assert x.tobytes() == expected.tobytes()
        assert np.array_equal(y, labels)


def test_labels_may_have_files_of_their_own_that_are_cut_elsewhere(tmp_path):
    written(tmp_path, "npy")
    for k, part in enumerate(np.split(Y, [10, 400])):
        np.save(tmp_path / f"y{k}.npy", part)
    for window in (None, 100):
        loader = Loader(tmp_path / "part-*.npy", tmp_path / "y*.npy", batch_size=33, window=window, backend="cpu")
        for x, y in loader:
            assert np.array_equal(y, Y[x[:, 0].astype(int)])
    with pytest.raises(gb.ShapeError, match="equal numbers of samples"):
        Loader(tmp_path / "part-*.npy", tmp_path / "y1.npy", batch_size=33, backend="cpu")


# --- what is decoded ------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Counts the groups that are decoded, by file and group."""
    found, original = Counter(), tables._Table._decode
    monkeypatch.setattr(
        tables._Table, "_decode", lambda self, group: found.update([(self.path, group)]) or original(self, group)
    )
    return found


@every("name", ["parquet", "arrow", "arrow stream"], ["parquet"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"window": 120},
        {"window": 20},
        {"window": 210, "shuffle": False},
        {"window": 150, "rank": 1, "world_size": 2},
        {"window": 4 * N},
    ],
    ids=str,
)
def test_each_group_is_decoded_once_an_epoch_and_none_before_the_first_batch(name, arguments, tmp_path, decoded):
    source = opened(written(tmp_path, name), name)
    loader = Loader(source, batch_size=33, backend="cpu", **arguments)
    assert decoded == {}
    for epoch in range(1, 3):
        deque(loader, maxlen=0)
        assert set(decoded.values()) <= {epoch}
    assert len(decoded) >= 3 + 4 + 4  # and that of a single row, which is one rank's


def test_a_run_decodes_each_group_once_an_epoch(tmp_path, decoded):
    """With a batch size that is tried before the first epoch, and with a held-out part, which is read three times."""
    source = opened(written(tmp_path, "parquet"), "parquet")
    net = gb.mlp([3, 4, 7], backend="cpu")
    loader = Loader(source, window=400, at_most=32, backend="cpu", scale=1 / N)
    epochs_of(loader).replan(lambda batch_size: {}, most=32)  # as if memory were short, since so few are one batch
    epochs_of(loader).peek()
    for _ in range(2):
        deque(loader, maxlen=0)
    assert set(decoded.values()) == {2}
    decoded.clear()
    loader = Loader(source, batch_size=50, window=400, backend="cpu", scale=1 / N)
    gb.fit(net, loader, gb.Adam(net.parameters), epochs=3, progress=False, validation=0.2)
    assert set(decoded.values()) <= {3, 4, 7}  # 3 where one row is trained on alone, 4 where it is held out
    decoded.clear()
    backend = queued_backend("late")
    with backend.own_stream():
        loader = Loader(source, batch_size=33, window=400, backend=backend, scale=1 / N)
        looked_at = [backend.to_numpy(array) for array in epochs_of(loader).peek()]
        first, *_ = [[backend.to_numpy(array) for array in batch] for batch in loader]
    assert set(decoded.values()) == {1}
    assert all(np.array_equal(a, b) for a, b in zip(looked_at, first, strict=True))
    few = Loader(opened(tmp_path, "parquet"), batch_size=50, backend="cpu", scale=1 / N)
    decoded.clear()
    with epochs_of(few).holding_out(0.5, 100):
        deque(few, maxlen=0)
    assert set(decoded.values()) == {1}


def test_one_file_s_rows_are_held_at_a_time(tmp_path):
    source = opened(written(tmp_path, "parquet"), "parquet")
    source.read(np.arange(N))
    assert sum(bool(part._kept) for part in source._parts) == 1
    loader = Loader(source, batch_size=33, backend="cpu")
    assert loader.plan.parts["decoding of files"] == 2 * 50 * (12 + 8)


@every("name", FORMATS.keys(), ["npy", "parquet"])
def test_few_files_are_open_at_a_time(name, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_module, "OPEN", 3)
    folder = written(tmp_path, name, [*range(0, N + 1, 25)])

    def count():
        paths = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return sum(path.startswith(os.fspath(folder)) for path in paths)

    if not Path("/proc/self/fd").exists():
        pytest.skip("counts Linux's descriptors")
    source = opened(folder, name)
    assert count() == 0
    for arguments in ({"window": 100}, {"replacement": True}):
        for x, _ in batches(source, prefetch=0, **arguments):
            assert len(x)
            assert 1 <= count() <= 3


# --- which files ----------------------------------------------------------------------------------------------------


def firsts(where, **options):
    """The first number of each file, in the order of the samples."""
    return [int(part.read(np.zeros(1, int)).flat[0]) for part in sources.files(where, **options)._parts]


def test_files_are_found_in_natural_order_and_hidden_ones_left_out(tmp_path):
    for k, name in enumerate(
        ["b10.npy", "b9.npy", "a/year=2024/9.npy", "a/year=2024/10.npy", "a/year=300/1.npy", "_x.npy", ".y.npy",
         "_tmp/z.npy", "a/.git/q.npy"]
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / name, np.full((2, 1), k))
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "a/around").symlink_to(tmp_path)
    (tmp_path / "c.npy").mkdir()
    assert firsts(tmp_path) == [4, 2, 3, 1, 0]
    assert firsts(f"{tmp_path}/*.npy") == [1, 0]
    assert firsts(f"{tmp_path}/a/year=*/**/*.npy") == [4, 2, 3]
    assert firsts(f"{tmp_path}/_*.npy") == [5]
    assert firsts(tmp_path / "_tmp") == [7]
    assert firsts([tmp_path / "b10.npy", tmp_path / "a/year=300", f"{tmp_path}/b[9].npy"]) == [0, 4, 1]
    assert firsts(sources.LocalFile(tmp_path / "b9.npy")) == [1]
    np.save(tmp_path / "b[1].npy", np.full((2, 1), 77))  # a name that looks like a pattern
    assert firsts(tmp_path / "b[1].npy") == [77]


def test_a_loader_and_a_run_take_paths(tmp_path):
    written(tmp_path / "X", "npy")
    np.save(tmp_path / "Y.npy", Y)
    listed = sorted((tmp_path / "X").iterdir(), key=lambda path: int(re.findall(r"\d+", path.name)[-1]))
    expected = list(Loader(X, Y, batch_size=33, backend="cpu"))
    for x in (os.fspath(tmp_path / "X"), tmp_path / "X", listed, [os.fspath(path) for path in listed]):
        found = list(Loader(x, os.fspath(tmp_path / "Y.npy"), batch_size=33, backend="cpu"))
        assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(found, expected, strict=True))
    loader = Loader(tmp_path / "X", tmp_path / "Y.npy", batch_size=33, backend="cpu", scale=1 / N)
    histories = []
    for validation in ((tmp_path / "X", tmp_path / "Y.npy"), (X, Y)):
        net = gb.mlp([3, 4, 7], backend="cpu")
        history = gb.fit(net, loader, gb.SGD(net.parameters, 0.1), epochs=1, progress=False, validation=validation)
        histories.append(history.validation_loss)
        loader = Loader(tmp_path / "X", tmp_path / "Y.npy", batch_size=33, backend="cpu", scale=1 / N)
    assert np.allclose(*histories)
    with pytest.raises(gb.DTypeError, match="must hold integers"):
        Loader(["good", "bad"], Y[:2], backend="cpu")
    with pytest.raises(FileNotFoundError):
        Loader("nowhere", backend="cpu")
    with pytest.raises(gb.DTypeError, match="validation must be"):
        gb.fit(net, loader, gb.SGD(net.parameters, 0.1), epochs=1, progress=False, validation=[tmp_path / "X"])


# --- what is refused ------------------------------------------------------------------------------------------------


def damage(folder):
    """Files that differ from each other; each test takes those that it needs."""
    np.save(folder / "a.npy", X[:5])
    np.save(folder / "b.npy", X[:5].astype(np.float64))
    np.save(folder / "c.npy", X[:5, :2])
    (folder / "d.npy").touch()
    (folder / "notes.md").touch()
    (folder / "empty").mkdir()
    (folder / "hidden").mkdir()
    (folder / "hidden/_SUCCESS").touch()


FORMAT, ARGUMENT = gb.DataFormatError, gb.ArgumentError
REFUSED = {
    "suffixes": (lambda f: sources.files(f), FORMAT, "found 4 .npy (a.npy, ...), 1 .md (notes.md); name those that"),
    "no files": (lambda f: sources.files(f / "empty"), FileNotFoundError, "no files in the folder"),
    "hidden files": (lambda f: sources.files(f / "hidden"), FileNotFoundError, "no files in the folder"),
    "no match": (lambda f: sources.files(f / "*.pq"), FileNotFoundError, "no file matches the pattern"),
    "no file": (lambda f: sources.files(f / "e.npy"), FileNotFoundError, "e.npy"),
    "none": (lambda f: sources.files([]), ARGUMENT, "at least one file, got an empty list"),
    "twice": (lambda f: sources.files([f / "a.npy", f / "*a.npy"]), ARGUMENT, "a.npy 2 times"),
    "type": (lambda f: sources.files([f / "a.npy", f / "b.npy"]), FORMAT, "a.npy, found float64 (3,)"),
    "shape": (lambda f: sources.files([f / "a.npy", f / "c.npy"]), FORMAT, "a.npy, found float32 (2,)"),
    "0 bytes": (lambda f: sources.files([f / "a.npy", f / "d.npy"]), FORMAT, "d.npy: expected an .npy file"),
    "unknown": (lambda f: sources.files(f / "notes.md"), FORMAT, "found '.md'; name the format by format=, one of"),
    "format": (lambda f: sources.files(f / "a.npy", format="csv"), ARGUMENT, "'raw', got 'csv'"),
    "option": (lambda f: sources.files(f / "a.npy", columns="a"), ARGUMENT, "have the options flatten, got 'columns'"),
    "data set": (lambda f: sources.files(f / "a.npy", format="hdf5"), ARGUMENT, "hdf5 need the option 'dataset'"),
    "raw": (lambda f: sources.files(f / "a.npy", format="raw"), ARGUMENT, "raw need the option 'sample_shape'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_are_no_set_are_refused(case, tmp_path):
    damage(tmp_path)
    open_it, error, message = REFUSED[case]
    with pytest.raises(error, match=re.escape(message)):
        open_it(tmp_path)
    if case in ("type", "shape"):
        with pytest.raises(error, match=r"[bc]\.npy: expected samples of float32 \(3,\), as in .*a\.npy"):
            open_it(tmp_path)


def test_formats_are_not_mixed(tmp_path):
    np.save(tmp_path / "a.npy", X)
    put_idx(tmp_path / "b-idx2-ubyte", X, Y)
    with pytest.raises(gb.DataFormatError, match="expected files of one format, found 1 of npy, 1 of idx"):
        sources.files([tmp_path / "a.npy", tmp_path / "b-idx2-ubyte"])


OTHER_COLUMNS = {
    "missing": (lambda t: t.drop_columns("c1"), r"expected the same in .*b\.parquet as in .*a\.parquet: .*got 'c1'"),
    "more": (lambda t: t.append_column("d", t["y"]), r"b\.parquet: expected the columns .*a\.parquet, found 'd', too"),
    "type": (
        lambda t: t.set_column(1, "c1", t["c1"].cast("float64")),
        r"b\.parquet: expected column 'c1' of type float, as in .*a\.parquet, found double",
    ),
    "labels": (
        lambda t: t.set_column(3, "y", t["y"].cast("int32")),
        r"b\.parquet: expected column 'y' of type int64, as in .*a\.parquet, found int32",
    ),
    "twice": (lambda t: t.rename_columns(["c0", "c1", "c1", "y"]), "expected one column 'c1', found 2|got 'c2'"),
    "no rows": (lambda t: t[:0].set_column(3, "y", t["y"][:0].cast("int32")), "expected column 'y' of type int64"),
}


@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_tables_with_other_columns_are_refused(case, tmp_path):
    pq, (change, message) = optional("pyarrow.parquet"), OTHER_COLUMNS[case]
    pq.write_table(table_of(X, Y), tmp_path / "a.parquet")
    pq.write_table(change(table_of(X, Y)), tmp_path / "b.parquet")
    with pytest.raises(FORMAT, match=message):
        sources.files(tmp_path, label="y")


def test_columns_may_be_in_another_order_and_others_be_unread(tmp_path):
    pq, made = optional("pyarrow.parquet"), table_of(X, Y)
    pq.write_table(made, tmp_path / "a.parquet")
    pq.write_table(made.select(["y", "c2", "c0", "c1"]), tmp_path / "b.parquet")
    x, y = sources.files(tmp_path, label="y").read(np.array([3, N + 3]))
    assert np.array_equal(x, X[[3, 3]])
    assert y.tolist() == [Y[3]] * 2
    pq.write_table(made.append_column("more", made["y"]), tmp_path / "b.parquet")
    assert np.array_equal(sources.files(tmp_path, columns="c1").read(np.array([N + 3])), X[[3], 1])


def test_lists_of_another_length_in_another_file(tmp_path):
    put_lists(tmp_path / "a.parquet", X, Y)
    put_lists(tmp_path / "b.parquet", X[:, :2], Y)
    source = sources.files(tmp_path, columns="x")
    with pytest.raises(
        gb.DataFormatError, match=r"b\.parquet: expected lists of 3 numbers in column 'x', as in .*a\.parquet, found 2"
    ):
        list(Loader(source, batch_size=33, shuffle=False, backend="cpu"))


@every("name", FORMATS.keys(), ["npy", "parquet"])
def test_an_error_in_the_middle_names_file_and_row(name, tmp_path):
    suffix, put, _ = FORMATS[name]
    source = opened(written(tmp_path, name), name)
    bad = X[131:330].copy()
    bad[69, 1] = np.inf
    put(tmp_path / f"part-11{suffix}", bad, Y[131:330])
    source = opened(tmp_path, name)
    message = rf"sample 200 has inf at \[1\] \(row 69 of .*part-11{re.escape(suffix)}, file 3 of 4\)"
    for arguments in ({"shuffle": False}, {"window": 100}):
        with pytest.raises(gb.NonFiniteError, match=message):
            batches(source, **arguments)
    path = tmp_path / f"part-12{suffix}"
    source = opened(tmp_path, name)
    source.read(np.array([330]))
    path.write_bytes(path.read_bytes()[:300])
    source._parts[3].close()
    message = rf"part-12{re.escape(suffix)}: expected the file that was opened first"
    with pytest.raises(FORMAT, match=message) as caught:
        source.read(np.arange(N - 1, 328, -1))
    assert caught.value.__notes__ == [f"while reading rows 0 to 169 of {path}, file 4 of 4"]


def test_a_damaged_group_is_named(tmp_path):
    path = written(tmp_path, "parquet") / "part-11.parquet"
    column = optional("pyarrow.parquet").ParquetFile(path).metadata.row_group(2).column(0)
    start, data = column.dictionary_page_offset or column.data_page_offset, bytearray(path.read_bytes())
    data[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    loader = Loader(tmp_path, batch_size=33, shuffle=False, backend="cpu")
    message = r"part-11\.parquet: expected whole samples 100 to 149, found damage"
    with pytest.raises(FORMAT, match=message) as caught:
        list(loader)
    assert f"of {path}, file 3 of 4" in caught.value.__notes__[0]


# --- the order ------------------------------------------------------------------------------------------------------


@drawn(
    30,
    400,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    together=st.integers(1, 60),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**64 - 1),
    version=st.sampled_from([1, 2]),
)
def test_an_uneven_order_has_every_sample_once_and_every_block_in_one_piece(
    sizes, together, world, shuffle, seed, version
):
    bounds = np.cumsum([0, *sizes])
    n = int(bounds[-1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpubatch.loader.order, "LEAST", 8)
        uneven_order_is_whole(bounds, n, together, world, shuffle, seed, version)


def uneven_order_is_whole(bounds, n, together, world, shuffle, seed, version):
    ranks = [
        UnevenOrder(UnevenBlocks(bounds, of), of, together)
        for of in (EpochOf(seed, 3, shuffle, rank, world, None, version) for rank in range(min(world, n)))
    ]
    seen = np.concatenate([order.indices(0, len(range(rank, n, world))) for rank, order in enumerate(ranks)])
    if world <= n:
        assert np.array_equal(np.sort(seen), np.arange(n))
    if world == 1:
        order, read = ranks[0], []
        for window in range(len(order)):
            samples, images = order.part(window)
            samples, use = samples[:], images.between(0, len(samples))
            assert 0 < len(samples) <= together
            assert np.array_equal(np.sort(use), np.arange(len(samples)))
            assert np.array_equal(order.indices(len(read), len(read) + len(samples)), samples[use])
            read += samples.tolist()
        if not shuffle:
            assert read == list(range(n))
        # What is read is whole blocks, each of them from its first sample to its last.
        cuts = np.flatnonzero(np.diff(read) != 1) + 1
        assert {*np.array(read)[[0, *cuts]]} <= {*bounds[:-1]}


def test_samples_of_all_files_meet_in_a_batch(tmp_path):
    source = opened(written(tmp_path, "parquet", [*range(0, N + 1, 20)]), "parquet")
    order = np.concatenate([x[:, 0] for x, _ in batches(source, window=400)])
    first = np.unique(order[:100] // 20)
    assert len(first) > 8  # of 10 files in half a window
    assert np.any(np.diff(first) > 1)
    other = Loader(source, batch_size=33, seed=6, window=400, backend="cpu")
    assert not np.array_equal(order, np.concatenate([x[:, 0] for x, _ in other]))


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda f: put_parquet(f / "part-99.parquet", X[:9], Y[:9]),
        lambda f: (f / "part-8.parquet").unlink(),
        lambda f: put_parquet(f / "part-8.parquet", X[:130] + 1, Y[:130]),
        lambda f: os.utime(f / "part-8.parquet", ns=(0, 0)),
        lambda f: (f / "part-8.parquet").rename(f / "part-7.parquet"),
        lambda f: put_parquet(f / "part-9.parquet", X[:9], Y[:9]),  # which had no rows
    ],
    ids=["added", "removed", "changed", "touched", "renamed", "filled"],
)
def test_a_state_is_refused_where_files_are_others(change, tmp_path):
    written(tmp_path / "a", "parquet")
    loader = Loader(opened(tmp_path / "a", "parquet"), batch_size=33, window=200, backend="cpu")
    rest = iter(loader)
    for _ in range(7):
        next(rest)
    state = loader.state_dict()
    expected = [x.tobytes() for x, _ in rest]
    shutil.move(tmp_path / "a", tmp_path / "b")  # all together, with their times
    again = Loader(opened(tmp_path / "b", "parquet"), batch_size=33, window=200, backend="cpu")
    again.load_state_dict(state)
    assert [x.tobytes() for x, _ in again] == expected
    change(tmp_path / "b")
    other = Loader(opened(tmp_path / "b", "parquet"), batch_size=33, window=200, backend="cpu")
    with pytest.raises(gb.ArgumentError, match=r"state has other files, 4 files, \w+; this loader has \d files, \w+"):
        other.load_state_dict(state)


def test_a_run_over_files_goes_on_with_the_same_bits_or_is_refused(tmp_path):
    written(tmp_path / "data", "parquet")

    def run(folder, stop=None, **arguments):
        net = gb.mlp([3, 8, 7], backend="cpu", seed=1)
        loader = Loader(opened(tmp_path / "data", "parquet"), batch_size=20, window=150, scale=1 / N, backend="cpu")

        class Stop:
            def on_step(self, state):
                if state.step == stop:
                    raise KeyboardInterrupt

        store = gb.Checkpoints(tmp_path / folder, every=7)
        arguments |= {"checkpoint": store, "callbacks": [Stop()], "progress": False}
        with contextlib.suppress(KeyboardInterrupt):
            gb.fit(net, loader, gb.Adam(net.parameters), epochs=2, **arguments)
        return net.parameters.flat.tobytes()

    whole = run("a")
    assert run("b", stop=33) != whole
    assert run("b", resume=True) == whole
    run("c", stop=33)
    os.utime(tmp_path / "data/part-8.parquet", ns=(0, 0))
    with pytest.raises(gb.ArgumentError, match="cannot be resumed here: state has other files"):
        run("c", resume=True)


# --- threads, processes, memory -------------------------------------------------------------------------------------


def test_threads_and_loaders_share_a_source(tmp_path):
    source, wrong = opened(written(tmp_path, "parquet"), "parquet"), []

    def work(seed):
        for x, y in Loader(source, batch_size=7, window=120, seed=seed, backend="cpu"):
            numbers = x[:, 0].astype(int)
            if not (np.array_equal(x, X[numbers]) and np.array_equal(y, Y[numbers])):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@every("name", FORMATS.keys(), ["npy"])
def test_a_forked_child_reads_on(name, tmp_path):
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    source = opened(written(tmp_path, name), name)
    loader = Loader(source, *(() if name in LABELLED else (Y,)), batch_size=33, window=120, prefetch=0, backend="cpu")
    expected = [x.tobytes() for x, _ in loader]
    state = {**loader.state_dict(), "epoch": 0}
    if (child := os.fork()) == 0:
        status = 1
        with contextlib.suppress(BaseException):
            loader.load_state_dict(state)
            status = int([x.tobytes() for x, _ in loader] != expected)
        os._exit(status)
    loader.load_state_dict(state)
    assert [x.tobytes() for x, _ in loader] == expected
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "arguments", [{"window": 20_000}, {"window": 2000}, {"window": 10**6}, {"window": 70_000}], ids=str
)
def test_the_plan_has_what_a_folder_takes(arguments, tmp_path):
    pa, pq = optional("pyarrow"), optional("pyarrow.parquet")
    rng, n = np.random.default_rng(0), 0
    for k in range(12):
        rows = 7000 + 100 * k
        n += rows
        x = pa.FixedSizeListArray.from_arrays(rng.random(rows * 40).astype(np.float32), 40)
        pq.write_table(pa.table({"x": x, "y": np.arange(rows)}), tmp_path / f"{k}.parquet", row_group_size=3000)
    loader = Loader(sources.files(tmp_path, label="y"), batch_size=100, prefetch=0, backend="cpu", **arguments)
    deque(loader, maxlen=0)
    tracemalloc.start()
    try:
        deque(loader, maxlen=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.99 * peak - 60_000 < loader.plan.needed < 1.2 * peak + 2 * 3000 * 168 + 60_000, (
        loader.plan
    )  # Arrow's is not traced


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a limit on address space is Linux's")
def test_a_run_over_a_folder_that_is_larger_than_memory_decodes_each_group_once(tmp_path):
    """The script that measures a folder of 6 GB checks what is read and decoded; here it reads one of 0.7 GB."""
    optional("pyarrow.parquet")
    script = Path(__file__).parent.parent / "bench" / "folder.py"
    small = ["--gigabytes", "0.7", "--files", "7", "--limit", "700 MB", "--window", "64 MiB", "--rounds", "1"]
    command = [sys.executable, script, *small, "--folder", tmp_path, "--out", tmp_path / "out.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["row_groups"] == 7 * 10
    assert found["runs"]["trained"]["peak"] < 700e6 < found["bytes"]
    assert found["trained"]["loss"] < 2.0
    refused = subprocess.run([*map(str, command), "--limit", "10 MB"], capture_output=True, text=True)
    assert refused.returncode == 1
    assert "failed" in refused.stderr
