"""Whose a folder is: told by what its documents say. Nothing of a user's is removed, whatever it is called."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import Made, run_cli

from tc_deploy.bundle import MANIFEST, FolderKind, check_replaceable, new_folder, remove_folder
from tc_deploy.errors import StorageError
from tc_deploy.manifest import BUNDLE_FOLDER, TARGET_FOLDER
from tc_deploy.plan import PLAN, PLAN_FOLDER

DIGITS = Path(__file__).parents[2] / "calibration" / "digits"
WEB_APP = {"name": "My app", "short_name": "app", "icons": [], "start_url": "/"}
NEARLY = {"kind": "bundle", "format_version": 3, "made_by": "tc-deploy 0.1.0", "files": {}}


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, links as what they say."""
    return {
        str(path.relative_to(folder)): str(path.readlink()).encode()
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def refused(folder: Path, kind: FolderKind, message: str) -> None:
    before = tree(folder.parent)
    with pytest.raises(StorageError, match=message) as raised:
        check_replaceable(folder, kind)
    assert "\n" not in str(raised.value)
    assert tree(folder.parent) == before


@pytest.fixture
def bundle(mixed: Made, tmp_path: Path) -> Path:
    (tmp_path / "engines").mkdir()
    return mixed.copy(tmp_path / "engines" / "mixed")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DIGITS, tmp_path / "calibration" / "digits"))


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        (json.dumps(WEB_APP), "format version is None"),
        (json.dumps(NEARLY), "required and missing"),
        (json.dumps(NEARLY | {"format_version": 1}), "has not the keys of format version 1"),
        (json.dumps(NEARLY | {"format_version": 99}), "its format version is 99"),
        (json.dumps(NEARLY | {"kind": "target"}), "its kind is 'target'"),
        (json.dumps(NEARLY | {"made_by": "somebody"}), "tc-deploy did not make it"),
        ("[1, 2]", "no JSON object"),
        ("{not json", "no JSON"),
        ("[" * 200_000, "no JSON"),
        ('{"a":' * 200_000, "no JSON"),
    ],
)
@pytest.mark.parametrize("kind", [BUNDLE_FOLDER, PLAN_FOLDER], ids=["bundle", "plan"])
def test_somebodys_marker_is_not_ours(tmp_path: Path, kind: FolderKind, marker: str, message: str) -> None:
    folder = tmp_path / "site"
    (folder / "src").mkdir(parents=True)
    (folder / "src" / "main.js").write_text("precious")
    (folder / "index.html").write_text("precious")
    (folder / kind.marker).write_text(marker)
    if kind is PLAN_FOLDER:
        message = "is not a plan"
    refused(folder, kind, message)


def test_a_marker_too_large_to_be_one_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(StorageError, match="bytes are too many"):
        check_replaceable(tmp_path, BUNDLE_FOLDER)


def test_a_marker_that_is_a_link_is_not_ours(bundle: Path) -> None:
    (bundle / MANIFEST).rename(bundle.parent / "elsewhere.json")
    (bundle / MANIFEST).symlink_to("../elsewhere.json")
    refused(bundle, BUNDLE_FOLDER, "it is a link")


def test_what_was_made_here_may_be_replaced(bundle: Path, plan: Path) -> None:
    before = tree(bundle), tree(plan)
    check_replaceable(bundle, BUNDLE_FOLDER)
    check_replaceable(bundle / "onnxruntime", TARGET_FOLDER)
    check_replaceable(plan, PLAN_FOLDER)
    assert (tree(bundle), tree(plan)) == before


@pytest.mark.parametrize(("version", "gone"), [(1, ("kind", "forecast")), (2, ()), (2, ("forecast",))])
def test_a_plan_of_an_older_version_is_ours(plan: Path, version: int, gone: tuple[str, ...]) -> None:
    document = json.loads((plan / PLAN).read_text()) | {"format_version": version, "measured": None}
    document = {key: value for key, value in document.items() if key not in gone}
    (plan / PLAN).write_text(json.dumps(document))
    check_replaceable(plan, PLAN_FOLDER)
    (plan / PLAN).write_text(json.dumps(document | {"colour": 1}))
    refused(plan, PLAN_FOLDER, f"has not the keys of format version {version}")


def test_a_bundle_and_a_target_of_an_older_version_are_ours(bundle: Path) -> None:
    for folder, kind, later in ((bundle / "onnxruntime", TARGET_FOLDER, "reads"), (bundle, BUNDLE_FOLDER, "loras")):
        document = json.loads((folder / MANIFEST).read_text()) | {"format_version": 2}
        del document[later]  # which came with version 3
        (folder / MANIFEST).write_text(json.dumps(document))
        check_replaceable(folder, kind)
        (folder / MANIFEST).write_text(json.dumps(document | {"colour": 1}))
        refused(folder, kind, "has not the keys of format version 2")
        (folder / MANIFEST).write_text(json.dumps(document))


