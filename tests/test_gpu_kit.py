"""What is to run on a GPU, as far as a machine without one can tell."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gpu import kit, measure, page
from gpu.parts import Kit


def test_the_page_is_what_the_measurements_say() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.page_of(page.measured())


def test_without_measurements_the_page_claims_nothing() -> None:
    assert page.page_of({}).count(page.NOT_RUN) == len(page.PARTS) == len(measure.PARTS)


def test_a_line_names_gpu_driver_versions_and_date() -> None:
    spread = {"median": 0.5, "iqr": 0.01}
    made = {"latency": {"half": {"p50_ms": 1.5}}, "time_to_full": {"half": spread}, "efficiency": {"half": 0.98}}
    document = {
        "date": "2026-11-28",
        "gpu": [{"name": "NVIDIA X", "driver": "1.2"}],
        "versions": {"torch": "2.11.0", "tensorrt": None},
        "results": {"512 px": {"found": {"graph": made}}, "256 px": {"refused": "MemoryError: none left"}},
    }
    written = page.page_of({"large": document})
    assert "NVIDIA X, driver 1.2; torch 2.11.0; 2026-11-28." in written
    assert "| 512 px | graph | half | 1.50 | 0.500 ± 0.010 | 0.98 |" in written
    assert "| 256 px | MemoryError: none left |" in written


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A part of three measurements, of which one needs no GPU and one fails; the names of those that ran."""
    ran: list[str] = []

    def found(name: str) -> str:
        ran.append(name)
        if name == "broken":
            raise ValueError("two\nlines")
        return name

    class Module:
        WITHOUT_GPU = ("plain", "broken")

        @staticmethod
        def measurements(given: Kit) -> dict[str, Any]:  # noqa: ARG004 - as a part has it
            return {name: lambda name=name: found(name) for name in ("on a GPU", "plain", "broken")}

    monkeypatch.setitem(measure.PARTS, "runtime", "a_part")
    monkeypatch.setitem(sys.modules, "a_part", Module)
    return ran


def test_a_part_keeps_every_answer_and_goes_on_with_what_is_missing(part: list[str], tmp_path: Path) -> None:
    file, given = tmp_path / "runtime.json", Kit(bundle=tmp_path, work=tmp_path)
    measure.run_part("runtime", file, given, end=0.0)
    assert not file.exists(), "the time was up"
    measure.run_part("runtime", file, given, end=float("inf"))
    document = json.loads(file.read_text(encoding="utf-8"))
    results = document["results"]
    assert results["plain"]["found"] == "plain"
    assert results["broken"]["refused"] == "ValueError: two"
    if "refused" in results["on a GPU"]:
        assert results["on a GPU"]["refused"] == measure.NO_GPU
        assert part == ["plain", "broken"]
    assert document["versions"]["tc_deploy"]
    del results["plain"]
    file.write_text(json.dumps(document), encoding="utf-8")
    part.clear()
    measure.run_part("runtime", file, given, end=float("inf"))
    assert part == ["plain"]


def test_a_part_that_lacks_a_library_says_which_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(measure.PARTS, "runtime", "no_such_library")
    answer = CliRunner().invoke(measure.main, [str(tmp_path), "--part", "runtime", "--within", "--end", "1e12"])
    assert answer.exit_code == 1
    assert answer.output.count("\n") == 1
    assert "runtime: No module named 'no_such_library'" in answer.output
    assert not (tmp_path / "runtime.json").exists()


def test_the_kit_leaves_out_what_the_machine_brings_and_replaces_kits_only(tmp_path: Path) -> None:
    there = kit.present()
    assert {"torch", "numpy", "onnx", "huggingface-hub"} <= there
    # Without these the script itself would not start.
    assert not {"diffusers", "pydantic", "pydantic-core", "tensorrt", "click", "safetensors", "rich"} & there
    asked = {kit.canonical(line.split(">")[0]) for line in kit.wanted()}
    assert {"diffusers", "pydantic", "safetensors", "torch"} <= asked
    (tmp_path / "mine").mkdir()
    answer = CliRunner().invoke(kit.main, [str(tmp_path / "mine")])
    assert answer.exit_code == 1
    assert "is there and is no kit" in answer.output
