"""Checkpoints: whole or not at all, whatever happens to the program, the disk or the file."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from hypothesis import HealthCheck, given, settings, strategies as st
from needs import missing
from safetensors.numpy import load_file, save as safetensors_bytes

import gpubatch as gb
from gpubatch import checkpoint
from gpubatch.backend import Backend
from gpubatch.checkpoint import DTYPES, HEADER_LIMIT, Checkpoints, read
from gpubatch.errors import CheckpointError, CheckpointWarning
from gpubatch.own import live

FAULT_RUNS = Path(__file__).parent.parent / "bench" / "fault_runs.py"


def state(number: int = 0) -> dict[str, Any]:
    """A state with a value of every kind; each ``number`` gives another one."""
    rng = np.random.default_rng(number)
    return {
        "number": number,
        "nested": {"float": 0.1 + number, "nothing": None, "yes": True, "list": [1, "two", {"three": 3.0}]},
        "arrays": {kind: (100 * rng.random((3, 5))).astype(kind) for kind in DTYPES},
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5),
        "odd": [rng.random(7).astype(np.float32), rng.random(3)],
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def number_of_newest(store: Checkpoints) -> int:
    """The ``number`` of the newest state, after checking that it is as saved."""
    found = store.newest()
    assert found is not None
    assert same(found[1], state(found[1]["number"]))
    return found[1]["number"]


@pytest.fixture
def store(tmp_path: Path) -> Checkpoints:
    store = Checkpoints(tmp_path / "run" / "checkpoints")
    store.open()
    return store


# --- round trips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_a_state_comes_back_as_it_was(background: bool, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, background=background)
    store.open()
    assert store.newest() is None
    for number in range(3):
        assert store.save(state(number))
    assert store.wait()
    assert number_of_newest(store) == 2


def test_the_arrays_are_those_of_the_safetensors_library(store: Checkpoints) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    store.save(state())
    theirs = safetensors.load_file(store.files()[0])
    assert len(theirs) == len(DTYPES) + 4
    for name, array in state()["arrays"].items():
        assert same(theirs[f"arrays.{name}"], array)
    assert same(theirs["odd.0"], state()["odd"][0])


def test_the_file_says_what_wrote_it(store: Checkpoints) -> None:
    store.save(state())
    content = store.files()[0].read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    versions = json.loads(header["__metadata__"]["versions"])
    assert (versions["gpubatch"], versions["numpy"]) == (gb.__version__, np.__version__)
    assert set(header["__metadata__"]) == {"format", "state", "versions"}


def test_other_byte_orders_and_strides_are_stored_plainly(store: Checkpoints) -> None:
    x = np.arange(12.0).reshape(3, 4)
    store.save({"big": x.astype(">f8"), "transposed": x.T, "every other": x[:, ::2]})
    found = store.newest()
    assert found is not None
    for name, expected in (("big", x), ("transposed", x.T), ("every other", x[:, ::2])):
        assert found[1][name].dtype == np.float64
        np.testing.assert_array_equal(found[1][name], expected)


def test_the_name_has_the_checksum_and_the_last_ones_are_kept(store: Checkpoints) -> None:
    for number in range(5):
        store.save(state(number))
    assert [path.name[:17] for path in store.files()] == ["checkpoint-000003", "checkpoint-000004", "checkpoint-000005"]
    for path in store.files():
        with zipfile.ZipFile(store.folder / "zip", "w") as other:  # which has a CRC-32 of its own
            other.write(path)
        (entry,) = other.infolist()
        assert path.name.endswith(f"-{entry.CRC:08x}{entry.file_size:08x}.safetensors")
    (store.folder / "zip").unlink()
    assert sorted(store.folder.iterdir()) == store.files()


def test_other_files_in_the_folder_are_let_be(store: Checkpoints) -> None:
    names = ["notes.txt", "checkpoint-000009.safetensors", "checkpoint-000009-0123456789abcdef.safetensors.bak"]
    for name in names:
        (store.folder / name).write_text("mine")
    for number in range(5):
        store.save(state(number))
    assert number_of_newest(store) == 4
    assert all((store.folder / name).read_text() == "mine" for name in names)


def test_device_arrays_are_saved(backend: Backend, store: Checkpoints) -> None:
    x = np.arange(6, dtype=np.float32)
    store.save({"x": backend.asarray(x)})
    found = store.newest()
    assert found is not None
    assert same(found[1], {"x": x})


def test_a_checkpoint_is_as_readable_as_any_file(store: Checkpoints) -> None:
    store.save(state())
    (store.folder / "any").touch()
    assert store.files()[0].stat().st_mode == (store.folder / "any").stat().st_mode


# Two checkpoints of the run below, written at commit 79e6696: in the middle of its second epoch, and at its end.
MIDDLE, END = sorted((Path(__file__).parent / "golden").glob("checkpoint-*.safetensors"))


def old_network(made: str, backend: Any) -> gb.Network:
    """The network of that run, made in one of the ways that there are now."""
    common = {"l2": 1e-3, "dtype": "float64", "backend": backend, "seed": 3}
    if made == "of layers":
        layers = [gb.Dense(8, 7), gb.BatchNorm(7), gb.GELU(), gb.Dropout(0.1), gb.Dense(7, 3, init=0.5)]
        return gb.Network(layers, **common)
    return gb.mlp([8, 7, 3], "gelu", True, 0.1, init="v0.1" if made == "as in 0.1" else "auto", **common)


def test_an_older_network_with_a_bias_before_batch_norm_is_refused(tmp_path: Path) -> None:
    """Its parameters and optimizer state are other ones; the message says how to make the old network."""
    shutil.copy(MIDDLE, tmp_path)
    net = old_network("as mlp does now", "cpu")
    X, Y = np.zeros((96, 8)), np.zeros(96, int)
    loader = gb.Loader(X, Y, batch_size=16, dtype="float64", backend="cpu")
    before = net.parameters.flat.copy()
    message = r"biases before batch norm; make the network with gb.mlp\(..., init='v0.1'\), or Dense\(bias=True\)"
    with pytest.raises(gb.ArgumentError, match=message):
        gb.fit(net, loader, gb.Adam(net.parameters), 2, checkpoint=tmp_path, resume=True, progress=False)
    assert (net.parameters.flat == before).all()


@pytest.mark.parametrize("made", ["of layers", "as in 0.1"])
def test_a_run_of_an_older_gpubatch_goes_on(made: str, backend: Backend, tmp_path: Path) -> None:
    """How the first weights would be drawn now makes no difference."""
    shutil.copy(MIDDLE, tmp_path)
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(96, 8)), rng.integers(3, size=96)
    net = old_network(made, backend)
    loader = gb.Loader(X, Y, batch_size=16, seed=1, backend=backend, dtype="float64")
    opt = gb.Adam(net.parameters, lr=gb.CosineDecay(1e-2, total=12, per="step"), amsgrad=True)
    validation = backend.asarray(X[:20]), backend.asarray(Y[:20])
    checkpoints = Checkpoints(tmp_path, every=4)
    history = gb.fit(
        *(net, loader, opt), epochs=2, validation=validation, checkpoint=checkpoints, resume=True, progress=False
    )
    expected = read(END)
    assert opt.t == expected["optimizer"]["t"] == 12
    np.testing.assert_allclose(history.loss, expected["history"]["loss"], rtol=1e-9)
    for name, value in expected["network"]["parameters"].items():
        found = backend.to_numpy(net.parameters[name])
        np.testing.assert_allclose(found, value, rtol=1e-6, atol=1e-9, err_msg=name)


# --- torn and corrupt files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 1, 7, 8, 9, 100, -9, -8, -1])
def test_a_truncated_newest_one_is_passed_over(left: int, store: Checkpoints) -> None:
    for number in range(2):
        store.save(state(number))
    newest = store.files()[-1]
    newest.write_bytes(newest.read_bytes()[:left])
    with pytest.warns(CheckpointWarning, match=f"{re.escape(newest.name)} is torn or corrupt: .*skipped"):
        assert number_of_newest(store) == 0
    # The next one is newer than the bad one.
    store.save(state(7))
    assert number_of_newest(store) == 7


def test_a_flipped_bit_anywhere_is_seen(store: Checkpoints, rng: np.random.Generator) -> None:
    for number in range(2):
        store.save(state(number))
    newest = store.files()[-1]
    content = newest.read_bytes()
    for place in [0, 5, 8, 9, len(content) - 1, *rng.integers(len(content), size=60)]:
        wrong = bytearray(content)
        wrong[place] ^= 1 << int(rng.integers(8))
        newest.write_bytes(wrong)
        with pytest.warns(CheckpointWarning, match="torn or corrupt"):
            assert number_of_newest(store) == 0


def test_a_longer_file_is_seen(store: Checkpoints) -> None:
    store.save(state())
    with store.files()[0].open("ab") as file:
        file.write(b"\0")
    with pytest.raises(gb.DataFormatError, match="checksum"):
        read(store.files()[0])


def test_where_none_is_complete_it_says_so(store: Checkpoints) -> None:
    for number in range(2):
        store.save(state(number))
    for path in store.files():
        path.write_bytes(b"")
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(gb.DataFormatError, match=r"has no complete checkpoint: .*000002.*000001"),
    ):
        store.newest()


def signed(folder: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """Write a file with the right checksum and any content."""
    content = (len(header) if length is None else length).to_bytes(8, "little") + header + data
    path = folder / f"checkpoint-000001-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**40, HEADER_LIMIT + 1, 101])
def test_an_absurd_header_is_refused_before_memory_is_asked_for(length: int, tmp_path: Path) -> None:
    path = signed(tmp_path, b"{}" + 98 * b" ", length=length)
    if length == HEADER_LIMIT + 1:
        with path.open("r+b") as file:
            file.truncate(2 * HEADER_LIMIT)
    tracemalloc.start()
    try:
        with pytest.raises(gb.DataFormatError, match=f"a header of {length} bytes in a file of"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_run_is_saved_from_its_own_arrays(tmp_path: Path) -> None:
    """Neither the state nor the file is copied in memory; safetensors reads what was written."""
    net = gb.Network([gb.Dense(1000, 1000)], loss="mse", backend="cpu", seed=0)
    opt = gb.Adam(net.parameters)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"x": np.zeros(1)})
    tracemalloc.start()
    try:
        checkpoints.save({"network": live(net), "optimizer": live(opt)})
        assert tracemalloc.get_traced_memory()[1] < 1 << 20  # of 12 MB
    finally:
        tracemalloc.stop()
    found = load_file(checkpoints.files()[-1])
    assert np.array_equal(found["network.parameters.W1"], net.parameters["W1"])
    assert found["optimizer.state.m.W1"].shape == (1000, 1000)


def many(kind: str, count: int = 65) -> Any:
    """More arrays than have tensors of their own: of several shapes, some without elements."""
    rng = np.random.default_rng(count)
    shapes = [[(2, 3), (), (0, 4), (5,), (1, 1, 2)][i % 5] for i in range(count)]
    arrays = [rng.random(shape).astype(np.float32) for shape in shapes]
    if kind == "list":
        return arrays
    named = {f"w{i}" if i else 'a "name"\n': array for i, array in enumerate(arrays)}
    if kind == "mapping":
        return named
    return gb.Parameters(named, backend="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["mapping", "list", "views"])
def test_many_arrays_are_one_tensor(kind: str, store: Checkpoints) -> None:
    """And what has the same names and shapes, as optimizer state has, has the same table."""
    first, second = many(kind), many(kind)
    store.save({"network": first, "optimizer": {"m": second, "few": many("mapping", 64)}})
    theirs = load_file(store.files()[0])
    tables = ["tables.0.shapes"] if kind == "list" else ["tables.0.names", "tables.0.shapes"]
    assert sorted(name for name in theirs if ".few" not in name) == ["network", "optimizer.m", *tables]
    assert len(theirs) == 64 + 2 + len(tables)
    found = read(store.files()[0])
    assert isinstance(found["optimizer"]["few"], dict)
    for expected, got in ((first, found["network"]), (second, found["optimizer"]["m"])):
        assert same(got if kind == "list" else dict(got), expected if kind == "list" else dict(expected))


def test_arrays_of_several_types_or_with_others_have_tensors_of_their_own(store: Checkpoints) -> None:
    mixed = {**many("mapping"), "w1": np.arange(3)}
    store.save({"mixed": mixed, "other": [*many("list"), "text"]})
    assert same(read(store.files()[0]), {"mixed": mixed, "other": [*many("list"), "text"]})
    with pytest.raises(gb.DTypeError, match=r"m must hold real numbers to be saved, got dtype complex128"):
        store.save({"m": [np.zeros(2, complex)] * 65})
    with pytest.raises(gb.DTypeError, match=r"the keys of m must be text to be saved, got 0"):
        store.save({"m": dict(enumerate(many("list")))})


def packed(names: bytes = b'["a", "b"]', shapes: Sequence[int] = (1, 2, 2, 1, 3), flat: int = 5) -> tuple[bytes, bytes]:
    """The header and the data of a file with a packed tensor."""
    arrays = {"x": np.arange(flat, dtype=np.float32), "tables.0.shapes": np.array(shapes, np.int64)}
    arrays["tables.0.names"] = np.frombuffer(names, np.uint8)
    state = '{"x": {"__packed__": "x", "table": "tables.0"}}'
    content = safetensors_bytes(arrays, metadata={"format": "2", "state": state})
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


TABLES = {
    "names too few": {"names": b'["a"]'},
    "names twice": {"names": b'["a", "a"]'},
    "names of numbers": {"names": b"[1, 2]"},
    "names of lists": {"names": b"[[], []]"},
    "a number of names": {"names": b"2"},
    "no JSON": {"names": b"\xff"},
    "negative rows": {"shapes": (1, -2, 2, 1, 3)},
    "negative axes": {"shapes": (-1, 1, 5)},
    "more axes than there are": {"shapes": (1, 2, 3, 1, 3)},
    "other sizes": {"shapes": (1, 2, 2, 1, 4)},
    "huge sizes": {"shapes": (1, 2, 2, 2**62, 2**62)},
    "no rows of 2**62": {"shapes": (1, 5, 3, 0, 2**62, 2**62)},
}


@pytest.mark.parametrize("name", TABLES)
def test_a_strange_table_is_refused(name: str, tmp_path: Path) -> None:
    path = signed(tmp_path, *packed(**TABLES[name]))
    with pytest.raises(gb.DataFormatError, match=re.escape(f"{path} is not a checkpoint: ")):
        read(path)


def test_the_table_that_the_strange_ones_differ_from_is_read(tmp_path: Path) -> None:
    found = read(signed(tmp_path, *packed()))["x"]
    assert {name: array.tolist() for name, array in found.items()} == {"a": [0, 1], "b": [[2, 3, 4]]}


@pytest.mark.gpu
@pytest.mark.parametrize("background", [False, True])
def test_arrays_of_a_gpu_come_through_pinned_memory(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No copy on the device, whatever its size and kind; in the background training may go on at once."""
    if "cuda:0" not in gb.available_backends():
        missing("gpu", "no CUDA device can be used here")
    device = gb.get_backend("cuda:0")
    monkeypatch.setattr(checkpoint, "AT_ONCE", 1 << 12)
    net = gb.mlp([100, 70, 10], backend=device, seed=0)
    opt = gb.Adam(net.parameters)
    expected = device.to_numpy(net.parameters.flat).copy()
    pool = device.cupy.get_default_memory_pool()  # type: ignore[attr-defined]
    store = Checkpoints(tmp_path, background=background)
    device.free_unused()
    before, asked = pool.used_bytes(), []
    monkeypatch.setattr(type(device), "pinned", counted(type(device).pinned, asked))
    pool.set_limit(size=pool.total_bytes())  # there is no room for another array
    try:
        many = {str(i): net.parameters.flat[i : i + 3] for i in range(100)}
        store.save({"network": live(net), "optimizer": live(opt), "many": many})
        net.parameters.flat.fill(0)
        store.wait()
    finally:
        pool.set_limit(size=0)
    assert pool.used_bytes() == before
    assert max(asked) <= checkpoint.PINNED << 12
    found = read(store.files()[0])
    got = np.concatenate([found["network"]["parameters"][name].reshape(-1) for name in net.parameters])
    np.testing.assert_array_equal(got, expected)
    assert found["many"]["99"].tolist() == expected[99:102].tolist()
    assert not found["optimizer"]["state"]["m"]["W1"].any()


