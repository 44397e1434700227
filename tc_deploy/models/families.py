"""The package's own families: a new one is its file and its name here.

Out: :data:`FAMILIES`, by model class. Never: looks for installed packages' (``loading.py`` does).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Final

from tc_deploy.models.family import Family

_MODULES = (
    "chroma",
    "cogvideox",
    "cogview4",
    "dit",
    "flux",
    "flux2",
    "hunyuan_dit",
    "longcat_image",
    "ltx_video",
    "pixart",
    "qwen_image",
    "sd3",
    "wan",
    "z_image",
)
"""Each has a ``FAMILY``."""


def _families() -> dict[str, Family]:
    found: list[Family] = [import_module(f"tc_deploy.models.{name}").FAMILY for name in _MODULES]
    return {family.model_class: family for family in found}


FAMILIES: Final[Mapping[str, Family]] = _families()
