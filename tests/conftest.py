"""Shared fixtures: backends, dtypes, and a random generator seeded by the test's name."""

from __future__ import annotations

import gc
import re
import zlib
from collections.abc import Generator, Iterator

import numpy as np
import pytest
from emulated_gpu.plugin import pytest_addoption, pytest_configure
from hypothesis import settings
from large_orders import from_64_on
from needs import missing
from stand_in import device_of

from gpubatch.backend import Backend, CudaBackend, available_backends, get_backend
from gpubatch.ops import products
from gpubatch.train import loop

__all__ = ["backend", "device", "dtype", "formula_cache", "rng", "small", "tolerance"]
__all__ += ["pytest_addoption", "pytest_configure"]

settings.register_profile("repeatable", derandomize=True, deadline=None)  # machines are busy
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what is collected out of Python's garbage collector: it took seconds to look at 20,000 tests each time."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param not in available_backends():
        missing("gpu", "no CUDA device can be used here")
    return get_backend(request.param)


@pytest.fixture(params=["stand-in", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> CudaBackend:
    return device_of(request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of 64 samples are large."""
    from_64_on(monkeypatch)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def tolerance(dtype: np.dtype) -> dict[str, float]:
    """Tolerances for results of a few hundred roundings; a GPU contracts a*b + c and flushes denormals."""
    return {"rtol": 64 * float(np.finfo(dtype).eps), "atol": 64 * float(np.finfo(dtype).eps)}


@pytest.fixture(autouse=True, scope="session")
def formula_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Formulas that tests declare are compiled to a cache of their own, also by the processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPUBATCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def few_steps() -> Iterator[None]:
    """The runs of tests may be short without a warning."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "FEW_STEPS", 0)
        yield


@pytest.fixture(autouse=True)
def small_workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrink cuBLASLt's workspace: the stand-in has one per device, and overwrites all of it in each product."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(products, "WORKSPACE", {False: 1 << 14, True: 1 << 15})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An address in a test's id differs between the processes of pytest-xdist, which then run nothing."""
    if named := [item.nodeid for item in items if re.search(r"0x[0-9a-f]{6,}", item.nodeid)]:
        raise pytest.UsageError(f"an address in the id of {named[0]}; give the parameter an id")
