"""What goes over the wire: the body of a request, checked; a bundle's answer; errors, in the shape of OpenAI's API.

In: a body as pydantic read it, and a bundle's manifest. Out: a runtime request, or an :class:`ApiError` that names the
field. Never: shows a client a path, a module or the text of an error that is ours.
"""

from __future__ import annotations

import base64
import io
import re
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from tc_deploy.bounds import MAX_GUIDANCE
from tc_deploy.errors import UsageError
from tc_deploy.manifest import Manifest
from tc_deploy.runtime.course import HD, STANDARD
from tc_deploy.runtime.request import GUIDANCE_SCALE, TRUE_CFG_SCALE, Request, checked_request

MOST_PICTURES = 10
"""Of one request, as OpenAI has it."""
MOST_LETTERS = 4000
MOST_SEED = 2**53 - 1
"""The largest that every JSON reader keeps."""
RANDOM_SEEDS = 2**31
MOST_PREVIEWS = 50
MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_LABEL = re.compile(r"[0-9]{1,9}")
_UNPRINTED = re.compile(r"[^\x20-\x7e]")


class ApiError(Exception):
    """An answer that is an error; its message is for the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self, request_id: str) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": {**fields, "request_id": request_id}}


class ErrorFields(BaseModel):
    """What is said of an error."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorFields


class ImagesBody(BaseModel):
    """The body of ``POST /v1/images/generations``: OpenAI's, and what it has no field for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str, Field(max_length=MOST_LETTERS)] | None = None
    """For a bundle that takes class labels, one of them in digits."""
    class_label: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    negative_prompt: Annotated[str, Field(max_length=MOST_LETTERS)] | None = None
    model: Annotated[str, Field(max_length=256)] | None = None
    """May be left out where only one is served."""
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] | None = None
    size: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$")] | None = None
    """Width x height; there is one per bundle."""
    quality: Literal["standard", "hd", "auto"] | None = None
    """``standard`` is the plan, ``hd`` every step in full."""
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    """Not looked at."""
    seed: Annotated[int, Field(ge=0, le=MOST_SEED - MOST_PICTURES)] | None = None
    """Picture i has seed + i; drawn where it is left out."""
    guidance_scale: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None
    stream: bool | None = None
    """Send events as the picture comes to be."""
    partial_images: Annotated[int, Field(ge=0, le=MOST_PREVIEWS)] | None = None
    """With ``stream``: how many times the unfinished picture is sent."""


class Picture(BaseModel):
    """One picture of an answer."""

    b64_json: str


class ImagesAnswer(BaseModel):
    """The answer to ``POST /v1/images/generations``."""

    created: int
    data: list[Picture]
    model: str
    bundle_id: str
    seed: int
    size: str
    quality: str
    output_format: str
    steps_full: int
    steps_cached: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A body that fits a bundle."""

    request: Request
    course: str
    seed: int
    output_format: str
    stream: bool
    previews: int


def asked_of(body: ImagesBody, manifest: Manifest, size: tuple[int, int], most: int) -> Asked:
    """Check a body against the bundle that it names.

    Args:
        body: as the schema has it.
        manifest: the bundle's.
        size: height and width of its pictures.
        most: pictures that one request can have here.

    Raises:
        ApiError: 400, with the field that does not fit.
    """
    count = body.n or 1
    if count > most:
        raise ApiError(400, f"n must be at most {most} here, found {count}", param="n")
    offered = f"{size[1]}x{size[0]}"
    if body.size not in (None, "auto", offered):
        raise ApiError(400, f"size must be {offered}, which is the model's, found {body.size}", param="size")
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images goes with stream", param="partial_images")
    seed = secrets.randbelow(RANDOM_SEEDS) if body.seed is None else body.seed
    request = _request(body, manifest, count, seed)
    quality = STANDARD if body.quality in (None, "auto") else body.quality
    return Asked(
        request=request,
        course=HD if quality == HD else STANDARD,
        seed=seed,
        output_format=body.output_format or "png",
        stream=bool(body.stream),
        previews=body.partial_images or 0,
    )


def _request(body: ImagesBody, manifest: Manifest, count: int, seed: int) -> Request:
    given: dict[str, Any] = dict.fromkeys(("class_labels", "prompt", "negative_prompt", "conditions", "unconditional"))
    given |= {"count": None, GUIDANCE_SCALE: body.guidance_scale, TRUE_CFG_SCALE: None}
    prompt, label = body.prompt, body.class_label
    if not manifest.conditions:
        if label is not None:
            raise ApiError(400, "this model takes no class label", param="class_label")
        given["count"] = count  # a client of OpenAI's cannot leave the prompt out
    elif manifest.text is None and manifest.takes_labels:
        given["class_labels"] = [_label(prompt, label, manifest)] * count
    elif manifest.text is None:
        raise ApiError(400, "this model takes prompt embeddings, which this API has no field for", param="model")
    else:
        if label is not None:
            raise ApiError(400, "this model takes a prompt and no class label", param="class_label")
        if prompt is None:
            raise ApiError(400, "prompt is missing", param="prompt")
        for name, text in (("prompt", prompt), ("negative_prompt", body.negative_prompt)):
            if text is not None and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise ApiError(400, f"{name} is no Unicode text", param=name)
        given["prompt"] = [prompt] * count
    if body.negative_prompt is not None:
        if given["prompt"] is None or not manifest.guided:
            raise ApiError(400, "this model takes no negative prompt", param="negative_prompt")
        given["negative_prompt"] = body.negative_prompt
    if body.guidance_scale is not None and not (manifest.guided or manifest.embeds_guidance):
        raise ApiError(400, "this model was built without guidance", param="guidance_scale")
    try:
        return checked_request(manifest, **given, seed=seed, latents=None)
    except UsageError as error:
        raise ApiError(400, _UNPRINTED.sub("?", str(error))) from error


def _label(prompt: str | None, label: int | None, manifest: Manifest) -> int:
    classes = next(item.classes for item in manifest.conditions if item.classes is not None)
    what = f"a class label from 0 to {classes - 1}"
    if (prompt is None) == (label is None):
        raise ApiError(400, f"give class_label, or prompt with {what} in digits; one of them", param="class_label")
    param = "prompt" if label is None else "class_label"
    if label is None:
        if not _LABEL.fullmatch(str(prompt)):
            raise ApiError(400, f"this model takes no text; prompt must be {what}, in digits", param=param)
        label = int(str(prompt))
    if label >= classes:
        raise ApiError(400, f"{param} must be {what}, found {label}", param=param)
    return label


def encoded(pixels: NDArray[np.uint8], output_format: str) -> str:
    """A picture as a file, in base64."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=output_format)
    return base64.b64encode(stream.getvalue()).decode()
