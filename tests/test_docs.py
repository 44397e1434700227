"""The documents: nothing is left to be filled in, no link is dead."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tc_deploy.bundle import Document
from tc_deploy.calibrate.recipe import Recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_every_key_of_a_recipe_stands_in_the_table_with_its_default() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`(.+?)`|none|required) \|", text, re.MULTILINE)
    expected: dict[str, Any] = {}
    for name, field in Recipe.model_fields.items():
        if field.is_required() or not isinstance(field.default, Document):
            expected[name] = None if field.is_required() else field.default
        else:
            expected |= {f"{name}.{key}": value for key, value in field.default.model_dump(mode="json").items()}
    assert {key: tomllib.loads(f"x = {value}")["x"] if value else None for key, value in rows} == expected
