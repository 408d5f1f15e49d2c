"""Formulas of the user's own, compiled on first use: their bits, their cache, and what happens without a compiler."""

from __future__ import annotations

import itertools
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expressions import programs, rule_of
from families import drawn, every
from hypothesis import strategies as st
from needs import missing
from optimizer_table import CASES, trace_of
from stand_in import stand_in_backend

import gpubatch as gb
from gpubatch.formula import Activation, ScoreLoss, Trace, activations, scores
from gpubatch.ops import Ops, host_compiler as jit, host_library, ops_for, own_form, program
from gpubatch.ops.host_source import library_source
from gpubatch.ops.update import CompiledUpdate, HostUpdate, update_for

F = np.dtype(np.float32)


@pytest.fixture
def library() -> Any:
    found = host_library()
    if isinstance(found, str):
        missing("compiler", f"the compiled kernels are not there: {found}")
    if isinstance(compiler := jit.compiler(), str):
        missing("compiler", compiler)
    return found


@pytest.fixture
def at_level(library: Any) -> Iterator[Callable[[str], None]]:
    """Sets the SIMD level; it is restored after the test."""
    level = library.level()
    yield library.use
    library.use(level)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, library: Any) -> Iterator[Path]:
    """An empty cache, in a process that has not looked for a compiler; the folder where the cache will be."""
    monkeypatch.setenv("GPUBATCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(jit, "PLACES", {})
    for cached in (jit.compiler, jit.warn):
        cached.cache_clear()
    yield tmp_path / "formulas"
    for cached in (jit.compiler, jit.warn):
        cached.cache_clear()


@gb.rule
def drift(w, g, m, t, *, lr=0.1, beta=0.75):
    m = beta * m + 0.2345 * g
    return w - lr * m / (np.sqrt(np.abs(m)) + 0.01), m


@gb.activation
def softsign(x, *, width=1.5):
    return x / (width + np.abs(x))


@gb.score_loss
def log_cosh(z, y):
    return np.abs(z - y) + np.log1p(np.exp(-2 * np.abs(z - y)))


def updates(formulas: list[Trace], dtype: np.dtype, library: Any) -> list[CompiledUpdate]:
    """Rules, compiled together as one library for the SIMD level in use."""
    found = jit.compiler()
    assert isinstance(found, jit.Compiler)
    functions = jit.load_functions(found, library_source(formulas, dtype.name), library.level())
    places = [jit.Place(library.add("rule", dtype.name, [function]), "own") for function in functions]
    return [CompiledUpdate(f, dtype, library, place) for f, place in zip(formulas, places, strict=True)]


# --- bits ------------------------------------------------------------------------------------------------------------


@every("which", ["some", "all"], ["some"])
def test_rules_have_numpy_s_bits(
    which: str, dtype: np.dtype, library: Any, at_level: Callable[[str], None], rng: np.random.Generator
) -> None:
    """As the rules of the build, which test_launch.py compares: here all are compiled as if they were a user's."""
    cases = [trace_of(case) for case in CASES.values()][0 if which == "all" else -6 :]
    compiled: list[CompiledUpdate] = []
    for level in library.levels() if which == "all" else library.levels()[-1:]:
        at_level(level)
        compiled += updates([trace for trace, _ in cases], dtype, library)
    for (trace, hyper), update in zip(itertools.cycle(cases), compiled, strict=False):
        plain = HostUpdate(trace, dtype)
        for n in (1, 17, 40_001):
            ours = tuple(np.abs(rng.standard_normal(n)).astype(dtype) for _ in trace.arrays)
            theirs = tuple(a.copy() for a in ours)
            for t, scale in ((1, 1.0), (2, 0.25)):
                control = np.array([scale, 0], dtype)
                scalars = [trace.evaluate(t, **hyper)]
                assert update.at_once([ours], scalars, control)
                plain([theirs], scalars, control)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=trace.name)


EVERY_ELEMENTWISE = {n: getattr(m, n) for m in (activations, scores) for n in m.__all__}


