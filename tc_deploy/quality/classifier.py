"""The classifier that judges pictures: what a Fréchet distance and a class accuracy are taken on.

In: one ONNX file, since that is data where a pickled module is code. Out: features and logits of pictures, computed by
ONNX Runtime on the CPU. Never: resizes or guesses; a classifier of other pictures than the model's is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tc_deploy.errors import ModelError, first_line, no_file
from tc_deploy.libraries import imported

IMAGES, FEATURES, LOGITS = "images", "features", "logits"
_CONTRACT = (
    "a classifier takes images (batch, channels, height, width) and gives features (batch, F) and logits (batch,"
    " classes), float32, of any batch, other sizes fixed"
)
_BATCH = 256


class Classifier:
    """A classifier, loaded and tried.

    Its input ``images`` (B, C, H, W) are pictures in [-1, 1], or latents as they are where a model's are no pictures.

    Args:
        path: the ONNX file.

    Raises:
        ModelError: there is no such file, ONNX Runtime refuses it, or its inputs and outputs are other ones.
        BackendError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._session = _session(path)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if not (_are(inputs, {IMAGES: 4}) and _are(outputs, {FEATURES: 2, LOGITS: 2})):
            found = ", ".join(_described(tensor) for tensor in (*inputs, *outputs))
            raise ModelError(f"{path}: {_CONTRACT}; found {found or 'nothing'}; export it so")
        widths = {tensor.name: tensor.shape[1] for tensor in outputs}
        self.image_shape: tuple[int, int, int] = tuple(inputs[0].shape[1:])
        """(C, H, W)."""
        self.features: int = widths[FEATURES]
        """F, the width of the features."""
        self.classes: int = widths[LOGITS]
        # A graph may promise any batch, and hold a reshape to the one that it was exported with.
        for batch in (1, 2):
            self(torch.zeros(batch, *self.image_shape))

    def check_fits(self, image_shape: tuple[int, ...]) -> None:
        """Check that it reads pictures of this shape.

        Raises:
            ModelError: it reads others.
        """
        if image_shape != self.image_shape:
            raise ModelError(
                f"{self.path}: the classifier reads images {self.image_shape}, the model makes {image_shape} (channels,"
                " height, width); name a classifier that was trained on such"
            )

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Judge pictures.

        Args:
            images: (B, C, H, W) float32, of :attr:`image_shape`.

        Returns:
            Features (B, F) and logits (B, classes).

        Raises:
            ModelError: ONNX Runtime fails, or a result has another shape or is not finite.
        """
        features, logits = zip(*(self._run(part) for part in torch.split(images, _BATCH)), strict=True)
        return torch.cat(features), torch.cat(logits)

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        try:
            found = self._session.run([FEATURES, LOGITS], {IMAGES: images.numpy()})
        except Exception as error:  # ONNX Runtime raises a class of its own per status, without a common base
            raise ModelError(f"{self.path}: fails on {len(images)} images: {first_line(error)}") from error
        features, logits = (torch.from_numpy(array) for array in found)
        for name, values, width in ((FEATURES, features, self.features), (LOGITS, logits, self.classes)):
            if values.shape != (len(images), width):
                raise ModelError(
                    f"{self.path}: {name} of {len(images)} images: expected {(len(images), width)}, found"
                    f" {tuple(values.shape)}; export it with a dynamic batch"
                )
            if not values.isfinite().all():
                raise ModelError(f"{self.path}: {name} are not finite; the classifier cannot judge these pictures")
        return features, logits


def _session(path: Path) -> Any:
    onnxruntime = imported("onnxruntime", purpose="a classifier needs ONNX Runtime: ")
    if not path.is_file():
        raise ModelError(f"{path}: {no_file(path)}; a classifier is one ONNX file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # Between two calls the threads must not spin: PyTorch wants the cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as in Classifier._run
        raise ModelError(
            f"{path}: ONNX Runtime refuses it: {first_line(error)}; a classifier is one ONNX file"
        ) from error


def _are(tensors: list[Any], ranks: dict[str, int]) -> bool:
    """Whether these are the tensors by name and rank, float32, with a dynamic first axis and the others fixed."""
    return {tensor.name: len(tensor.shape) for tensor in tensors} == ranks and all(
        tensor.type == "tensor(float)"
        and [isinstance(size, int) for size in tensor.shape] == [False] + [True] * (len(tensor.shape) - 1)
        for tensor in tensors
    )


def _described(tensor: Any) -> str:
    sizes = ", ".join(str(size or "?") for size in tensor.shape)
    return f"{tensor.name} ({sizes}) {tensor.type.removeprefix('tensor(').removesuffix(')')}"
