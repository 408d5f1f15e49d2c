"""Main memory of the machine: how much this process may use, within control groups and ulimits."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Memory", "main_memory"]


@dataclass(frozen=True)
class Memory:
    """Memory of a device in bytes: the total that this process may use, and what is available to it now.

    >>> memory = gb.get_backend("cpu").memory()
    >>> 0 < memory.available <= memory.total
    True
    """

    total: int
    available: int


def main_memory(root: str = "/") -> Memory:
    """Main memory for this process: the machine's, or less where a control group or a ulimit says so.

    ``root`` is where ``proc`` and ``sys`` are found. Outside Linux and Windows available memory is half of what is
    installed, since no portable call tells more.
    """
    total, available = _meminfo(root) or _installed_memory()
    for limit, used in (*_control_groups(root), *_address_space(root)):
        total, available = min(total, limit), min(available, limit - used)
    return Memory(total, max(available, 0))


def _read(*path: str) -> str:
    """The text of a small file, empty where there is none."""
    try:
        with open(os.path.join(*path), encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def _meminfo(root: str) -> tuple[int, int] | None:
    found = re.findall(r"^(\w+):\s+(\d+) kB", _read(root, "proc/meminfo"), re.MULTILINE)
    size = {name: 1024 * int(kilobytes) for name, kilobytes in found}
    if "MemTotal" not in size:
        return None
    return size["MemTotal"], size.get("MemAvailable", size.get("MemFree", 0))


def _installed_memory() -> tuple[int, int]:
    if sys.platform == "win32":
        import ctypes

        status = (ctypes.c_ulonglong * 8)()  # MEMORYSTATUSEX: two 32-bit fields (length, load), then seven of 64 bits
        ctypes.cast(status, ctypes.POINTER(ctypes.c_ulong))[0] = ctypes.sizeof(status)
        ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return int(status[1]), int(status[2])
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total // 2


def _control_groups(root: str) -> Iterator[tuple[int, int]]:
    """(limit, used) of every memory control group around this process; page cache that can be dropped is not used."""
    for line in _read(root, "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mount = "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be the host's, of which only the mount point itself is seen here.
        inner = [name for name in path.split("/") if name]
        if not os.path.isdir(os.path.join(root, mount, *inner)):
            inner = []
        for depth in range(len(inner), -1, -1):
            yield from _group_limit(os.path.join(root, mount, *inner[:depth]), *names)


def _group_limit(folder: str, limit_name: str, usage_name: str, cache_name: str) -> Iterator[tuple[int, int]]:
    limit, used = _read(folder, limit_name).strip(), _read(folder, usage_name).strip()
    # "max" is no limit in version 2, in version 1 it is a number near 2**63.
    if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:
        cache = re.search(rf"^{cache_name} (\d+)$", _read(folder, "memory.stat"), re.MULTILINE)
        yield int(limit), max(int(used) - (int(cache[1]) if cache else 0), 0)


def _address_space(root: str) -> Iterator[tuple[int, int]]:
    """(limit, used) of ``ulimit -v``, where one is set."""
    try:
        import resource
    except ImportError:  # Windows has none
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read(root, "proc/self/statm").partition(" ")[0]
    if limit != resource.RLIM_INFINITY and pages:
        yield limit, int(pages) * os.sysconf("SC_PAGE_SIZE")