@every("formula", EVERY_ELEMENTWISE, ["tanh", "mse"])
def test_activations_and_losses_have_the_bits_of_the_build(
    formula: Activation | ScoreLoss, dtype: np.dtype, library: Any, rng: np.random.Generator
) -> None:
    kind = "activation" if isinstance(formula, Activation) else "score loss"
    built_in = jit.place_of(library, formula, dtype.name)
    assert built_in.form == "compiled"
    found = jit.compiler()
    assert isinstance(found, jit.Compiler)
    own = library.add(
        kind, dtype.name, jit.load_functions(found, library_source([formula], dtype.name), library.level())
    )
    x, y = (rng.standard_normal((301, 33)).astype(dtype) for _ in range(2))
    bias, results = rng.standard_normal(33).astype(dtype), []
    for place in (built_in.number, own):
        out, kept, dx, db = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x), np.zeros_like(bias)
        partial, loss = np.zeros((64, 33), dtype), np.zeros(1, dtype)
        if isinstance(formula, Activation):
            bound = formula.bind(**dict.fromkeys(formula.required, 0.3))
            form = formula.form(dtype.name)
            assert library.activate(place, bound.scalars(form.forward), x, bias, out, kept)
            read = kept if bound.keeps else out
            assert library.activation_gradient(place, bound.scalars(form.backward), read, y, dx, db, partial)
        else:
            scalars = formula.bind().scalars(formula.form(dtype.name, "loss", "dz"))
            parts = np.zeros(64)
            assert library.score_loss(place, scalars, x, y, dx, parts, loss, True, None, None)
        results.append((out, kept, dx, db, loss))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@gb.rule
def exp_of(w, g, t):
    return (np.exp(g),)


@gb.rule
def log_of(w, g, t):
    return (np.log(g),)


@gb.rule
def log1p_of(w, g, t):
    return (np.log1p(g),)


@gb.rule
def tanh_of(w, g, t):
    return (np.tanh(g),)


@gb.rule
def power_of(w, g, t):
    return (w**g,)


# NumPy's own forms of these may differ by a few units of the last place, as activations do.
ROUNDED = {np.exp: exp_of, np.log: log_of, np.log1p: log1p_of, np.tanh: tanh_of, np.power: power_of}


def applied(update: CompiledUpdate) -> Callable[..., None]:
    """A function of one or two operands, as Program calls it, by a compiled rule."""

    def call(*operands: np.ndarray, out: np.ndarray) -> None:
        wide = [np.array(np.broadcast_to(x, out.shape), update.dtype) for x in operands]
        w, g = wide if len(wide) == 2 else (np.empty_like(wide[0]), wide[0])
        assert update.at_once([(w, g)], [()])
        out[...] = w

    return call


@pytest.mark.exhaustive
def test_functions_of_infinity_zero_and_nan_are_numpy_s(dtype: np.dtype, library: Any) -> None:
    x = np.array([-np.inf, -2, -1, -0.0, 0, 1, np.inf, np.nan], dtype)
    compiled = updates([rule.trace() for rule in ROUNDED.values()], dtype, library)
    for f, call in zip(ROUNDED, map(applied, compiled), strict=True):
        operands, out = [x] * f.nin, np.empty_like(x)
        call(*operands, out=out)
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(out, f(*operands), 4 * np.finfo(dtype).eps, err_msg=f.__name__)


@drawn(1, 25, many=st.lists(st.tuples(programs(), programs()), min_size=8, max_size=20), single=st.booleans())
def test_any_expression_has_numpy_s_bits(many: list[tuple[Any, Any]], single: bool) -> None:
    """NumPy's form with the compiled exp, log, log1p, tanh and power; all else is exact."""
    library = host_library()
    if isinstance(library, str) or isinstance(jit.compiler(), str):
        missing("compiler", "formulas cannot be compiled")
    dtype, traces = np.dtype(np.float32 if single else np.float64), [rule_of(*each).trace() for each in many]
    compiled = updates([*(rule.trace() for rule in ROUNDED.values()), *traces], dtype, library)
    functions = dict(zip(ROUNDED, map(applied, compiled), strict=False))
    for trace, update in zip(traces, compiled[len(ROUNDED) :], strict=True):
        plain = HostUpdate(trace, dtype)
        plain.program.steps = [(functions.get(f, f), pick, out) for f, pick, out in plain.program.steps]
        ours = tuple(np.random.default_rng(5).standard_normal((4, 40)).astype(dtype))
        theirs = tuple(a.copy() for a in ours)
        scalars = [trace.evaluate(3, lr=0.7)]
        assert update.at_once([ours], scalars)
        plain([theirs], scalars)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=trace.c)


