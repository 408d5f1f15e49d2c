"""How a formula is run: compiled for the CPU, and by CUDA: one compilation, one launch a step, a table of arrays."""

from __future__ import annotations

import gc
import math
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import every
from needs import missing
from optimizer_table import CASES, FAST, Case, trace_of
from stand_in import StandIn, stand_in_backend

import gpubatch as gb
from gpubatch.backend import CudaBackend
from gpubatch.errors import ArgumentError
from gpubatch.ops import compile, update, update_for


@pytest.fixture
def device() -> CudaBackend:
    return stand_in_backend()


@pytest.fixture
def cupy(device: CudaBackend) -> StandIn:
    return device.cupy


# --- compiled for the CPU ------------------------------------------------------------------------------------------


@pytest.fixture
def library() -> Any:
    found = compile.host_library()
    if isinstance(found, str):
        missing("compiler", f"the compiled formulas are not there: {found}")
    return found


BUILT_IN = {name: case for name, case in CASES.items() if not name.startswith("custom")}


@pytest.fixture
def every_level(library: Any) -> Iterator[Iterator[str]]:
    """Sets each SIMD level of this processor in turn, with two threads."""
    threads, widest = library.threads(), library.level()
    library.set_threads(2)
    yield (library.use(level) or level for level in library.levels())
    library.set_threads(threads)
    library.use(widest)


@pytest.mark.parametrize("case", BUILT_IN.values(), ids=BUILT_IN)
def test_every_rule_is_compiled_and_gives_numpys_bits(
    case: Case, every_level: Iterator[str], dtype: np.dtype, rng: np.random.Generator
) -> None:
    trace, hyper = trace_of(case)
    compiled = update.update_for(trace, dtype, gb.get_backend("cpu"))
    assert isinstance(compiled, update.CompiledUpdate)
    plain = update.HostUpdate(trace, dtype)
    sizes = [0, 1, 17, 80_001]  # the last one is worth two threads
    groups = [tuple(np.abs(rng.standard_normal(n)).astype(dtype) for _ in trace.arrays) for n in sizes]
    wide, tall = ([np.abs(rng.standard_normal((30, 10))).astype(dtype) for _ in trace.arrays] for _ in range(2))
    groups += [tuple(a[:, ::2] for a in wide), tuple(a[1:, :5].T for a in tall)]
    expected = [tuple(a.copy() for a in group) for group in groups]
    for t, level in enumerate(every_level, 1):
        scalars = [trace.evaluate(t, **hyper)]
        compiled(groups, scalars)
        plain(expected, scalars)
        for ours, theirs in zip(groups, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=level)


def test_a_row_of_scalars_that_is_not_there_is_refused(library: Any) -> None:
    arrays = [(np.ones(3), np.ones(3))]
    compiled = update.update_for(gb.rules.sgd.trace(), np.dtype("float64"), gb.get_backend("cpu"))
    assert isinstance(compiled, update.CompiledUpdate)
    for row_of in ([2], [-1]):
        with pytest.raises(IndexError, match="row_of must name rows of scalars"):
            compiled.at_once(arrays, [(0.1,), (0.2,)], None, row_of)
    assert arrays[0][0].tolist() == [1, 1, 1]


def test_other_arrays_are_noticed(library: Any, rng: np.random.Generator) -> None:
    """Arrays are not remembered: a new gradient is used in every step."""
    w, expected = np.zeros(5), np.zeros(5)
    opt = gb.SGD([w], 1.0)
    for _ in range(20):
        g = rng.standard_normal(5)
        opt.step([g])
        expected -= g
        del g
    np.testing.assert_array_equal(w, expected)


