"""Data sets in files: IDX (MNIST and similar sets), CIFAR-10, and the 10,000 MNIST digits bundled with gpubatch.

Each loader returns ``(X_train, y_train), (X_test, y_test)``. X is uint8, y int64 (samples,). Its options:

normalize: X as float32 in [0, 1]
one_hot: y as float32 (samples, classes)
flatten: X as (samples, features); False: as images
"""

from __future__ import annotations

import gzip
import math
import os
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from gpubatch.errors import DataFormatError, check_bool, check_int, unexpected

__all__ = [
    "check_labels",
    "cifar10",
    "cifar10_records",
    "mnist",
    "mnist_10k",
    "mnist_sets",
    "read_idx",
    "read_idx_header",
]

Samples: TypeAlias = tuple[np.ndarray, np.ndarray]

IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: "i2", 0x0C: "i4", 0x0D: "f4", 0x0E: "f8"}
MAX_DIMENSIONS = 64  # of a NumPy array
GZIP_MAGIC = b"\x1f\x8b"
CHUNK = 1 << 20
CLASSES = 10
CIFAR_IMAGE = (3, 32, 32)
CIFAR_RECORD = 1 + math.prod(CIFAR_IMAGE)  # bytes: a label, and the image
CIFAR_PARTS = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
# What the files of a set in MNIST's format are called: the set's name, the part, and the format.
IDX_NAME = r"(?:(?P<set>.+?)-)?(?P<stem>(?:train|t10k|test)-(?:images|labels))[-.]idx\d[-.]\w+(?:\.gz)?"
BUNDLED = Path(__file__).parent / "data" / "mnist10k"


# --- IDX ----------------------------------------------------------------------------------------------------------


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """The array in an IDX file, plain or gzip (detected by content), in native byte order.

    Raises ``DataFormatError`` for any other file. Memory use is bounded by the data in the file, whatever its header
    claims. Format: https://yann.lecun.com/exdb/mnist/.
    """
    with open(path, "rb") as file:
        packed = file.read(2) == GZIP_MAGIC
        file.seek(0)
        read = gzip.GzipFile(fileobj=file).read if packed else file.read
        try:
            dtype, shape = read_idx_header(path, read)
            size = math.prod(shape) * dtype.itemsize
            promise = f"{path}: an IDX header of shape {shape} and dtype {dtype.name} needs {size} bytes of data"
            if not packed and (found := os.fstat(file.fileno()).st_size - file.tell()) != size:
                raise DataFormatError(f"{promise}, found {found}")
            data = _take(read, size)
            if len(data) < size:
                raise DataFormatError(f"{promise}, found {len(data)}")
            if read(1):
                raise DataFormatError(f"{promise}, found more")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise unexpected(path, "a whole gzip file", f"a damaged one ({error})") from error
    return np.frombuffer(data, dtype).astype(dtype.newbyteorder("="), copy=False).reshape(shape)


