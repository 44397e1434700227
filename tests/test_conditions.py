"""Conditions: what fits is passed on as it is, what does not is named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from tc_deploy.conditions import checked_conditions, labelled_conditions, placeholder_conditions, read_conditions
from tc_deploy.errors import UsageError
from tc_deploy.manifest import ConditionRecord

TOKENS, WIDTH, CLASSES = 6, 4, 10
PROMPT = ConditionRecord(name="encoder_hidden_states", dtype="float32", shape=(TOKENS, WIDTH), classes=None)
MASK = ConditionRecord(name="encoder_attention_mask", dtype="float32", shape=(TOKENS,), classes=None)
GUIDANCE = ConditionRecord(name="guidance", dtype="float32", shape=(), classes=None)
LABEL = ConditionRecord(name="class_labels", dtype="int32", shape=(), classes=CLASSES)
TEXT = (PROMPT, MASK, GUIDANCE)


def prompts(count: int, seed: int = 0) -> dict[str, Any]:
    drawn = np.random.default_rng(seed)
    return {item.name: drawn.standard_normal((count, *item.shape), np.float32) for item in TEXT}


def refusal(needed: Any, conditions: Any, unconditional: Any = None, *, guided: bool = False) -> str:
    with pytest.raises(UsageError) as raised:
        checked_conditions(needed, conditions, unconditional, guided=guided, where="prompts.safetensors")
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("prompts.safetensors: ")
    return message.removeprefix("prompts.safetensors: ")


def test_what_fits_is_passed_on_as_it_is() -> None:
    conditions = prompts(3)
    checked = checked_conditions(TEXT, conditions, None, guided=False)
    assert (checked.count, dict(checked.unconditional)) == (3, {})
    assert list(checked.given) == [item.name for item in TEXT]
    assert all(checked.given[name] is conditions[name] for name in conditions)


@pytest.mark.parametrize("count", [1, 3])
def test_the_unconditional_half_is_of_each_sample_or_of_all(count: int) -> None:
    conditions, unconditional = prompts(3), prompts(count, seed=1)
    checked = checked_conditions(TEXT, conditions, unconditional, guided=True)
    for name, array in unconditional.items():
        assert checked.unconditional[name].shape == conditions[name].shape
        for sample in range(3):
            assert np.array_equal(checked.unconditional[name][sample], array[sample % count])


def test_without_guidance_the_unconditional_half_is_not_looked_at() -> None:
    assert not checked_conditions(TEXT, prompts(1), {"junk": np.zeros(3)}, guided=False).unconditional


@given(labels=st.lists(st.integers(0, CLASSES - 1), min_size=1), guided=st.booleans())
def test_labels_are_conditions_whose_unconditional_half_is_no_class(labels: list[int], guided: bool) -> None:
    for checked in (
        labelled_conditions((LABEL,), labels, guided=guided),
        checked_conditions((LABEL,), {"class_labels": np.array(labels, np.int32)}, None, guided=guided),
    ):
        assert checked.given["class_labels"].tolist() == labels
        assert checked.given["class_labels"].dtype == np.int32
        half = {name: array.tolist() for name, array in checked.unconditional.items()}
        assert half == ({"class_labels": [CLASSES] * len(labels)} if guided else {})


def test_another_class_may_stand_for_no_class() -> None:
    labels = {"class_labels": np.array([1, 2], np.int32)}
    away = checked_conditions((LABEL,), labels, {"class_labels": np.array([3], np.int32)}, guided=True)
    assert away.unconditional["class_labels"].tolist() == [3, 3]


@given(index=st.lists(st.integers(0, 3), max_size=6))
def test_rows_are_samples(index: list[int]) -> None:
    checked = checked_conditions(TEXT, prompts(4), prompts(1), guided=True)
    chosen = checked.rows(np.array(index, np.intp))
    assert chosen.count == len(index)
    for place, row in enumerate(index):
        for name in checked.given:
            assert np.array_equal(chosen.given[name][place], checked.given[name][row])
            assert np.array_equal(chosen.unconditional[name][place], checked.unconditional[name][row])
    assert checked.rows(slice(2, 9)).count == 2


def edited(name: str, array: Any) -> dict[str, Any]:
    return {**prompts(2), name: array}


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ({}, "encoder_hidden_states is missing; this model takes encoder_hidden_states (n, 6, 4) float32"),
        ({"guidance": np.ones(2, np.float32)}, "encoder_hidden_states is missing; this model takes"),
        (edited("prompt", np.zeros(2)), "prompt is unknown; this model takes encoder_hidden_states (n, 6, 4) float32"),
        (
            edited("guidance", np.ones(2)),
            "guidance: expected float32, found float64; convert it with .astype(numpy.float32)",
        ),
        (edited("guidance", np.float32(1)), "guidance: expected shape (n,), found ()"),
        (edited("guidance", [3.5, 3.5]), "guidance: expected float32, found float64"),
        (
            edited("guidance", np.ones(3, np.float32)),
            "guidance: expected 2 samples, as encoder_hidden_states has",
        ),
        (edited("guidance", np.float32([1, np.nan])), "guidance: holds values that are not finite"),
        (
            edited("encoder_hidden_states", np.zeros((2, 9, 4), np.float32)),
            "the prompt is longer than the 6 of the export; encode it to 6 tokens, or calibrate and export for 9",
        ),
        (
            edited("encoder_attention_mask", np.zeros((2, 2), np.float32)),
            "the prompt is shorter than the 6; pad it to 6 tokens, or calibrate and export for 2",
        ),
        (
            edited("encoder_hidden_states", np.zeros((2, 6, 8), np.float32)),
            "embeddings 8 wide are of another text encoder than the model's, whose are 4",
        ),
        (edited("encoder_hidden_states", np.zeros((6, 4), np.float32)), "expected shape (n, 6, 4), found (6, 4)"),
        ({name: array[:0] for name, array in prompts(1).items()}, "encoder_hidden_states holds no sample"),
    ],
)
def test_what_does_not_fit_is_named(conditions: dict[str, Any], message: str) -> None:
    assert message in refusal(TEXT, conditions)


@pytest.mark.parametrize(
    ("unconditional", "message"),
    [
        (None, "unconditional half: encoder_hidden_states is missing; this model takes"),
        (prompts(3), "encoder_hidden_states: expected 2 samples, as encoder_hidden_states has, found 3"),
        (edited("guidance", np.ones(2)), "unconditional half: guidance: expected float32, found float64"),
    ],
)
def test_the_unconditional_half_is_checked_too(unconditional: dict[str, Any] | None, message: str) -> None:
    assert message in refusal(TEXT, prompts(2), unconditional, guided=True)


@pytest.mark.parametrize("label", [-1, CLASSES, 2**31 - 1])
def test_a_label_out_of_range_is_named(label: int) -> None:
    message = f"class_labels must lie in 0..9, found {label}"
    assert message in refusal((LABEL,), {"class_labels": np.array([0, label], np.int32)})


def test_no_class_is_for_the_unconditional_half_alone() -> None:
    labels = {"class_labels": np.array([CLASSES], np.int32)}
    assert "must lie in 0..9, found 10" in refusal((LABEL,), labels, guided=True)
    assert checked_conditions((LABEL,), {"class_labels": np.array([0], np.int32)}, labels, guided=True).count == 1


def test_a_model_without_labels_says_what_it_takes() -> None:
    with pytest.raises(UsageError, match=r"takes no labels; give conditions: encoder_hidden_states \(n, 6, 4\)"):
        labelled_conditions(TEXT, [1], guided=False)


def test_placeholders_fit() -> None:
    needed = (*TEXT, LABEL)
    values = placeholder_conditions(needed, 3)
    assert checked_conditions(needed, values.given, values.unconditional, guided=True).count == 3


# ---------------------------------------------------------------------------------------------------------------- files


def test_a_file_holds_both_halves_by_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts.safetensors"
    conditions, unconditional = prompts(3), prompts(1, seed=1)
    renamed = {f"unconditional.{name}": array for name, array in unconditional.items()}
    safetensors.numpy.save_file(conditions | renamed, path)
    found = read_conditions(path)
    for half, expected in zip(found, (conditions, unconditional), strict=True):
        assert half.keys() == expected.keys()
        assert all(np.array_equal(half[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["missing", "folder", "text", "truncated"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "prompts.safetensors"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("a cat")
    elif kind == "truncated":
        path.write_bytes(safetensors.numpy.save(prompts(1))[:-5])
    with pytest.raises(UsageError) as raised:
        read_conditions(path)
    assert str(raised.value).startswith(f"{path}: {'a folder' if kind == 'folder' else 'n'}")
    assert "encode_prompt of the diffusers pipeline" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_a_library_says_of_a_file_is_one_line_that_can_be_printed(tmp_path: Path) -> None:
    header = b'{"x": {"dtype": "\\u206e\\u001b[2J", "shape": [1], "data_offsets": [0, 4]}}'
    path = tmp_path / "prompts.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UsageError) as raised:
        read_conditions(path)
    assert str(raised.value).isprintable()
    assert "206e" in str(raised.value)
