"""Reports on disk."""

import json
from pathlib import Path

import pytest

from allpet.reports import table, write_report
from experiments import results_table

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def test_a_report_says_what_made_it_and_is_replaced_whole(tmp_path):
    write_report("speed", [{"old": 1}], [0], tmp_path)
    path = write_report("speed", [{"method": "a", "rate": 0.123456}, {"method": "b"}], [1, 2], tmp_path, seconds=3.0)
    report = json.loads(path.read_text())
    assert {"command", "date", "versions", "hardware"} <= report.keys()
    assert report["seeds"] == [1, 2]
    assert report["seconds"] == 3.0
    assert report["rows"][0] == {"method": "a", "rate": 0.123456}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["speed.json", "speed.md"]
    assert "0.1235" in (tmp_path / "speed.md").read_text()


def test_a_table_lines_up_and_leaves_unknown_cells_empty():
    lines = table([{"method": "ours", "rate": 2.0}, {"method": "b", "error": 0.5}]).splitlines()
    assert lines[0].split() == ["|", "method", "|", "rate", "|", "error", "|"]
    assert len({len(line) for line in lines}) == 1
    assert lines[3].count("|") == 4


def test_the_page_of_results_is_what_the_results_say():
    text = (EXPERIMENTS / "README.md").read_text(encoding="utf-8")
    assert text == results_table.page(EXPERIMENTS / "results")


def test_every_report_is_on_the_page(tmp_path):
    first = write_report("first", [{"method": "ours", "rate": 2.5}], [3, 4], tmp_path, title="Speed", remarks="Fast.")
    report = json.loads(first.read_text())
    del report["hardware"]["gpu"]
    first.write_text(json.dumps(report))
    second = write_report("second", [{"error": 0.25}], [0], tmp_path)
    second.with_suffix(".png").touch()
    text = results_table.page(tmp_path)
    assert text.startswith(results_table.HEAD)
    for expected in (
        "## Speed",
        "Fast.",
        "Seeds 3, 4; " + report["hardware"]["processor"],
        "| 2.5 ",
        f"`{report['command']}`",
    ):
        assert expected in text
    (tmp_path / "remarks.md").write_text("# Remarks\n\nOf tables.\n\n## first, second\n\nMade\nby hand.\n")
    further = results_table.page(tmp_path)
    assert further.index("## second") < further.rindex("Made by hand.") < further.index("| 0.25 ")
    assert further.count("Made by hand.") == 2
    (tmp_path / "remarks.md").write_text("# Remarks\n\n## third\n\nMade by hand.")
    with pytest.raises(SystemExit, match="speaks of third, of which there is no report"):
        results_table.page(tmp_path)
    assert text.index("## Speed") < text.index("## second") < text.index("| 0.25 ") < text.index("(results/second.png)")


def test_a_page_that_is_out_of_date_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(results_table, "HERE", tmp_path)
    write_report("speed", [{"rate": 1.5}], [0], tmp_path / "results")
    monkeypatch.setattr("sys.argv", ["results_table.py", "--check"])
    with pytest.raises(SystemExit, match="is not what experiments/results says"):
        results_table.main()
    assert not (tmp_path / "README.md").exists()
    monkeypatch.setattr("sys.argv", ["results_table.py"])
    results_table.main()
    monkeypatch.setattr("sys.argv", ["results_table.py", "--check"])
    results_table.main()
    write_report("speed", [{"rate": 3.5}], [0], tmp_path / "results")
    with pytest.raises(SystemExit, match="is not what experiments/results says"):
        results_table.main()