def read_idx_header(path: Any, read: Callable[[int], bytes]) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Read an IDX header: element type and shape; ``read(n)`` returns the next ``n`` bytes of the file."""
    magic = _take(read, 4)
    if len(magic) < 4:
        raise unexpected(path, "an IDX header of at least 8 bytes", len(magic))
    if magic[:2] != b"\0\0":
        raise unexpected(path, "the magic number of IDX, 00 00 TYPE DIMENSIONS", magic.hex(" "))
    kind, dimensions = magic[2], magic[3]
    if kind not in IDX_TYPES:
        known = ", ".join(f"0x{code:02x}" for code in IDX_TYPES)
        raise unexpected(path, f"an IDX element type out of {known}", f"0x{kind:02x}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise unexpected(path, f"1 to {MAX_DIMENSIONS} dimensions", dimensions)
    sizes = _take(read, 4 * dimensions)
    if len(sizes) < 4 * dimensions:
        raise unexpected(
            path, f"an IDX header of {4 + 4 * dimensions} bytes for {dimensions} dimensions", 4 + len(sizes)
        )
    dtype, shape = np.dtype(IDX_TYPES[kind]).newbyteorder(">"), tuple(np.frombuffer(sizes, ">u4").tolist())
    # As NumPy counts: an empty array must fit without its dimensions of size 0.
    if math.prod(n or 1 for n in shape) * dtype.itemsize > sys.maxsize:
        raise unexpected(path, "an array that fits into memory", f"an IDX header of shape {shape}")
    return dtype, shape


def _take(read: Callable[[int], bytes], size: int) -> bytearray:
    """The next ``size`` bytes, fewer at the end of the file; memory grows with the bytes read."""
    data = bytearray()
    while len(data) < size and (chunk := read(min(CHUNK, size - len(data)))):
        data += chunk
    return data


# --- the data sets ------------------------------------------------------------------------------------------------


def mnist(
    folder: str | os.PathLike[str], *, normalize: bool = False, one_hot: bool = False, flatten: bool = True
) -> tuple[Samples, Samples]:
    """MNIST, or a set in its format, from its four files in ``folder``, plain or gzip.

    Such sets are Fashion-MNIST, KMNIST, and those of EMNIST, whose names have more before "train" or "test". Where a
    folder has several, as EMNIST's has, ``folder`` is that folder and the name of one: "gzip/emnist-letters". X of
    MNIST is (60000, 784) and (10000, 784), or (samples, 28, 28). Other sets may have images of other sizes, also of
    several channels, and labels of any integer type; with ``one_hot`` y has a column for each label up to the largest.
    EMNIST stores an image's columns as rows; they are left so.
    """
    home, name = _named_set(folder)
    train, test = _mnist_part(home, name, "train"), _mnist_part(home, name, "t10k", "test")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise unexpected(home, "images of one size", f"{train[0].shape[1:]} to train on, {test[0].shape[1:]} to test")
    classes = max(CLASSES, *(int(labels.max()) + 1 for _, labels in (train, test)))
    options = normalize, one_hot, flatten
    return _prepare(*train, *options, classes=classes), _prepare(*test, *options, classes=classes)


def mnist_sets(folder: str | os.PathLike[str]) -> list[str]:
    """The names of the sets in MNIST's format that have files in ``folder``: what stands before "train", or ""."""
    found = (re.fullmatch(IDX_NAME, path.name) for path in _existing(folder).iterdir())
    return sorted({match["set"] or "" for match in found if match})


def mnist_10k(
    seed: int = 0, *, normalize: bool = False, one_hot: bool = False, flatten: bool = True
) -> tuple[Samples, Samples]:
    """The bundled 10,000 MNIST test images, split at random by ``seed`` into 8,000 for training and 2,000 for testing.

    X is (8000, 784) and (2000, 784), or (samples, 28, 28). Source and licence: ``gpubatch/data/mnist10k/README.md``.
    """
    seed = check_int("seed", seed, 0, 2**64 - 1)
    images, labels = _mnist_part(BUNDLED, "", "t10k")
    # NumPy guarantees the stream of a bit generator, not the results of Generator.permutation: sort random words.
    # Each word has its index in its low bits, so there are no ties.
    words, low = np.random.Philox(key=seed).random_raw(len(images)), np.uint64(2**14 - 1)
    order = np.sort(words & ~low | np.arange(len(images), dtype=np.uint64)) & low
    train, test = np.split(order.astype(np.int64), [8000])
    return (
        _prepare(images[train], labels[train], normalize, one_hot, flatten),
        _prepare(images[test], labels[test], normalize, one_hot, flatten),
    )


def cifar10(
    folder: str | os.PathLike[str], *, normalize: bool = False, one_hot: bool = False, flatten: bool = True
) -> tuple[Samples, Samples]:
    """CIFAR-10, binary version, from ``folder`` or its subfolder ``cifar-10-batches-bin``.

    X is (50000, 3072) and (10000, 3072), the red, green and blue planes in turn, or (samples, 3, 32, 32). The Python
    version is refused, because unpickling runs code. Format: https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    *train, test = (_cifar_batch(path) for path, _ in cifar10_records(folder, "train", "test"))
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return _prepare(images, labels, normalize, one_hot, flatten), _prepare(*test, normalize, one_hot, flatten)


def cifar10_records(folder: str | os.PathLike[str], *parts: str) -> list[tuple[Path, int]]:
    """The files of CIFAR-10's binary version and their numbers of records, without reading them.

    folder: as for :func:`cifar10`
    parts: "train", "test" or both
    """
    home = _existing(folder)
    inner = home / "cifar-10-batches-bin"
    home = inner if inner.is_dir() else home
    paths = [home / name for part in parts for name in CIFAR_PARTS[part]]
    if absent := [path.name for path in paths if not path.is_file()]:
        for pickled in (home / "data_batch_1", home / "cifar-10-batches-py" / "data_batch_1"):
            if pickled.is_file():
                raise unexpected(
                    pickled,
                    "the binary version of CIFAR-10",
                    "the Python version, a pickle; unpickling runs code from the file, so it is not read; take "
                    "cifar-10-binary.tar.gz instead",
                )
        raise FileNotFoundError(f"no {', '.join(absent)} in {home}; they come in cifar-10-binary.tar.gz")
    return [(path, _whole_records(path, path.stat().st_size)) for path in paths]


def _named_set(folder: str | os.PathLike[str]) -> tuple[Path, str]:
    """The folder of a set in MNIST's format, and the set's name; "" where its files have the names of MNIST's."""
    place = Path(os.path.expanduser(folder))
    if not place.is_dir() and place.parent.is_dir() and place.name in mnist_sets(place.parent):
        return place.parent, place.name
    sets = mnist_sets(folder)
    if len(sets) > 1 and "" not in sets:
        raise unexpected(
            place, "one set", f"{', '.join(sets)}; name one, as {place / sets[0]}, or give each a folder of its own"
        )
    return place, sets[0] if sets else ""


