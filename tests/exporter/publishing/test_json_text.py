"""The layout of report.json changes nothing of what it says."""

from __future__ import annotations

import json

from exporter.publishing.json_text import json_text


def test_lists_of_numbers_take_one_line_and_nothing_else_changes() -> None:
    data = {
        "load": [[0.25, 1e-05, 3], None, []],
        "interval": (1.5, -2.0),
        "text": ["[\n 1,\n 2\n]", "[ 1 ]", '"[\n', "]"],
        "mixed": [1, "two", {"three": [True, None, 4]}],
    }
    text = json_text(data)
    assert json.loads(text) == json.loads(json.dumps(data))
    lines = [line.strip() for line in text.splitlines()]
    assert "[0.25, 1e-05, 3]," in lines
    assert '"interval": [1.5, -2.0],' in lines
    assert '"three": [true, null, 4]' in lines
    assert '"two",' in lines
