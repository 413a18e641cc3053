"""Write experiments/README.md from the committed results.

    python experiments/results_table.py [--check]

Every ``experiments/results/NAME.json`` is a report (``allpet.reports``) that a command left in ``outputs/reports`` and
somebody copied here; its ``title`` and ``remarks``, if any, stand above its table: the ``summary`` if it has one, else
its rows; ``tables``, by title, follow. ``results/remarks.md`` holds what is known of a table besides, such as how it
was made, if not by its command alone, under the names of its files. ``--check`` writes nothing and fails where the
page is not what the results say.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from allpet.reports import table

HERE = Path(__file__).parent
HEAD = """# Results

Made by `python experiments/results_table.py` from `experiments/results/*.json`; do not edit. Every table carries the
command that made it, and can be made again by it.
"""


def page(folder: Path) -> str:
    """Return the page for a folder of reports."""
    parts = [HEAD]
    reports = sorted(folder.glob("*.json"))
    known = _remarks(folder / "remarks.md", {path.stem for path in reports})
    for path in reports:
        report = json.loads(path.read_text(encoding="utf-8"))
        hardware = report["hardware"]
        where = f"{hardware.get('gpu') or hardware['processor']}, {hardware['threads']} threads"
        seeds = ", ".join(map(str, report["seeds"]))
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        parts.append(f"## {report.get('title', path.stem)}\n")
        if report.get("remarks"):
            parts.append(f"{report['remarks']}\n")
        if path.stem in known:
            parts.append(f"{known[path.stem]}\n")
        parts.append(f"`{report['command']}`\n\nSeeds {seeds}; {where}; {report['date'][:10]}; {versions}.\n")
        parts.append(table(report.get("summary", report["rows"])) + "\n")
        parts += [f"{title}:\n\n{table(rows)}\n" for title, rows in report.get("tables", {}).items()]
        for picture in sorted(folder.glob(f"{path.stem}*.png")):
            parts.append(f"![{picture.stem}](results/{picture.name})\n")
    return "\n".join(parts)


def _remarks(file: Path, reports: set[str]) -> dict[str, str]:
    """Read what is known of reports besides, by name."""
    found: dict[str, str] = {}
    for part in file.read_text(encoding="utf-8").split("\n## ")[1:] if file.exists() else []:
        names, _, text = part.partition("\n")
        found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    if unknown := sorted(found.keys() - reports):
        sys.exit(f"{file} speaks of {', '.join(unknown)}, of which there is no report: name it as its file.")
    return found


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    arguments = parser.parse_args()
    target, text = HERE / "README.md", page(HERE / "results")
    if not arguments.check:
        target.write_text(text, encoding="utf-8")
    elif not target.exists() or target.read_text(encoding="utf-8") != text:
        sys.exit(f"{target} is not what experiments/results says: run python experiments/results_table.py.")


if __name__ == "__main__":
    main()
