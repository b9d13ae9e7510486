"""Journals that a kill has cut short."""

from formats.journal import append_line, read_lines


def test_lines_are_read_in_order(tmp_path):
    path = tmp_path / "journal.jsonl"
    assert list(read_lines(path)) == []
    for n in range(3):
        append_line(path, {"n": n})
    assert [entry["n"] for entry in read_lines(path)] == [0, 1, 2]


def test_a_cut_line_costs_itself_alone(tmp_path):
    path = tmp_path / "journal.jsonl"
    append_line(path, {"n": 0, "text": "é" * 9})
    append_line(path, {"n": 1, "text": "é" * 9})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        append_line(path, {"n": 2})
        found = [entry["n"] for entry in read_lines(path)]
        complete = whole[:length].count(b"}")
        assert found == [*range(complete), 2]
