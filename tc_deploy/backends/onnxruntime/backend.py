"""ONNX Runtime: the embedded default and the reference on the CPU, and its execution providers for NVIDIA GPUs.

Its engines are the bundle's ONNX graphs as they are: ONNX Runtime compiles them when a session is made, for the very
machine it runs on, so a target of this backend holds no copy of them, only the settings and the checks of its build.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_deploy.backends.base import Progress
from tc_deploy.backends.compiled_at_load import MOST_THREADS, PACKED, SHARED, WEIGHTS_MODES, CompiledAtLoad
from tc_deploy.backends.onnxruntime.providers import CPU, PROVIDERS
from tc_deploy.backends.onnxruntime.run import OrtDevice, load_cuda, onnxruntime
from tc_deploy.errors import BackendError
from tc_deploy.manifest import Manifest
from tc_deploy.types import Precision


class OnnxRuntime(CompiledAtLoad):
    """The backend."""

    name = "onnxruntime"

    def version(self) -> str:
        """ONNX Runtime's version."""
        return str(onnxruntime().__version__)

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With the provider, and whose number of threads it is."""
        return {"provider": CPU, "threads": 0, **options}

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> None:
        """Run every graph once. fp16 graphs run, by casts to fp32 and back around what ONNX Runtime lacks on a CPU."""
        if manifest.precision is Precision.BF16 and options.get("provider", CPU) == CPU:
            raise BackendError(
                f"{bundle}: its graphs are in bf16, which ONNX Runtime does not compute on a CPU; build with --backend"
                " openvino or tensorrt-rtx, or export with --precision fp16 or fp32"
            )
        super().build(bundle, manifest, folder, options, progress)

    def open(self, options: Mapping[str, Any]) -> OrtDevice:
        """Open the CPU or a GPU; see :class:`OrtDevice` for the options."""
        settings = {"threads": 0, "provider": CPU, "weights": None, "unfused": False, **options}
        threads, name = settings["threads"], settings["provider"]
        provider = PROVIDERS.get(name) if isinstance(name, str) else None
        unknown = sorted(settings.keys() - {"threads", "provider", "weights", "unfused"})
        wrong = (
            not isinstance(threads, int)
            or not 0 <= threads <= MOST_THREADS
            or settings["weights"] not in (None, *WEIGHTS_MODES)
        )
        if unknown or wrong or provider is None or not isinstance(settings["unfused"], bool):
            found = repr(unknown[0]) if unknown else ", ".join(f"{key} {value!r}" for key, value in settings.items())
            raise BackendError(
                f"{self.name} takes the options threads, a number from 0 to {MOST_THREADS}, provider, one of"
                f" {', '.join(PROVIDERS)}, weights, {SHARED} or {PACKED}, and unfused, true or false;"
                f" found {found}; build again"
            )
        if name != CPU and "weights" in options:
            raise BackendError(f"{self.name} takes the option weights with provider {CPU} only; build again without it")
        available = onnxruntime().get_available_providers()
        if provider.name not in available:
            raise BackendError(
                f"this ONNX Runtime has no {provider.name}, only {', '.join(available)};"
                f" {provider.cure()}; or build again for another --provider"
            )
        if name != CPU:
            load_cuda()
        return OrtDevice(threads=threads, provider=provider, weights=settings["weights"], unfused=settings["unfused"])