def test_a_forked_child_makes_threads_of_its_own(library: Any) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    code = (
        "import os, numpy as np, gpubatch as gb\n"
        "w = np.zeros(10**6); opt = gb.SGD([w], 1.0); g = np.ones(10**6); opt.step([g])\n"
        "child = os.fork()\n"
        "opt.step([g])\n"
        "assert (w == -2).all()\n"
        "os._exit(0) if child == 0 else None\n"
        "assert os.waitpid(child, 0)[1] == 0"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_it_can_be_switched_off() -> None:
    code = "from gpubatch.ops import compile; print(compile.host_library())"
    env = {**os.environ, "GPUBATCH_HOST": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout == "switched off by GPUBATCH_HOST=0\n"


@pytest.mark.parametrize("variable", ["GPUBATCH_HOST", "GPUBATCH_JIT"])
def test_a_switch_is_0_or_1(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "maybe")
    with pytest.raises(ArgumentError, match=f"^{variable} must be 0 or 1, got 'maybe'$"):
        compile.switched_off(variable)
    for value, off in (("0", True), ("1", False), ("", False)):
        monkeypatch.setenv(variable, value)
        assert compile.switched_off(variable) == off


def test_compiled_kernels_that_a_source_tree_hides_are_named(library: Any, tmp_path: Path) -> None:
    tree = Path(gb.__file__).parent
    shutil.copytree(tree, tmp_path / "gpubatch", ignore=shutil.ignore_patterns("_host*", "__pycache__"))
    code = "from gpubatch.ops import compile; print(compile.host_library())"
    # Without the .pth files of site-packages, by which an installation with -e comes before the folder.
    path = [str(Path(library.__file__).parents[1]), *filter(None, sys.path)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    python = [sys.executable, "-S", "-c", code]
    done = subprocess.run(python, capture_output=True, text=True, check=True, env=env, cwd=tmp_path)
    assert str(tmp_path) in done.stdout
    assert "pip install -e" in done.stdout
    assert "CompilerWarning: NumPy does the work of the compiled kernels" in done.stderr


def test_compiled_kernels_of_other_sources_are_told(library: Any, tmp_path: Path) -> None:
    tree = Path(gb.__file__).parent
    for folder in (tree, tree.parent / "kernels"):
        shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("_host*", "__pycache__"))
    shutil.copy(library.__file__, tmp_path / "gpubatch")
    code = "from gpubatch.ops import compile; print(compile.host_library())"
    python = [sys.executable, "-S", "-c", code]  # without site, whose hook finds an installation first
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}

    def done() -> subprocess.CompletedProcess[str]:
        return subprocess.run(python, capture_output=True, text=True, check=True, env=env, cwd=tmp_path)

    assert done().stdout.startswith("<module 'gpubatch._host'")
    source = tmp_path / "kernels" / "host.cpp"
    source.write_text(source.read_text() + "// changed\n")
    found = done()
    assert "was built from other sources" in found.stdout
    assert "pip install -e" in found.stdout
    assert "CompilerWarning: NumPy does the work of the compiled kernels" in found.stderr


def test_the_digest_is_of_all_that_is_included() -> None:
    found, left = set[str](), ["host.cpp", "host_kernels.cpp"]
    while left:
        found.add(name := left.pop())
        left += (
            set(re.findall(r'#include "(\w+\.\w+)"', compile.kernel_source(name))) - found - {"formulas.h", "sources.h"}
        )
    assert found == set(compile.HOST_SOURCES)


# --- CUDA ----------------------------------------------------------------------------------------------------------

SHAPES = {"W": (300, 70), "b": (70,), "none": (0, 3)}


@every("case", CASES, FAST)
def test_a_step_is_one_launch_for_each_pass_and_gives_numpys_bits(
    case: Case, cupy: StandIn, device: CudaBackend, rng: np.random.Generator
) -> None:
    start = {k: rng.standard_normal(s) for k, s in SHAPES.items()}
    on_device, on_host = gb.Parameters(start, device), gb.Parameters(start, "cpu")
    a, b = case.make(on_device), case.make(on_host)
    passes = len(a._trace.passes)
    for step in range(1, 4):
        g = rng.standard_normal(on_host.size).astype(np.float32)
        on_device.grads.flat[...] = g
        on_host.grads.flat[...] = g
        a.step()
        b.step()
        assert len(cupy.launches) == step * passes
        # The device adds in another order than the CPU.
        roundings = 64 * np.finfo(np.float32).eps * (passes > 1)
        np.testing.assert_allclose(on_device.flat.get(), on_host.flat, rtol=roundings, atol=roundings)
    assert len(cupy.compiled) == passes
    blocks = -(-on_host.size // 4096) if passes == 1 else sum(-(-math.prod(s) // 4096) for s in SHAPES.values())
    assert cupy.launches[:passes] == [
        *[("reduce_arrays", (blocks,), (256,))] * (passes - 1),
        ("update_arrays", (blocks,), (256,)),
    ]


def test_arrays_that_lie_apart_are_one_launch_too(cupy: StandIn, device: CudaBackend, rng: np.random.Generator) -> None:
    start = {str(i): rng.standard_normal(n) for i, n in enumerate([5000, 1, 17, 4096, 0])}
    params, expected = gb.Parameters(start, device), gb.Parameters(start, "cpu")
    a, b = gb.Adam(params), gb.Adam(expected)
    for step in range(1, 4):
        grads = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in start.items()}
        a.step({k: device.asarray(g) for k, g in grads.items()})  # new arrays in new places every time
        b.step(grads)
        assert len(cupy.launches) == step
        np.testing.assert_array_equal(params.flat.get(), expected.flat)
    assert cupy.launches == [("update_arrays", (2 + 1 + 1 + 1,), (256,))] * 3


def test_the_table_is_laid_out_again_only_for_other_arrays(
    device: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    original = update.piece_table
    monkeypatch.setattr(update, "piece_table", lambda *a: made.append(1) or original(*a))
    params = gb.Parameters({"w": (10,)}, device)
    opt = gb.SGD(params, 0.1)
    for _ in range(3):
        opt.step()
    assert len(made) == 1
    opt.step(device.zeros(10, "float32"))
    assert len(made) == 2


@pytest.mark.parametrize("form", [dict, list])
def test_gradients_that_were_looked_at_are_not_looked_at_again(
    form: type, device: CudaBackend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    original = gb.Optimizer._gradient
    monkeypatch.setattr(gb.Optimizer, "_gradient", lambda *a: looked.append("") or original(*a))
    start = {str(i): rng.standard_normal(n).astype(np.float32) for i, n in enumerate([50, 3, 17])}
    params, expected = gb.Parameters(start, device), gb.Parameters(start, "cpu")
    a, b = gb.Adam(params), gb.Adam(expected)

    def step(grads: dict[str, np.ndarray], looks: bool) -> None:
        for g in grads.values():
            g[...] = rng.standard_normal(g.shape)
        looked.clear()
        a.step(grads if form is dict else list(grads.values()))
        assert len(looked) == 3 * looks
        b.step({name: g.get() for name, g in grads.items()})
        np.testing.assert_array_equal(params.flat.get(), expected.flat)

    grads = {name: device.zeros(w.shape, "float32") for name, w in start.items()}
    step(grads, True)
    step(grads, False)
    step(dict(grads), False)
    step({**grads, "1": device.zeros(3, "float32")}, True)
    step(grads, True)
    if form is dict:  # the same arrays in another order come under other names
        step({name: grads[name] for name in reversed(grads)}, True)
    a.load_state_dict(a.state_dict())
    step(grads, True)
    kept = weakref.ref(grads["0"])
    grads.clear()
    gc.collect()
    assert kept() is None


def test_two_optimizers_share_the_kernel_and_not_the_scalars(cupy: StandIn, device: CudaBackend) -> None:
    p, q = gb.Parameters({"w": (4,)}, device), gb.Parameters({"w": (4,)}, device)
    p.grads.flat[...] = q.grads.flat[...] = 1.0
    a, b = gb.SGD(p, 0.1), gb.SGD(q, 0.2)
    a.step()
    b.step()
    a.step()
    assert len(cupy.compiled) == 1
    np.testing.assert_allclose(p.flat.get(), -0.2, rtol=1e-6)
    np.testing.assert_allclose(q.flat.get(), -0.2, rtol=1e-6)


def test_a_strided_array_is_refused(device: CudaBackend) -> None:
    update = update_for(gb.rules.sgd.trace(), np.dtype("float32"), device)
    strided = device.zeros((4, 8), "float32")[:, ::2]
    with pytest.raises(gb.ShapeError, match="needs C-contiguous arrays"):
        update([(strided, strided)], [(0.1,)], None)


def test_a_missing_kernel_file_says_where_it_was_looked_for() -> None:
    with pytest.raises(
        FileNotFoundError, match=r"nothing.cuh is in none of .*kernels.*; the installation is incomplete"
    ):
        compile.kernel_source("nothing.cuh")
