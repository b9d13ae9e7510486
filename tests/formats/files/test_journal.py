"""Journals that a kill has cut short."""

from bitwright.formats.files.journal import append_line, read_lines


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


def test_what_was_not_written_here_is_left_out_and_said(tmp_path):
    path = tmp_path / "journal.jsonl"
    for n in range(3):
        append_line(path, {"n": n, "loss": 0.1 * n})
    first, second, third = path.read_text().splitlines()
    said: list[str] = []
    for damaged in (second.replace('"n": 1', '"n": 7'), '{"a":1}', "[]", "\0" * 40, second[:20], '{"check": 1}'):
        path.write_text(f"{first}\n{damaged}\n{third}\n")
        assert [entry["n"] for entry in read_lines(path, said.append)] == [0, 2]
    assert len(said) == 6 and all("1 of 3 lines are damaged" in text for text in said)
    path.write_text(f"{first}\n{second}\n{third[:-9]}")  # as a kill leaves it
    assert [entry["n"] for entry in read_lines(path, said.append)] == [0, 1] and len(said) == 6
    append_line(path, {"n": 3})
    assert [entry["n"] for entry in read_lines(path, said.append)] == [0, 1, 3] and len(said) == 6