def test_a_kind_is_not_taken_for_another(bundle: Path, plan: Path, tmp_path: Path) -> None:
    refused(bundle, PLAN_FOLDER, "mixed holds .*, which tc-deploy did not write there")
    refused(plan, BUNDLE_FOLDER, "holds no manifest.json")
    refused(bundle, TARGET_FOLDER, "its kind is 'bundle'")
    alone = Path(shutil.copytree(bundle / "onnxruntime", tmp_path / "alone" / "target"))
    refused(alone, BUNDLE_FOLDER, "its kind is 'target'")


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "demo.png", "onnx/mine.onnx", "onnxruntime/cache", "new/", ".git/HEAD", "onnx/empty/", ".hidden"],
)
def test_a_foreign_file_in_a_bundle_is_named(bundle: Path, name: str) -> None:
    path = bundle / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_text("precious")
    refused(bundle, BUNDLE_FOLDER, f"holds {name.rstrip('/')}.*, which tc-deploy did not write there; move it away")


def test_a_link_in_the_place_of_a_file_is_foreign(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (bundle / "onnx" / "full.onnx").unlink()
    (bundle / "onnx" / "full.onnx").symlink_to(tmp_path / "precious")
    refused(bundle, BUNDLE_FOLDER, r"holds onnx/full\.onnx")
    (bundle / "onnx" / "full.onnx").unlink()
    shutil.move(bundle / "onnx", tmp_path / "onnx")
    (bundle / "onnx").symlink_to(tmp_path / "onnx")
    refused(bundle, BUNDLE_FOLDER, "holds onnx, which")


def test_a_manifest_that_names_what_is_outside_is_not_ours(bundle: Path) -> None:
    (bundle.parent / "precious").write_text("precious")
    document = json.loads((bundle / MANIFEST).read_text())
    document["files"]["../precious"] = {"size_bytes": 8, "sha256": "0" * 64}
    (bundle / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(StorageError, match=r"is not one of tc-deploy's|outside"):
        check_replaceable(bundle, BUNDLE_FOLDER)
    remove_folder(bundle, BUNDLE_FOLDER)
    assert (bundle.parent / "precious").read_text() == "precious"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda bundle: (bundle / "onnx" / "full.onnx").unlink(),
    "cut": lambda bundle: (bundle / "onnx" / "weights.bin").write_bytes(b"x"),
    "altered plan": lambda bundle: (bundle / PLAN).write_text("{}"),
    "no samples": lambda bundle: shutil.rmtree(bundle / "polygraphy"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_may_be_replaced_as_we_advise(bundle: Path, damage: str) -> None:
    DAMAGES[damage](bundle)
    check_replaceable(bundle, BUNDLE_FOLDER)


def test_by_products_of_ours_are_ours(bundle: Path) -> None:
    (bundle / "polygraphy" / "__pycache__").mkdir()
    (bundle / "polygraphy" / "__pycache__" / "inputs.cpython-311.pyc").write_bytes(b"")
    (bundle / "onnx" / ".weights.bin.tc-deploy-123").write_bytes(b"half")
    check_replaceable(bundle, BUNDLE_FOLDER)
    remove_folder(bundle, BUNDLE_FOLDER)
    assert not bundle.exists()


def test_what_came_in_while_the_new_one_was_made_is_kept(bundle: Path) -> None:
    with new_folder(bundle, BUNDLE_FOLDER) as staged:
        shutil.copytree(bundle, staged, dirs_exist_ok=True)
        (bundle / "onnx" / "notes.txt").write_text("precious")
    assert (bundle / "onnx" / "notes.txt").read_text() == "precious"
    assert [path.name for path in bundle.parent.iterdir()] == [bundle.name]


def test_a_foreign_file_stays_when_a_folder_of_ours_is_removed(bundle: Path) -> None:
    (bundle / "onnx" / "notes.txt").write_text("precious")
    remove_folder(bundle, BUNDLE_FOLDER)
    assert (bundle / "onnx" / "notes.txt").read_text() == "precious"


# ---------------------------------------------------------------------------------------------- the commands themselves


def test_commands_refuse_what_is_not_theirs(mixed: Made, bundle: Path, plan: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / MANIFEST).write_text(json.dumps(WEB_APP))
    (site / PLAN).write_text(json.dumps({"steps": ["buy milk"]}))
    shutil.copytree(mixed.model, site / "checkpoint")
    shutil.rmtree(bundle / "onnxruntime")
    (bundle / "onnxruntime").mkdir()
    (bundle / "onnxruntime" / MANIFEST).write_text(json.dumps(WEB_APP))
    before = tree(tmp_path)
    by_hand = ("--steps", 4, "--samples", 0, "--keep-counts", "0", "0")
    for words in (
        ("export", mixed.plan, "-o", site),
        ("export", mixed.plan, "-o", plan),
        ("calibrate", mixed.model, "-o", site, *by_hand),
        ("calibrate", mixed.model, "-o", bundle, *by_hand),
        ("build", bundle),
    ):
        answer = run_cli(*words)
        assert answer.code == StorageError.exit_code, words
        assert "move it away or choose another output" in answer.error
        assert tree(tmp_path) == before, words
