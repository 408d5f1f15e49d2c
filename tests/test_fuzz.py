"""Damaged files: bench/fuzz_readers.py on fewer inputs, and files that are made to do harm."""

from __future__ import annotations

import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from families import every

import gpubatch as gb
from gpubatch import sources

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import fuzz_readers

# 2,750 in all.
INPUTS = {
    "IDX": 150,
    "IDX, gzip": 150,
    "IDX, by place": 200,
    "CIFAR-10": 100,
    "CIFAR-10, by place": 100,
    "npy": 100,
    "raw": 100,
    "checkpoint": 100,
    "checkpoint, checksum right": 200,
    "history": 100,
    "history, digest right": 50,
    "history's reference": 50,
    "model": 200,
    "model, digest right": 100,
    "model's text": 100,
    "Parquet": 150,
    "Arrow": 150,
    "table, CSV": 50,
    "table, Parquet": 30,
    "table, Arrow": 20,
    "table, piped": 30,
    "table, others": 20,
    "HDF5": 100,
    "Arrow stream": 100,
    "folder of npy": 100,
    "folder of IDX": 50,
    "folder of Parquet": 50,
    "folder of Arrow": 50,
    "folder of HDF5": 50,
}
EXHAUSTIVE = {"history, digest right", "history's reference", "table, piped", "table, others"}


@every("name", INPUTS.keys(), INPUTS.keys() - EXHAUSTIVE)
def test_a_damaged_file_is_read_or_refused_with_a_documented_error(name: str) -> None:
    if library := fuzz_readers.missing(name):
        pytest.skip(f"{library} is not installed (pip install 'gpubatch[data]')")
    found = fuzz_readers.fuzz(name, INPUTS[name], seed=1)
    assert found.undocumented == 0, found.errors
    assert found.kinds.total() == INPUTS[name]
    assert found.kinds["read"] > 0, "no damage was small enough to get past the header"
    assert found.kinds["DataFormatError"] > 0


def test_every_reader_has_its_share() -> None:
    assert INPUTS.keys() == fuzz_readers.READERS.keys()
    assert sum(INPUTS.values()) == 2750


def test_an_input_is_a_function_of_its_seed() -> None:
    seeds = fuzz_readers.idx_files()

    def some(seed: int) -> list[bytes]:
        return [fuzz_readers.damaged(seeds, random.Random(f"{seed} {i}"))[1] for i in range(200)]

    assert some(1) == some(1)
    assert some(1) != some(2)
    assert len(set(some(1))) > 150


@pytest.mark.parametrize(
    ("what", "kind"),
    [
        ("raise KeyError('x')", "! KeyError"),
        ("raise gb.ShapeError('x')", "ShapeError"),
        ("np.empty(2 * BOUND, np.uint8)", "! MemoryError"),
        ("warnings.warn('x')", "! UserWarning"),
        ("Path('/etc/hostname').read_text()", "! OutsideError"),
        ("os.rename(folder / 'x', '/gpubatch')", "! OutsideError"),
        ("os.kill(os.getpid(), 9)", "! crash (-9)"),
        ("time.process_time = lambda began=time.process_time(): began + 2 * MOST_SECONDS", "! slow (read)"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="what ends a process, and where its files are, is Linux's")
def test_what_is_undocumented_is_found(what: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(fuzz_readers.__file__).read_text()
    damage = f"def read_cifar(folder, data, original):\n    if data != original:\n        {what}\n\n\ndef unused("
    (tmp_path / "fuzz_readers.py").write_text(script.replace("def read_cifar(", damage))
    monkeypatch.setattr(fuzz_readers, "__file__", str(tmp_path / "fuzz_readers.py"))
    found = fuzz_readers.fuzz("CIFAR-10", 3)
    assert found.kinds == Counter({kind: 3})
    assert found.undocumented == 3 * kind.startswith("!")


@pytest.mark.parametrize("rows", [2**31, 2**40, 2**63 - 1, 2**63, -1])
def test_an_npy_header_that_claims_too_much_is_refused(rows: int, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, 3), }}".encode()
    for size in (len(header), 2**32 - 1):
        path = tmp_path / "a.npy"
        path.write_bytes(b"\x93NUMPY\2\0" + size.to_bytes(4, "little") + header + bytes(120))
        with pytest.raises(gb.DataFormatError):
            sources.npy(path)


@pytest.mark.parametrize("how", ["a link", "its storage", "a virtual data set"])
def test_an_hdf5_file_leads_to_no_other_file(how: str, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    other, path = tmp_path / "other.h5", tmp_path / "a.h5"
    with h5py.File(other, "w") as file:
        file["x"] = np.ones((4, 3), np.float32)
    with h5py.File(path, "w") as file:
        if how == "a link":
            file["x"] = h5py.ExternalLink(str(other), "/x")
        elif how == "its storage":
            file.create_dataset("x", (4, 3), np.float32, external=[(str(other), 0, 48)])
        else:
            layout = h5py.VirtualLayout((4, 3), np.float32)
            layout[:] = h5py.VirtualSource(str(other), "x", (4, 3))
            file.create_virtual_dataset("x", layout)
    with pytest.raises(gb.DataFormatError, match="in another file"):
        sources.hdf5(path, "x")