@gb.rule
def loop_names(w, g, i, row, table, first, scalars, array0, element1, formula_0, t, *, scale=0.5, T=2.0):
    return w - scale * g * T, row, table, first, scalars, array0, element1, formula_0, i + 1


def test_state_may_have_the_names_of_the_loop(library: Any) -> None:
    trace = loop_names.trace()
    [compiled], plain = updates([trace], F, library), HostUpdate(trace, F)
    ours = tuple(np.full(5, number, F) for number, _ in enumerate(trace.arrays))
    theirs = tuple(a.copy() for a in ours)
    for update in (compiled, plain):
        update([ours if update is compiled else theirs], [trace.evaluate(1, scale=0.5, T=2.0)])
    np.testing.assert_array_equal(ours, theirs)


def test_the_options_are_those_of_the_build() -> None:
    """Otherwise the bits might differ: an option on contraction, or on errno, chooses other instructions."""
    text = (Path(gb.__file__).parent.parent / "CMakeLists.txt").read_text()
    options = text.partition("target_compile_options(kernels_${level} PRIVATE ")[2].partition(")")[0].split()
    assert options == [option for option in jit.OPTIONS if option[:3] in ("-O3", "-fn", "-ff")]
    assert "-march=x86-64-${level}" in text
    assert jit.level_options("x86-64-v3") == ["-march=x86-64-v3"]
    assert jit.level_options("plain") == []


# --- what runs -------------------------------------------------------------------------------------------------------


def steps_of(opt: gb.Optimizer, w: np.ndarray) -> np.ndarray:
    for g in (0.5, -1.0, 2.0):
        opt.step([np.full_like(w, g)])
    return w


def test_a_rule_of_ones_own_is_compiled(fresh: Path, dtype: np.dtype) -> None:
    opt = gb.Optimizer(drift, [w := np.linspace(-1, 1, 100, dtype=dtype)])
    program = jit.compiler().program
    assert opt.form == f"compiled on first use by {program}"
    plain = update_for(opt._trace, dtype, opt.backend)
    assert isinstance(plain, CompiledUpdate)
    assert steps_of(opt, w).dtype == dtype
    assert len([*fresh.glob("*.so")]) == 1
    assert own_form().startswith(f"compiled on first use by {program} (")
    assert own_form().endswith(f", kept in {fresh} (1 files, {next(fresh.glob('*.so')).stat().st_size / 1024:.0f} KiB)")


def test_the_form_is_said(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gb.Adam([np.zeros(3)]).form == "compiled"
    half = gb.Optimizer(drift, [np.zeros(3, np.float16)])
    assert half.form == f"compiled on first use by {jit.compiler().program}"
    net = gb.Network([gb.Dense(3, 2), gb.Tanh(), gb.Elementwise(softsign)], loss=log_cosh, backend="cpu")
    assert net.forms == {"tanh": "compiled", "softsign": half.form, "log_cosh": half.form}
    assert gb.mlp([3, 2], loss="svm", backend="cpu").forms == {}
    monkeypatch.setattr("gpubatch.ops.update.host_library", lambda: "not built")
    assert gb.Optimizer(drift, [np.zeros(3)]).form == "NumPy: not built"


def test_the_form_of_a_network_without_the_library_and_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpubatch.ops.table.host_library", lambda: "not built")
    assert Ops().form(softsign, F) == "NumPy: not built"
    assert ops_for(stand_in_backend(), F).form(softsign, F) == "CUDA kernel"


def test_a_network_with_an_activation_and_a_loss_of_ones_own(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and by NumPy it learns the same, and NumPy's program is not run where the formula is compiled."""
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((64, 5)).astype(F), rng.standard_normal((64, 2)).astype(F)
    losses = []
    for on in ("1", "0"):
        monkeypatch.setenv("GPUBATCH_JIT", on)
        monkeypatch.setattr(jit, "PLACES", {})
        jit.compiler.cache_clear()
        # Bound anew, so that what was found for the other form is not remembered.
        act = Activation(softsign.name, softsign.formula, softsign.required, softsign.defaults)
        loss = ScoreLoss(log_cosh.name, log_cosh.formula, log_cosh.required, log_cosh.defaults)
        net = gb.mlp([5, 8, 2], activation=act, loss=loss, seed=1, backend="cpu")
        if on == "1":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(program.Program, "run", None)
                net.loss_and_grad(X, Y)
        opt = gb.Optimizer(drift, net.parameters)
        found = []
        for _ in range(20):
            found.append(net.loss_and_grad(X, Y)[0])
            opt.step()
        losses.append(found)
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][-1] < losses[0][0]
    assert len([*fresh.glob("*.so")]) == 3


# --- the cache -------------------------------------------------------------------------------------------------------


def script(folder: Path, text: str) -> str:
    """A program that stands for a compiler."""
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@pytest.fixture
def counted(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], int]:
    """How often the compiler has run."""
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", script(tmp_path, f'echo >> "{log}"\nexec "{jit.compiler().program}" "$@"'))
    jit.compiler.cache_clear()
    return lambda: len(log.read_text()) if log.exists() else 0


