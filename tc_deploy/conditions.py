"""What conditions samples: labels, prompt embeddings, masks; checked by name, type and shape before anything runs.

In: arrays by name, from a caller or from a safetensors file, in which the arrays of the unconditional half stand under
``unconditional.NAME``. Out: :class:`Conditions` that fit a model. Never: encodes a prompt, converts a type, or fills in
an embedding that was not given.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tc_deploy.errors import UsageError, first_line, no_file
from tc_deploy.tensors import read_tensors

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
GUIDANCE = "guidance"
"""The condition that tells a model how strong its distilled guidance is."""
UNCONDITIONAL = "unconditional."
HOW_TO_ENCODE = "it holds what encode_prompt of the diffusers pipeline returns, under the transformer's names for it"


class Condition(Protocol):
    """One input that conditions a model; a family and a manifest describe it with classes of their own."""

    @property
    def name(self) -> str:
        """The model's argument."""

    @property
    def dtype(self) -> str:
        """As numpy calls it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Per sample, so without the batch axis."""

    @property
    def classes(self) -> int | None:
        """Labels run from 0 to classes - 1; the one after them means "no class". None where it is not a label."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """What conditions n samples, checked."""

    count: int
    """n."""
    given: Arrays
    """By name, (n, ...)."""
    unconditional: Arrays
    """By name, (n, ...), for the unconditional half of a guided batch; empty without guidance."""

    def rows(self, index: Any) -> Conditions:
        """Some of the samples, in that order; ``index`` is what numpy takes to choose rows."""
        return Conditions(
            count=len(np.arange(self.count)[index]),
            given={name: array[index] for name, array in self.given.items()},
            unconditional={name: array[index] for name, array in self.unconditional.items()},
        )


def checked_conditions(
    needed: Sequence[Condition], given: Arrays, unconditional: Arrays | None, *, guided: bool, where: str = "conditions"
) -> Conditions:
    """Check that conditions fit a model.

    Args:
        needed: what the model takes.
        given: by name, (n, ...), n at least 1.
        unconditional: by name, (n, ...), or (1, ...) for all samples alike. Labels may be left out and are then "no
            class". Not looked at without guidance.
        guided: whether there is an unconditional half.
        where: named first in every message.

    Raises:
        UsageError: one is missing, unknown, of another type, shape or number, a label is out of range, or a value is
            not finite.
    """
    if not needed:
        raise UsageError(f"{where}: this model takes no condition; leave them out")
    conditional = _checked_half(needed, given, where, no_class=False)
    first = needed[0].name
    count = len(conditional[first])
    if count < 1:
        raise UsageError(f"{where}: {first} holds no sample; at least one is needed")
    other: dict[str, NDArray[Any]] = {}
    if guided:
        labels = {item.name: np.array([item.classes], item.dtype) for item in needed if item.classes is not None}
        other = _checked_half(
            needed, {**labels, **(unconditional or {})}, f"{where}: unconditional half", no_class=True
        )
    for allowed, half in (((count,), conditional), ((count, 1), other)):
        for name, array in half.items():
            if len(array) not in allowed:
                raise UsageError(f"{where}: {name}: expected {count} samples, as {first} has, found {len(array)}")
    alike = {name: np.broadcast_to(array, conditional[name].shape) for name, array in other.items()}
    return Conditions(count=count, given=conditional, unconditional=alike)


def labelled_conditions(needed: Sequence[Condition], class_labels: Sequence[int], *, guided: bool) -> Conditions:
    """Conditions of a model that takes one label and nothing else.

    Raises:
        UsageError: the model takes something else, there is no label, or one is no number or out of range.
    """
    if len(needed) != 1 or needed[0].classes is None:
        raise UsageError(f"class_labels: this model takes no labels; give conditions: {_all(needed)}")
    label = needed[0]
    try:
        given = list(class_labels)
    except TypeError:
        raise UsageError(
            f"class_labels must be a list, found {class_labels!r}; for one picture give a list of one"
        ) from None
    numbers = [whole_number(number, "class label") for number in given]
    if not numbers:
        raise UsageError("no class label given; a request makes one picture per label, so at least one is needed")
    # Before they are narrowed, which would let 2 ** 40 in as something else.
    for number in numbers:
        _check_label(number, classes=int(label.classes or 0), no_class=False, what="class label")
    return checked_conditions(needed, {label.name: np.asarray(numbers, label.dtype)}, None, guided=guided)


def placeholder_conditions(needed: Sequence[Condition], count: int) -> Conditions:
    """Conditions whose values do not matter, for runs that are timed: class 0, anything else 1."""
    values = {item.name: np.full((count, *item.shape), 1 if item.classes is None else 0, item.dtype) for item in needed}
    return Conditions(count=count, given=values, unconditional=values)


def whole_number(value: Any, what: str) -> int:
    """A number without a fraction, numpy's included.

    Raises:
        UsageError: it is something else.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise UsageError(f"{what} must be a whole number, found {value!r}")


