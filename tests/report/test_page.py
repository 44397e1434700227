"""The page: whole, self-contained, the same every time; and one line for every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import Made, run_cli, snapshot
from report.folders import (
    CHOSEN,
    DIGITS,
    SOLVER_STEPS,
    edit,
    make_point,
    make_samples,
    points_of_the_demo,
    write_search,
)

from tc_deploy.bundle import MANIFEST, sha256_of_file
from tc_deploy.errors import BundleError, StorageError
from tc_deploy.manifest import ONNX_FOLDER
from tc_deploy.plan import PLAN, SAMPLES, SEARCH, Plan, fitted_for_sha256, load_plan, save_plan
from tc_deploy.schedule import PHASES
from tc_deploy.search.record import FULL_POINT, Kind
from tc_deploy.tables import tables_record

ALWAYS = ["schedule", "tokens", "provenance"]
ALL = ["pareto", "schedule", "tokens", "drift", "samples", "points", "provenance"]
ATTACK = "<script>alert(1)</script>\"'>&"
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Reads a page and keeps what is looked for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.sections: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.addresses: list[str] = []
        self.unnamed: list[str] = []
        self.handlers: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags[tag] += 1
        if tag not in VOID:
            self._open.append(tag)
        self._keep(tag, found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self._keep(tag, {name: value or "" for name, value in attrs})

    def _keep(self, tag: str, found: dict[str, str]) -> None:
        self.ids += [found["id"]] if "id" in found else []
        self.sections += [found["id"]] if tag == "section" else []
        for name in ("href", "src"):
            if found.get(name, "").startswith("#"):
                self.targets.append(found[name][1:])
            elif name in found:
                self.addresses.append(found[name])
        self.handlers += [name for name in found if name.startswith("on")]
        named = {"img": "alt" in found, "svg": "aria-label" in found or found.get("aria-hidden") == "true"}
        if not named.get(tag, True):
            self.unnamed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def draw(folder: Path, output: Path) -> Page:
    answer = run_cli("report", folder, "-o", output)
    assert answer.code == 0, answer.err
    assert re.fullmatch(rf"{re.escape(str(output))}: \d+ KiB\n", answer.out)
    return check(output)


def check(output: Path) -> Page:
    """What holds of every page."""
    page = Page(output.read_text(encoding="utf-8"))
    assert page.tags["script"] == 0
    assert page.handlers == []
    assert page.unnamed == []
    assert [address for address in page.addresses if not address.startswith("data:")] == []
    assert len(set(page.ids)) == len(page.ids)
    assert set(page.targets) <= set(page.ids)
    return page


@pytest.fixture
def searched(tmp_path: Path) -> Path:
    return write_search(tmp_path / "digits")


def test_a_plan_alone(tmp_path: Path) -> None:
    page = draw(DIGITS, tmp_path / "new" / "report.html")
    assert page.sections == ALWAYS
    assert "closer to the full run than fewer steps" in page.text
    assert "tc-deploy calibrate RECIPE -o calibration/NAME" in page.text
    assert 'model = "../../../examples/digits-dit"  # relative to this file' in page.text


def test_a_plan_with_a_search(searched: Path, tmp_path: Path) -> None:
    page = draw(searched, tmp_path / "report.html")
    assert page.sections == ALL
    points = points_of_the_demo()
    assert page.tags["title"] >= len(points)
    for words in (*(point.name for point in points), *(point.kind for point in points)):
        assert words in page.text
    assert "Token selection adds 3.7 dB" in page.text
    assert "AMD EPYC, 2 cores" in page.text
    assert str(tmp_path) not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_every_kind_of_point_has_a_shape_and_a_colour(searched: Path, tmp_path: Path) -> None:
    draw(searched, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for kind in set(Kind) - {Kind.FULL}:
        name = kind.name.lower().replace("_", "-")
        assert f'<path id="{name}"' in page
        assert f".mark.{name} {{ fill: var(--{name}); }}" in page
        assert page.count(f"--{name}: #") == 2  # on light paper and on dark


def test_what_is_beaten_is_folded_and_the_picture_comes_first(tmp_path: Path) -> None:
    page = draw(write_search(tmp_path / "digits"), tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.index('id="pareto"') < html.index('aria-label="Sections"') < html.index("Token selection adds")
    open_rows, _, folded = html.partition('id="points"')[2].partition("<details>")
    assert CHOSEN in open_rows
    assert f'<th scope="row">{SOLVER_STEPS}</th>' in folded
    assert f'<th scope="row">{SOLVER_STEPS}</th>' not in open_rows
    assert "each slower than one above" in page.text


def test_where_no_token_is_kept_none_are_drawn(multistep: Made, tmp_path: Path) -> None:
    assert "tokens" in draw(multistep.plan, tmp_path / "some.html").sections
    plan, tables = load_plan(multistep.plan)
    none = {"keep_counts": tuple((0,) * plan.model.blocks for _ in PHASES)}
    tables = {name: table for name, table in tables.items() if not name.startswith(("token_index", "importance"))}
    bare = plan.model_copy(
        update={
            "cache": plan.cache.model_copy(update=none),
            "cost": plan.cost.model_copy(update={"cached_flops": (0, 0)}),
            "tables": tables_record(tables),
            "measured": None,
        }
    )
    save_plan(bare, tables, tmp_path / "plan")
    assert draw(tmp_path / "plan", tmp_path / "none.html").sections == ["schedule", "provenance"]


def test_a_bundle(mixed: Made, tmp_path: Path) -> None:
    page = draw(mixed.bundle, tmp_path / "report.html")
    assert page.sections == ALWAYS
    assert "graph cached-2" in page.text
    assert "onnxruntime " in page.text
    assert "The quality of this plan was not measured." in page.text
    assert "keep_counts = [[0, 16, 8], [8, 0, 4]]" in page.text
    assert ", fp32, " in page.text
    assert ", built by tc-deploy" in page.text


@pytest.mark.parametrize("file", [f"{ONNX_FOLDER}/full.onnx", MANIFEST])
def test_a_bundle_that_is_damaged(mixed: Made, tmp_path: Path, file: str) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    (bundle / file).unlink()
    answer = run_cli("report", bundle, "-o", tmp_path / "report.html")
    assert answer.code == BundleError.exit_code
    assert ("half-written or damaged bundle" if file == MANIFEST else f"{file} is missing") in answer.error
    assert not (tmp_path / "report.html").exists()


def test_latents_without_a_decoder(tmp_path: Path) -> None:
    samples = make_samples(points_of_the_demo(), channels=4)
    page = draw(write_search(tmp_path / "digits", samples=samples), tmp_path / "report.html")
    assert page.sections == ALL
    assert "a decoder is needed to see them" in page.text


def test_a_search_of_which_little_is_known(tmp_path: Path) -> None:
    points = points_of_the_demo()[:1]
    folder = write_search(tmp_path / "digits", points, {}, remarks=(), settings={})
    assert draw(folder, tmp_path / "report.html").sections == [*ALWAYS[:2], "points", "provenance"]


def test_the_same_folder_gives_the_same_page(searched: Path, tmp_path: Path) -> None:
    draw(searched, tmp_path / "one.html")
    moved = tmp_path / "elsewhere" / "digits"
    shutil.copytree(searched, moved)
    draw(moved, tmp_path / "two.html")
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_what_comes_from_data_stays_text(tmp_path: Path) -> None:
    def poison(document: dict[str, Any]) -> None:
        document["model"].update(model_class=ATTACK, source=ATTACK)
        document["sampling"].update(scheduler_class=ATTACK, scheduler_config={ATTACK: ATTACK})
        document["origin"].update(settings={ATTACK: ATTACK})
        document["measured"] = None
        plan = Plan.model_validate_json(json.dumps(document))
        document["forecast"]["fitted_for"] = fitted_for_sha256(plan.model, plan.sampling, plan.schedule, plan.cache)

    folder = tmp_path / "<b>&'\""
    shutil.copytree(DIGITS, folder)
    edit(folder / PLAN, poison)
    points = [*points_of_the_demo()[:1], make_point(ATTACK, Kind.SKIP_REUSE, 0.3, 40.0, on_front=True)]
    words = dict.fromkeys(("made_by", "date", "hardware", "backend", "backend_version"), ATTACK)
    write_search(folder, points, {}, **words, settings={ATTACK: ATTACK}, remarks=(ATTACK,))
    page = draw(folder, tmp_path / "report.html")
    assert page.tags["b"] == 0
    assert page.text.count("<script>alert(1)</script>") >= 10


def test_an_earlier_page_is_replaced(searched: Path, tmp_path: Path) -> None:
    draw(searched, tmp_path / "report.html")
    draw(searched, tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits", "report.html"]


@pytest.mark.parametrize("name", ["notes.txt/report.html", "digits"])
def test_a_place_that_cannot_be_written(searched: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    answer = run_cli("report", searched, "-o", tmp_path / name)
    assert answer.code == StorageError.exit_code
    assert f"{tmp_path / name} cannot be written" in answer.error
    assert snapshot(tmp_path) == before


def _of_another_model(folder: Path) -> None:
    edit(folder / SEARCH, lambda search: search["model"].update(weights_sha256="0" * 64))


def _altered_samples(folder: Path) -> None:
    data = bytearray((folder / SAMPLES).read_bytes())
    data[-1] ^= 1
    (folder / SAMPLES).write_bytes(data)


def _rewritten(samples: dict[str, object]) -> Callable[[Path], object]:
    return lambda folder: write_search(folder, samples=samples)  # type: ignore[arg-type]


FULL = make_samples(points_of_the_demo())[FULL_POINT]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / PLAN).unlink(), "no plan.json in it; give a folder calibration/NAME or engines/NAME"),
        (_of_another_model, "the search is of another model than plan.json"),
        (lambda folder: edit(folder / SEARCH, lambda search: search.update(colour="red")), "colour: unknown key"),
        (_altered_samples, "samples.safetensors: expected SHA-256"),
        (lambda folder: (folder / SAMPLES).unlink(), "samples.safetensors is missing"),
        (_rewritten({CHOSEN: FULL}), "no 'full' in it"),
        (_rewritten({FULL_POINT: FULL, CHOSEN: FULL[:2]}), "latents of one shape"),
        (_rewritten({FULL_POINT: FULL[0, 0]}), "expected finite (n, *latent shape) float32"),
        (_rewritten({FULL_POINT: FULL.astype(np.float64)}), "expected finite (n, *latent shape) float32"),
        (_rewritten({FULL_POINT: FULL * np.float32(np.inf)}), "expected finite (n, *latent shape) float32"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")
def test_folders_that_cannot_be_drawn(
    searched: Path, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(searched)
    answer = run_cli("report", searched, "-o", tmp_path / "report.html")
    assert answer.code == BundleError.exit_code
    assert message in answer.error
    assert not (tmp_path / "report.html").exists()


def test_of_a_bundle_too_the_page_does_not_say_where_on_this_machine_it_lies(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    edit(bundle / PLAN, lambda plan: plan["model"].update(source="./checkpoint"))
    record = {"size_bytes": (bundle / PLAN).stat().st_size, "sha256": sha256_of_file(bundle / PLAN)}
    edit(bundle / MANIFEST, lambda manifest: manifest["files"].update({PLAN: record}))
    draw(bundle, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert str(bundle) not in page
    assert "./checkpoint" in page


def test_a_bundle_whose_plan_was_altered(mixed: Made, tmp_path: Path) -> None:
    bundle = mixed.copy(tmp_path / "bundle")
    (bundle / PLAN).write_text((bundle / PLAN).read_text().replace('"seed": 0', '"seed": 1'))
    assert "plan.json: expected SHA-256" in run_cli("report", bundle, "-o", tmp_path / "report.html").error


def test_no_model_and_no_engine_is_loaded(searched: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from tc_deploy.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or ', '.join({'torch', 'diffusers', 'onnxruntime', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    words = [sys.executable, "-c", program, "report", str(searched), "-o", str(tmp_path / "report.html")]
    subprocess.run(words, check=True, capture_output=True)
