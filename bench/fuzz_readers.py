"""Fuzz all readers of gpubatch with damaged files: ``python bench/fuzz_readers.py --inputs 50000``.

Inputs are small valid files with random changes: bits flipped, bytes cut off, added, or moved within and between files,
numbers in headers set to 0, -1, 2^31, 2^40, 2^63, words of JSON replaced. Each input is read to its end, through a
loader if the reader returns a source. A folder has three files, of which the second one is damaged. For checkpoints,
the table has one row with the checksum of the damaged bytes in the file's name, and one with the original checksum.
A checkpoint's history is a file beside it, which may also be absent, or a folder, a link or a pipe in its place; it has
a row with the checkpoint's own digest, one where the digest is that of the damaged bytes, and one for the damaged words
by which the checkpoint refers to it. The numbers must be those that were saved, or NaN, of which a warning tells.
Tables are read in memory and streamed, from standard input, and what is no table is given in place of one.
Models have a row for whole files, one where their digest is taken as right, and one for their JSON alone, which is
damaged before it becomes a part of the header. An input depends only on its number and ``--seed``:
``--reader npy --first 812 --inputs 1`` repeats one.

A reader may read the file, or raise a documented error: ``GpubatchError`` or ``OSError``. Anything else, warnings
included, is undocumented: it is counted, its traceback is printed, and the exit status is 1. This includes

- ``MemoryError``: on Linux the address space is limited to ``BOUND`` above that for the undamaged files, so a header
  that claims 2^40 rows must be refused before memory is allocated;
- more than ``MOST_SECONDS`` of processor time for one input: a suspended or busy machine does not count;
- Python opening a file outside the input's folder, except modules and the system's memory statistics.

Each reader runs in its own process. If a C library crashes, that counts as a crash, and the next input goes to a new
process. Files that a C library opens by itself are not watched.
"""

from __future__ import annotations

import argparse
import bz2
import collections
import contextlib
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import os
import platform
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import gpubatch as gb
from gpubatch import checkpoint, datasets, model, series, sources, tables

