"""Count NumPy's allocations and refuse a chosen one, by a memory handler (NEP 49) in C."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from needs import missing

SOURCE = r"""
#include <stdint.h>
#include <stdlib.h>

long count, refused;  /* allocations so far; the number of the one that fails, from 1, or 0 */
size_t least;         /* bytes; smaller ones are neither counted nor refused */

static int refuse(size_t size) { return size >= least && ++count == refused; }
static void *get(void *c, size_t size) { return refuse(size) ? NULL : malloc(size); }
static void *get_zeros(void *c, size_t n, size_t size) { return refuse(n * size) ? NULL : calloc(n, size); }
static void *get_again(void *c, void *old, size_t size) { return refuse(size) ? NULL : realloc(old, size); }
static void give_back(void *c, void *p, size_t size) { free(p); }

struct {  /* PyDataMem_Handler */
    char name[127];
    uint8_t version;
    void *context;
    void *(*malloc)(void *, size_t);
    void *(*calloc)(void *, size_t, size_t);
    void *(*realloc)(void *, void *, size_t);
    void (*free)(void *, void *, size_t);
} handler = {"refusing", 1, NULL, get, get_zeros, get_again, give_back};
"""
SET_HANDLER = 304  # of NumPy's C API: PyDataMem_SetHandler


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = shutil.which("gcc") or missing("compiler", "gcc is not installed")
    folder = tempfile.TemporaryDirectory(prefix="gpubatch-allocations-")
    atexit.register(folder.cleanup)
    path = Path(folder.name, "refusing.c")
    path.write_text(SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", path, "-o", path.with_suffix(".so")], check=True)
    return ctypes.CDLL(str(path.with_suffix(".so")))


@functools.cache
def _set_handler() -> Any:
    from numpy._core import _multiarray_umath as core

    pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    table = ctypes.cast(pointer(core._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[SET_HANDLER])


@functools.cache
def _handler() -> Any:
    capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
        ("PyCapsule_New", ctypes.pythonapi)
    )
    return capsule(ctypes.addressof(ctypes.c_char.in_dll(_library(), "handler")), b"mem_handler", None)


class Refusal:
    """Counts allocations of at least ``least`` bytes since ``refuse``, and selects the one that fails."""

    def __init__(self, least: int) -> None:
        ctypes.c_size_t.in_dll(_library(), "least").value = least
        self._count = ctypes.c_long.in_dll(_library(), "count")
        self._refused = ctypes.c_long.in_dll(_library(), "refused")
        self.refuse(0)

    @property
    def count(self) -> int:
        return self._count.value

    def refuse(self, number: int) -> None:
        """Reset the count, and refuse allocation ``number``, counted from 1; 0 refuses none."""
        self._count.value, self._refused.value = 0, number


@contextlib.contextmanager
def refusing(least: int = 0) -> Iterator[Refusal]:
    """Route this thread's NumPy allocations through a handler that can refuse one."""
    before = _set_handler()(_handler())
    found = Refusal(least)
    try:
        yield found
    finally:
        found.refuse(0)
        _set_handler()(before)
