"""Formulas of the user's own on a CPU: the system's C++ compiler translates one when it is first used.

Why this way: three were measured for a user's Adam on two cores with AVX-512 (AMD EPYC, GCC 12.2, 2026-11-29).

- The compiler gets the text that the build compiles the library's own rules from, so speed and bits are theirs, and
  there is one writer of C++. It takes 60 ms, once: the next process loads the file in less than 1 ms.
- LLVM through llvmlite compiles in 13 ms, but its import takes 40 ms in every process and 173 MB of disk, and a second
  writer, of LLVM's language, would have to agree with the first in every function and bit.
- Loops over blocks in the first-level cache, one for each recorded operation, need no compiler, but reach a third of
  the speed (0.36, 0.32 and 0.34 at 10,000, 1 million and 50 million parameters).

Without a compiler NumPy runs the formula, as it does where gpubatch was installed without one. Libraries are kept in
``GPUBATCH_CACHE_DIR``, or the user's cache directory, at most 64 MiB, some 3,000 formulas: those that were not used for
longest are removed. ``CXX`` names a compiler; ``GPUBATCH_JIT=0`` switches it off.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpubatch.errors import CompilerWarning
from gpubatch.formula import Activation, ScoreLoss, Trace
from gpubatch.ops.compile import elementwise_digest, formula_digest, host_library, switched_off
from gpubatch.ops.host_source import library_source

# As in CMakeLists.txt, for the bits of the build. The text needs no more than C++17, and no warning concerns the user.
OPTIONS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-std=c++17", "-w", "-shared", "-fPIC"]
MOST_BYTES = 64 << 20  # of the cache
SECONDS = 60  # until a compiler counts as hung; a formula takes a fraction of a second


class CompilationError(Exception):
    """A formula cannot be compiled; the message says why."""


class OfOneFormulaError(CompilationError):
    """A compiler that compiles others does not compile this formula."""


# --- formulas --------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where ``_host`` has a formula, -1 for nowhere, and in words which form of it therefore runs."""

    number: int
    form: str


PLACES: dict[tuple[str, str, str, str], Place] = {}


def place_of(library: Any, formula: Trace | Activation | ScoreLoss, dtype: str) -> Place:
    """Where ``library`` has a formula for elements of ``dtype``: from the build, or compiled now if it is not yet."""
    if isinstance(formula, Trace):
        kind, digest = "rule", formula_digest(formula)
    else:
        kind, digest = formula.kind, elementwise_digest(formula)
    if (place := library.place_of(kind, digest)) >= 0:
        return Place(place, "compiled")
    level = library.level()
    key = kind, digest, dtype, level
    if key not in PLACES:
        found = compiler()
        try:
            if isinstance(found, str):
                raise CompilationError(found)
            functions = load_functions(found, library_source([formula], dtype), level)
        except OfOneFormulaError as error:
            words = f"the {kind} {formula.name} runs on NumPy, and slower than compiled: {error}"
            warnings.warn(words, CompilerWarning, stacklevel=1)
            PLACES[key] = Place(-1, f"NumPy: {error}")
            return PLACES[key]
        except CompilationError as error:
            warn(str(error))
            return Place(-1, f"NumPy: {error}")
        PLACES[key] = Place(library.add(kind, dtype, functions), f"compiled on first use by {found.program}")
    return PLACES[key]


def own_form() -> str:
    """In words what runs a user's formula on the CPU, for ``gpubatch info``: the compiler, and the cache."""
    library, found = host_library(), compiler()
    if isinstance(library, str) or isinstance(found, str):
        return f"NumPy: {library if isinstance(library, str) else found}"
    try:
        words = f"compiled on first use by {found.program} ({found.version()})"
        if (folder := cache_folder()) is None:
            return f"{words}, for each process anew"
        if folder.exists():
            check_private(folder)
        sizes = [path.stat().st_size for path in folder.glob("*.so")]
    except (OSError, subprocess.SubprocessError, CompilationError) as error:
        return f"NumPy: {error}"
    return f"{words}, kept in {folder} ({len(sizes)} files, {sum(sizes) / 1024:.0f} KiB)"