BOUND = 64 << 20  # bytes of address space
MOST_SECONDS = 20.0  # of processor time for one input, on a machine where most take 0.01
PROCESS = 1000  # inputs of one process: pyarrow keeps some 10 KB for a damaged packed file, for ever
DOCUMENTED = (gb.GpubatchError, OSError)
NUMBERS = [0, 1, -1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
WORDS = [b"null", b"true", b"[]", b"{}", b'""', b"1e999", b"NaN", b"[" * 2000, b"9" * 5000, b"0.5", b"(", b"'O'"]
WORD = re.compile(
    rb"\"[^\"]{0,40}\"|'[^']{0,40}'|-?\d+|\[[^\[\]]{0,40}\]|\([^()]{0,40}\)|\{[^{}]{0,40}\}|null|true|False"
)


# --- damage --------------------------------------------------------------------------------------------------------


def damaged(seeds: list[bytes], draw: random.Random) -> tuple[bytes, bytes]:
    """One of the files, and a copy with one to four changes."""
    original = draw.choice(seeds)
    data = bytearray(original)
    for _ in range(draw.choice([1, 1, 1, 2, 3, 4])):
        draw.choice(CHANGES)(data, draw, seeds)
    return original, bytes(data)


def place(data: bytearray, draw: random.Random) -> int:
    """A random position in the file; two times in three near its start or end, where the headers are."""
    near = min(len(data), 128)
    return draw.choice([draw.randrange(len(data) + 1), draw.randrange(near + 1), len(data) - draw.randrange(near + 1)])


def flip(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    for _ in range(draw.choice([1, 1, 2, 8])):
        if (at := place(data, draw)) < len(data):
            data[at] ^= 1 << draw.randrange(8)


def cut(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    del data[place(data, draw) :]


def leave_out(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    at = place(data, draw)
    del data[at : at + draw.choice([1, 2, 4, 8, 64])]


def grow(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    at, size = draw.choice([len(data), place(data, draw)]), draw.choice([1, 4, 8, 100, 5000])
    data[at:at] = draw.choice([bytes(size), draw.randbytes(size)])


def splice(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    other = draw.choice(seeds)
    start, size = draw.randrange(len(other)), draw.choice([4, 16, 64, 512])
    at = place(data, draw)
    data[at : at + draw.choice([0, size])] = other[start : start + size]


def number(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    """Overwrite one to eight bytes by a number in either byte order, where a number may begin."""
    width = draw.choice([1, 2, 4, 8])
    at = place(data, draw) // draw.choice([1, width]) * draw.choice([1, width])
    value = draw.choice(NUMBERS) % 2 ** (8 * width)
    if at + width <= len(data):
        data[at : at + width] = value.to_bytes(width, draw.choice(["little", "big"]))


def word(data: bytearray, draw: random.Random, seeds: list[bytes]) -> None:
    """Replace a word of a text header by a number, by another word of the file, or by an unexpected word."""
    found = list(WORD.finditer(data, 0, 8192))
    if not found:
        return
    old = draw.choice(found)
    new = draw.choice([str(draw.choice([*NUMBERS, 10**30])).encode(), draw.choice(found)[0], draw.choice(WORDS)])
    data[old.start() : old.end()] = new


CHANGES = [flip, flip, cut, leave_out, grow, splice, number, number, word, word]


def header_repaired(width: int, at: int) -> Callable[[bytes, bytes], bytes]:
    """A function that corrects the header's length, ``width`` bytes at ``at``, by the growth of the file, usually."""

    def repaired(original: bytes, data: bytes) -> bytes:
        if len(data) < at + width or zlib.crc32(data) % 4 == 0:
            return data
        length = int.from_bytes(data[at : at + width], "little") + len(data) - len(original)
        return data[:at] + (length % 2 ** (8 * width)).to_bytes(width, "little") + data[at + width :]

    return repaired


# --- files and readers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """A reader: ``read(folder, data, original)`` writes ``data`` to a file and reads it.

    seeds: makes the undamaged files
    read: reads an input; raises an error for a damaged one
    repaired: may correct the damaged bytes, for instance a length in the header
    needs: the libraries that it needs, by comma
    """

    seeds: Callable[[], list[bytes]]
    read: Callable[[Path, bytes, bytes], Any]
    repaired: Callable[[bytes, bytes], bytes] = lambda original, data: data
    needs: str = "numpy"


def put(path: Path, data: bytes) -> Path:
    """Write a new file; HDF5 would confuse a rewritten file with the one that it still has open."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def through_a_loader(source: Any) -> None:
    for _ in gb.Loader(source, batch_size=5, backend="cpu", prefetch=0):
        pass


def idx_files() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for code, kind in datasets.IDX_TYPES.items():
        for shape in ((12,), (7, 5), (6, 4, 3)):
            array = (100 * rng.random(shape)).astype(f">{kind}")
            files.append(struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape) + array.tobytes())
    return files


def idx_files_packed() -> list[bytes]:
    plain = idx_files()
    zeros = struct.pack(">BBBB2I", 0, 0, 8, 2, 1000, 1000) + bytes(10**6)
    return [gzip.compress(data, mtime=0) for data in [*plain, zeros]] + [
        gzip.compress(plain[0][:10], mtime=0) + gzip.compress(plain[0][10:], mtime=0)
    ]


def cifar_files() -> list[bytes]:
    rng = np.random.default_rng(0)
    records = rng.integers(0, 256, (3, 3073), dtype=np.uint8)
    records[:, 0] %= 10
    return [records[:n].tobytes() for n in (1, 2, 3)]


def cifar_folder(folder: Path, data: bytes, original: bytes) -> Path:
    for stem in ("data_batch_1", "data_batch_2", "data_batch_4", "data_batch_5", "test_batch"):
        if not (path := folder / f"{stem}.bin").exists():
            put(path, original)
    put(folder / "data_batch_3.bin", data)
    return folder


def read_cifar(folder: Path, data: bytes, original: bytes) -> Any:
    return datasets.cifar10(cifar_folder(folder, data, original), normalize=True)


def npy_files() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for kind in ("u1", "<f4", ">f8", "?", "<f2"):
        for shape in ((20,), (7, 5), (6, 4, 3)):
            for version in ((1, 0), (2, 0)):
                file = io.BytesIO()
                np.lib.format.write_array(file, (100 * rng.random(shape)).astype(kind), version)
                files.append(file.getvalue())
    return files


def repaired_npy(original: bytes, data: bytes) -> bytes:
    return header_repaired(2 if data[6:7] == b"\1" else 4, 8)(original, data)


def table() -> Any:
    import pyarrow as pa

    rng = np.random.default_rng(0)
    lists = pa.array(rng.standard_normal((24, 3)).astype(np.float32).tolist(), pa.list_(pa.float32()))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(rng.standard_normal(48)), 2)
    numbers = {"a": rng.standard_normal(24).astype(np.float32), "b": rng.standard_normal(24).astype(np.float32)}
    return pa.table({**numbers, "many": lists, "two": fixed, "y": rng.integers(0, 3, 24)})


def parquet_files() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for options in (
        {"compression": "none"},
        {"compression": "snappy"},
        {"compression": "zstd", "use_dictionary": True},
    ):
        file = pa.BufferOutputStream()
        pq.write_table(table(), file, row_group_size=10, **options)
        files.append(file.getvalue().to_pybytes())
    return files


def arrow_files(stream: bool = False) -> list[bytes]:
    import pyarrow as pa

    files = []
    for compression in (None, "lz4"):
        file = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression=compression)
        with (pa.ipc.new_stream if stream else pa.ipc.new_file)(file, table().schema, options=options) as writer:
            writer.write_table(table(), max_chunksize=10)
        files.append(file.getvalue().to_pybytes())
    return files


def read_table(open_source: Callable[..., Any], folder: Path, data: bytes) -> None:
    path = put(folder / "table", data)
    for columns in (["a", "b"], "many", "two"):
        through_a_loader(open_source(path, columns, label="y"))


def read_folder(folder: Path, suffix: str, data: bytes, original: bytes, *several: dict[str, Any]) -> None:
    """Read a folder of three files, of which the second is damaged, with each of ``several`` options."""
    for name, content in (("1", original), ("2", data), ("10", original)):
        put(folder / f"{name}{suffix}", content)
    for options in several:
        through_a_loader(sources.files(folder, **options))


def named_columns() -> Any:
    """A table with a column of each kind that ``gb.read_table`` takes."""
    import pyarrow as pa

    texts = pa.array(["p", None, 'q, "r"', "s\nt"] * 6)
    columns = {
        "x": [0.5, None, 2.5, 1e-3] * 6,
        "n": [1, 2, 3, None] * 6,
        "b": [True, False, None] * 8,
        "c": texts,
        "d": texts.dictionary_encode(),
        "y": ["yes", "no", "no", "perhaps"] * 6,
    }
    return pa.table(columns)


def csv_files() -> list[bytes]:
    import pyarrow as pa
    from pyarrow import csv

    pa.set_cpu_count(1)  # the stacks of ten threads alone are more than BOUND
    pa.set_io_thread_count(1)
    made = named_columns()
    files = []
    for delimiter in (",", ";"):
        memory = io.BytesIO()
        csv.write_csv(made.select(["x", "n", "b", "c", "y"]), memory, csv.WriteOptions(delimiter=delimiter))
        files.append(memory.getvalue())
    return [*files, files[0].replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + files[0], gzip.compress(files[0], mtime=0)]


def named_parquet_files() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = []
    for compression in ("none", "zstd"):
        file = pa.BufferOutputStream()
        pq.write_table(named_columns(), file, row_group_size=10, compression=compression)
        files.append(file.getvalue().to_pybytes())
    return files


def named_arrow_files() -> list[bytes]:
    import pyarrow as pa

    files = []
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        file = pa.BufferOutputStream()
        with new(file, named_columns().schema) as writer:
            writer.write_table(named_columns(), max_chunksize=10)
        files.append(file.getvalue().to_pybytes())
    return files


def other_files() -> list[bytes]:
    """What is given in place of tables, and CSV files as other programs write them."""
    rows = [f"{i},5;{'pq'[i % 2]};{['yes', 'no'][i % 3 > 0]}" for i in range(24)]
    words = [json.dumps({"x": i + 0.5, "y": ["yes", "no"][i % 2]}) for i in range(24)]
    texts = [
        "\n".join(["x;c;y", *rows, ""]),
        "\n".join(["x\tc\ty", *(row.replace(";", "\t") for row in rows), ""]),
        "\n".join(["zip,x,y", *(f"0{i % 3},{i},{'ab'[i % 2]}" for i in range(24)), ""]),
        f"[{', '.join(words)}]",
        "\n".join(words),
        "<!doctype html>\n<html><body>x,y</body></html>\n",
        "@relation x\n@attribute y numeric\n@data\n1\n",
    ]
    files = [text.encode() for text in texts]
    magic = [b"\x80\x04K\x01.", b"PK\x03\x04" + bytes(60), b"SQLite format 3\0" + bytes(60), b"\xfd7zXZ\0" + bytes(60)]
    packed = [bz2.compress(files[0]), lzma.compress(files[0])]
    return [*files, *magic, *packed, texts[0].encode("utf-16"), texts[0].replace("p", "\xe4").encode("latin-1")]


def read_piped(folder: Path, data: bytes, original: bytes) -> None:
    """Read a table from standard input, as the commands do."""
    from gpubatch.cli.arrays import Piped  # needs typer

    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(data))):
        piped = Piped("-")
    read_named_from(piped, (None,))


def read_named(folder: Path, data: bytes, original: bytes) -> None:
    """Read a table in memory and streamed, as :func:`read_named_from` does."""
    packed = data.startswith(tuple(tables.files.PACKED))
    read_named_from(put(folder / "table", data), (False,) if packed else (False, True))


def read_other(folder: Path, data: bytes, original: bytes) -> None:
    """The same of files that are refused even where they are not damaged."""
    with contextlib.suppress(*DOCUMENTED) if data == original else contextlib.nullcontext():
        read_named(folder, data, original)


def read_named_from(source: Any, streams: tuple[bool | None, ...]) -> None:
    """Read a table by its own numbers and by those of another; raise the last error."""
    last = None
    with warnings.catch_warnings(), mock.patch.object(tables.files, "PIECE", 100):
        warnings.simplefilter("ignore", gb.TableWarning)
        for options in ({"label": "y"}, {}, {"like": known_table()}):
            for stream in streams:
                try:
                    found = gb.read_table(source, stream=stream, **options)
                    repr(found)
                    for part in found.split(0.3):
                        if len(part):
                            part.as_source().read(np.arange(len(part)))
                    through_a_loader(found.as_source())
                except DOCUMENTED as error:
                    last = error
    try:
        if last is not None:
            raise last
    finally:
        del last  # which holds this frame, and what it opened


@functools.cache
def known_table() -> Any:
    return gb.read_table(named_columns().select(["x", "n", "b", "c", "y"]), label="y")


def hdf5_files() -> list[bytes]:
    import h5py

    files = []
    for options in (
        {},
        {"chunks": (5, 3), "compression": "gzip", "shuffle": True},
        {"chunks": (4, 3), "fletcher32": True},
    ):
        for version in ("earliest", "latest"):
            with io.BytesIO() as memory:
                with h5py.File(memory, "w", libver=version) as file:
                    file.create_dataset("x", data=np.arange(60, dtype=np.float32).reshape(20, 3), **options)
                    file["y"] = np.arange(20) % 3
                files.append(memory.getvalue())
    return files


@functools.cache
def checkpoint_files() -> list[bytes]:
    rng = np.random.default_rng(0)
    whole = {
        "number": 3,
        "nested": {"float": 0.5, "nothing": None, "list": [1, "two", {"three": 3.0}]},
        "arrays": {kind: (100 * rng.random((3, 5))).astype(kind) for kind in checkpoint.DTYPES},
        "many": {f"w{i}": rng.random((i % 3, 2)).astype(np.float32) for i in range(70)},  # one tensor and a table
        "empty": np.zeros((0, 4), np.float32),
    }
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for state in (whole, {"w": np.ones(3)}, {}):
            store = checkpoint.Checkpoints(folder)
            store.save(state)
            files.append(store.files()[-1].read_bytes())
    return files


def read_checkpoint(folder: Path, data: bytes, named_after: bytes) -> None:
    path = put(folder / f"checkpoint-000001-{hashlib.sha256(named_after).hexdigest()[:16]}.safetensors", data)
    try:
        if not isinstance(state := checkpoint.read(path), dict):
            raise TypeError(f"a state is a mapping, got {state!r}")
    finally:
        path.unlink()


NAMES = ("history.step_loss", "history.step_lr")


@functools.cache
def history_runs() -> list[tuple[str, bytes, bytes]]:
    """Of two runs the name of the newest checkpoint, the checkpoint, and the history in blocks of several saves."""
    found = []
    for seed in range(2):
        rng, numbers = np.random.default_rng(seed), [series.Series(), series.Series()]
        with tempfile.TemporaryDirectory() as folder:
            store = checkpoint.Checkpoints(folder)
            for count in (3, 1, 5):
                for one in numbers:
                    one.extend(rng.random(count))
                store.save({"history": dict(zip(("step_loss", "step_lr"), numbers, strict=True)), "w": np.ones(3)})
            (history,) = Path(folder).glob("history-*")
            found.append((store.files()[-1].name, store.files()[-1].read_bytes(), history.read_bytes()))
    return found


def history_files() -> list[bytes]:
    return [history for _, _, history in history_runs()]


def read_history(folder: Path, data: bytes, original: bytes) -> None:
    """Read the checkpoint of the run whose history is ``original``, with something else beside it."""
    runs = history_runs()
    number = [history for _, _, history in runs].index(original)
    (name, whole, _), other = runs[number], runs[1 - number][2]
    path, beside, aside = put(folder / name, whole), folder / "history-000001.f64", folder / "aside"
    form = zlib.crc32(data) % 16
    if form == 1:
        beside.mkdir()
    elif form == 2:
        os.mkfifo(beside)
    elif form == 3:
        beside.symlink_to(put(aside, data))
    elif form == 4:
        beside.symlink_to(aside)  # which is not there
    elif form == 5:
        put(beside, other)
    elif form == 6:
        put(beside, original + data)  # after the bytes that belong to the checkpoint
    elif form != 0:
        put(beside, data)
    try:
        right = form == 6 or (form not in (0, 1, 2, 4, 5) and data.startswith(original))
        judge(lambda: checkpoint.read(path)["history"], [*known_series(number)], right)
    finally:
        for one in (path, aside, beside):
            if one.is_dir():
                one.rmdir()
            else:
                one.unlink(missing_ok=True)


def known_series(number: int) -> list[series.Series]:
    """The numbers of a run."""
    rng, numbers = np.random.default_rng(number), [series.Series(), series.Series()]
    for count in (3, 1, 5):
        for one in numbers:
            one.extend(rng.random(count))
    return numbers


def judge(read: Callable[[], Any], known: list[series.Series], right: bool) -> None:
    """Raise DataFormatError for numbers that are NaN and were said to be; AssertionError for wrong ones."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = [list(one) for one in read().values()]
    if told:
        assert not right, told[0].message
        assert [warning.category for warning in told] == [gb.errors.CheckpointWarning], told
        assert all(np.isnan(one).all() for one in found), found
        raise gb.errors.DataFormatError(str(told[0].message))
    assert right, "the file is not what was saved"
    assert found == [list(one) for one in known], found


def read_history_with_any_digest(folder: Path, data: bytes, original: bytes) -> None:
    """Read blocks whose digest is right; counts that differ are what is left to tell damage by."""
    path = put(folder / "history-000001.f64", data)
    of = {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    reference = json.dumps({**of, "series": [[name, 9] for name in NAMES]})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, file = read_reference(folder / "checkpoint-000003", reference)
    assert [len(one) for one in found.values()] == [9, 9]
    assert (file is None) == bool(told)
    if told:
        raise gb.errors.DataFormatError(str(told[0].message))


def history_references() -> list[bytes]:
    history = history_files()[0]
    of = {"file": "history-000001.f64", "bytes": len(history), "sha256": hashlib.sha256(history).hexdigest()}
    whole = {**of, "series": [[name, 9] for name in NAMES]}
    return [json.dumps(whole).encode(), json.dumps(whole, indent=1).encode()]


def read_history_reference(folder: Path, data: bytes, _: bytes) -> None:
    """Read a history as damaged words say."""
    put(folder / "history-000001.f64", history_files()[0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, file = read_reference(folder / "checkpoint-000003", data.decode(errors="replace"))
    if told:
        raise gb.errors.DataFormatError(str(told[0].message))
    if file is not None:
        known = [list(one) for one in known_series(0)]
        assert [list(one) for one in found.values()] == known[: len(found)], found


def read_reference(path: Path, reference: str) -> Any:
    """What a checkpoint refers to; other words than a checkpoint has are damage of the checkpoint."""
    try:
        return series.read_series(path, reference)
    except checkpoint.UNREADABLE as error:
        raise gb.errors.DataFormatError(str(error)) from error


@gb.activation
def leaky_swish(x: Any, *, beta: float = 1.5, low: float = 0.0) -> Any:
    return np.where(x < -3, low, x / (1 + np.exp(-beta * x)))


@functools.cache
def model_files() -> list[bytes]:
    """Models with layers of each kind, a formula by its text, losses by name and by their arguments, a preparation."""
    X = np.zeros((4, 3), np.uint8)
    networks = [
        gb.Network([gb.Dense(3, 4), gb.BatchNorm(4), gb.Elementwise(leaky_swish), gb.Dense(4, 2)], backend="cpu"),
        gb.Network([gb.Dense(3, 2), gb.GELU("tanh"), gb.Dropout(0.2), gb.Dense(2, 1)], "mse", 0.1, "cpu", "float64"),
        gb.mlp([3, 2], loss=gb.SoftmaxCrossEntropy(ignore_label=5), backend="cpu"),
        gb.mlp([3, 2], backend="cpu"),
    ]
    loaders = [
        gb.Loader(X, backend="cpu", scale=1 / 255, prepare=np.sqrt),
        gb.Loader(X.T, backend="cpu", dtype="float64", sample_axis=1),
        None,
        gb.Loader(np.eye(3), backend="cpu", dtype="float32", prepare=gb.Standardize.of(np.eye(3))),
    ]
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for net, loader in zip(networks, loaders, strict=True):
            path = Path(folder) / "m.safetensors"
            gb.save(path, net, loader, ["yes", "no"] if net.loss_function.classifies else None)
            files.append(path.read_bytes())
        if importlib.util.find_spec("pyarrow"):
            for options in ({"label": "y"}, {"label": "x", "drop": "y"}):
                rows = named_columns().filter(named_columns()["x"].is_valid())
                kinds = {"c": "hash"}
                made = gb.read_table(rows, kinds=kinds, buckets=5, **options)
                gb.save(path, gb.mlp([made.features, made.outputs], loss=made.loss, backend="cpu"), made)
                files.append(path.read_bytes())
            frame = table().select(["a", "b"])
            gb.save(path, gb.mlp([2, 2], backend="cpu"), gb.Loader(frame, backend="cpu", dtype="float32"))
            files.append(path.read_bytes())
    return files


def read_model(path: Path) -> None:
    """Load a model and predict with it."""
    found = gb.load(path, backend="cpu")
    of = found.preparation
    if of is not None and of.table is not None:
        numeric = {"number": [1.5, None]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gb.TableWarning)
            found.predict({column.name: numeric.get(column.kind, ["p", "new"]) for column in of.table.columns})
        return
    shape = (2, *of.sample_shape) if of is not None else (2, found.net.inputs)
    raw = np.zeros(shape, found.net.dtype if of is None else of.dtype)
    found.predict(np.moveaxis(raw, 0, of.sample_axis) if of is not None else raw)


def read_with_any_digest(path: Path) -> None:
    """The same, whatever digest the file has."""
    with mock.patch.object(model.file, "digest_of", return_value=mock.ANY):
        read_model(path)


def model_texts() -> list[bytes]:
    """What the models say of themselves, as JSON."""
    found = []
    for data in model_files():
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        found.append(header["__metadata__"]["model"].encode())
    return found


def read_model_text(folder: Path, data: bytes, original: bytes) -> None:
    """Put a damaged text into the model that the undamaged one is of."""
    whole = model_files()[model_texts().index(original)]
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    header["__metadata__"]["model"] = data.decode(errors="replace")
    text = json.dumps(header).encode()
    path = put(folder / "m.safetensors", len(text).to_bytes(8, "little") + text + whole[8 + size :])
    read_with_any_digest(path)


COLUMNS = [{"columns": columns, "label": "y"} for columns in (["a", "b"], "many", "two")]
READERS = {
    "IDX": Reader(idx_files, lambda folder, data, _: datasets.read_idx(put(folder / "a.idx", data))),
    "IDX, gzip": Reader(idx_files_packed, lambda folder, data, _: datasets.read_idx(put(folder / "a.gz", data))),
    "IDX, by place": Reader(
        idx_files, lambda folder, data, _: through_a_loader(sources.idx(put(folder / "a.idx", data)))
    ),
    "CIFAR-10": Reader(cifar_files, read_cifar),
    "CIFAR-10, by place": Reader(
        cifar_files,
        lambda folder, data, original: through_a_loader(sources.cifar10(cifar_folder(folder, data, original))),
    ),
    "npy": Reader(
        npy_files, lambda folder, data, _: through_a_loader(sources.npy(put(folder / "a.npy", data))), repaired_npy
    ),
    "raw": Reader(
        lambda: [bytes(range(240)), bytes(24)],
        lambda folder, data, _: through_a_loader(sources.raw(put(folder / "a", data), (3, 2), "float32")),
    ),
    "checkpoint": Reader(checkpoint_files, lambda folder, data, original: read_checkpoint(folder, data, original)),
    "checkpoint, checksum right": Reader(
        checkpoint_files, lambda folder, data, _: read_checkpoint(folder, data, data), header_repaired(8, 0)
    ),
    "history": Reader(history_files, read_history),
    "history, digest right": Reader(history_files, read_history_with_any_digest),
    "history's reference": Reader(history_references, read_history_reference),
    "model": Reader(model_files, lambda folder, data, _: read_model(put(folder / "m.safetensors", data))),
    "model, digest right": Reader(
        model_files,
        lambda folder, data, _: read_with_any_digest(put(folder / "m.safetensors", data)),
        header_repaired(8, 0),
    ),
    "model's text": Reader(model_texts, read_model_text),
    "Parquet": Reader(
        parquet_files, lambda folder, data, _: read_table(sources.parquet, folder, data), needs="pyarrow"
    ),
    "Arrow": Reader(arrow_files, lambda folder, data, _: read_table(sources.arrow, folder, data), needs="pyarrow"),
    "Arrow stream": Reader(
        lambda: arrow_files(stream=True),
        lambda folder, data, _: read_table(sources.arrow, folder, data),
        needs="pyarrow",
    ),
    "folder of npy": Reader(
        npy_files, lambda folder, data, original: read_folder(folder, ".npy", data, original, {}), repaired_npy
    ),
    "folder of IDX": Reader(
        idx_files, lambda folder, data, original: read_folder(folder, "-idx2-ubyte", data, original, {})
    ),
    "folder of Parquet": Reader(
        parquet_files,
        lambda folder, data, original: read_folder(folder, ".parquet", data, original, *COLUMNS),
        needs="pyarrow",
    ),
    "folder of Arrow": Reader(
        lambda: [*arrow_files(), *arrow_files(stream=True)],
        lambda folder, data, original: read_folder(folder, ".arrow", data, original, *COLUMNS),
        needs="pyarrow",
    ),
    "folder of HDF5": Reader(
        hdf5_files,
        lambda folder, data, original: read_folder(folder, ".h5", data, original, {"dataset": "x", "label": "y"}),
        needs="h5py",
    ),
    "table, CSV": Reader(csv_files, read_named, needs="pyarrow"),
    "table, Parquet": Reader(named_parquet_files, read_named, needs="pyarrow"),
    "table, Arrow": Reader(named_arrow_files, read_named, needs="pyarrow"),
    "table, piped": Reader(
        lambda: [*csv_files(), *named_parquet_files(), *named_arrow_files()], read_piped, needs="pyarrow,typer"
    ),
    "table, others": Reader(other_files, read_other, needs="pyarrow"),
    "HDF5": Reader(
        hdf5_files,
        lambda folder, data, _: through_a_loader(sources.hdf5(put(folder / "a.h5", data), "x", "y")),
        needs="h5py",
    ),
}


# --- one process ---------------------------------------------------------------------------------------------------


class OutsideError(BaseException):
    """A file outside the folder is opened; a BaseException, so that no reader catches it."""


class Watch:
    """An audit hook: while ``folder`` is set, opening a file outside it raises OutsideError."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        modules = [sys.prefix, sys.base_prefix, os.path.dirname(gb.__file__), *filter(None, sys.path)]
        self.allowed = tuple(f"{path}{os.sep}" for path in ["/proc", "/sys", *modules])
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None or not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        # The first argument is a path; when renaming, so is the second.
        for path in arguments[: 1 if event == "open" else 2]:
            if isinstance(path, (str, bytes, os.PathLike)):
                name = os.path.realpath(os.fsdecode(path))
                if not f"{name}{os.sep}".startswith((f"{self.folder}{os.sep}", *self.allowed)):
                    raise OutsideError(f"{event} of {name}")


def work(name: str, seed: int, first: int, last: int, folder: Path) -> None:
    """Read inputs ``first`` to ``last``; print a line for each, and tracebacks to standard error."""
    warnings.simplefilter("error")
    reader, watch = READERS[name], Watch()
    seeds = reader.seeds()
    for data in seeds:
        reader.read(folder, data, data)
    limit_memory()
    print("ready", flush=True)
    for index in range(first, last):
        original, data = damaged(seeds, random.Random(f"{seed} {name} {index}"))
        data = reader.repaired(original, data)
        started, kind = time.process_time(), "read"
        try:
            watch.folder = folder
            reader.read(folder, data, original)
        except DOCUMENTED as error:
            kind = type(error).__name__
        except (Exception, OutsideError) as error:
            watch.folder = None
            kind = f"! {type(error).__name__}"
            print(f"\n--- {name}, input {index} of seed {seed}", file=sys.stderr)
            traceback.print_exc()
        watch.folder = None
        seconds = time.process_time() - started
        if seconds > MOST_SECONDS:
            kind = f"! slow ({kind})"
            print(f"\n--- {name}, input {index} of seed {seed}: {seconds:.1f} s", file=sys.stderr)
        print(f"{seconds:.4f} {kind}", flush=True)
    print(f"peak {peak()}", flush=True)


def limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError):
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BOUND, resource.getrlimit(resource.RLIMIT_AS)[1]))