def counted(pinned: Any, asked: list[int]) -> Any:
    def call(self: Any, size: int, dtype: Any) -> Any:
        asked.append(size * dtype.itemsize)
        return pinned(self, size, dtype)

    return call


@pytest.mark.exhaustive
def test_a_hundred_thousand_arrays_are_saved_and_read(tmp_path: Path) -> None:
    """As many arrays as an optimizer of that many small parameters has."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"state": {f"w{i}": np.full(2, i, np.float32) for i in range(100_000)}})
    found = checkpoints.newest()
    assert found is not None
    assert len(found[1]["state"]) == 100_000
    assert found[1]["state"]["w99999"].tolist() == [99999, 99999]


def header(**changed: Any) -> dict[str, Any]:
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changed}
    return {"__metadata__": {"format": "1", "state": '{"x": {"__array__": "x"}}'}, "x": entry}


STRANGE = {
    "not JSON": b"{",
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "a deep list": 100_000 * b"[",
    "no metadata": {"x": header()["x"]},
    "another format": {**header(), "__metadata__": {"format": "3", "state": "{}"}},
    "metadata of text": {"__metadata__": "format 1"},
    "a state that is not JSON": {**header(), "__metadata__": {"format": "1", "state": "{"}},
    "an array that is not there": {**header(), "y": header()["x"], "x": 3},
    "an unknown dtype": header(dtype="F8"),
    "a dtype that is a list": header(dtype=["F32"]),
    "too many rows": header(shape=[2**40, 3]),
    "negative rows": header(shape=[-2, -3]),
    "true rows": header(shape=[True, 6]),
    "rows of text": header(shape="23"),
    "too many axes": header(shape=[2, 3, *([1] * 1000)]),
    "no rows of 2**62": header(shape=[2**62, 0], data_offsets=[0, 0]),
    "another shape": header(shape=[2, 2]),
    "offsets outside": header(data_offsets=[0, 2**60]),
    "offsets that overlap": {**header(), "y": header()["x"]},
    "offsets the wrong way": header(data_offsets=[24, 0]),
    "three offsets": header(data_offsets=[0, 12, 24]),
    "offsets that leave a hole": header(data_offsets=[4, 24], shape=[5]),
    "a number of 10,000 digits": b'{"__metadata__": ' + 10_000 * b"9" + b"}",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_header_is_refused(name: str, tmp_path: Path) -> None:
    strange = STRANGE[name]
    path = signed(tmp_path, strange if isinstance(strange, bytes) else json.dumps(strange).encode(), bytes(24))
    with pytest.raises(gb.DataFormatError, match=re.escape(f"{path} is not a checkpoint: ")):
        read(path)


def test_the_header_that_the_strange_ones_differ_from_is_read(tmp_path: Path) -> None:
    found = read(signed(tmp_path, json.dumps(header()).encode(), bytes(24)))
    assert same(found, {"x": np.zeros((2, 3), np.float32)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_a_file_gives_a_state_or_the_documented_error(data: st.DataObject, tmp_path: Path) -> None:
    """Valid files, changed in a few places, with the checksum corrected."""
    text = bytearray(json.dumps(header()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text)))
        text[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = signed(tmp_path, bytes(text), bytes(data.draw(st.sampled_from([24, 0, 25]))))
    try:
        assert isinstance(read(path), (dict, list, str, int, float, type(None)))
    except gb.DataFormatError:
        pass
    finally:
        path.unlink()


def test_a_file_of_another_name_is_not_read(store: Checkpoints) -> None:
    store.save(state())
    other = store.files()[0].rename(store.folder / "best.safetensors")
    with pytest.raises(gb.DataFormatError, match=r"its original name, checkpoint-NUMBER-CHECKSUM\.safetensors"):
        read(other)


# --- a disk that fails ---------------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Simulate a disk that is full after ``size`` bytes of a file, by the limit of ``ulimit -f``."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before(background: bool, tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, background=background)
    store.open()
    store.save(state(1))
    store.wait()
    with files_of_at_most(1000), pytest.raises(CheckpointError, match="File too large; the newest is") as raised:
        all([store.save(state(2)), store.wait()])  # in the background it is wait that raises
    assert isinstance(raised.value, OSError)
    assert sorted(tmp_path.iterdir()) == store.files()
    assert number_of_newest(store) == 1
    assert store.save(state(3))
    assert store.wait()
    assert number_of_newest(store) == 3


def test_the_program_may_choose_to_go_on(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, on_failure="warn")
    store.open()
    with files_of_at_most(1000), pytest.warns(CheckpointWarning, match="File too large; there is no earlier one"):
        assert store.save(state()) is False
    assert store.save(state())


def test_a_folder_that_vanishes(store: Checkpoints) -> None:
    store.save(state())
    shutil.rmtree(store.folder)
    with pytest.raises(CheckpointError, match=r"No such file or directory; the folder can no longer be read"):
        store.save(state())
    assert not store.folder.exists()  # not created again: it may be an unmounted disk


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(CheckpointError, match=r"checkpoints cannot be written to .*file"):
            Checkpoints(tmp_path / place).open()


def test_a_read_only_folder(store: Checkpoints) -> None:
    store.save(state(1))
    store.folder.chmod(0o500)
    try:
        if os.access(store.folder, os.W_OK):
            pytest.skip("this user may write to any folder")
        with pytest.raises(CheckpointError, match="Permission denied"):
            store.open()
        with pytest.raises(CheckpointError, match="Permission denied; the newest is checkpoint-000001"):
            store.save(state(2))
        assert number_of_newest(store) == 1
    finally:
        store.folder.chmod(0o700)


def test_other_errors_of_the_background_are_raised_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise MemoryError("no room")

    store = Checkpoints(tmp_path, background=True)
    store.open()
    monkeypatch.setattr(checkpoint, "_sync_folder", fail)
    store.save(state())
    with pytest.raises(MemoryError, match="no room"):
        store.save(state())


CUT_OFF = """
import os, signal, sys
import numpy as np
from gpubatch.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1])
store.open()
store.save({"number": 1, "x": np.zeros(1000)})
die = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
setattr(os, sys.argv[2], die)
store.save({"number": 2, "x": np.ones(1000)})
"""


@pytest.mark.parametrize(("call", "newest"), [("fsync", 1), ("replace", 1), ("open", 2)])
def test_a_kill_while_writing(call: str, newest: int, tmp_path: Path) -> None:
    """Between snapshot and rename, and between rename and sync (``os.open`` opens the folder)."""
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(tmp_path), call], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(tmp_path.glob("*.unfinished"))) == (newest == 1)
    store = Checkpoints(tmp_path)
    found = store.newest()
    assert found is not None
    assert found[1]["number"] == newest
    store.open()
    assert sorted(tmp_path.iterdir()) == store.files()


def test_numbers_of_numpy_are_numbers(store: Checkpoints) -> None:
    assert store.save({"best": np.argmin([3, 1, 2]), "loss": np.float32(0.5), "seen": np.bool_(True)})
    found = store.newest()
    assert found is not None
    assert found[1] == {"best": 1, "loss": 0.5, "seen": True}
    assert [type(value) for value in found[1].values()] == [int, float, bool]


def test_save_opens_a_new_folder(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "a" / "b")
    assert store.save({"number": 3})
    found = store.newest()
    assert found is not None
    assert found[1] == {"number": 3}


# --- errors --------------------------------------------------------------------------------------------------------

ERRORS = {
    "folder": (lambda: Checkpoints(3), TypeError, "the folder of checkpoints must be a path, got 3"),
    "every": (lambda: Checkpoints("x", every=0), ValueError, "every must be an integer >= 1, got 0"),
    "keep": (lambda: Checkpoints("x", keep=0), ValueError, "keep must be an integer >= 1, got 0"),
    "background": (lambda: Checkpoints("x", background=1), TypeError, "background must be True or False, got 1"),
    "on_failure": (
        lambda: Checkpoints("x", on_failure="stop"),
        ValueError,
        "on_failure must be one of 'raise', 'warn'",
    ),
    "object": (
        lambda: Checkpoints("x").save({"a": {"b": object()}}),
        TypeError,
        r"a\.b must be made of arrays, .*object",
    ),
    "dtype": (
        lambda: Checkpoints("x").save({"a": np.zeros(2, complex)}),
        TypeError,
        "a must hold real numbers.*complex",
    ),
    "a key that is no text": (
        lambda: Checkpoints("x").save({"best": {1: 0.5, "1": 0.7}}),
        TypeError,
        r"the keys of best must be text to be saved, got 1; use str\(key\)",
    ),
    "one name": (
        lambda: Checkpoints("x").save({"a": {"b": np.zeros(1)}, "a.b": np.ones(1)}),
        ValueError,
        r"two arrays of state would have the same name, 'a\.b'",
    ),
    "header": (
        lambda: Checkpoints("x").save({"a": "b" * (HEADER_LIMIT + 1)}),
        ValueError,
        f"state needs a header of .* bytes, more than {HEADER_LIMIT}",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert isinstance(raised.value, gb.GpubatchError)
    assert list(tmp_path.iterdir()) == []


def test_what_one_sees() -> None:
    assert repr(Checkpoints("runs/a", every=50)) == "<Checkpoints in 'runs/a', after every 50 steps, the last 3 kept>"
    assert repr(Checkpoints("a", keep=1)) == "<Checkpoints in 'a', after every epoch, the last 1 kept>"


# --- kills ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked here")
@every("kills", {"2": 2, "20": 20}, ["2"])
def test_runs_that_are_killed_end_as_one_that_is_not(kills: int, tmp_path: Path) -> None:
    """``bench/fault_runs.py`` with few kills, at random moments."""
    command = [sys.executable, str(FAULT_RUNS), "--kills", str(kills), "--out", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["kills"] == kills
    assert result["runs_that_differ"] == 0
    assert result["failed_resumes"] == 0
