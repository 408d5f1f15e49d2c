"""Choosing a device, saying why not, and what a backend does with arrays and memory."""

from __future__ import annotations

import importlib.machinery
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpubatch as gb
from gpubatch import backend as module
from gpubatch.backend import backend_of, float_dtype
from gpubatch.main_memory import main_memory


class CUDARuntimeError(RuntimeError):
    pass


def fake_cupy(driver: int = 13000, needed: int = 13000, devices: Any = 1, product: Any = 14.0) -> types.ModuleType:
    """The part of CuPy that the probe uses; ``devices`` or ``product`` may be an exception to raise."""

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    class Probe:
        def __matmul__(self, other: object) -> Any:
            return answer(product)

    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.float32 = np.float32
    cupy.arange = lambda n, dtype: Probe()
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: needed,
            getDeviceCount=lambda: answer(devices),
            getDeviceProperties=lambda i: {"name": b"Fake GPU"},
        )
    )
    return cupy


@pytest.fixture(autouse=True)
def fresh_probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("GPUBATCH_BACKEND", "GPUBATCH_FALLBACK", *module.LOCAL_RANKS):
        monkeypatch.delenv(name, raising=False)
    yield
    module._probe_cupy.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, cupy: types.ModuleType | None) -> None:
    module._probe_cupy.cache_clear()
    if cupy is None:
        monkeypatch.delitem(sys.modules, "cupy", raising=False)
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setitem(sys.modules, "cupy", cupy)


