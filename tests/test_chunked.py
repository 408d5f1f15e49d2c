"""Arrays that are read by chunks, zarr's, tensorstore's and h5py's, and Hugging Face's datasets, against NumPy's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing, peer

import gpubatch as gb
from gpubatch import sources
from gpubatch.errors import ArgumentError, DataFormatError, DTypeError
from gpubatch.sources import as_source

N, FEATURES, CHUNK = 1003, 6, 70
X = np.random.default_rng(0).normal(size=(N, FEATURES)).astype(np.float32)
Y = np.arange(N)


class Chunks:
    """An array that is read by slices, and counts how often each of its chunks is read."""

    def __init__(self, array: np.ndarray, chunk: int) -> None:
        self.array, self.shape, self.dtype, self.chunks = array, array.shape, array.dtype, (chunk, *array.shape[1:])
        self.times = np.zeros(-(-len(array) // chunk), int)

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.times[rows.start // self.chunks[0] : -(-rows.stop // self.chunks[0])] += 1
        return self.array[rows]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 70, 500, 2000])
@pytest.mark.parametrize("window", [4000, 301, 1003])
def test_each_chunk_is_read_once_an_epoch(window: int, chunk: int, shuffle: bool) -> None:
    """Where half a window holds at least one; another chunk would not be within the bound."""
    given = Chunks(X, chunk)
    loader = gb.Loader(given, Y, batch_size=33, window=window, shuffle=shuffle, seed=2, backend="cpu", prefetch=0)
    for _ in range(2):
        given.times[:] = 0
        seen = np.concatenate([x for x, _ in loader])
        assert np.array_equal(seen[np.lexsort(seen.T)], X[np.lexsort(X.T)])
        if min(chunk, N) <= min(window, N) // 2:
            assert set(given.times.tolist()) <= {0, 1}  # 0: the last that was read before
            assert (given.times == 0).sum() <= 1


@pytest.mark.parametrize("error", [RuntimeError("Zstd error"), ValueError("bad chunk"), KeyError("c/3"), EOFError()])
def test_a_chunk_that_its_library_cannot_read_is_an_error_with_the_place(error: Exception) -> None:
    class Damaged(Chunks):
        def __getitem__(self, rows: slice) -> np.ndarray:
            if rows.start <= 200 < rows.stop:
                raise error
            return super().__getitem__(rows)

    with pytest.raises(
        DataFormatError, match=r"samples 1\d\d to \d+: an array of test_chunked could not read"
    ) as found:
        list(gb.Loader(Damaged(X, CHUNK), batch_size=50, backend="cpu"))
    assert found.value.__cause__ is error


def test_any_rows_in_any_order() -> None:
    rng = np.random.default_rng(1)
    for chunk in (1, 3, 70):
        source = as_source("X", Chunks(X, chunk))
        assert source is not None
        for index in (*(rng.integers(0, N, size) for size in (1, 5, 200)), np.arange(60, 300), np.arange(N)):
            assert np.array_equal(source.read(index), X[index])


def zarr_array(folder: Path, version: int, shards: tuple[int, int] | None = None) -> Any:
    made = peer("zarr").create_array(
        str(folder / f"x{version}"), shape=X.shape, chunks=(CHUNK, 4), shards=shards, dtype="f4", zarr_format=version
    )
    made[:] = X
    return made


def zarr_2(folder: Path) -> Any:
    return zarr_array(folder, 2)


def zarr_3(folder: Path) -> Any:
    return zarr_array(folder, 3)


def zarr_shards(folder: Path) -> Any:
    return zarr_array(folder, 3, (7 * CHUNK, 8))


def tensorstore_of(folder: Path) -> Any:
    tensorstore = peer("tensorstore")
    zarr_array(folder, 2)
    file = {"driver": "file", "path": str(folder / "x2")}
    return tensorstore.open({"driver": "zarr", "kvstore": file}).result()


def tensorstore_moved(folder: Path) -> Any:
    """Whose rows begin at 9."""
    return tensorstore_of(folder)[peer("tensorstore").d[0].translate_to[9]]


def h5py_dataset(folder: Path) -> Any:
    try:
        import h5py
    except ImportError:
        missing("data", "h5py is not installed (pip install 'gpubatch[data]')")
    return h5py.File(folder / "x.h5", "w").create_dataset("x", data=X, chunks=(CHUNK, 4))


KINDS = {made.__name__: made for made in (zarr_2, zarr_3, zarr_shards, tensorstore_of, tensorstore_moved, h5py_dataset)}


@every("kind", KINDS, ["zarr_3", "tensorstore_moved"])
@pytest.mark.parametrize("options", [{"window": 300}, {"shuffle": False, "window": 300}], ids=str)
def test_batches_are_those_of_the_array(kind: Any, options: dict[str, Any], tmp_path: Path) -> None:
    options = {"batch_size": 33, "seed": 2, "backend": "cpu", **options}
    loader = gb.Loader(kind(tmp_path), Y, **options)
    assert loader.block % CHUNK == 0
    expected = list(gb.Loader(Chunks(X, CHUNK), Y, **options))
    for batch, other in zip(loader, expected, strict=True):
        assert all(one.tobytes() == two.tobytes() for one, two in zip(batch, other, strict=True))
    if options.get("shuffle") is False:
        assert np.array_equal(np.concatenate([x for x, _ in expected]), X)


def test_a_run_and_its_validation(tmp_path: Path) -> None:
    """Trained on a chunked array, validated on it and predicted for it, as on the array in memory."""
    found = []
    for form in (lambda a: Chunks(a, CHUNK), np.asarray):
        net = gb.mlp([FEATURES, 8, 3], backend="cpu")
        loader = gb.Loader(form(X), Y % 3, batch_size=50, shuffle=False, backend="cpu")
        history = gb.fit(net, loader, gb.Adam(net.parameters), epochs=2, validation=(form(X), Y % 3), progress=False)
        found.append((history.step_loss, history.validation_loss, gb.Model(net, loader).predict(form(X)).tolist()))
    assert found[0] == found[1]


# --- Hugging Face ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One of several record batches, in a file that is mapped into memory."""
    datasets = peer("datasets")
    datasets.disable_progress_bars()
    folder = str(tmp_path_factory.mktemp("dataset"))
    columns = {f"c{i}": np.tile(X[:, i], 3) for i in range(FEATURES)}
    vectors = datasets.Sequence(datasets.Value("float32"))
    kinds = {**{name: datasets.Value("float32") for name in columns}, "v": vectors, "y": datasets.ClassLabel(7)}
    kinds |= {"words": datasets.Value("string")}
    rows = {**columns, "v": np.tile(X, (3, 1)), "y": np.arange(3 * N) % 7, "words": ["a"] * (3 * N)}
    datasets.Dataset.from_dict(rows, features=datasets.Features(kinds)).save_to_disk(folder)
    return datasets.load_from_disk(folder)


