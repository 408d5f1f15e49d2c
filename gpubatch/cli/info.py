"""``gpubatch info``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import shutil
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import typer

from gpubatch.backend import Backend, available_backends, get_backend, load_cupy
from gpubatch.cli import options
from gpubatch.cli.shared import app, console, examples, print_json, table_of, versions
from gpubatch.errors import BackendUnavailableError, check_choice
from gpubatch.formula import Rule, rules
from gpubatch.ops import cpu_products, host_library, own_form, products_for, reduce_sources, update_source
from gpubatch.parallel import Ranks
from gpubatch.sizing import format_bytes

# The optional dependencies: what they are for, and the packages that are imported.
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cli": ("this command", ("typer", "rich")),
    "plot": ("pictures", ("matplotlib",)),
    "data": ("tables, HDF5", ("pyarrow", "h5py")),
    "remote": ("files at URLs", ("fsspec", "aiohttp")),
    "sklearn": ("gpubatch.sklearn", ("scikit-learn",)),
    "onnx": ("gb.export_onnx", ("onnx",)),
    "tensorboard": ("gb.TensorBoard", ("tensorboardX",)),
    "parallel": ("gb.Ranks", ("mpi4py",)),
    "cuda12": ("GPUs, driver for CUDA 12", ("cupy-cuda12x", "nvmath-python")),
    "cuda13": ("GPUs, driver for CUDA 13", ("cupy-cuda13x", "nvmath-python")),
}


@app.command(epilog=examples(this_machine="gpubatch info", a_kernel="gpubatch info --kernel adam"))
def info(
    kernel: Annotated[
        str | None, typer.Option(help="Print the CUDA source of this update rule, for --dtype, instead.")
    ] = None,
    dtype: options.DtypeName = "float32",
    as_json: options.AsJson = False,
) -> None:
    """Show the backends, their devices and memory, and why CUDA can be used or not."""
    if kernel is not None:
        known: dict[str, Rule] = {name: getattr(rules, name) for name in rules.__all__}
        rule = known[check_choice("--kernel", kernel, known)]
        of_kernel = rule.trace(), check_choice("--dtype", dtype, options.DTYPES)
        source = "\n".join([*reduce_sources(*of_kernel), update_source(*of_kernel)])
        if as_json:
            print_json(kernel=kernel, dtype=dtype, source=source, versions=versions())
        else:
            typer.echo(source)
        return
    found, auto = [get_backend(spec) for spec in available_backends()], get_backend()
    why_not, processes, products = _why_no_cuda(), ranks_here(), _how_cuda_multiplies(found)
    packages = {name: installed(names) for name, (_, names) in EXTRAS.items()}
    if as_json:
        print_json(
            backends={be.spec: {"device": be.device, "memory": dataclasses.asdict(be.memory())} for be in found},
            cuda=why_not or "available",
            matrix_products={"cpu": cpu_products(), **products},
            kernels=kernels_in_words(),
            ranks=processes,
            extras=packages,
            own_formulas=own_form(),
            auto=auto.spec,
            versions=versions(),
        )
        return
    out = console()
    out.print(", ".join(f"{name} {version}" for name, version in versions().items()))
    table = table_of("backend", "device", "memory", "available now")
    for be in found:
        memory = be.memory()
        table.add_row(be.spec, be.device, format_bytes(memory.total), format_bytes(memory.available))
    out.print(table, soft_wrap=False)
    out.print(f'"auto" is {auto.spec}: {auto.reason}.')
    if why_not:
        out.print(why_not)
    for spec, how in products.items():
        out.print(f"matrix products of a captured step on {spec}: {how}.")
    out.print(f"kernels compiled for the CPU: {kernels_in_words()}.")
    out.print(f"matrix products on the CPU: {cpu_products()}.")
    out.print(f"formulas of your own on a CPU: {own_form()}.")
    out.print(f"ranks: {_ranks_in_words(processes)}.")
    extras = table_of("extra", "for", "installed")
    for name, (what, _) in EXTRAS.items():
        parts = [", ".join(f"{package} {version}" for package, version in packages[name].items() if version)]
        parts += [f"pip install 'gpubatch[{name}]'"] if None in packages[name].values() else []
        extras.add_row(name, what, "; ".join(filter(None, parts)))
    out.print(extras, soft_wrap=False)


def ranks_here() -> dict[str, Any]:
    """The processes that a launcher started, what connects them, and their devices; of one process, what could."""
    ranks = Ranks()
    auto = get_backend()
    nccl = None
    if auto.name == "cuda":
        with contextlib.suppress(ImportError):
            nccl = load_cupy().cuda.nccl.get_version()
    return {
        "size": ranks.size,
        "connected_by": " ".join(ranks.connection.split()),
        "devices": ranks.gather(f"{auto.spec} ({auto.device})"),
        **installed(["mpi4py"]),
        "mpiexec": shutil.which("mpiexec"),
        "nccl": nccl,
    }


def _ranks_in_words(processes: Mapping[str, Any]) -> str:
    version = processes["mpi4py"]
    mpi4py = "no mpi4py: pip install 'gpubatch[parallel]' mpich" if version is None else f"mpi4py {version}"
    if processes["size"] == 1:
        where = processes["mpiexec"] or "no mpiexec on the path"
        return f"one process, as nothing started more of them; {mpi4py}, {where}"
    devices = "; ".join(f"{rank}: {device}" for rank, device in enumerate(processes["devices"]))
    nccl = "" if processes["nccl"] is None else f", NCCL {processes['nccl']}"
    return f"{processes['size']} processes, connected by {processes['connected_by']}, {mpi4py}{nccl}; {devices}"


def installed(packages: Sequence[str]) -> dict[str, str | None]:
    """The version of each package; None where the package is not installed."""
    found: dict[str, str | None] = dict.fromkeys(packages)
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def kernels_in_words() -> str:
    """For what processors the kernels are compiled, and on how many threads they run; or why there are none."""
    library = host_library()
    if isinstance(library, str):
        return library
    most = library.threads()
    threads = f"on up to {most} threads, and on fewer while others use the processors" if most > 1 else "on one thread"
    return f"for {library.level()}, {threads}"


def _why_no_cuda() -> str | None:
    try:
        load_cupy()
    except BackendUnavailableError as error:
        return str(error)
    return None


def _how_cuda_multiplies(backends: Sequence[Backend]) -> dict[str, str]:
    """By spec, what multiplies the matrices of a captured step, or why steps cannot be captured."""
    made = {be.spec: products_for(be, np.dtype(np.float32), "full") for be in backends if be.name == "cuda"}
    return {spec: p.reason if p.capturable else f"none, {p.reason}" for spec, p in made.items()}
