"""PyTorch: for a machine with a GPU and none of the other engines, or to compare them with.

Its engines are the bundle's steps, made anew from the checkpoint in the bundle's precision: on a CPU traced by
``torch.export`` for the batch that they run with (a saved program would be read with pickle), on a GPU captured as CUDA
graphs, one per binding. So a target holds only settings, and the checkpoint must be where the plan says, or where the
option ``model`` does. The one backend that needs torch and the compile side; both are imported when it is opened, and
not before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tc_deploy.backends.base import Progress
from tc_deploy.backends.compiled_at_load import CompiledAtLoad
from tc_deploy.backends.torch.run import DEVICES, TorchDevice, device_here, torch_module
from tc_deploy.errors import BackendError
from tc_deploy.manifest import FP32_GRAPHS, Manifest


class Torch(CompiledAtLoad):
    """The backend."""

    name = "torch"

    def version(self) -> str:
        """PyTorch's version."""
        return str(torch_module().__version__)

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With the device, the GPU where there is one, and whether steps are compiled."""
        return {"device": device_here(), "compile": False, **options}

    def build(
        self, bundle: Path, manifest: Manifest, folder: Path, options: Mapping[str, Any], progress: Progress
    ) -> None:
        """Run every graph once; what no plan names a checkpoint of is refused: decoder, text encoders, a prologue."""
        kept = [name for name in FP32_GRAPHS if name in manifest.graphs]
        if kept:
            raise BackendError(
                f"{bundle}: torch runs the steps' graphs only, and this bundle has a {kept[0]}; build it with another"
                " backend, or export without --with-decoder and --with-text-encoder"
            )
        if manifest.has_prologue:
            raise BackendError(
                f"{bundle}: torch makes its steps of the checkpoint, where nothing is computed before the first one,"
                " and this bundle has a prologue; build it with another backend, or export with --no-prologue"
            )
        super().build(bundle, manifest, folder, options, progress)

    def reads(self, manifest: Manifest, options: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ARG002 - the protocol's
        """Nothing: its engines are made of the checkpoint, whose checksum the plan has."""
        return ()

    def open(self, options: Mapping[str, Any]) -> TorchDevice:
        """Open the GPU or the CPU; see :class:`TorchDevice` for the options."""
        compiled, model, device = options.get("compile", False), options.get("model"), options.get("device")
        unknown = sorted(options.keys() - {"compile", "model", "device"})
        wrong = not isinstance(compiled, bool) or not (model is None or isinstance(model, str))
        if unknown or wrong or device not in (None, *DEVICES):
            found = repr(unknown[0]) if unknown else f"compile {compiled!r}, model {model!r}, device {device!r}"
            raise BackendError(
                f"{self.name} takes the options compile, true or false, model, a checkpoint's path, and device,"
                f" {' or '.join(DEVICES)}; found {found}; build again"
            )
        return TorchDevice(compiled=compiled, model=model, device=device)
