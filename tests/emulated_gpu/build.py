"""C++ to shared libraries: compiled on first use with g++, kept in a cache by what they were made of.

The cache is ``.emulated_gpu_cache`` at the repository's root, or where ``EMULATED_GPU_CACHE`` says. Several processes
may build at once: one compiles, the others wait for its library.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
# No contraction: a*b + c is fused where the PTX says fma, and nowhere else.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread")


def cache() -> Path:
    """The folder of everything that is made on first use."""
    folder = Path(os.environ.get("EMULATED_GPU_CACHE") or HERE.parents[1] / ".emulated_gpu_cache")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(name: str, sources: Sequence[Path | str], flags: Sequence[str] = (), key: str = "") -> Path:
    """The shared library compiled of ``sources``: files (``Path``) or C++ text (``str``).

    It is compiled anew where a source, a header that it includes, a flag, ``key`` or the compiler is another.
    """
    digest = hashlib.sha256()
    for part in (compiler(), *FLAGS, *flags, key, *(with_headers(read(source)) for source in sources)):
        digest.update(part.encode() + b"\0")
    library = cache() / f"{name}-{digest.hexdigest()[:24]}.so"
    if library.exists():
        return library
    with locked(library.with_suffix(".lock")):
        if not library.exists():
            compile_to(library, sources, flags)
    return library


def compile_to(library: Path, sources: Sequence[Path | str], flags: Sequence[str]) -> None:
    """Compile next to ``library`` and rename: whoever looks sees all of it or nothing."""
    made = library.with_suffix(f".{os.getpid()}")
    files = []
    try:
        for i, source in enumerate(sources):
            if isinstance(source, str):
                text = library.with_suffix(f".{os.getpid()}.{i}.cpp")
                text.write_text(source)
                files.append(text)
        paths = [str(source) for source in sources if isinstance(source, Path)] + [str(file) for file in files]
        command = ["g++", *FLAGS, f"-I{HERE}", *flags, "-o", str(made), *paths]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"emulated GPU: g++ cannot compile {library.name}:\n{run.stderr[:8000]}")
        os.replace(made, library)
    finally:
        for file in files:
            file.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which goes with the process that dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read(source: Path | str) -> str:
    return source.read_text() if isinstance(source, Path) else source


def with_headers(text: str) -> str:
    """C++ text with that of the headers of this folder that it includes."""
    seen: dict[str, str] = {}
    left = [text]
    while left:
        for name in re.findall(r'^#include "([\w/.]+)"', left.pop(), re.MULTILINE):
            if name not in seen and (HERE / name).exists():
                seen[name] = (HERE / name).read_text()
                left.append(seen[name])
    return "\0".join([text, *seen.values()])


@functools.cache
def compiler() -> str:
    """The compiler's version."""
    try:
        return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout
    except OSError as error:
        raise RuntimeError(f"emulated GPU: needs g++, which cannot be started ({error})") from error


def nvidia(cuda: int, part: str, path: str) -> Path:
    """A file of NVIDIA's wheel of ``part`` ("cuda_runtime", "cuda_nvrtc") for CUDA ``cuda``."""
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        file = Path(root, part if cuda == 12 else f"cu{cuda}", path)
        if file.exists():
            return file
    wheel = f"nvidia-{part.replace('_', '-')}" + ("-cu12" if cuda == 12 else "")
    raise RuntimeError(f"emulated GPU: {path} is missing; install {wheel}")
