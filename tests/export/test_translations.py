"""Operators that are translated to ONNX here and not by the exporter: what they compute, and of what."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor

from tc_deploy.export.graphs import _TRANSLATIONS, _quiet


class _Padded(torch.nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([one, other], **self.given)


@pytest.mark.parametrize("lengths", [(4, 4), (2, 4)])
@pytest.mark.parametrize(
    "given",
    [{"batch_first": True}, {"batch_first": False, "padding_value": 1.5, "padding_side": "left"}],
    ids=["first", "second"],
)
def test_padded_sequences_are_pytorch_s_without_a_scatter(lengths: tuple[int, int], given: dict[str, Any]) -> None:
    module, inputs = _Padded(**given), tuple(torch.randn(length, 3) for length in lengths)
    with _quiet():
        program = torch.onnx.export(
            module, inputs, dynamo=True, input_names=["one", "other"], custom_translation_table=_TRANSLATIONS
        )
    assert program is not None
    assert not [node.op_type for node in program.model.graph if node.op_type.startswith("Scatter")]
    engine = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = dict(zip(("one", "other"), (tensor.numpy() for tensor in inputs), strict=True))
    assert np.array_equal(engine.run(None, feeds)[0], module(*inputs).numpy())
