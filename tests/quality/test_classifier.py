"""Classifiers: the shipped one on real digits, one judged by hand, and every file that is none."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from quality.classifiers import CLASSES, FEATURES, IMAGE_SHAPE, write_classifier

from tc_deploy.errors import BackendError, ModelError
from tc_deploy.quality.classifier import _BATCH, Classifier

EXAMPLES = Path(__file__).parents[2] / "examples"
SHIPPED = EXAMPLES / "digits-classifier.onnx"
LARGEST_BYTES = 300 * 1024
LEAST_ACCURACY = 0.98
"""What the project promises of the shipped classifier."""


def error_of(path: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as raised:
        Classifier(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: "), message
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# ------------------------------------------------------------------------------------------------------ the shipped one


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_shipped_classifier_reads_real_digits(digits: ModuleType) -> None:
    images, labels = digits.images_and_labels()
    judge = Classifier(SHIPPED)
    assert judge.image_shape == images.shape[1:]
    assert judge.classes == digits.CLASSES
    features, logits = judge(torch.from_numpy(images))
    assert features.shape == (len(images), judge.features)
    assert (logits.argmax(1).numpy() == labels).mean() >= LEAST_ACCURACY
    # A Fréchet distance wants features that all tell something.
    assert np.linalg.matrix_rank(np.cov(features.T.numpy())) == judge.features


def test_the_shipped_classifier_is_one_small_file_that_names_no_other() -> None:
    assert SHIPPED.stat().st_size <= LARGEST_BYTES
    model = onnx.load(SHIPPED, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    assert {node.domain for node in model.graph.node} == {""}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


# --------------------------------------------------------------------------------------------------------------- a call


def test_features_and_logits_by_hand(tmp_path: Path) -> None:
    judge = Classifier(write_classifier(tmp_path))
    assert (judge.image_shape, judge.features, judge.classes) == (IMAGE_SHAPE, FEATURES, CLASSES)
    images = torch.arange(32.0).reshape(2, *IMAGE_SHAPE)
    features, logits = judge(images)
    assert features.tolist() == [[0.0, 1.0], [16.0, 17.0]]
    assert logits.tolist() == [[0.0, 1.0, 2.0], [16.0, 17.0, 18.0]]


def test_many_images_are_judged_as_one_by_one(tmp_path: Path) -> None:
    judge = Classifier(write_classifier(tmp_path))
    images = torch.randn(2 * _BATCH + 1, *IMAGE_SHAPE)
    features, logits = judge(images)
    assert torch.equal(features, images.flatten(1)[:, :FEATURES])
    assert torch.equal(logits, images.flatten(1)[:, :CLASSES])


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 8, 8), (1, 4, 5), (4, 4)])
def test_other_images_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    judge = Classifier(write_classifier(tmp_path))
    judge.check_fits(IMAGE_SHAPE)
    with pytest.raises(ModelError) as raised:
        judge.check_fits(shape)
    assert f"judge.onnx: the classifier reads images (1, 4, 4), the model makes {shape} (channels" in str(raised.value)


# ------------------------------------------------------------------------------------------------------ no classifiers


@pytest.mark.parametrize(
    ("edits", "found"),
    [
        ([("images", "pictures")], "found pictures (batch, 1, 4, 4) float,"),
        ([("float", "double")], "found images (batch, 1, 4, 4) double,"),
        ([("batch", "2")], "found images (2, 1, 4, 4) float, features (2, 2) float,"),
        ([("1, 4, 4", "1, height, 4")], "found images (batch, 1, height, 4) float,"),
        ([("1, 4, 4", "16")], "found images (batch, 16) float,"),
        ([("logits", "scores")], "features (batch, 2) float, scores (batch, 3) float; export it so"),
        ([("float[batch, 2] features, ", "")], "found images (batch, 1, 4, 4) float, logits (batch, 3) float; export"),
        ([("3] logits", "3] logits, float[batch, 16] flat")], "flat (batch, 16) float; export it so"),
        ([("4] images", "4] images, float[batch] t")], "found images (batch, 1, 4, 4) float, t (batch) float,"),
        (
            [
                ("[batch, 3]", "[batch, classes]"),
                ("(flat, three)", "(flat, t)"),
                ("4] images", "4] images, int64[n] t"),
            ],
            "t (n) int64, features (batch, 2) float, logits (batch, classes) float; export it so",
        ),
    ],
)
def test_other_inputs_and_outputs_are_refused(tmp_path: Path, edits: list[tuple[str, str]], found: str) -> None:
    path = write_classifier(tmp_path, *edits)
    error_of(path, "a classifier takes images (batch, channels, height, width) and gives features (batch, F)", found)


def test_a_batch_that_is_not_as_dynamic_as_promised_is_refused(tmp_path: Path) -> None:
    first = "flat = Reshape (images, rows) zero = Constant <value_ints = [0]> () one = Constant <value_ints = [1]> ()"
    cut = "first = Slice (flat, zero, one, zero) features = Gather <axis = 1> (first, two)"
    path = write_classifier(
        tmp_path, ("flat = Reshape (images, rows)", first), ("features = Gather <axis = 1> (flat, two)", cut)
    )
    error_of(path, "features of 2 images: expected (2, 2), found (1, 2); export it with a dynamic batch")


def test_a_judge_that_gives_no_numbers_is_refused(tmp_path: Path) -> None:
    logs = ("logits = Gather <axis = 1> (flat, three)", "logs = Log (flat) logits = Gather <axis = 1> (logs, three)")
    error_of(write_classifier(tmp_path, logs), "logits are not finite; the classifier cannot judge these pictures")


@pytest.mark.parametrize("content", [b"", b"no graph", SHIPPED.read_bytes()[:1000], b"\x80\x04K\x01."])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "judge.onnx"
    path.write_bytes(content)
    error_of(path, "ONNX Runtime refuses it: ", "; a classifier is one ONNX file")


def test_no_file_is_refused(tmp_path: Path) -> None:
    error_of(tmp_path / "none.onnx", "no such file; a classifier is one ONNX file")
    error_of(tmp_path, "a folder, and no file")


def test_images_that_onnx_runtime_refuses(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    judge = Classifier(write_classifier(tmp_path))
    with pytest.raises(ModelError, match=r"judge.onnx: fails on 2 images: .*Got invalid dimensions"):
        judge(torch.zeros(2, 3, 4, 4))
    assert capfd.readouterr() == ("", "")


def test_onnx_runtime_that_is_not_there_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_classifier(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"a classifier needs ONNX Runtime: onnxruntime is not installed: pip"):
        Classifier(path)
