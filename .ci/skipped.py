"""Print the tests that a run skipped: ``python .ci/skipped.py RESULTS.xml``, for ``pytest @FILE``.

Tests marked gpu are excluded by ``-m``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def skipped(results: Path) -> list[str]:
    """Node ids in order; for a file skipped as a whole, the file."""
    found = []
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("skipped") is not None:
            module, name = case.get("classname"), case.get("name", "")
            found.append(f"{path(module)}::{name}" if module else path(name))
    return found


def path(module: str) -> str:
    """The file of a module."""
    return module.replace(".", "/") + ".py"


if __name__ == "__main__":
    print("\n".join(skipped(Path(sys.argv[1]))))