@functools.cache
def warn(reason: str) -> None:
    """Say once that NumPy runs what could be compiled."""
    if not switched_off("GPUBATCH_JIT"):
        warnings.warn(
            f"formulas of your own run on NumPy, and slower than gpubatch's: {reason}. "
            f"GPUBATCH_JIT=0 accepts that without this warning",
            CompilerWarning,
            stacklevel=1,
        )


# --- the compiler ----------------------------------------------------------------------------------------------------


class Compiler:
    """A C++ compiler: its ``program``, the ``options`` that CXX has beside the program, and its ``failure``.

    One that does not even compile a library without a formula is not run again, so that a hung one is waited for once.
    """

    def __init__(self, program: str, options: Sequence[str] = ()) -> None:
        self.program, self.options = os.path.abspath(program), [*options]
        self.failure: str | None = None

    def identity(self) -> str:
        """What changes when another compiler takes the place of this one; to ask for its version would take 5 ms."""
        found = os.stat(self.program)
        return f"{os.path.realpath(self.program)} {found.st_size} {found.st_mtime_ns} {self.options}"

    def version(self) -> str:
        """The first line of what ``--version`` prints."""
        done = subprocess.run([self.program, *self.options, "--version"], capture_output=True, timeout=SECONDS)
        return done.stdout.decode(errors="replace").partition("\n")[0]

    def compile(self, source: str, level: str, folder: str) -> str:
        """Make a shared library in ``folder``; returns its path. Raises :class:`CompilationError`."""
        if self.failure is None:
            try:
                return self._compile(source, level, folder, SECONDS)
            except CompilationError as error:
                reason = f"{self.program} {error}"
            try:
                self._compile(library_source([], "float32"), level, folder, SECONDS / 4)
            except CompilationError:
                self.failure = reason
            else:
                raise OfOneFormulaError(reason)
        raise CompilationError(self.failure)

    def _compile(self, source: str, level: str, folder: str, seconds: float) -> str:
        out = os.path.join(folder, "formula.so")
        command = [self.program, *self.options, *OPTIONS, *level_options(level), "-x", "c++", "-", "-o", out]
        # TMPDIR: what the parts of the compiler hand on stays in the private folder. LC_ALL: messages in English.
        environment = {**os.environ, "TMPDIR": folder, "LC_ALL": "C"}
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        with subprocess.Popen(
            command, stdin=pipe, stdout=null, stderr=pipe, env=environment, start_new_session=True
        ) as process:
            try:
                _, said = process.communicate(source.encode(), seconds)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)  # the compiler proper is a child of the program
                if isinstance(error, subprocess.TimeoutExpired):
                    raise CompilationError(f"was not done after {seconds} seconds") from None
                raise
        if process.returncode:
            lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
            first = next((line for line in lines if "error" in line), lines[0] if lines else "it says nothing")
            raise CompilationError(f"failed with exit status {process.returncode}: {first.strip()}")
        return out


def level_options(level: str) -> list[str]:
    """The option for a SIMD level of ``_host``, as in CMakeLists.txt."""
    return [] if level == "plain" else [f"-march={level}"]


@functools.cache
def compiler() -> Compiler | str:
    """The compiler that ``CXX`` names, or the first of c++, g++ and clang++; in words why there is none."""
    if switched_off("GPUBATCH_JIT"):
        return "switched off by GPUBATCH_JIT=0"
    if sys.platform == "win32":
        return "gpubatch does not compile formulas on Windows"
    if named := shlex.split(os.environ.get("CXX", "")):
        program = shutil.which(named[0])
        return Compiler(program, named[1:]) if program else f"CXX names {named[0]!r}, and no such program was found"
    for name in ("c++", "g++", "clang++"):
        if program := shutil.which(name):
            return Compiler(program)
    return "no C++ compiler was found; install one, or name it by CXX"


# --- the cache -------------------------------------------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where compiled formulas are kept: ``GPUBATCH_CACHE_DIR``, or the user's cache directory; None without a home."""
    if chosen := os.environ.get("GPUBATCH_CACHE_DIR"):
        return Path(chosen).absolute() / "formulas"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    folder = home / "Library" / "Caches" if sys.platform == "darwin" else home / ".cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or folder).absolute() / "gpubatch" / "formulas"