@pytest.mark.parametrize("columns", [[f"c{i}" for i in range(FEATURES)], "v"], ids=["columns", "lists"])
def test_rows_of_a_dataset_are_those_of_the_arrays(dataset: Any, columns: Any) -> None:
    source = sources.huggingface(dataset, columns, "y")
    batches = list(gb.Loader(source, batch_size=33, shuffle=False, backend="cpu"))
    assert np.array_equal(np.concatenate([x for x, _ in batches]), np.tile(X, (3, 1)))
    assert np.array_equal(np.concatenate([y for _, y in batches]), np.arange(3 * N) % 7)
    chosen = dataset.shuffle(seed=4).select(range(10, 2100))
    x, y = sources.huggingface(chosen, columns, "y").read(np.arange(2090)[::-1])
    assert np.array_equal(x, np.stack([chosen[f"c{i}"] for i in range(FEATURES)], 1).astype("f4")[::-1])
    assert np.array_equal(y, np.asarray(chosen["y"])[::-1])
    shuffled = gb.Loader(source, batch_size=33, window=1500, backend="cpu")
    assert sum(len(x) for x, _ in shuffled) == 3 * N


def test_what_is_no_dataset_of_rows_is_told(dataset: Any) -> None:
    datasets = peer("datasets")
    for given, message in (
        (dataset.to_iterable_dataset(), "got IterableDataset; it is streamed, and a loader needs rows by number"),
        (datasets.DatasetDict(train=dataset), r"got DatasetDict; give one of its parts, as dataset\['train'\]"),
        (X, "dataset must be a datasets.Dataset, got ndarray"),
    ):
        with pytest.raises(DTypeError, match=message):
            sources.huggingface(given)
    with pytest.raises(DTypeError, match=r"a Hugging Face Dataset; give gb.sources.huggingface\(X, columns, label\)"):
        gb.Loader(dataset, backend="cpu")
    with pytest.raises(DTypeError, match="column 'words' must hold numbers or lists of one length of numbers, got"):
        list(gb.Loader(sources.huggingface(dataset, "words"), backend="cpu"))
    with pytest.raises(ArgumentError, match=r"has the columns c0, .*; got 'z'"):
        sources.huggingface(dataset, "z")
    missing_one = datasets.Dataset.from_dict({"a": [1.0, None, 2.0]})
    with pytest.raises(DataFormatError, match="missing value in column 'a', sample 1"):
        list(gb.Loader(sources.huggingface(missing_one, "a"), backend="cpu"))