def broken_import(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CuPy that is installed but cannot be loaded, as when a CUDA library is missing."""
    install(monkeypatch, None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: importlib.machinery.ModuleSpec(name, None))
    monkeypatch.setitem(sys.modules, "cupy", None)  # Python's own way to make an import fail


UNUSABLE = {
    "not installed": (lambda m: install(m, None), "not installed", "CuPy is not installed.*pip install 'gpubatch"),
    "import fails": (broken_import, "libraries missing", "CUDA libraries are missing.*Remedy: install"),
    "no cublas": (
        lambda m: install(m, fake_cupy(product=ImportError("libcublas.so.13: cannot open shared object file"))),
        "libraries missing",
        r"libraries are missing or do not load \(libcublas.so.13",
    ),
    "old driver": (
        lambda m: install(m, fake_cupy(driver=12020, devices=CUDARuntimeError("cudaErrorInsufficientDriver: too old"))),
        "driver too old",
        "serves CUDA 12.2 and CuPy was built for 13.0.*update the driver.*cupy-cuda12x",
    ),
    "no driver": (
        lambda m: install(m, fake_cupy(driver=0, devices=CUDARuntimeError("cudaErrorInsufficientDriver: none"))),
        "no device",
        "no NVIDIA driver was found",
    ),
    "no device": (
        lambda m: install(m, fake_cupy(devices=CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device"))),
        "no device",
        r"shows no usable device \(cudaErrorNoDevice.*CUDA_VISIBLE_DEVICES",
    ),
    "hidden devices": (lambda m: install(m, fake_cupy(devices=0)), "no device", "shows no usable device"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_cuda_that_cannot_be_used_says_why_and_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, cause, message = UNUSABLE[name]
    break_it(monkeypatch)
    for _ in range(2):  # the second time from memory
        with pytest.raises(gb.BackendUnavailableError, match=message) as raised:
            gb.get_backend("cuda")
        assert raised.value.cause == cause
        assert raised.value.remedy in str(raised.value)
    assert gb.available_backends() == ("cpu",)
    auto = gb.get_backend("auto")
    assert (auto.name, auto.reason) == ("cpu", f"CUDA cannot be used: {cause}")
    with pytest.warns(gb.BackendFallbackWarning, match=f"using the CPU instead of 'cuda'.*{message}") as warned:
        assert gb.get_backend("cuda", fallback="cpu").name == "cpu"
    assert len(warned) == 1


def test_every_cause_is_tested() -> None:
    assert {cause for _, cause, _ in UNUSABLE.values()} == set(gb.BackendUnavailableError.CAUSES)


def test_a_usable_device_is_chosen_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_cupy(devices=2))
    assert gb.available_backends() == ("cpu", "cuda:0", "cuda:1")
    assert gb.get_backend("auto").spec == "cuda:0"
    assert gb.get_backend("cuda") == gb.get_backend("cuda:0")
    assert gb.get_backend("cuda:1").device == "cuda:1 (Fake GPU)"
    with pytest.raises(gb.BackendUnavailableError, match="no device of that number, this machine has 2"):
        gb.get_backend("cuda:2")


@pytest.mark.parametrize("variable", module.LOCAL_RANKS)
def test_each_process_of_a_launcher_chooses_a_device_of_its_own(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fake_cupy(devices=2))
    found = []
    for place in ("0", "1", "2", ""):
        monkeypatch.setenv(variable, place)
        assert gb.get_backend("auto") == gb.get_backend("cuda")
        assert gb.get_backend("cuda:1").spec == "cuda:1"
        found.append(gb.get_backend("cuda").spec)
    assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:0"]


@pytest.mark.parametrize("available", [True, False])
def test_nccl_that_is_missing_says_what_to_install(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        warnings.warn("nccl library could not be loaded", stacklevel=1)
        return types.SimpleNamespace(available=available, name=name)

    install(monkeypatch, fake_cupy())
    device = gb.get_backend("cuda")
    assert isinstance(device, module.CudaBackend)
    monkeypatch.setattr(device, "library", load)
    if available:
        assert device.nccl().name == "cupy.cuda.nccl"
        return
    with pytest.raises(gb.BackendUnavailableError, match=r"pip install nvidia-nccl-cu1\d"):
        device.nccl()


def test_where_warnings_are_errors_one_of_cuda_s_loader_hides_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = fake_cupy()
    arange = cupy.arange
    cupy.arange = lambda *of, **how: warnings.warn("which NVRTC?", stacklevel=1) or arange(*of, **how)
    install(monkeypatch, cupy)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("error")
        assert gb.get_backend("cuda").spec == "cuda:0"
    assert [str(warning.message) for warning in told] == ["which NVRTC?"]


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, None)
    monkeypatch.setenv("GPUBATCH_BACKEND", "cpu")
    assert gb.get_backend("auto").reason == "GPUBATCH_BACKEND=cpu"
    monkeypatch.setenv("GPUBATCH_BACKEND", "cuda")
    with pytest.raises(gb.BackendUnavailableError):
        gb.get_backend("auto")
    assert gb.get_backend("cpu").name == "cpu"
    monkeypatch.setenv("GPUBATCH_FALLBACK", "cpu")
    with pytest.warns(gb.BackendFallbackWarning):
        assert gb.get_backend("auto").name == "cpu"
    monkeypatch.setenv("GPUBATCH_BACKEND", "gpu")
    with pytest.raises(gb.ArgumentError, match=r"GPUBATCH_BACKEND must be .* got 'gpu'"):
        gb.get_backend()
    monkeypatch.setenv("GPUBATCH_FALLBACK", "tpu")
    with pytest.raises(gb.ArgumentError, match="GPUBATCH_FALLBACK must be one of 'cpu', got 'tpu'"):
        gb.get_backend()


def test_a_process_is_warned_once() -> None:
    code = "import gpubatch as gb\nfor _ in range(3): gb.get_backend('cuda:7')\ngb.get_backend('cuda:7')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"GPUBATCH_FALLBACK": "cpu", "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stderr.count("BackendFallbackWarning: using the CPU") == 1


@pytest.mark.parametrize("spec", ["gpu", "cuda:x", "cuda:-1", "", None, 0])
def test_unknown_specs_are_refused(spec: Any) -> None:
    with pytest.raises(gb.ArgumentError, match="backend must be 'auto', 'cpu', 'cuda', 'cuda:N' or a Backend, got"):
        gb.get_backend(spec)


def test_a_backend_is_its_own_spec(backend: gb.Backend) -> None:
    assert gb.get_backend(backend) is backend
    assert gb.get_backend(backend.spec) == backend
    assert {backend: 1}[gb.get_backend(backend.spec)] == 1
    assert backend != "cpu"


# --- arrays --------------------------------------------------------------------------------------------------------


def test_arrays_go_there_and_back(backend: gb.Backend) -> None:
    x = backend.asarray([[1, 2], [3, 4]], dtype="float32")
    assert backend.owns(x)
    assert x.dtype == np.float32
    back = backend.to_numpy(x)
    assert isinstance(back, np.ndarray)
    np.testing.assert_array_equal(back, [[1, 2], [3, 4]])
    assert backend.asarray(x) is x
    backend.synchronize()


def test_the_namespace_is_that_of_the_arrays(backend: gb.Backend) -> None:
    x = backend.zeros((2, 3), "float32")
    xp = gb.array_namespace(x, backend.empty(3, "float64"))
    assert xp is backend.xp
    assert backend.owns(xp.concat([x, x]))  # an Array-API name
    assert backend_of(x) == backend


class Elsewhere:
    """Mimics an array on a GPU: its content must not be read on the way to NumPy."""

    shape, dtype, size = (3,), np.dtype(np.float32), 3
    device = types.SimpleNamespace(id=1)
    flags = types.SimpleNamespace(c_contiguous=True)

    def __array__(self, *args: Any, **kwargs: Any) -> np.ndarray:
        raise AssertionError("a hidden copy from the device")


Elsewhere.__name__, Elsewhere.__module__ = "ndarray", "cupy"


def test_two_devices_never_meet_silently() -> None:
    with pytest.raises(
        gb.DeviceMismatchError, match=r"arrays of two devices: argument 0 is a NumPy.*1 is a CuPy.*cuda:1"
    ):
        gb.array_namespace(np.zeros(3), Elsewhere())
    cpu = gb.get_backend("cpu")
    with pytest.raises(gb.DeviceMismatchError, match=r"copy it with Backend.to_numpy"):
        cpu.asarray(Elsewhere())
    with pytest.raises(gb.DeviceMismatchError, match=r"X must be an array on 'cpu', got a CuPy array.*asarray"):
        cpu.check("X", Elsewhere())
    opt = gb.SGD([np.zeros(3, "float32")], 0.1)
    with pytest.raises(gb.DeviceMismatchError, match=r"grads\['0'\] must be an array on 'cpu'"):
        opt.step([Elsewhere()])
    with pytest.raises(gb.DeviceMismatchError, match="arrays of two devices"):
        gb.SGD([np.zeros(3, "float32"), Elsewhere()], 0.1)


def test_what_is_no_array_is_refused() -> None:
    with pytest.raises(gb.ArgumentError, match="at least one array"):
        gb.array_namespace()
    with pytest.raises(gb.DTypeError, match="expected a NumPy or CuPy array, got a list"):
        gb.array_namespace([1, 2])


def test_dlpack_arrays_are_seen_without_a_copy() -> None:
    class Foreign:
        def __init__(self, x: np.ndarray) -> None:
            self.x = x

        def __dlpack__(self, **options: Any) -> Any:
            return self.x.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.x.__dlpack_device__()

    x = np.arange(3.0)
    seen = gb.get_backend("cpu").asarray(Foreign(x))
    assert np.shares_memory(seen, x)


def test_float_dtypes() -> None:
    assert float_dtype("float32") == np.float32
    assert float_dtype(np.float64) == np.float64
    for bad in ("float16", "int32", "complex64", "nonsense", None):
        if bad is not None:
            with pytest.raises(gb.DTypeError, match="dtype must be float32 or float64, got"):
                float_dtype(bad)


# --- memory --------------------------------------------------------------------------------------------------------


def test_memory_of_this_machine(backend: gb.Backend) -> None:
    memory = backend.memory()
    assert 0 < memory.available <= memory.total


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {"proc/meminfo": "MemTotal:  16000 kB\nMemFree:  1000 kB\nMemAvailable:  8000 kB\n"}
KB = 1024
GROUPS = {
    "no group": ({}, (16000 * KB, 8000 * KB)),
    "version 2": (
        {
            "proc/self/cgroup": "0::/box\n",
            "sys/fs/cgroup/box/memory.max": f"{4000 * KB}\n",
            "sys/fs/cgroup/box/memory.current": f"{1500 * KB}\n",
            "sys/fs/cgroup/box/memory.stat": f"anon 1\ninactive_file {500 * KB}\n",
        },
        (4000 * KB, 3000 * KB),
    ),
    "version 2 without limit": (
        {
            "proc/self/cgroup": "0::/box\n",
            "sys/fs/cgroup/box/memory.max": "max\n",
            "sys/fs/cgroup/box/memory.current": "10\n",
        },
        (16000 * KB, 8000 * KB),
    ),
    "a tighter group outside": (
        {
            "proc/self/cgroup": "0::/outer/inner\n",
            "sys/fs/cgroup/outer/inner/memory.max": f"{6000 * KB}\n",
            "sys/fs/cgroup/outer/inner/memory.current": "0\n",
            "sys/fs/cgroup/outer/memory.max": f"{5000 * KB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{4000 * KB}\n",
        },
        (5000 * KB, 1000 * KB),
    ),
    "version 2 inside a container": (
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/memory.max": f"{2000 * KB}\n",
            "sys/fs/cgroup/memory.current": f"{500 * KB}\n",
        },
        (2000 * KB, 1500 * KB),
    ),
    "version 1": (
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/box\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": f"{4000 * KB}\n",
            "sys/fs/cgroup/memory/box/memory.usage_in_bytes": f"{1000 * KB}\n",
            "sys/fs/cgroup/memory/box/memory.stat": f"inactive_file 1\ntotal_inactive_file {200 * KB}\n",
        },
        (4000 * KB, 3200 * KB),
    ),
    "version 1 without limit": (
        {
            "proc/self/cgroup": "4:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000\n",
        },
        (16000 * KB, 8000 * KB),
    ),
    "used up": (
        {
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{1000 * KB}\n",
            "sys/fs/cgroup/memory.current": f"{1200 * KB}\n",
        },
        (1000 * KB, 0),
    ),
}


@pytest.mark.parametrize("name", GROUPS)
def test_memory_honours_control_groups(name: str, tmp_path: Path) -> None:
    files, expected = GROUPS[name]
    assert main_memory(str(tree(tmp_path, MACHINE | files))) == gb.Memory(*expected)


def test_memory_honours_ulimit() -> None:
    resource = pytest.importorskip("resource")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))\n"
        "import gpubatch as gb; print(gb.get_backend('cpu').memory())"
    )
    assert resource
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    memory = eval(done.stdout, {"Memory": gb.Memory})
    assert memory.total == 2**32
    assert 0 < memory.available < 2**32