def load_functions(compiler: Compiler, source: str, level: str) -> list[int]:
    """The addresses of the functions of ``source``, compiled if the cache has no sound copy.

    Raises :class:`CompilationError`.
    """
    text = "\n".join([compiler.identity(), *OPTIONS, *level_options(level), platform.machine(), source])
    key, folder = hashlib.sha256(text.encode()).hexdigest()[:32], cache_folder()
    try:
        # OSError: the folder cannot be written, is full, or programs in it cannot be run. A private one will do.
        if folder is not None:
            with contextlib.suppress(OSError):
                check_private(folder)
                for path in folder.glob(f"{key}-*.so"):
                    if is_sound(path, key):
                        with contextlib.suppress(OSError):
                            os.utime(path)  # it was used now
                        return functions_of(path)
                made = compiled_into(folder, compiler, source, level, key)
                remove_unused(folder, made)
                return functions_of(made)
        with tempfile.TemporaryDirectory(prefix="gpubatch-") as private:
            return functions_of(compiled_into(Path(private), compiler, source, level, key))
    except OSError as error:
        compiler.failure = f"what {compiler.program} makes cannot be written or loaded: {error}"
        raise CompilationError(compiler.failure) from None


def compiled_into(folder: Path, compiler: Compiler, source: str, level: str, key: str) -> Path:
    """Compile ``source`` to a file of ``folder``, whole: other processes see all of the library or none."""
    with tempfile.TemporaryDirectory(dir=folder) as private:
        made = Path(compiler.compile(source, level, private))
        made.chmod(0o600)
        return made.replace(folder / name_of(key, made.read_bytes()))


def remove_unused(folder: Path, made: Path) -> None:
    """Remove the files of the cache that were not used for longest, if all take more than ``MOST_BYTES``; not ``made``.

    A process that has loaded one keeps it; one that is about to compiles it anew.
    """
    found = list[tuple[int, int, Path]]()
    for path in folder.glob("*.so"):
        with contextlib.suppress(OSError):  # another process has removed it
            about = path.stat()
            found.append((about.st_mtime_ns, about.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= MOST_BYTES:
            break
        if path != made:
            path.unlink(missing_ok=True)
            total -= size


def name_of(key: str, library: bytes) -> str:
    """The name of a file of the cache, by which a truncated or foreign one is noticed before it is loaded."""
    return f"{key}-{hashlib.sha256(key.encode() + library).hexdigest()[:32]}.so"


def is_sound(path: Path, key: str) -> bool:
    """Whether a file of the cache is this user's, and as it was written for ``key``."""
    try:
        with open(path, "rb") as file:
            found, library = os.fstat(file.fileno()), file.read()
    except OSError:
        return False
    private = found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return private and path.name == name_of(key, library)


def check_private(folder: Path) -> None:
    """Make the folder of the cache; raises :class:`CompilationError` if anybody else can put files there.

    Whoever can do that chooses the machine code that this process runs.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise CompilationError(
            f"the cache {folder} belongs to another user; set GPUBATCH_CACHE_DIR to a folder of yours"
        )
    # In a directory with the sticky bit, such as /tmp, nobody can replace what belongs to another.
    parents = [path for path in folder.parents if not path.stat().st_mode & stat.S_ISVTX]
    for path, others in ((folder, stat.S_IWGRP | stat.S_IWOTH), *((path, stat.S_IWOTH) for path in parents)):
        if path.stat().st_mode & others:
            raise CompilationError(
                f"other users can write to {path}, so the cache {folder} is not used; "
                f"set GPUBATCH_CACHE_DIR to a folder of yours, or chmod that one"
            )


def functions_of(path: Path) -> list[int]:
    """Load a library; returns the addresses in its ``functions``, which a zero ends."""
    first = ctypes.c_void_p.in_dll(ctypes.CDLL(str(path)), "functions")
    addresses = ctypes.cast(ctypes.addressof(first), ctypes.POINTER(ctypes.c_void_p))
    return [*itertools.takewhile(bool, (addresses[i] for i in itertools.count()))]
