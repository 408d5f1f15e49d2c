"""scikit-learn's own tests of its networks, run on gpubatch's estimators."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from needs import peer

peer("sklearn")

pytestmark = [pytest.mark.exhaustive, pytest.mark.filterwarnings("default")]

# Tests of scikit-learn's that are not about behaviour, and what takes their place here.
APART = {
    "test_gradient": "calls the private _loss_grad_lbfgs; test_sklearn.test_lbfgs_finds_scikit_learns_minimum",
}


def patched() -> dict[str, Any]:
    """The names of scikit-learn's module of tests, where its estimators are gpubatch's."""
    spec = importlib.util.find_spec("sklearn.neural_network")
    assert spec is not None
    assert spec.origin is not None
    path = Path(spec.origin).parent / "tests" / "test_mlp.py"
    imported = "from sklearn.neural_network import MLPClassifier, MLPRegressor"
    source = path.read_text()
    assert source.count(imported) == 1
    names: dict[str, Any] = {"__name__": "patched_test_mlp"}
    exec(
        compile(source.replace(imported, imported.replace("sklearn.neural_network", "gpubatch.sklearn")), path, "exec"),
        names,
    )
    return names


THEIRS = {name: test for name, test in patched().items() if name.startswith("test_")}
globals().update({name: test for name, test in THEIRS.items() if name not in APART})


@pytest.fixture(scope="module")
def global_random_seed() -> int:
    return 42


def test_the_table_names_tests_that_there_are() -> None:
    assert set(APART) <= set(THEIRS)
    assert len(THEIRS) > 40