def peak() -> int:
    """This process's peak memory in bytes, or 0 if unknown."""
    with contextlib.suppress(ImportError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


# --- all of them ---------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """The results of a reader: inputs by outcome, the slowest one and its processor time, the peak memory in bytes."""

    inputs: int
    kinds: collections.Counter[str]
    slowest: float
    slowest_input: int
    peak: int
    errors: str

    @property
    def undocumented(self) -> int:
        return sum(count for kind, count in self.kinds.items() if kind.startswith("!"))


def fuzz(name: str, inputs: int, seed: int = 0, first: int = 0) -> Found:
    """Run a reader on ``inputs`` inputs, in child processes."""
    found = Found(inputs, collections.Counter(), 0.0, first, 0, "")
    # The system's allocator and one thread: others reserve far more address space than they use.
    alone = {
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "GPUBATCH_JIT": "0",
    }
    end = first + inputs
    with tempfile.TemporaryDirectory() as folder:
        while first < end:
            command = [sys.executable, __file__, "--reader", name, "--seed", str(seed), "--work", folder]
            command += ["--first", str(first), "--inputs", str(min(end - first, PROCESS))]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **alone}, timeout=1200)
            found.errors += done.stderr
            ready, *lines = done.stdout.splitlines() or [""]
            if ready != "ready":
                raise RuntimeError(f"{name}: undamaged files could not be read\n{done.stderr}")
            for line in lines:
                value, kind = line.split(" ", 1)
                if value == "peak":
                    found.peak = max(found.peak, int(kind))
                    continue
                found.kinds[kind] += 1
                if float(value) > found.slowest:
                    found.slowest, found.slowest_input = float(value), first
                first += 1
            if done.returncode:
                found.kinds[f"! crash ({done.returncode})"] += 1
                found.errors += f"\n--- {name}, input {first} of seed {seed}: ended with {done.returncode}\n"
                first += 1
    return found


