"""Reports on disk."""

import json

from allpet.reports import table, write_report


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
