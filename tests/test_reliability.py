"""The record of a reliability suite: what was counted, and nothing that was not asked for."""

import json
from pathlib import Path

import pytest
from reliability import DOCS, RECORD, SUITES, record


def pages(folder: Path) -> Path:
    (folder / "measurements").mkdir()
    (folder / "reliability.md").write_text((DOCS / "reliability.md").read_text())
    return folder


@pytest.mark.parametrize("suite", SUITES)
def test_a_record_stands_on_the_page_and_as_json(suite: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = pages(tmp_path)
    monkeypatch.setenv(RECORD, "1")
    for kills in (1, 1234):
        record(suite, {"kills": kills, "tracebacks": 0}, took_s=125.0, docs=docs)
    text = (docs / "reliability.md").read_text()
    assert text.count("| kills | 1,234 |\n| tracebacks | 0 |\n") == 1
    assert "| kills | 1 |" not in text
    document = json.loads((docs / "measurements" / f"{suite}.json").read_text())
    assert document["counts"] == {"kills": 1234, "tracebacks": 0}
    assert document["date"] in text
    assert document["hardware"] in text
    others = [other for other in SUITES if other != suite]
    assert all(f"<!-- {other} -->" in text for other in others)


def test_a_suite_run_by_hand_changes_no_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs = pages(tmp_path)
    monkeypatch.delenv(RECORD, raising=False)
    record("chaos", {"kills": 3}, took_s=1.0, docs=docs)
    assert "3  kills" in capsys.readouterr().out
    assert (docs / "reliability.md").read_text() == (DOCS / "reliability.md").read_text()
    assert list((docs / "measurements").iterdir()) == []


def test_an_unknown_suite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="known: chaos"):
        record("chaoss", {}, took_s=1.0, docs=tmp_path)
