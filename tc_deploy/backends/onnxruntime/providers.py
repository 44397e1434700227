"""What computes a session's graph: execution providers, and what brings them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tc_deploy.libraries import install_command


@dataclass(frozen=True, kw_only=True)
class Provider:
    """An execution provider: what computes a session's graph."""

    name: str
    """ONNX Runtime's."""
    options: Mapping[str, str]
    """Its own settings."""
    extra: str | None
    """What brings it; None: no package of ONNX Runtime does."""
    also: str = ""
    """What it needs beside."""

    def cure(self) -> str:
        """How to get it; the packages of ONNX Runtime overwrite each other's files."""
        if self.extra is None:
            return "install a build of ONNX Runtime with it"
        removal = "" if self.extra == CPU else "pip uninstall -y onnxruntime; then "
        return f"{removal}{install_command(self.extra)}{self.also}"


CPU = "cpu"
PROVIDERS = {
    CPU: Provider(name="CPUExecutionProvider", options={}, extra="cpu"),
    "cuda": Provider(name="CUDAExecutionProvider", options={"enable_cuda_graph": "1", "use_tf32": "0"}, extra="cuda"),
    "tensorrt": Provider(
        name="TensorrtExecutionProvider",
        options={"trt_cuda_graph_enable": "1"},
        extra="cuda",
        also="; and TensorRT",
    ),
    "nv-tensorrt-rtx": Provider(
        name="NvTensorRTRTXExecutionProvider",
        options={"enable_cuda_graph": "1"},
        extra=None,
    ),
}
"""By the name that the option ``provider`` takes. A CUDA graph is captured of every binding, and fp32 is not TF32."""