def array_of(value: Any, what: str) -> NDArray[Any]:
    """What a caller gives as an array.

    Raises:
        UsageError: it is none, as a list of rows of unequal length is not.
    """
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: a tensor of another library, on a GPU
        raise UsageError(f"{what}: expected an array of numbers: {first_line(error)}") from None


def read_conditions(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
    """Read a file of conditions.

    Returns:
        The conditions by name, and those of the unconditional half; not checked against a model.

    Raises:
        UsageError: there is no such file, or it is not safetensors of numpy's types.
    """
    if not path.is_file():
        raise UsageError(f"{path}: {no_file(path)} of conditions; {HOW_TO_ENCODE}")
    try:
        arrays = read_tensors(path)
    except ValueError as error:
        raise UsageError(f"{path}: {error}; {HOW_TO_ENCODE}") from None
    unconditional = {name.removeprefix(UNCONDITIONAL): arrays.pop(name) for name in [*arrays] if is_unconditional(name)}
    return arrays, unconditional


def is_unconditional(name: str) -> bool:
    """Whether a name in a file belongs to the unconditional half."""
    return name.startswith(UNCONDITIONAL)


def _checked_half(needed: Sequence[Condition], given: Arrays, where: str, *, no_class: bool) -> dict[str, NDArray[Any]]:
    """What a model needs of ``given``; ``no_class`` says whether a label may be the one that means so."""
    _check_by_name(given, where)
    arrays = {name: array_of(array, f"{where}: {name}") for name, array in given.items()}
    names = [condition.name for condition in needed]
    unknown, missing = sorted({*arrays} - {*names}), [name for name in names if name not in arrays]
    for problem, wrong in (("unknown", unknown), ("missing", missing)):
        if wrong:
            raise UsageError(f"{where}: {wrong[0]} is {problem}; this model takes {_all(needed)}")
    for condition in needed:
        _check_array(condition, arrays[condition.name], where, no_class=no_class)
    return {name: arrays[name] for name in names}


def _check_by_name(given: Any, where: str) -> None:
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise UsageError(f"{where} must be arrays by name, found {type(given).__name__}")


def _check_array(condition: Condition, array: NDArray[Any], where: str, *, no_class: bool) -> None:
    what = f"{where}: {condition.name}"
    if array.dtype != condition.dtype:
        raise UsageError(
            f"{what}: expected {condition.dtype}, found {array.dtype}; convert it with .astype(numpy.{condition.dtype})"
        )
    if array.shape[1:] != condition.shape or array.ndim == 0:
        raise UsageError(
            f"{what}: expected shape {_shape(condition)}, found {array.shape}{_why(condition, array.shape)}"
        )
    if condition.classes is not None:
        for number in array.flat:
            _check_label(int(number), classes=condition.classes, no_class=no_class, what=what)
    elif not np.isfinite(array).all():
        raise UsageError(f"{what}: holds values that are not finite; encode the prompts again, in float32")


def _check_label(number: int, *, classes: int, no_class: bool, what: str) -> None:
    if not 0 <= number < classes + no_class:
        raise UsageError(f"{what} must lie in 0..{classes - 1 + no_class}, found {number}")


def _why(condition: Condition, found: tuple[int, ...]) -> str:
    """What a wrong shape means: of embeddings (T, C) and of masks (T,) the first axis is the prompt's length."""
    expected = condition.shape
    if len(found) != len(expected) + 1:
        return ""
    if len(expected) == 2 and found[2] != expected[1]:
        return f"; embeddings {found[2]} wide are of another text encoder than the model's, whose are {expected[1]}"
    if len(expected) == 2 or condition.name.endswith("_mask"):
        tokens = expected[0]
        longer = found[1] > tokens
        how = f"longer than the {tokens} of the export; encode" if longer else f"shorter than the {tokens}; pad"
        return f"; the prompt is {how} it to {tokens} tokens, or calibrate and export for {found[1]}"
    return ""


def _shape(condition: Condition) -> str:
    return f"({', '.join(map(str, ('n', *condition.shape)))}{',' * (not condition.shape)})"


def _all(needed: Sequence[Condition]) -> str:
    return ", ".join(f"{item.name} {_shape(item)} {item.dtype}" for item in needed)
