"""Overwrite memory that CuPy's pool allocates or frees with NaN, as the device does with its own.

The pool orders reuse only within the stream on which the memory was allocated, so the overwriting is work of that
stream. A read in another stream, or in a replayed graph, then finds NaN.
"""

from __future__ import annotations

import ctypes
from typing import Any


def poison_the_pool(cupy: Any, library: ctypes.CDLL) -> None:
    """Overwrite from now on, for allocations of this thread; CuPy's hooks are per thread."""

    class Poison(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "emulated GPU"

        def __init__(self) -> None:
            self._streams: dict[int, int] = {}  # address of an allocated block: stream

        def malloc_postprocess(self, *, mem_size: int, mem_ptr: int, **_: Any) -> None:
            self._streams[mem_ptr] = cupy.cuda.get_current_stream().ptr
            self._overwrite(mem_ptr, mem_size)

        def free_postprocess(self, *, mem_size: int, mem_ptr: int, **_: Any) -> None:
            if mem_ptr in self._streams:
                self._overwrite(mem_ptr, mem_size)
                del self._streams[mem_ptr]

        def _overwrite(self, pointer: int, size: int) -> None:
            stream = ctypes.c_void_p(self._streams[pointer])
            library.emulated_poison(ctypes.c_void_p(pointer), ctypes.c_size_t(size), stream)

    Poison().__enter__()
