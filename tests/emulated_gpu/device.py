"""Load and configure the emulated device's library in this process, and load modules for it."""

from __future__ import annotations

import ctypes
import traceback
from pathlib import Path
from typing import Any

from emulated_gpu import blas, modules, nccl, overlay, pool
from emulated_gpu.build import HERE, build, nvidia
from emulated_gpu.options import TIMINGS, Options
from emulated_gpu.registers import registers, text_of

SOURCES = ("device.cpp", "memory.cpp", "streams.cpp", "graphs.cpp", "launch.cpp")
INVALID_IMAGE, INVALID_PTX = 200, 218  # of CUresult

LOAD = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)
REGISTERS = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)


class Loaded:
    """The objects that must live as long as CuPy may call the library."""

    def __init__(self, library: ctypes.CDLL, options: Options) -> None:
        self.library, self.options = library, options
        self.texts: dict[int, str] = {}  # PTX, by module
        self.modules: dict[int, Any] = {}
        self.hooks = LOAD(self.load_module), REGISTERS(self.registers)
        library.emulated_set_hooks(*self.hooks)

    def load_module(self, handle: int, image: bytes) -> int:
        """Compile the PTX of a module and register its kernels; return 0 or a CUresult."""
        if image.startswith(b"\x7fELF"):
            self.fault("a module of machine code, where PTX is emulated: CUPY_COMPILE_WITH_PTX must be 1")
            return INVALID_IMAGE
        try:
            text = text_of(image)
            module = modules.build(text)
            self.texts[handle], self.modules[handle] = text, module
            self.add(handle, module)
        except Exception:
            self.fault(f"cannot load a module: {traceback.format_exc()}")
            return INVALID_PTX
        return 0

    def add(self, handle: int, module: Any) -> None:
        pointer = ctypes.c_void_p
        for name, kernel in module.kernels.items():
            count = len(kernel.parameters)
            offsets, sizes = (
                ((ctypes.c_size_t * count)(*numbers) for numbers in zip(*kernel.parameters, strict=True))
                if count
                else (None, None)
            )
            launch = ctypes.cast(getattr(module.library, kernel.symbol), pointer)
            size = ctypes.c_size_t
            self.library.emulated_add_kernel(
                pointer(handle), name.encode(), launch, count, offsets, sizes, size(kernel.parameter_bytes),
                kernel.max_threads, size(kernel.shared_bytes),
            )  # fmt: skip
        for name, (symbol, size_of) in module.variables.items():
            address = ctypes.addressof(ctypes.c_char.in_dll(module.library, symbol))
            self.library.emulated_add_variable(
                pointer(handle), name.encode(), pointer(address), ctypes.c_size_t(size_of)
            )

    def registers(self, handle: int, name: bytes) -> int:
        """The number of registers of a kernel; -1 if it cannot be determined."""
        try:
            return registers(self.texts[handle], self.options.capability)[name.decode()]
        except Exception:
            self.fault(f"cannot count the registers of {name.decode()}: {traceback.format_exc()}")
            return -1

    def fault(self, sentence: str) -> None:
        self.library.emulated_fault(sentence.encode())


_loaded: list[Loaded] = []


def load(options: Options) -> None:
    """Build and load the device's libraries, before CuPy looks for NVIDIA's."""
    if _loaded:
        return
    _, _, cuda = overlay.cupy_wheel()
    library = ctypes.CDLL(str(build_library(cuda)), mode=ctypes.RTLD_GLOBAL)
    configure(library, options)
    blas.load(cuda)
    nccl.load()
    # The real NVRTC, loaded here by path so that CuPy does not search for it.
    ctypes.CDLL(str(nvidia(cuda, "cuda_nvrtc", f"lib/libnvrtc.so.{cuda}")))
    _loaded.append(Loaded(library, options))


def build_library(cuda: int) -> Path:
    """Build the device's library for CUDA ``cuda``, with the driver's SONAME, so that it replaces the driver."""
    headers = nvidia(cuda, "cuda_runtime", "include/cuda_runtime_api.h").parent
    flags = ("-Wl,-soname,libcuda.so.1", f"-I{HERE / 'include'}", f"-I{headers}")
    return build("libcuda", [HERE / name for name in SOURCES], flags)


def configure(library: ctypes.CDLL, options: Options) -> None:
    """Create the devices."""
    memory = (ctypes.c_uint64 * options.devices)(*options.memory_of_each())
    timing, late = TIMINGS.index(options.timing), options.pageable == "late"
    library.emulated_configure(options.devices, memory, timing, late, options.capability)


def lay_over(module: Path) -> None:
    """Replace CUDA's runtime in CuPy's module."""
    overlay.lay_over(module, _loaded[0].library)


def poison_the_pool(cupy: Any) -> None:
    """Overwrite memory that CuPy's pool allocates and frees."""
    pool.poison_the_pool(cupy, _loaded[0].library)


def faults() -> list[str]:
    """See :func:`emulated_gpu.faults`."""
    found = []
    text = ctypes.create_string_buffer(8192)
    while _loaded and _loaded[0].library.emulated_take_fault(text, ctypes.c_size_t(len(text))):
        found.append(text.value.decode(errors="replace"))
    return found


def mend() -> None:
    """See :func:`emulated_gpu.mend`."""
    if _loaded:
        _loaded[0].library.emulated_mend()
