"""How image and text rows stand in what a block is given and gives, and how to take them apart and put them back.

Tokens of the picture can be pruned, tokens of the text never are; models keep them in one tensor or two. Works under
torch.export, for row counts that are left open too.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Streams(NamedTuple):
    """The rows of a value, by what they are; None where it has none of the kind."""

    image: Tensor | None
    text: Tensor | None


class Rows(Enum):
    """What stands where in a value."""

    IMAGE = "image"
    """One tensor, image rows only."""
    TEXT = "text"
    """One tensor, text rows only."""
    TEXT_IMAGE = "text then image"
    """One tensor, text rows first."""
    IMAGE_TEXT = "image then text"
    """One tensor, image rows first."""
    IMAGE_AND_TEXT = "(image, text)"
    """Two tensors."""
    TEXT_AND_IMAGE = "(text, image)"
    """Two tensors."""

    @property
    def has_image(self) -> bool:
        """Whether there are image rows."""
        return self is not Rows.TEXT

    @property
    def has_text(self) -> bool:
        """Whether there are text rows."""
        return self is not Rows.IMAGE

    def split(self, value: Any, images: int, axis: int = 1) -> Streams:
        """Take a value apart.

        Args:
            value: a tensor, or a tuple of two.
            images: its image rows; text rows are the others.
            axis: of a tensor, the one that counts rows.
        """
        match self:
            case Rows.IMAGE:
                return Streams(value, None)
            case Rows.TEXT:
                return Streams(None, value)
            case Rows.IMAGE_AND_TEXT:
                return Streams(value[0], value[1])
            case Rows.TEXT_AND_IMAGE:
                return Streams(value[1], value[0])
            # Two slices rather than a split, which export does not fold where the value is a constant.
            case Rows.IMAGE_TEXT:
                return Streams(value.narrow(axis, 0, images), value.narrow(axis, images, value.shape[axis] - images))
            case Rows.TEXT_IMAGE:
                texts = value.shape[axis] - images
                return Streams(value.narrow(axis, texts, images), value.narrow(axis, 0, texts))

    def join(self, streams: Streams, axis: int = 1) -> Any:
        """Put a value together again."""
        image, text = streams
        match self:
            case Rows.IMAGE:
                return image
            case Rows.TEXT:
                return text
            case Rows.IMAGE_AND_TEXT:
                return image, text
            case Rows.TEXT_AND_IMAGE:
                return text, image
            case Rows.IMAGE_TEXT:
                return torch.cat([image, text], dim=axis)  # type: ignore[list-item]
            case Rows.TEXT_IMAGE:
                return torch.cat([text, image], dim=axis)  # type: ignore[list-item]
