"""Classifiers small enough to judge by hand, in ONNX's own notation."""

from pathlib import Path

import onnx.parser

SOURCE = """
<ir_version: 10, opset_import: ["": 20]>
judge (float[batch, 1, 4, 4] images) => (float[batch, 2] features, float[batch, 3] logits) {
    rows = Constant <value_ints = [-1, 16]> ()
    flat = Reshape (images, rows)
    two = Constant <value_ints = [0, 1]> ()
    three = Constant <value_ints = [0, 1, 2]> ()
    features = Gather <axis = 1> (flat, two)
    logits = Gather <axis = 1> (flat, three)
}
"""
"""The first two pixels are the features, the first three are the logits."""
IMAGE_SHAPE, FEATURES, CLASSES = (1, 4, 4), 2, 3


def write_classifier(folder: Path, *edits: tuple[str, str]) -> Path:
    """Write :data:`SOURCE` as an ONNX file, each (old, new) replaced everywhere."""
    source = SOURCE
    for old, new in edits:
        assert old in source
        source = source.replace(old, new)
    path = folder / "judge.onnx"
    onnx.save(onnx.parser.parse_model(source), path)
    return path