def again(monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the optimizer as another process would, which has compiled nothing; returns its form."""
    monkeypatch.setattr(jit, "PLACES", {})
    opt = gb.Optimizer(drift, [w := np.linspace(-1, 1, 100)])
    steps_of(opt, w)
    return opt.form


def test_a_file_is_for_its_user_alone_and_used_again(
    fresh: Path, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        assert again(monkeypatch).startswith("compiled on first use")
        assert counted() == 1
    [file] = fresh.iterdir()
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.stat().st_uid == os.geteuid()


def test_another_level_another_type_and_another_compiler_are_compiled_for(
    fresh: Path, counted: Callable[[], int], at_level: Callable[[str], None], library: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    levels = library.levels()
    for level in (*levels, *levels):
        at_level(level)
        again(monkeypatch)
    assert counted() == len(levels)
    gb.Optimizer(drift, [np.zeros(3, F)])
    assert counted() == len(levels) + 1
    with open(tmp_path / "cxx", "a") as file:
        file.write("# another version\n")
    again(monkeypatch)
    assert counted() == len(levels) + 2


# What a file of the cache is replaced by: of its bytes, and those of another sound file.
DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "empty": lambda own, other: b"",
    "truncated": lambda own, other: own[:-1000],
    "another byte": lambda own, other: b"\0" + own[1:],
    "another's": lambda own, other: other,
    "writable by all": lambda own, other: own,
}


@every("damage", DAMAGES.keys(), ["truncated", "another's"])
def test_an_unsound_file_is_compiled_anew(
    damage: str, fresh: Path, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    again(monkeypatch)
    [file] = fresh.iterdir()
    gb.Optimizer(drift, [np.zeros(3, F)])
    [other] = {*fresh.iterdir()} - {file}
    assert counted() == 2
    whole = file.read_bytes()
    damaged = tmp_path / "damaged"  # replaces the file: what this process has loaded must stay
    damaged.write_bytes(DAMAGES[damage](whole, other.read_bytes()))
    damaged.chmod(0o666 if damage == "writable by all" else 0o600)
    damaged.replace(file)
    assert again(monkeypatch).startswith("compiled on first use")
    assert counted() == 3
    assert file.read_bytes() == whole
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again(monkeypatch)
    assert counted() == 3


def test_what_was_not_used_for_longest_is_removed(
    fresh: Path, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    again(monkeypatch)
    [used] = fresh.iterdir()
    size = used.stat().st_size
    idle = [fresh / f"{i}.so" for i in range(3)]
    for i, path in enumerate(idle):
        path.write_bytes(bytes(size))
        os.utime(path, (10 + i, 10 + i))
    os.utime(used, (1, 1))
    again(monkeypatch)
    assert counted() == 1
    monkeypatch.setattr(jit, "MOST_BYTES", 3.5 * size)
    gb.Optimizer(drift, [np.zeros(3, F)])
    [new] = {*fresh.iterdir()} - {used, *idle}
    assert {*fresh.iterdir()} == {used, new, idle[2]}
    monkeypatch.setattr(jit, "MOST_BYTES", 1)
    used.unlink()
    assert again(monkeypatch).startswith("compiled on first use")
    assert [*fresh.iterdir()] == [used]  # larger than all that may be kept, but in use


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GPUBATCH_CACHE_DIR", "here")
    assert jit.cache_folder() == Path.cwd() / "here" / "formulas"
    monkeypatch.delenv("GPUBATCH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert jit.cache_folder() == tmp_path / "gpubatch" / "formulas"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(jit.sys, "platform", "linux")
    assert jit.cache_folder() == tmp_path / ".cache" / "gpubatch" / "formulas"
    monkeypatch.setattr(jit.sys, "platform", "darwin")
    assert jit.cache_folder() == tmp_path / "Library" / "Caches" / "gpubatch" / "formulas"


@pytest.mark.parametrize("where", ["a file", "a file system of the kernel's", "no home"])
def test_without_a_place_for_the_cache_a_private_folder_will_do(
    where: str, fresh: Path, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if where == "no home":
        monkeypatch.setattr(jit, "cache_folder", lambda: None)
    else:
        monkeypatch.setenv("GPUBATCH_CACHE_DIR", str(tmp_path / "log" if where == "a file" else "/proc/gpubatch"))
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(jit.tempfile, "tempdir", str(temporary))
    for runs in (1, 2):
        (tmp_path / "log").touch()
        assert again(monkeypatch).startswith("compiled on first use")
        assert counted() == runs
    assert [*temporary.iterdir()] == []
    assert not fresh.exists()
    assert own_form().startswith("compiled on first use")


@pytest.mark.parametrize("mode", [0o777, 0o720])
def test_a_folder_that_others_can_write_to_is_refused(
    mode: int, fresh: Path, counted: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.mkdir()
    fresh.chmod(mode)
    with pytest.warns(gb.CompilerWarning, match=rf"other users can write to {fresh}, so the cache {fresh} is not used"):
        assert again(monkeypatch).startswith("NumPy: other users can write to")
    assert counted() == 0
    assert [*fresh.iterdir()] == []
    assert "other users can write to" in own_form()


def test_a_folder_that_others_can_replace_is_refused(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(gb.CompilerWarning, match=rf"other users can write to {tmp_path}, so the cache"):
        again(monkeypatch)
    tmp_path.chmod(0o1777)  # as /tmp
    assert again(monkeypatch).startswith("compiled on first use")


def test_a_folder_of_another_user_is_refused(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit.os, "geteuid", lambda: 12345)
    with pytest.warns(gb.CompilerWarning, match="belongs to another user; set GPUBATCH_CACHE_DIR to a folder of yours"):
        again(monkeypatch)


# --- many at once ----------------------------------------------------------------------------------------------------


def test_threads_that_use_it_first_at_the_same_time(fresh: Path) -> None:
    start, forms = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        opt = gb.Optimizer(drift, [w := np.linspace(-1, 1, 100)])
        forms.append((opt.form, steps_of(opt, w).tobytes()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(forms) == 4
    assert len(set(forms)) == 1
    assert len([*fresh.iterdir()]) == 1


PROCESS = """
import sys; sys.path[:0] = [{tests!r}]
import numpy as np, gpubatch as gb
from test_host_compiler import drift, steps_of
opt = gb.Optimizer(drift, [w := np.linspace(-1, 1, 100)])
print(opt.form, steps_of(opt, w).tobytes().hex())
"""


@pytest.mark.exhaustive
def test_processes_that_use_it_first_at_the_same_time(fresh: Path) -> None:
    code = PROCESS.format(tests=str(Path(__file__).parent))
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(6)]
    said = {process.communicate(timeout=300)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 6
    assert len(said) == 1
    assert next(iter(said)).startswith("compiled on first use")
    assert len([*fresh.iterdir()]) == 1


# --- without a compiler ----------------------------------------------------------------------------------------------

# What a program does that stands for a compiler, and what is said about it.
COMPILERS: dict[str, tuple[str | None, str]] = {
    "it says why": (
        "echo 'x.cpp:1: error: out of luck' >&2; echo more >&2; exit 3",
        r"cxx failed with exit status 3: x.cpp:1: error: out of luck",
    ),
    "it says nothing": ("exit 1", r"cxx failed with exit status 1: it says nothing"),
    "it makes nothing": ("exit 0", r"what \S+cxx makes cannot be written or loaded: .*No such file"),
    "it makes no library": (
        'for out in "$@"; do :; done; echo nonsense > "$out"',
        r"what \S+cxx makes cannot be written or loaded: ",
    ),
    "it hangs": ("sleep 600 & wait", r"cxx was not done after 1 seconds"),
    "it is missing": (None, r"CXX names 'no-such-compiler', and no such program was found"),
}


@pytest.mark.parametrize("name", COMPILERS)
def test_a_compiler_that_fails_is_told_once_and_numpy_does_the_work(
    name: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: np.random.Generator
) -> None:
    text, words = COMPILERS[name]
    monkeypatch.setenv("CXX", "no-such-compiler" if text is None else f"{script(tmp_path, text)} --option")
    monkeypatch.setattr(jit, "SECONDS", 1)
    jit.compiler.cache_clear()
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        opt = gb.Optimizer(drift, [w := np.ones(100)])
        other = gb.Optimizer(drift, [np.ones(100, F)])
        layer = gb.mlp([5, 8, 2], activation=softsign, loss="mse", seed=1, backend="cpu")
        layer.loss_and_grad(rng.standard_normal((9, 5)).astype(F), rng.standard_normal((9, 2)).astype(F))
    assert time.perf_counter() - start < 60
    assert [(w.category, "formulas of your own run on NumPy" in str(w.message)) for w in told] == [
        (gb.CompilerWarning, True)
    ]
    assert told[0].message.args[0].endswith(". GPUBATCH_JIT=0 accepts that without this warning")
    for said in (opt.form, other.form, str(told[0].message)):
        assert re.search(words, said)
    assert isinstance(opt._update, HostUpdate)
    expected = np.ones(100)
    plain = HostUpdate(opt._trace, expected.dtype)
    state = np.zeros(100)
    for t, g in enumerate((0.5, -1.0, 2.0), 1):
        plain([(expected, np.full(100, g), state)], [opt._trace.evaluate(t, lr=0.1, beta=0.75)])
    np.testing.assert_array_equal(steps_of(opt, w), expected)


@gb.rule
def squashed(w, g, t, *, lr=0.1):
    return (w - lr * np.tanh(g),)


def test_a_formula_that_is_not_compiled_leaves_the_others_compiled(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is told once for each formula, and tried once; the compiler stands for one with a fault."""
    lines = f"""source=$(cat)
echo >> {tmp_path}/runs
case "$source" in *0.2345*) echo "<stdin>:7: error: internal compiler error" >&2; exit 1;; esac
printf %s "$source" | {jit.compiler().program} "$@"
"""
    monkeypatch.setenv("CXX", script(tmp_path, lines))
    jit.compiler.cache_clear()
    with pytest.warns(gb.CompilerWarning, match="^the rule drift runs on NumPy, .*7: error: internal compiler error$"):
        opt = gb.Optimizer(drift, [np.ones(100)])
    assert opt.form.startswith("NumPy: ")
    assert gb.Optimizer(squashed, [np.ones(100)]).form.startswith("compiled on first use by")
    assert gb.Optimizer(drift, [np.ones(100)]).form == opt.form
    assert (tmp_path / "runs").read_text() == "\n" * 3  # drift, a library without a formula, and squashed


@pytest.mark.exhaustive
def test_the_benchmark_runs(fresh: Path, tmp_path: Path) -> None:
    """It checks that the two of a pair give the same bits; the times are not tested."""
    script = Path(gb.__file__).parent.parent / "bench" / "own_rules.py"
    out = tmp_path / "out.json"
    command = [sys.executable, str(script), "--rounds", "1", "--sizes", "1000", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert json.loads(out.read_text()).keys() >= {"date", "processor", "compiler", "adam", "elementwise", "fit"}
