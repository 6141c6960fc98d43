"""The example of docs/faithfulness.md shows what is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs" / "faithfulness.md"


def test_the_example_shows_what_is_written():
    if not DOCS.exists():
        pytest.skip("needs the source tree")
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), flags=re.M | re.S)
    names, shown = {}, 0
    for statement in code.splitlines():
        expression, _, said = statement.partition("  # ")
        if said:
            assert repr(eval(expression, names)) == said
            shown += 1
        else:
            exec(statement, names)
    assert shown == 5
