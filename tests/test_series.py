"""Numbers that grow with a run: lists in memory, appended to a file beside the checkpoints."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st

import gpubatch as gb
from gpubatch.checkpoint import Checkpoints, read
from gpubatch.errors import CheckpointWarning
from gpubatch.series import Series

numbers = st.floats(allow_nan=False, width=64)
slices = st.slices(6)
# What users do with a list: each is done to a list and to a series, and must do and give the same.
DONE = {
    "append": (numbers, lambda x, a: x.append(a)),
    "extend": (st.lists(numbers, max_size=3), lambda x, a: x.extend(a)),
    "extend by itself": (st.none(), lambda x, a: x.extend(x)),
    "+=": (st.lists(numbers, max_size=3), lambda x, a: x.__iadd__(a) is x),
    "insert": (st.tuples(st.integers(-7, 7), numbers), lambda x, a: x.insert(*a)),
    "set": (st.tuples(st.integers(-7, 7), numbers), lambda x, a: x.__setitem__(*a)),
    "set a slice": (st.tuples(slices, st.lists(numbers, max_size=3)), lambda x, a: x.__setitem__(*a)),
    "delete": (st.integers(-7, 7), lambda x, a: x.__delitem__(a)),
    "delete a slice": (slices, lambda x, a: x.__delitem__(a)),
    "pop": (st.none(), lambda x, a: x.pop()),
    "remove": (numbers, lambda x, a: x.remove(a)),
    "reverse": (st.none(), lambda x, a: x.reverse()),
    "clear": (st.none(), lambda x, a: x.clear()),
    "get": (st.integers(-7, 7), lambda x, a: x[a]),
    "slice": (slices, lambda x, a: x[a]),
    "add": (st.lists(numbers, max_size=3), lambda x, a: (x + a, a + x)),
    "iterate": (st.none(), lambda x, a: ([*x], list(reversed(x)), sorted(x), sum(x), len(x), bool(x))),
    "find": (numbers, lambda x, a: (a in x, x.count(a), x.index(a))),
    "copy": (st.none(), lambda x, a: (copy.copy(x), copy.deepcopy(x), pickle.loads(pickle.dumps(x)))),
    "show": (st.none(), lambda x, a: (repr(x), json.dumps(list(x)))),
}


def outcome(do: Any, x: Any, argument: Any) -> Any:
    try:
        return do(x, argument)
    except (IndexError, ValueError) as error:
        return type(error)


@settings(max_examples=60, deadline=None)
@example([1.0, 2.0], [("set a slice", (slice(None, None, 2), []))])
@given(
    st.lists(numbers, max_size=5),
    st.lists(st.sampled_from(sorted(DONE)).flatmap(lambda name: st.tuples(st.just(name), DONE[name][0])), max_size=8),
)
def test_a_series_is_a_list(start: list[float], done: list[tuple[str, Any]]) -> None:
    plain, series = list(start), Series(start)
    for name, argument in done:
        expected, found = outcome(DONE[name][1], plain, argument), outcome(DONE[name][1], series, argument)
        assert found == expected, name
        assert series == plain
        assert plain == series
    assert series.tolist() == plain
    assert np.asarray(series).tolist() == plain
    assert Series(plain) == series
    assert series != [*plain, 1.0]


def test_a_series_is_not_bound_by_what_was_made_of_it() -> None:
    series = Series([1, 2.5])
    array = np.asarray(series, np.float32)
    series.append(np.float32(3))
    assert (array.tolist(), series) == ([1, 2.5], [1, 2.5, 3])
    with pytest.raises(ValueError, match="copied"):
        np.asarray(series, copy=False)
    with pytest.raises(TypeError):
        series.extend([4.0, "five"])  # type: ignore[list-item]
    assert series == [1, 2.5, 3]


def test_a_history_takes_lists_and_gives_plain_ones() -> None:
    history = gb.History(step_loss=[1.0, 2.0], loss=[1.5])  # type: ignore[arg-type]
    history.step_loss.append(3.0)
    assert history == gb.History(step_loss=Series([1, 2, 3]), loss=[1.5])
    found = json.loads(json.dumps(history.to_dict()))
    assert (found["step_loss"], found["step_lr"], found["loss"]) == ([1.0, 2.0, 3.0], [], [1.5])


# --- the file ------------------------------------------------------------------------------------------------------


def history_of(folder: Path) -> Path:
    (found,) = folder.glob("history-*")
    return found


def numbers_of_newest(store: Checkpoints) -> dict[str, Any]:
    found = store.newest()
    assert found is not None
    return found[1]


def test_what_is_new_is_appended(tmp_path: Path) -> None:
    """Each save writes 16 bytes and the new numbers; the first file has all that was there by then."""
    store, a, b = Checkpoints(tmp_path), Series(range(1000)), Series()
    store.save({"a": a, "b": b})
    file = history_of(tmp_path)
    before = file.read_bytes()
    assert len(before) == 16 + 8 * 1000
    a.append(0.5)
    b.extend([1, 2])
    store.save({"a": a, "b": b})
    after = file.read_bytes()
    assert after.startswith(before)
    assert len(after) == len(before) + 16 + 8 + 16 + 16
    store.save({"a": a, "b": b})
    assert file.read_bytes() == after
    assert all(len(path.read_bytes()) < 2000 for path in store.files())
    assert read(store.files()[0]) == {"a": [*range(1000)], "b": []}
    assert read(store.files()[1]) == {"a": [*range(1000), 0.5], "b": [1, 2]}


def test_a_resumed_run_cuts_off_what_its_checkpoint_has_not(tmp_path: Path) -> None:
    store, series = Checkpoints(tmp_path), Series([1, 2])
    store.save({"x": series})
    series.extend([3, 4, 5])
    store.save({"x": series})
    store.files()[1].unlink()  # as if it was killed after the history was written
    resumed = Checkpoints(tmp_path)
    found = numbers_of_newest(resumed)["x"]
    assert found == [1, 2]
    found.append(7)
    resumed.save({"x": found})
    assert history_of(tmp_path).stat().st_size == 16 + 16 + 16 + 8
    assert numbers_of_newest(Checkpoints(tmp_path)) == {"x": [1, 2, 7]}
    found.append(8)
    resumed.save({"x": found})
    assert [read(path)["x"] for path in resumed.files()] == [[1, 2], [1, 2, 7], [1, 2, 7, 8]]


@pytest.mark.parametrize("edit", ["set", "replaced", "gone", "a new store"])
def test_what_no_longer_continues_the_file_gets_another(edit: str, tmp_path: Path) -> None:
    """The old file stays as long as a checkpoint needs it."""
    store, series = Checkpoints(tmp_path, keep=2), Series([1, 2, 3])
    store.save({"x": series})
    first, expected = history_of(tmp_path), [[1, 2, 3]]
    if edit == "set":
        series[0] = 9
    elif edit == "replaced":
        series = Series([9, 2, 3])
    elif edit == "gone":
        first.write_bytes(b"")
        expected = []
    else:
        store = Checkpoints(tmp_path, keep=2)
    store.save({"x": series})
    assert sorted(path.name for path in tmp_path.glob("history-*")) == ["history-000001.f64", "history-000002.f64"]
    if expected:
        assert [read(path)["x"] for path in store.files()] == [*expected, series]
    series.append(4)
    store.save({"x": series})
    assert history_of(tmp_path).name == "history-000002.f64"
    assert read(store.files()[-1])["x"] == series


@pytest.mark.parametrize("damage", ["not there", "short", "a bit", "a length", "a folder", "a pipe", "a link"])
def test_without_its_file_a_checkpoint_still_goes_on(damage: str, tmp_path: Path) -> None:
    store, series = Checkpoints(tmp_path), Series([1, 2, 3])
    store.save({"x": series, "w": np.ones(2)})
    file = history_of(tmp_path)
    data = bytearray(file.read_bytes())
    if damage == "a bit":
        data[-1] ^= 1
    if damage == "a length":
        data[8] = 200
    file.write_bytes(data[:-8] if damage == "short" else data)
    if damage in ("not there", "a folder", "a pipe", "a link"):
        file.unlink()
    if damage == "a folder":
        file.mkdir()
    if damage == "a pipe":
        os.mkfifo(file)
    if damage == "a link":
        file.symlink_to(tmp_path / "nowhere")
    with pytest.warns(
        CheckpointWarning, match=r"history-000001\.f64 for x, but that (is not|cannot).*are NaN up to here"
    ):
        found = numbers_of_newest(store := Checkpoints(tmp_path))
    assert np.isnan(found["x"]).tolist() == [True] * 3
    assert found["w"].tolist() == [1, 1]
    found["x"].append(4)
    store.save(found)
    assert np.array_equal(numbers_of_newest(Checkpoints(tmp_path))["x"], [np.nan] * 3 + [4], equal_nan=True)


def test_a_history_is_not_written_through_a_link(tmp_path: Path) -> None:
    """Neither a new one, nor what is appended to one."""
    store, series, other = Checkpoints(tmp_path / "run"), Series([1, 2, 3]), tmp_path / "other"
    other.write_bytes(b"of somebody else's" * 10)
    store.open()
    (tmp_path / "run" / "history-000001.f64").symlink_to(other)
    store.save({"x": series})
    file = history_of(tmp_path / "run")
    file.unlink()
    file.symlink_to(other)
    series.append(4)
    store.save({"x": series})
    assert other.read_bytes() == b"of somebody else's" * 10
    assert numbers_of_newest(Checkpoints(tmp_path / "run")) == {"x": [1, 2, 3, 4]}


def test_a_copied_run_goes_on_and_a_single_file_says_what_is_missing(tmp_path: Path) -> None:
    def train(folder: Path, epochs: int) -> gb.History:
        X, Y = np.random.default_rng(0).random((40, 3)), np.arange(40) % 2
        net = gb.mlp([3, 4, 2], backend="cpu", seed=0)
        loader = gb.Loader(X, Y, batch_size=4, backend="cpu")
        opt = gb.Adam(net.parameters, lr=gb.StepDecay(0.1, 0.5, 1, per="epoch"))
        return gb.fit(net, loader, opt, epochs, checkpoint=folder, resume=True, progress=False)

    whole = train(tmp_path / "whole", 6)
    train(tmp_path / "a", 3)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    resumed = train(tmp_path / "b", 6)
    assert (resumed.step_loss, resumed.step_lr, resumed.loss) == (whole.step_loss, whole.step_lr, whole.loss)
    (tmp_path / "c").mkdir()
    shutil.copy(max((tmp_path / "a").glob("checkpoint-*")), tmp_path / "c")
    with pytest.warns(CheckpointWarning, match=r"for history\.step_loss, history\.step_lr, but that is not beside it"):
        alone = train(tmp_path / "c", 6)
    assert np.isnan(alone.step_loss).tolist() == [True] * 30 + [False] * 30
    assert alone.step_loss[30:] == whole.step_loss[30:]
    assert alone.loss == whole.loss


CUT_OFF = """
import os, signal, sys
from gpubatch.checkpoint import Checkpoints
from gpubatch.series import Series
store, series = Checkpoints(sys.argv[1]), Series([1, 2])
store.save({"x": series})
series.append(3)
os.replace = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
store.save({"x": series})
"""


@pytest.mark.exhaustive
def test_a_kill_between_the_history_and_its_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CUT_OFF, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert history_of(tmp_path).stat().st_size == 16 + 16 + 16 + 8
    store = Checkpoints(tmp_path)
    series = numbers_of_newest(store)["x"]
    assert series == [1, 2]
    series.append(4)
    store.save({"x": series})
    assert numbers_of_newest(Checkpoints(tmp_path)) == {"x": [1, 2, 4]}


def full(*arguments: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_history_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, series = Checkpoints(tmp_path, on_failure="warn"), Series([1, 2])
    store.save({"x": series})
    series.append(3)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.warns(CheckpointWarning, match="no checkpoint could be written to .*: No space left"):
            assert store.save({"x": series}) is False
    series.append(4)
    assert store.save({"x": series})
    assert numbers_of_newest(Checkpoints(tmp_path)) == {"x": [1, 2, 3, 4]}


REFERENCE = {"file": "history-000001.f64", "bytes": 32, "sha256": "", "series": [["x", 2]]}


@pytest.mark.parametrize(
    "changed",
    [
        {"file": "../history-000001.f64"},
        {"file": 3},
        {"bytes": "32"},
        {"series": [["x", -1]]},
        {"series": [["x", 2**60]]},
        {"series": [["x", True]]},
        {"series": 3},
        {"series": [["x"]]},
    ],
    ids=str,
)
def test_a_strange_reference_is_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    metadata = {"format": "2", "state": '{"x": {"__series__": "x"}}', "series": json.dumps({**REFERENCE, **changed})}
    header = json.dumps({"__metadata__": metadata}).encode()
    content = len(header).to_bytes(8, "little") + header
    path = tmp_path / f"checkpoint-000001-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    path.write_bytes(content)
    with pytest.raises(gb.DataFormatError, match="is not a checkpoint"):
        read(path)
