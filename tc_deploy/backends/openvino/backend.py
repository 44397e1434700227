"""OpenVINO on the CPU: the fast path there, in the graphs' own fp32 or, where a target asks for it, in half precision.

Its engines are the bundle's ONNX graphs as they are: OpenVINO compiles them when a pipeline is made, for the very
machine and batch it runs with, so a target of this backend holds no copy of them, only the settings and the checks of
its build. (Compiled graphs kept as files load in half to three quarters of the time, fix the batch, and each hold the
weights again.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tc_deploy.backends.compiled_at_load import MOST_THREADS, PACKED, SHARED, WEIGHTS_MODES, CompiledAtLoad
from tc_deploy.backends.openvino.run import CAPABILITIES, DEFAULT_PRECISION, DEVICE, OpenVinoDevice, openvino_module
from tc_deploy.errors import BackendError


class OpenVino(CompiledAtLoad):
    """The backend."""

    name = "openvino"

    def version(self) -> str:
        """OpenVINO's version, without the build's hash."""
        return str(openvino_module().__version__).partition("-")[0]

    def settled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """With the device, and whose number of threads it is."""
        return {"device": DEVICE.lower(), "threads": 0, **options}

    def open(self, options: Mapping[str, Any]) -> OpenVinoDevice:
        """Open the CPU; see :class:`OpenVinoDevice` for the options."""
        settings = {"device": DEVICE.lower(), "threads": 0, "precision": DEFAULT_PRECISION, **options}
        threads, precision = settings["threads"], settings["precision"]
        # Shared weights are converted at every run: where they must be, copies cost less.
        weights = settings.setdefault("weights", None if precision == DEFAULT_PRECISION else PACKED)
        unknown = sorted(settings.keys() - {"device", "threads", "precision", "weights"})
        wrong = (
            settings["device"] != DEVICE.lower()
            or not isinstance(threads, int)
            or not 0 <= threads <= MOST_THREADS
            or weights not in (None, *WEIGHTS_MODES)
        )
        if unknown or wrong or precision not in tuple(CAPABILITIES):
            found = repr(unknown[0]) if unknown else ", ".join(f"{key} {value!r}" for key, value in settings.items())
            raise BackendError(
                f"{self.name} takes the options device, {DEVICE.lower()}, threads, a number from 0 to {MOST_THREADS},"
                f" precision, one of {', '.join(CAPABILITIES)}, and weights, {SHARED} or {PACKED}; found {found};"
                " build again"
            )
        return OpenVinoDevice(threads=threads, precision=precision, weights=weights)
