"""The tables and the picture that bench/report.py makes of pytest-benchmark's JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPORT = Path(__file__).parent.parent / "bench" / "report.py"


def entry(name: str, params: dict[str, Any], median: float, **extra: Any) -> dict[str, Any]:
    stats = {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}
    return {"name": f"{name}[...]", "params": params, "stats": stats, "extra_info": extra}


def saved(folder: Path, name: str, *entries: dict[str, Any]) -> Path:
    machine = {"cpu": {"brand_raw": "A CPU", "count": 2}, "machine": "x86_64", "python_version": "3.12.1"}
    path = folder / name
    path.write_text(json.dumps({"benchmarks": entries, "machine_info": machine, "datetime": "2026-01-02T03:04:05"}))
    return path


def report(*arguments: Any, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, REPORT, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def test_one_table_compares_sizes_and_backends(tmp_path: Path) -> None:
    file = saved(
        tmp_path,
        "run.json",
        entry("test_training_step", {"batch": 1024, "spec": "cpu"}, 2e-3),
        entry("test_training_step", {"batch": 64, "spec": "cpu"}, 1.28e-4),
        entry("test_training_step", {"batch": 64, "spec": "cuda"}, 6.4e-5),
        entry("test_training_epoch", {"batch": 64, "spec": "cpu"}, 4.0, samples=8000),
        entry("test_without_a_count", {"spec": "cpu"}, 1.0),
    )
    text = report(file).stdout
    assert text.startswith("run.json: A CPU, 2 CPUs, Python 3.12.1, 2026-01-02\n")
    assert "| batch | cpu | per sample | ratio | cuda | per sample | ratio |\n" in text
    assert (
        "| 64 | 128 µs ±10 % | 2 µs | 2.00 | 64 µs ±10 % | 1 µs | 1.00 |\n"
        "| 1,024 | 2 ms ±10 % | 1.95 µs | 1.95 |  |  |  |\n" in text
    )
    assert (
        "### training epoch\n\n| batch | cpu | per sample | ratio |\n|--:|--:|--:|--:|\n"
        "| 64 | 4 s ±10 % | 500 µs | 1.00 |\n" in text
    )
    assert "without" not in text
    assert "\nFastest per sample: cuda, batch 64.\n" in text


def test_the_work_is_named_once_for_all_sizes(tmp_path: Path) -> None:
    steps = [entry("test_step", {"batch": n, "spec": "cpu"}, 1e-9 * n, work="784-10, Adam") for n in (10, 100)]
    text = report(saved(tmp_path, "run.json", *steps)).stdout
    assert "### step\n\n784-10, Adam\n\n| batch |" in text


def test_a_picture_has_as_many_panels_as_fit_a_screen(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    many = [entry(f"test_{letter}_step", {"size": 10, "spec": "cpu"}, 1e-6) for letter in "abcde"]
    file = saved(tmp_path, "run.json", *many)
    error = report(file, "--plot", tmp_path / "run.png", code=1).stderr
    assert "at most 4 functions fit a screen; choose by --only" in error
    for only, panels in (("a s", 1), ("", 3)):
        few = saved(tmp_path, "few.json", *many[:3])
        report(few, "--only", only, "--plot", tmp_path / "run.svg")
        drawn = (tmp_path / "run.svg").read_text()
        assert drawn.count('id="axes_') == drawn.count('id="legend_') == panels
    assert (
        "no benchmark in these files has an integer parameter and 'z' in its name"
        in report(file, "--only", "z", code=1).stderr
    )


def test_files_stand_side_by_side_and_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steps = [entry("test_optimizer_step", {"size": n, "name": "adam", "spec": "cpu"}, 1e-9 * n) for n in (10, 100)]
    files = [saved(tmp_path, name, *steps) for name in ("old.json", "new.json")]
    text = report(*files, "--plot", tmp_path / "run.png").stdout
    assert "| size | adam cpu (old) | per parameter | ratio | adam cpu (new) | per parameter | ratio |" in text
    assert "| 100 | 100 ns ±10 % | 1 ns | 1.00 | 100 ns ±10 % | 1 ns | 1.00 |" in text
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    files = []
    for machine, median in (("m1", 1e-6), ("m2", 1e-5)):
        (tmp_path / machine).mkdir()
        files.append(saved(tmp_path / machine, "run.json", entry("test_step", {"size": 10, "spec": "cpu"}, median)))
    text = report(*files).stdout
    assert "| size | cpu (m1/run) | per parameter | ratio | cpu (m2/run) | per parameter | ratio |" in text
    assert "| 10 | 1 µs ±10 % | 100 ns | 1.00 | 10 µs ±10 % | 1 µs | 10.00 |" in text
    assert "a file must be given once" in report(files[0], files[0], code=1).stderr


def test_two_measurements_of_one_cell_are_refused(tmp_path: Path) -> None:
    twice = [entry("test_step", {"size": 10, "spec": "cpu"}, median) for median in (1e-6, 2e-6)]
    error = report(saved(tmp_path, "run.json", *twice), code=1).stderr
    assert error == "two benchmarks of step with size=10 are both 'cpu'\n"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"benchmarks": []}', '{"benchmarks": [], "machine_info": {}}'])
def test_a_file_of_something_else_is_told_in_a_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    error = report(file, code=1).stderr
    assert error.count("\n") == 1
    assert error.startswith(f"{file}: expected the JSON of pytest-benchmark")


def test_what_is_no_benchmark_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert "expected the JSON of pytest-benchmark" in report(tmp_path / "other.json", code=1).stderr
    assert "no benchmark in these files" in report(saved(tmp_path, "empty.json"), code=1).stderr
