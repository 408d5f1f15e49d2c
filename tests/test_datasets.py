"""Reading data sets: IDX files byte by byte, good and damaged, and the known facts of MNIST."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import re
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as hnp

from gpubatch import datasets
from gpubatch.datasets import cifar10, mnist, mnist_10k, read_idx
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError

CODES = {"uint8": 0x08, "int8": 0x09, "int16": 0x0B, "int32": 0x0C, "float32": 0x0D, "float64": 0x0E}
LETTERS = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "float32": "f", "float64": "d"}


def idx_bytes(array):
    """``array`` as an IDX file, written number by number with ``struct``."""
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, CODES[array.dtype.name], array.ndim, *array.shape)
    return header + struct.pack(f">{array.size}{LETTERS[array.dtype.name]}", *array.ravel().tolist())


def header(code, *shape):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape)


@pytest.fixture
def write(tmp_path):
    def write(content, name="file"):
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


# --- IDX ------------------------------------------------------------------------------------------------------------


def test_every_element_type_is_tried():
    assert sorted(CODES.values()) == sorted(datasets.IDX_TYPES)


@given(
    st.sampled_from(sorted(CODES)).flatmap(
        lambda name: hnp.arrays(name, hnp.array_shapes(min_dims=1, max_dims=5, min_side=0, max_side=5))
    ),
    st.booleans(),
)
def test_round_trip(tmp_path_factory, array, packed):
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx_bytes(array)) if packed else idx_bytes(array))
    found = read_idx(path)
    assert found.dtype == array.dtype
    assert found.dtype.isnative
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert found.flags.aligned
    np.testing.assert_array_equal(found, array)


def test_the_format_by_hand(write):
    # two shorts, 1 and -2, the high byte first
    path = write(bytes([0, 0, 0x0B, 1, 0, 0, 0, 2, 0, 1, 0xFF, 0xFE]))
    assert read_idx(path).tolist() == [1, -2]
    assert read_idx(str(path)).tolist() == [1, -2]
    assert read_idx(write(header(0x0E, 1) + bytes.fromhex("3ff8000000000000"))).tolist() == [1.5]


def test_gzip_is_told_by_content_not_by_name(write):
    content = idx_bytes(np.arange(6, dtype=np.int32).reshape(2, 3))
    assert read_idx(write(content, "plain.gz")).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert read_idx(write(gzip.compress(content), "packed.idx")).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("chunk", [1, 100, 2**20])
def test_gzip_of_several_members_and_with_padding(write, monkeypatch, chunk):
    monkeypatch.setattr(datasets, "CHUNK", chunk)
    content = idx_bytes(np.arange(1000, dtype=np.int16))
    for cut in (0, 1, 7, 8, 500, len(content)):
        members = gzip.compress(content[:cut]) + bytes(3) + gzip.compress(content[cut:])
        assert (read_idx(write(members + bytes(512))) == np.arange(1000)).all()


def test_more_than_one_chunk(write, monkeypatch, rng):
    array = rng.integers(0, 256, (100, 7), np.uint8)
    for chunk in (1, 2, 5, 64, 699, 700, 701):
        monkeypatch.setattr(datasets, "CHUNK", chunk)
        assert (read_idx(write(idx_bytes(array))) == array).all()
        assert (read_idx(write(gzip.compress(idx_bytes(array)))) == array).all()


WHOLE = header(0x08, 2, 3) + b"abcdef"
DAMAGED = {
    "empty": (b"", r"an IDX header of at least 8 bytes, found 0"),
    "three bytes": (WHOLE[:3], r"an IDX header of at least 8 bytes, found 3"),
    "cut in the sizes": (WHOLE[:9], r"an IDX header of 12 bytes for 2 dimensions, found 9"),
    "cut in the data": (WHOLE[:-1], r"shape \(2, 3\) and dtype uint8 needs 6 bytes of data, found 5"),
    "no data": (header(0x0E, 5), r"shape \(5,\) and dtype float64 needs 40 bytes of data, found 0"),
    "a byte too many": (WHOLE + b"!", r"needs 6 bytes of data, found (7|more)"),
    "wrong magic": (b"\x89PNG" + WHOLE, r"expected the magic number of IDX, 00 00 TYPE DIMENSIONS, found 89 50 4e 47"),
    "unknown type": (b"\0\0\x0a\1" + WHOLE[4:], r"element type out of 0x08, 0x09, 0x0b, 0x0c, 0x0d, 0x0e, found 0x0a"),
    "no dimensions": (b"\0\0\x08\0x", r"expected 1 to 64 dimensions, found 0"),
    "65 dimensions": (header(0x08, *[1] * 65) + b"x", r"expected 1 to 64 dimensions, found 65"),
    "2**40 rows": (header(0x08, 2**20, 2**20) + b"abc", r"needs 1099511627776 bytes of data, found 3"),
    "2**127 bytes": (header(0x08, *[2**31] * 4, 8) + b"abc", r"an array that fits into memory, found .*2147483648"),
    "nothing of 2**64": (header(0x08, 0, 2**32 - 1, 2**32 - 1), r"an array that fits into memory, found .*\(0, 4294"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(case, packed, write):
    content, message = DAMAGED[case]
    path = write(gzip.compress(content) if packed else content)
    tracemalloc.start()
    with pytest.raises(DataFormatError, match=message) as caught:
        read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert peak < 2**22


def test_every_cut_and_every_flipped_byte_of_a_gzip_file(write):
    array = np.arange(40, dtype=np.uint8)
    packed = gzip.compress(idx_bytes(array), mtime=0)
    for n in range(2, len(packed)):
        with pytest.raises(DataFormatError):
            read_idx(write(packed[:n]))
    # Except ten bytes of flags and date, and the byte before the checksum with its spare bits: these may change.
    for n in set(range(10, len(packed))) - {len(packed) - 9}:
        with pytest.raises(DataFormatError, match=r"file: "):
            read_idx(write(packed[:n] + bytes([packed[n] ^ 0x10]) + packed[n + 1 :]))
    with pytest.raises(DataFormatError, match=r"expected a whole gzip file, found a damaged one .*Not a gzipped file"):
        read_idx(write(packed + b"garbage"))
    with pytest.raises(DataFormatError, match=r"expected a whole gzip file, found a damaged one .*ended before"):
        read_idx(write(packed[:-1]))


def test_a_bomb_is_not_inflated(write):
    # 256 MiB of zeros behind a header that promises 10 bytes, in a file of 0.25 MB
    packer = zlib.compressobj(9, wbits=31)
    parts = [packer.compress(header(0x08, 10)), *(packer.compress(bytes(2**20)) for _ in range(256)), packer.flush()]
    path = write(b"".join(parts))
    assert path.stat().st_size < 300_000
    tracemalloc.start()
    with pytest.raises(DataFormatError, match="needs 10 bytes of data, found more"):
        read_idx(path)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_memory_of_a_gzip_file_is_that_of_the_array(write):
    size = 2**25
    path = write(gzip.compress(header(0x08, size) + bytes(size), 1))
    tracemalloc.start()
    array = read_idx(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert array.size == size
    assert peak < 1.25 * size  # a bytearray grows by an eighth


def test_a_missing_file_is_the_builtin_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.idx"):
        read_idx(tmp_path / "nowhere.idx")


# --- MNIST ----------------------------------------------------------------------------------------------------------

PARTS = {
    "train-images{}idx3-ubyte": np.arange(5 * 784, dtype=np.int64).astype(np.uint8).reshape(5, 28, 28),
    "train-labels{}idx1-ubyte": np.array([3, 0, 9, 9, 1], np.uint8),
    "t10k-images{}idx3-ubyte": np.full((2, 28, 28), 255, np.uint8),
    "t10k-labels{}idx1-ubyte": np.array([7, 2], np.uint8),
}


@pytest.fixture
def folder(tmp_path):
    for name, array in PARTS.items():
        (tmp_path / name.format("-")).write_bytes(idx_bytes(array))
    return tmp_path


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_mnist_under_all_its_names(tmp_path, mark, ending):
    for name, array in PARTS.items():
        content = idx_bytes(array)
        (tmp_path / (name.format(mark) + ending)).write_bytes(gzip.compress(content) if ending else content)
    for place in (tmp_path, str(tmp_path)):
        (X, y), (X_test, y_test) = mnist(place)
        assert (X.shape, X.dtype, y.shape, y.dtype) == ((5, 784), np.uint8, (5,), np.int64)
        np.testing.assert_array_equal(X, PARTS["train-images{}idx3-ubyte"].reshape(5, 784))
        assert y.tolist() == [3, 0, 9, 9, 1]
        assert (X_test == 255).all()
        assert X_test.shape == (2, 784)
        assert y_test.tolist() == [7, 2]


def test_forms(folder):
    (X, y), (X_test, y_test) = mnist(folder, normalize=True, one_hot=True, flatten=False)
    assert (X.shape, X.dtype, y.shape, y.dtype) == ((5, 28, 28), np.float32, (5, 10), np.float32)
    np.testing.assert_allclose(X, PARTS["train-images{}idx3-ubyte"] / 255, rtol=1e-7)
    assert X.max() == X_test.min() == 1.0
    assert y.argmax(1).tolist() == [3, 0, 9, 9, 1]
    assert (y.sum(1) == 1).all()
    assert (y.max(1) == 1).all()
    assert y_test.shape == (2, 10)


def test_a_missing_file_names_all_that_were_looked_for(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        mnist(folder)
    for name in ("t10k-labels-idx1-ubyte", "t10k-labels.idx1-ubyte"):
        assert f"{name}, {name}.gz" in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (
            "train-labels-idx1-ubyte",
            np.zeros(4, np.uint8),
            r"labels-idx1-ubyte: expected 5 integer labels, one for each image of train-images-.*found uint8 \(4,\)",
        ),
        ("train-labels-idx1-ubyte", np.zeros((5, 8), np.int32), r"expected 5 integer labels.*found int32 \(5, 8\)"),
        ("train-labels-idx1-ubyte", -np.ones(5, np.int8), r"expected labels from 0 on, found -1 at 0"),
        ("t10k-images-idx3-ubyte", np.zeros(784, np.uint8), r"images \(samples, height, width\), .*\(784,\)"),
        ("t10k-images-idx3-ubyte", np.zeros((2, 28, 28), np.int8), r"expected uint8 images .* found int8"),
    ],
    ids=["count", "label shape", "negative label", "image shape", "image type"],
)
def test_files_that_do_not_fit_each_other(folder, name, array, message):
    (folder / name).write_bytes(idx_bytes(array))
    with pytest.raises(DataFormatError, match=message):
        mnist(folder)


@pytest.mark.parametrize("load", [mnist, cifar10, lambda folder, **k: mnist_10k(**k)], ids=["mnist", "cifar10", "10k"])
@pytest.mark.parametrize("flag", ["normalize", "one_hot", "flatten"])
def test_flags_are_true_or_false(load, flag, folder):
    write_cifar(folder)
    with pytest.raises(DTypeError, match=f"{flag} must be True or False, got 1"):
        load(folder, **{flag: 1})


@pytest.mark.parametrize("load", [mnist, cifar10])
def test_a_folder_that_is_not_there(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder must be an existing folder, got '.*nowhere'"):
        load(tmp_path / "nowhere")


# --- the bundled digits -----------------------------------------------------------------------------------------------


def test_bundled_files_are_what_was_published():
    md5 = {
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    }
    for name, expected in md5.items():
        content = gzip.decompress((datasets.BUNDLED / f"{name}.gz").read_bytes())
        assert hashlib.md5(content, usedforsecurity=False).hexdigest() == expected
    notice = (datasets.BUNDLED / "README.md").read_text()
    for words in ("Yann LeCun", "Corinna Cortes", "Christopher J.C. Burges", "Share Alike 3.0", "NIST", *md5.values()):
        assert words in notice


def test_known_facts_of_the_bundled_digits():
    images = read_idx(datasets.BUNDLED / "t10k-images-idx3-ubyte.gz")
    labels = read_idx(datasets.BUNDLED / "t10k-labels-idx1-ubyte.gz")
    assert images.shape == (10_000, 28, 28)
    assert images.mean() == pytest.approx(33.79, abs=0.005)
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert labels[:5].tolist() == [7, 2, 1, 0, 4]


def rows(X, y):
    """Samples with their labels, in a form to compare and count."""
    return sorted(bytes([label]) + image.tobytes() for image, label in zip(X, y.tolist(), strict=True))


def test_split_of_the_bundled_digits():
    (X, y), (X_test, y_test) = mnist_10k()
    assert (X.shape, y.shape, X_test.shape, y_test.shape) == ((8000, 784), (8000,), (2000, 784), (2000,))
    assert (X.dtype, y.dtype) == (np.uint8, np.int64)
    images = read_idx(datasets.BUNDLED / "t10k-images-idx3-ubyte.gz").reshape(10_000, 784)
    labels = read_idx(datasets.BUNDLED / "t10k-labels-idx1-ubyte.gz")
    whole = rows(images, labels)
    assert len(set(whole)) == 10_000  # no two alike, so equal lists mean: every image once, in one part only
    assert sorted(rows(X, y) + rows(X_test, y_test)) == whole
    assert np.bincount(y_test, minlength=10).min() > 150
    (again, _), (_, y_again) = mnist_10k(seed=np.int64(0))
    assert (again == X).all()
    assert (y_again == y_test).all()
    for seed in (1, 2**64 - 1):
        assert not np.array_equal(mnist_10k(seed)[1][1], y_test)


def test_the_split_is_the_same_on_every_machine():
    # The first labels of both parts, and a checksum of all: a seed's split must not change between versions.
    (X, y), (X_test, y_test) = mnist_10k(seed=0)
    assert (y[:8].tolist(), y_test[:8].tolist()) == ([8, 4, 2, 6, 3, 5, 8, 3], [9, 6, 0, 5, 5, 2, 8, 7])
    assert zlib.crc32(X_test.tobytes(), zlib.crc32(X.tobytes())) == 0x4C529EE6


def test_forms_of_the_bundled_digits():
    (X, y), (X_test, _) = mnist_10k(3, normalize=True, one_hot=True, flatten=False)
    (plain, labels), _ = mnist_10k(3)
    assert (X.shape, X.dtype, X_test.shape) == ((8000, 28, 28), np.float32, (2000, 28, 28))
    assert (X.min(), X.max()) == (0.0, 1.0)
    np.testing.assert_allclose(X.reshape(8000, 784), plain / 255, rtol=1e-7)
    assert (y.argmax(1) == labels).all()


@pytest.mark.parametrize(("seed", "error"), [(-1, ArgumentError), (2**64, ArgumentError), (0.5, DTypeError)])
def test_bad_seeds(seed, error):
    with pytest.raises(error, match=f"seed must be an integer between 0 and 18446744073709551615, got {seed}"):
        mnist_10k(seed)


# --- CIFAR-10 -------------------------------------------------------------------------------------------------------


def write_cifar(folder, n=4):
    """Batch b, image i: label (b + i) % 10, red b, green i, blue a ramp."""
    for b, stem in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        ramp = bytes(range(256)) * 4
        images = (bytes([(b + i) % 10]) + bytes([b]) * 1024 + bytes([i]) * 1024 + ramp for i in range(n))
        (folder / f"{stem}.bin").write_bytes(b"".join(images))


@pytest.mark.parametrize("inner", [".", "cifar-10-batches-bin"])
def test_cifar10(tmp_path, inner):
    (tmp_path / inner).mkdir(exist_ok=True)
    write_cifar(tmp_path / inner)
    (X, y), (X_test, y_test) = cifar10(tmp_path)
    assert (X.shape, X.dtype, y.dtype) == ((20, 3072), np.uint8, np.int64)
    assert (X_test.shape, y_test.tolist()) == ((4, 3072), [5, 6, 7, 8])
    assert y.tolist() == [(b + i) % 10 for b in range(5) for i in range(4)]
    assert X[:, 0].tolist() == [b for b in range(5) for _ in range(4)]
    assert X[:, 1024].tolist() == [0, 1, 2, 3] * 5
    assert X[7, 2048:].tolist() == list(range(256)) * 4
    (images, one_hot), _ = cifar10(tmp_path, flatten=False, normalize=True, one_hot=True)
    assert (images.shape, images.dtype, one_hot.shape) == ((20, 3, 32, 32), np.float32, (20, 10))
    assert images[0, 2, 1, 5] == np.float32(37 / 255)
    assert X.flags.c_contiguous
    assert X.flags.writeable


def test_cifar10_python_version_is_refused_unread(tmp_path):
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("the pickle was run",)

    for place in (tmp_path, tmp_path / "cifar-10-batches-py"):
        place.mkdir(exist_ok=True)
        (place / "data_batch_1").write_bytes(pickle.dumps(Trap()))
        for folder in (tmp_path, place):
            with pytest.raises(DataFormatError, match=r"pickle; unpickling runs code .* take cifar-10-binary\.tar\.gz"):
                cifar10(folder)
        (place / "data_batch_1").unlink()


def test_cifar10_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data_batch_1.bin, .*test_batch.bin in .*cifar-10-binary"):
        cifar10(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_4.bin in"):
        cifar10(tmp_path)
    for content, message in [
        (b"", r"data_batch_4.bin: expected records of 3073 bytes, a label and an image, found 0 bytes"),
        (bytes(3073 + 3072), r"expected records of 3073 bytes.*found 6145 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), r"data_batch_4.bin: expected labels 0 to 9, found 10 at 1"),
    ]:
        (tmp_path / "data_batch_4.bin").write_bytes(content)
        with pytest.raises(DataFormatError, match=message):
            cifar10(tmp_path)


def write_idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def test_sets_in_mnist_s_format_may_have_other_names_sizes_and_labels(tmp_path: Path) -> None:
    """EMNIST's letters: labels from 1 to 26, the parts are train and test, and their names begin with the set's."""
    images = np.arange(2 * 5 * 4, dtype=np.uint8).reshape(2, 5, 4)
    for part in ("train", "test"):
        write_idx(tmp_path / f"emnist-letters-{part}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"emnist-letters-{part}-labels-idx1-ubyte", np.array([1, 26], np.uint8))
    (X, y), (X_test, y_test) = mnist(tmp_path)
    assert X.tolist() == X_test.tolist() == images.reshape(2, 20).tolist()
    assert y.tolist() == y_test.tolist() == [1, 26]
    one_hot = mnist(tmp_path, one_hot=True)[0][1]
    assert (one_hot.shape, one_hot.argmax(1).tolist()) == ((2, 27), [1, 26])
    write_idx(tmp_path / "emnist-digits-train-images-idx3-ubyte", images)
    assert datasets.mnist_sets(tmp_path) == ["emnist-digits", "emnist-letters"]
    name = re.escape(str(tmp_path / "emnist-digits"))
    with pytest.raises(DataFormatError, match=rf"one set, found emnist-digits, emnist-letters; name one, as {name}"):
        mnist(tmp_path)
    assert mnist(tmp_path / "emnist-letters")[0][1].tolist() == [1, 26]
    with pytest.raises(
        FileNotFoundError, match=r"no emnist-digits-train-labels in .*: looked for emnist-digits-train-l"
    ):
        mnist(tmp_path / "emnist-digits")
    with pytest.raises(FileNotFoundError, match="folder must be an existing folder"):
        mnist(tmp_path / "emnist-balanced")
    (tmp_path / "emnist-digits-train-images-idx3-ubyte").unlink()
    write_idx(tmp_path / "emnist-letters-test-images-idx3-ubyte", images[:, :3])
    with pytest.raises(DataFormatError, match=r"images of one size, found \(5, 4\) to train on, \(3, 4\) to test"):
        mnist(tmp_path)


def test_images_may_have_channels_and_labels_any_integer_type(tmp_path: Path) -> None:
    """A set in MNIST's format of colour images, with labels of 32 bits, as many sets are that people made."""
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), np.uint8)
    labels = np.array([0, 300, 7, 46, 0, 1], np.int32)
    for part, packed in (("train", True), ("t10k", False)):
        for what, array in (("images-idx4-ubyte", images), ("labels.idx1.int", labels)):
            content = idx_bytes(array)
            (tmp_path / f"{part}-{what}{'.gz' * packed}").write_bytes(gzip.compress(content) if packed else content)
    for (X, y), flatten in ((mnist(tmp_path)[0], True), (mnist(tmp_path, flatten=False)[1], False)):
        assert np.array_equal(X, images.reshape(6, -1) if flatten else images)
        assert (y.dtype, y.tolist()) == (np.int64, labels.tolist())
    assert mnist(tmp_path, one_hot=True)[0][1].shape == (6, 301)
