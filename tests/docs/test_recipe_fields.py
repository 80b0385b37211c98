"""docs/recipe_fields.md: its table is that of the library, and its code prints its output."""

from __future__ import annotations

import pathlib
import re

import pytest

from jlora.training.recipe.foreign_fields import format_foreign_fields_table

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "recipe_fields.md").read_text()


def test_page_table_is_foreign_fields_table() -> None:
    (table,) = re.findall(
        r"<!-- foreign fields: begin -->\n(.*?)\n<!-- foreign fields: end -->", PAGE, re.DOTALL
    )
    assert table == format_foreign_fields_table()


def test_page_code_prints_its_output(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (output,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(code, "docs/recipe_fields.md", "exec"), {"__name__": "page"})
    assert capsys.readouterr().out == output