def missing(name: str) -> str | None:
    """A library that a reader needs, if not installed; otherwise None."""
    return next((need for need in READERS[name].needs.split(",") if importlib.util.find_spec(need) is None), None)


def main() -> int:
    """Run the readers, print and save; exit code 1 if an outcome was undocumented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=50_000, help="number of inputs for all readers together")
    parser.add_argument("--seed", type=int, default=0, help="seed of the changes")
    parser.add_argument("--reader", choices=READERS, help="run only this reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.reader, given.seed, given.first, given.first + given.inputs, given.work.resolve())
        return 0

    chosen = [given.reader] if given.reader else [name for name in READERS if not missing(name)]
    rows = {}
    print(f"| {'reader':26} | inputs | undocumented | slowest, CPU ms | peak, MiB | ends |\n|:--|--:|--:|--:|--:|:--|")
    for number, name in enumerate(chosen):
        share = given.inputs // len(chosen) + (number < given.inputs % len(chosen))
        rows[name] = found = fuzz(name, share, given.seed, given.first)
        ends = ", ".join(f"{kind} {count:,}" for kind, count in found.kinds.most_common())
        slowest, most = f"{1e3 * found.slowest:.0f}", found.peak >> 20
        print(f"| {name:26} | {share:,} | {found.undocumented} | {slowest} | {most} | {ends} |", flush=True)
        print(found.errors[:5000], file=sys.stderr, end="")
    total = sum(found.undocumented for found in rows.values())
    print(f"\n{sum(found.inputs for found in rows.values()):,} inputs, {total} undocumented ends")
    for name in READERS if not given.reader else ():
        if library := missing(name):
            print(f"{name} is skipped: {library} is not installed")
    if given.out:
        results = {
            "date": date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
            "seed": given.seed,
            "bound_of_address_space": BOUND,
            "readers": {
                name: {
                    "inputs": found.inputs,
                    "undocumented": found.undocumented,
                    "ends": dict(found.kinds.most_common()),
                    "slowest_seconds": found.slowest,
                    "slowest_input": found.slowest_input,
                    "peak_bytes": found.peak,
                }
                for name, found in rows.items()
            },
        }
        given.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