def _mnist_part(home: Path, name: str, *parts: str) -> Samples:
    image_path, label_path = (_find(home, name, [f"{part}-{what}" for part in parts]) for what in ("images", "labels"))
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.dtype != np.uint8 or images.ndim < 2 or images.size == 0:
        raise unexpected(image_path, "uint8 images (samples, height, width)", f"{images.dtype} {images.shape}")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise unexpected(
            label_path,
            f"{len(images)} integer labels, one for each image of {image_path.name}",
            f"{labels.dtype} {labels.shape}",
        )
    if (least := int(labels.min())) < 0:
        raise unexpected(label_path, "labels from 0 on", f"{least} at {int(labels.argmin())}")
    return images, labels


def _find(home: Path, name: str, stems: list[str]) -> Path:
    """The file of the set ``name`` that has one of these stems, unpacked where both are there."""
    named = {path.name: re.fullmatch(IDX_NAME, path.name) for path in home.iterdir() if path.is_file()}
    for stem in stems:
        if found := [file for file, m in named.items() if m and (m["set"] or "", m["stem"]) == (name, stem)]:
            return home / min(found)
    kind, before = f"idx{3 if 'images' in stems[0] else 1}-ubyte", f"{name}-" if name else ""
    looked = [f"{before}{stem}{mark}{kind}{packed}" for stem in stems for mark in "-." for packed in ("", ".gz")]
    raise FileNotFoundError(f"no {before}{stems[0]} in {home}: looked for {', '.join(looked)}")


def _cifar_batch(path: Path) -> Samples:
    data = np.fromfile(path, np.uint8)
    records = data.reshape(_whole_records(path, data.size), CIFAR_RECORD)
    check_labels(path, records[:, 0])
    return records[:, 1:].reshape(-1, *CIFAR_IMAGE), records[:, 0]


def _whole_records(path: Path, size: int) -> int:
    if size == 0 or size % CIFAR_RECORD:
        raise unexpected(path, f"records of {CIFAR_RECORD} bytes, a label and an image", f"{size} bytes")
    return size // CIFAR_RECORD


def check_labels(path: Any, labels: np.ndarray, places: np.ndarray | None = None) -> None:
    """Raise ``DataFormatError`` for the first label above 9, naming its index, or ``places[index]`` if given."""
    wrong = np.flatnonzero(labels >= CLASSES)
    if wrong.size:
        place = wrong[0] if places is None else places[wrong[0]]
        raise unexpected(path, f"labels 0 to {CLASSES - 1}", f"{labels[wrong[0]]} at {place}")


def _existing(folder: str | os.PathLike[str]) -> Path:
    home = Path(os.path.expanduser(folder))
    if not home.is_dir():
        raise FileNotFoundError(f"folder must be an existing folder, got {os.fspath(folder)!r}")
    return home


def _prepare(
    images: np.ndarray, labels: np.ndarray, normalize: bool, one_hot: bool, flatten: bool, classes: int = CLASSES
) -> Samples:
    samples = len(images)
    if check_bool("flatten", flatten):
        images = images.reshape(samples, math.prod(images.shape[1:]))
    if check_bool("normalize", normalize):
        images = np.divide(images, 255, dtype=np.float32)
    if check_bool("one_hot", one_hot):
        return images, np.eye(classes, dtype=np.float32)[labels]
    return images, labels.astype(np.int64)
