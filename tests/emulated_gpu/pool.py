"""Memory that CuPy's pool hands out again, or takes back, is NaN: as what the device itself gives and takes.

The pool knows the order of one stream alone, that in which the memory was asked for; so it is overwritten in that
order. Whoever still reads it in another stream, or replays a graph that does, reads NaN.
"""

from __future__ import annotations

import ctypes
from typing import Any


def poison_the_pool(cupy: Any, library: ctypes.CDLL) -> None:
    """From now on, for memory that this thread asks for; CuPy's hooks belong to threads."""

    class Poison(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "emulated GPU"

        def __init__(self) -> None:
            self._streams: dict[int, int] = {}  # of each block that is in use

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
