"""The tests that a run skipped: ``python .ci/skipped.py RESULTS.xml``, for ``pytest @FILE``.

Those marked gpu are skipped again by ``-m``; a test that takes its parameters from what is installed is named whole.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree


def skipped(results: Path) -> list[str]:
    """Node ids, in order; of a file that was skipped whole, the file."""
    found = []
    for case in ElementTree.parse(results).iter("testcase"):
        if case.find("skipped") is not None:
            parts = (case.get("classname") or "").split(".")
            file = "/".join(parts) + ".py"
            found.append(f"{file}::{case.get('name')}" if case.get("classname") else f"{case.get('name')}")
    return found


if __name__ == "__main__":
    print("\n".join(skipped(Path(sys.argv[1]))))
