"""What a pipeline says that it has: ``model_index.json``, which diffusers loads a pipeline by.

In: a pipeline folder. Out: of each part the class that is named, or that there is none. Never: looks into a part.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from tc_deploy.errors import ModelError
from tc_deploy.models.files import AGAIN, read_json

INDEX = "model_index.json"
TRANSFORMER, AUTOENCODER = "transformer", "vae"
_AUTOENCODERS = (AUTOENCODER, "vqvae", "movq")
"""What diffusers' pipelines call a part that makes pictures of latents."""


class Said(Enum):
    """What an index says of a part."""

    PRESENT = "present"
    ABSENT = "absent"
    """``[null, null]``: the pipeline does without it."""
    NOTHING = "nothing"
    """It does not name the part."""


class PipelineIndex:
    """A pipeline folder's index.

    Args:
        folder: the pipeline's.

    Raises:
        ModelError: the index is no JSON object.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / INDEX
        self.is_there = self.path.is_file()
        self.entries = read_json(self.path) if self.is_there else {}

    @property
    def class_name(self) -> str | None:
        """The pipeline's class; None where it is not said."""
        name = self.entries.get("_class_name")
        return name if isinstance(name, str) else None

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that the pipeline has, as far as it says."""
        return tuple(name for name in self.entries if self.said(name) is Said.PRESENT)

    def said(self, part: str) -> Said:
        """What is said of a part."""
        entry = self.entries.get(part)
        if part.startswith("_") or not isinstance(entry, list) or len(entry) != 2:
            return Said.NOTHING
        return Said.ABSENT if entry[1] is None else Said.PRESENT

    def class_of(self, part: str) -> str | None:
        """The class that is named for a part; None where it has none."""
        return str(self.entries[part][1]) if self.said(part) is Said.PRESENT else None

    def has(self, part: str) -> bool:
        """Whether the pipeline has a part: as the index says; where it says nothing, as the folder shows."""
        said = self.said(part)
        return (self.folder / part).is_dir() if said is Said.NOTHING else said is Said.PRESENT

    @property
    def has_autoencoder(self) -> bool:
        """Whether what the transformer makes is latents of an autoencoder."""
        return any(self.has(part) for part in _AUTOENCODERS)

    def check_transformer(self) -> None:
        """Check that a transformer is named, where there is an index, and is there.

        Raises:
            ModelError: it is not.
        """
        if not self.is_there:
            return
        if self.said(TRANSFORMER) is Said.PRESENT:
            if not (self.folder / TRANSFORMER / "config.json").is_file():
                raise ModelError(
                    f"{self.folder}: {INDEX} names {TRANSFORMER}, and {TRANSFORMER}/config.json is missing; {AGAIN}"
                )
        elif "unet" in self.parts:
            raise ModelError(f"{self.folder}: {INDEX} names a unet and no {TRANSFORMER}; give a Diffusion Transformer")
