"""The table of faults: what each did to a training, what was lost, what was said.

    python experiments/faults.py [--kills]        or: make faults

Runs ``tests/test_faults.py`` (with ``--kills`` also ``tests/test_kills.py``, minutes) and writes what the tests record
to ``outputs/reports/faults.json``.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

import pytest

from allpet.reports import FOLDER, table, write_report

TESTS = Path(__file__).parents[1] / "tests"
TITLE = "Faults"
REMARKS = (
    "Each row is a fault put into a small training by a test, which passes only if nothing but what the row says was "
    "lost: the same command continues, and the final weights are those of a training that nothing disturbed, to the "
    "bit. Checkpoints are three steps apart here."
)


class Rows:
    """A pytest plugin that collects what the tests of faults record."""

    def __init__(self) -> None:
        self.rows: list[dict[str, str]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the row of a test that has passed."""
        row = {str(name): str(value) for name, value in report.user_properties}
        if report.when == "call" and report.passed and "fault" in row:
            self.rows.append({name: without_places(value) for name, value in row.items()})


def without_places(text: str) -> str:
    """Name files without the folders they lay in, which mean nothing elsewhere."""
    return re.sub(r"/(?:[^\s/:;,()]+/)+([^\s/:;,()]+)", r"\1", text)


def main() -> None:
    """Run the tests and write the report; fail as they do."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", action="store_true", help="also kill a training a hundred times")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the report")
    arguments = parser.parse_args()
    collected, began = Rows(), time.monotonic()
    files = [str(TESTS / "test_faults.py"), *([str(TESTS / "test_kills.py")] if arguments.kills else [])]
    marks = ["-m", "not gpu"] if arguments.kills else []
    status = pytest.main([*marks, "--rootdir", str(TESTS.parent), "-p", "no:cacheprovider", *files], [collected])
    if status:
        sys.exit(int(status))
    print(table(collected.rows))
    path = write_report(
        "faults", collected.rows, [0], arguments.out, title=TITLE, remarks=REMARKS, seconds=time.monotonic() - began
    )
    print(f"Written to {path}.")


if __name__ == "__main__":
    main()
