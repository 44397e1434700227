"""Options that commands share."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from tc_deploy.bounds import LARGEST_FLOAT32, MAX_SIZE
from tc_deploy.cli.help import option
from tc_deploy.errors import first_line
from tc_deploy.plan import RANDOM

Command = TypeVar("Command", bound=Callable[..., Any])
MOST = MAX_SIZE
"""Of whatever is counted and has no bound of its own."""
MAX_PROMPTS_BYTES = 2**24
_LONGEST_NAME = 200
"""Bytes of an output's name: temporary files stand beside it under longer ones."""


class _Path(click.Path):
    """A path that the system takes; click would let through what later fails in the middle of the work."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As click does for a path."""
        if not str(value):
            self.fail("expected a path, found nothing", param, ctx)
        path = Path(str(super().convert(value, param, ctx)))
        try:
            path.lstat()
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
                self.fail(f"{_shortened(path)}: {error.strerror}", param, ctx)
        return path


class _NewPath(_Path):
    """A path that is to be written."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As for every path."""
        path = super().convert(value, param, ctx)
        if len(os.fsencode(path.name)) > _LONGEST_NAME:
            self.fail(f"{_shortened(path)}: a name of more than {_LONGEST_NAME} bytes", param, ctx)
        return path


class _ModelPath(_Path):
    """A folder, or a hub's ``owner/name``. What begins with a dot means a folder, so it cannot be taken for an id."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """As for every path."""
        path = super().convert(value, param, ctx)
        return path.absolute() if str(value).startswith(".") and not path.exists() else path


class Number(click.FloatRange):
    """A finite number that fp32 holds, in which it is computed with."""

    name = "number"

    def __init__(self, least: float = -LARGEST_FLOAT32, most: float = LARGEST_FLOAT32) -> None:
        super().__init__(min=least, max=most)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click does for a number."""
        found = float(super().convert(value, param, ctx))
        if math.isnan(found):
            self.fail("expected a number, found nan", param, ctx)
        return found

    def _describe_range(self) -> str:
        if self.max is not None and self.max < LARGEST_FLOAT32:
            return f"{self.min:g}<=x<={self.max:g}"
        return f"{self.min:g}<=x" if self.min is not None and self.min > -LARGEST_FLOAT32 else "finite in fp32"


PATH, NEW_PATH, MODEL_PATH = _Path(), _NewPath(), _ModelPath()


def _shortened(path: Path) -> str:
    words = str(path)
    return words if len(words) <= 80 else f"{words[:40]}...{words[-20:]}"


def frozen_option(*names: str) -> Callable[[Command], Command]:
    """An option that users of diffusers look for and that no bundle takes; it is there to say so."""
    return option(*names, type=click.IntRange(1, MOST), hidden=True)


json_option = option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
force_option = option(
    "--force",
    advanced=True,
    is_flag=True,
    help="Replace a file at -o that tc-deploy did not write; never one that is read.",
)


def _lines_of(value: Path) -> tuple[str, ...]:
    """The lines of a text file that are not empty.

    Raises:
        BadParameter: it is no text file, is too large, or has none.
    """
    try:
        with value.open(encoding="utf-8") as file:
            text = file.read(MAX_PROMPTS_BYTES + 1)
    except (OSError, UnicodeError) as error:
        raise click.BadParameter(f"--prompts {value}: not a text file in UTF-8: {first_line(error)}") from None
    lines = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not lines or len(text) > MAX_PROMPTS_BYTES:
        wrong = "is too large" if lines else "holds no prompt"
        raise click.BadParameter(f"--prompts {value} {wrong}; a prompt stands on a line of its own")
    return lines


def recipe_options(command: Command) -> Command:
    """What ``calibrate`` and ``plan`` take alike; :func:`recipe_overrides` makes a recipe's keys of it."""
    for decorate in reversed(_RECIPE_OPTIONS):
        command = decorate(command)
    return command


def recipe_overrides(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the recipe's dotted keys; None where one was not given.

    Raises:
        BadParameter: the file of prompts is none.
    """
    values = {name.replace("__", "."): value for name, value in options.items()}
    file = values["prompts"]
    values["prompts"] = (*values.pop("prompt"), *(() if file is None else _lines_of(file))) or None
    return values


_RECIPE_OPTIONS = (
    option("--prompt", multiple=True, metavar="TEXT", help="A prompt to measure the plan on; repeatable."),
    option("--prompts", type=PATH, metavar="FILE", help="The same from a file, a prompt a line."),
    option("--negative-prompt", metavar="TEXT", help="What guidance goes away from."),
    option(
        "--steps",
        "--num-inference-steps",
        "sampling__num_inference_steps",
        type=int,
        help="Denoising steps of the sampling run.",
    ),
    option(
        "--guidance-scale",
        "sampling__guidance_scale",
        type=Number(),
        help="Classifier-free guidance, at 1 or less none; for FLUX the distilled guidance.",
    ),
    option("--height", type=int, help="Of a picture, in pixels."),
    option("--width", type=int, help="Of a picture, in pixels."),
    option("--num-frames", advanced=True, type=int, help="Of a video."),
    option(
        "--true-cfg-scale",
        "sampling__true_cfg_scale",
        advanced=True,
        type=Number(),
        help="For FLUX: classifier-free guidance.",
    ),
    option(
        "--text-tokens",
        advanced=True,
        type=click.IntRange(1, MOST),
        help="Tokens per prompt.",
    ),
    option(
        "--conditions",
        advanced=True,
        metavar=f"FILE|{RANDOM}",
        help=f"In the place of prompts: a safetensors file of embeddings, or {RANDOM} ones for a trial.",
    ),
    option(
        "--variant",
        advanced=True,
        metavar="NAME",
        help="Which copy of the weights, as fp16 of model.fp16.safetensors.",
    ),
    option("--seed", advanced=True, type=int, help="Of training, fits and the search."),
)
device_option = option(
    "--device",
    advanced=True,
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where PyTorch runs the model; cuda: on the first visible GPU.",
)
