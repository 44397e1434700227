"""The engine kinds by name."""

from __future__ import annotations

from tc_deploy.backends.base import Backend
from tc_deploy.backends.onnxruntime.backend import OnnxRuntime
from tc_deploy.backends.openvino.backend import OpenVino
from tc_deploy.backends.tensorrt.backend import TensorRt
from tc_deploy.backends.torch.backend import Torch
from tc_deploy.errors import UsageError

_ALL: tuple[Backend, ...] = (
    OnnxRuntime(),
    OpenVino(),
    TensorRt("tensorrt"),
    TensorRt("tensorrt_rtx"),
    Torch(),
)
BACKENDS = {engine.name: engine for engine in _ALL}
DEFAULT = OnnxRuntime.name


def backend(name: str) -> Backend:
    """The engine kind of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]
