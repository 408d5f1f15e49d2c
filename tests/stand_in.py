"""A stand-in for CuPy: its arrays are NumPy's, its kernels the real sources on the emulated grid."""

from __future__ import annotations

import contextlib
import re
import types
from typing import Any

import numpy as np
from emulate import host_kernel, sanitized

from gpubatch.backend import CudaBackend
from gpubatch.cuda_ops import STORED
from gpubatch.launch import C_TYPES, cuda_kernel

INDEX = 99  # of the device: no kernel of a real one is found in a cache

# The NumPy type of an argument, by its C type.
NUMBERS = {"long long": np.int64, "u64": np.uint64, "float": np.float32, "double": np.float64}


class DeviceArray(np.ndarray):
    """What gpubatch uses of a CuPy array."""

    device = types.SimpleNamespace(id=INDEX)

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def get(self) -> np.ndarray:
        return np.array(self)

    def set(self, values: np.ndarray) -> None:
        assert (type(values), values.dtype, values.shape) == (np.ndarray, self.dtype, self.shape)
        self[...] = values


DeviceArray.__name__, DeviceArray.__module__ = "ndarray", "cupy"


class StandIn:
    """As much of CuPy as gpubatch's kernels need, with a record of what was compiled and launched.

    ``order`` is that of the threads; with ``sanitize`` kernels run under the sanitizers.
    """

    def __init__(self, order: str = "forward", sanitize: bool = False) -> None:
        self.order, self.sanitize = order, sanitize
        self.compiled: list[str] = []
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
        self.cuda = types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDeviceProperties=lambda index: {"name": b"stand-in"}),
            Device=lambda index: contextlib.nullcontext(),
        )

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.full(shape, 7, dtype).view(DeviceArray)  # memory of a device is not clean

    def zeros(self, shape: Any, dtype: Any) -> np.ndarray:
        return np.zeros(shape, dtype).view(DeviceArray)

    def asarray(self, x: Any, dtype: Any = None) -> np.ndarray:
        return x if isinstance(x, DeviceArray) and dtype in (None, x.dtype) else np.array(x, dtype).view(DeviceArray)

    def RawModule(self, code: str, options: tuple[str, ...]) -> Any:  # noqa: N802  CuPy's name
        self.compiled.append(code)
        assert options == ("--std=c++17",)

        def get_function(name: str) -> Any:
            parameters = parameters_of(code, name)

            def kernel(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
                self.launches.append((name, grid, block))
                for parameter, argument in zip(parameters, arguments, strict=True):
                    check_argument(code, parameter, argument)
                blocks, threads = grid if len(grid) > 1 else grid[0], block[0]
                if not self.sanitize:
                    host_kernel(code, name, *parameters)(*arguments, blocks, threads, order=self.order)
                    return
                copies = sanitized(code, name, parameters, arguments, blocks, threads, self.order)
                for array, copy in zip((a for a in arguments if isinstance(a, DeviceArray)), copies, strict=True):
                    array[...] = copy

            return kernel

        return types.SimpleNamespace(get_function=get_function)


def parameters_of(source: str, kernel: str) -> tuple[str, ...]:
    """The C declarations of a kernel's parameters."""
    found = re.search(rf'extern "C" __global__ void {kernel}\(([^)]*)\)', source)
    assert found is not None, f"no kernel {kernel}"
    return tuple(" ".join(p.split()) for p in found[1].split(","))


def check_argument(source: str, parameter: str, argument: Any) -> None:
    """What CuPy does not look at: an argument has the type of its parameter; an address is an array or null."""
    element = {f"typedef {c} T;": np.dtype(name).type for name, c in C_TYPES.items()}
    stored = {f"typedef {c} S;": np.dtype(name).type for name, c in STORED.items()}
    of = {**NUMBERS, "T": found_in(source, element), "S": found_in(source, stored)}
    c_type, name = parameter.removeprefix("const ").rsplit(" ", 1)
    if not c_type.endswith("*"):
        assert type(argument) is of[c_type], f"{parameter} got a {type(argument)}"
    elif isinstance(argument, DeviceArray):
        assert argument.dtype.type is of[c_type[:-1]], f"{parameter} got an array of {argument.dtype}"
        assert argument.flags.c_contiguous, f"{parameter} got a strided array"
    else:
        assert type(argument) is np.uint64, f"{parameter} got a {type(argument)}"
        assert argument == 0, name


def found_in(source: str, choices: dict[str, Any]) -> Any:
    return next((value for text, value in choices.items() if text in source), None)


def stand_in_backend(order: str = "forward", sanitize: bool = False) -> CudaBackend:
    """A backend of its own; what others compiled is forgotten, so that its record is complete."""
    cuda_kernel.cache_clear()
    return CudaBackend(StandIn(order, sanitize), INDEX, "a test")


class StandInBackend(CudaBackend):
    """With NumPy for what is not a kernel of gpubatch's: matrix products, copies."""

    xp = np
