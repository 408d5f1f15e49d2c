"""Hook into the import of CuPy, so that a process without CuPy builds and loads nothing."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from emulated_gpu import VARIABLE
from emulated_gpu.build import HERE, cache
from emulated_gpu.options import Options

SITE = str(HERE / "site")


def install(options: Options) -> None:
    """See :func:`emulated_gpu.install`."""
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        if os.environ.get(VARIABLE) != str(options):
            raise RuntimeError(f"emulated GPU: is installed with {os.environ.get(VARIABLE)}, got {options}")
        return
    if "cupy_backends" in sys.modules:
        raise RuntimeError("emulated GPU: must be installed before CuPy is imported")
    os.environ[VARIABLE] = str(options)
    os.environ["CUPY_COMPILE_WITH_PTX"] = "1"  # not machine code
    os.environ["CUPY_CACHE_DIR"] = str(cache() / "cupy")
    os.environ["CUPY_ACCELERATORS"] = ""  # cub is machine code
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if SITE not in paths:
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SITE, *paths]))
    sys.meta_path.insert(0, Finder())


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of CuPy that need a step, as Python would."""

    STEPS: ClassVar[dict[str, str]] = {
        "cupy_backends": "before_the_backends",
        "cupy_backends.cuda.api.runtime": "after_loading_the_runtime",
        "cupy.cuda.compiler": "after_the_compiler",
        "cupy": "after_cupy",
    }

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.STEPS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = Loader(spec.loader, self.STEPS[name])  # type: ignore[arg-type]
        return spec


class Loader(importlib.abc.Loader):
    """Loads a module by ``loader``, and runs its step."""

    def __init__(self, loader: Any, step: str) -> None:
        self._loader, self._step = loader, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        from emulated_gpu import device

        if self._step in ("before_the_backends", "after_cupy"):
            # CuPy's first lines look for NVIDIA's libraries already, and take a loaded one of the same name.
            device.load(Options.parse(os.environ[VARIABLE]))
        module: ModuleType | None = self._loader.create_module(spec)
        if self._step == "after_loading_the_runtime":
            device.lay_over(Path(str(spec.origin)))
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if self._step == "after_the_compiler":
            from emulated_gpu.registers import record_sources

            record_sources(module)
        elif self._step == "after_cupy":
            from emulated_gpu import device

            device.poison_the_pool(module)
