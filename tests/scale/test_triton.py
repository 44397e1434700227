"""A model repository: its files to the letter, and its ``model.py`` under a stand-in for Triton's own module.

Triton's module comes with its server alone, so the stand-in has what its documentation says of the calls that are made.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import MadeByCommands, run_cli
from PIL import Image
from serving.served import PATIENT_S

from tc_deploy import __version__

CONFIG = """\
# Made by tc-deploy VERSION
name: "digits"
backend: "python"
max_batch_size: 0
model_transaction_policy { decoupled: true }
input { name: "class_label" data_type: TYPE_INT32 dims: [1] }
input { name: "seed" data_type: TYPE_INT64 dims: [1] optional: true }
input { name: "quality" data_type: TYPE_STRING dims: [1] optional: true }
output { name: "image" data_type: TYPE_UINT8 dims: [8, 8, 3] }
output { name: "seed" data_type: TYPE_INT64 dims: [1] }
parameters { key: "bundle" value { string_value: "BUNDLE" } }
parameters { key: "slots" value { string_value: "2" } }
parameters { key: "queue" value { string_value: "2" } }
"""


class Tensor:
    def __init__(self, name: str, array: Any) -> None:
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> Any:
        return self._array


class TritonError:
    INTERNAL, INVALID_ARG, UNAVAILABLE, CANCELLED = range(4)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self.words, self.code = message, code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors or []}
        self.error = error


class Asking:
    """A request and its response sender; Triton's are two objects with these methods."""

    def __init__(self, **tensors: Any) -> None:
        self.tensors = {name: Tensor(name, np.array([value])) for name, value in tensors.items()}
        self.cancelled = False
        self.sent: queue.Queue[InferenceResponse] = queue.Queue()

    def get_response_sender(self) -> Asking:
        return self

    def is_cancelled(self) -> bool:
        return self.cancelled

    def send(self, response: InferenceResponse, flags: int) -> None:
        assert flags == FINAL
        self.sent.put(response)

    @property
    def answer(self) -> InferenceResponse:
        found = self.sent.get(timeout=PATIENT_S)
        assert self.sent.empty()
        return found


FINAL = 1


@pytest.fixture
def repository(pixel: MadeByCommands, tmp_path: Path) -> Path:
    words = ("--name", "digits", "--slots", 2, "--queue", 2)
    answer = run_cli("export-triton", pixel.bundle, "-o", tmp_path / "repo", *words)
    assert answer.code == 0, answer.err
    return tmp_path / "repo"


@pytest.fixture
def model(repository: Path, pixel: MadeByCommands, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    triton: Any = types.ModuleType("triton_python_backend_utils")
    triton.Tensor, triton.InferenceResponse, triton.TritonError = Tensor, InferenceResponse, TritonError
    triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    triton.get_input_tensor_by_name = lambda request, name: request.tensors.get(name)
    monkeypatch.setitem(sys.modules, triton.__name__, triton)
    spec = importlib.util.spec_from_file_location("model", repository / "digits" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parameters = {"bundle": str(pixel.bundle), "slots": "2", "queue": "2"}
    config = {"name": "digits", "parameters": {key: {"string_value": value} for key, value in parameters.items()}}
    one = module.TritonPythonModel()
    one.initialize({"model_config": json.dumps(config), "model_instance_kind": "CPU"})
    yield one
    one.finalize()


def test_the_files_are_these(repository: Path, pixel: MadeByCommands) -> None:
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert files == {"digits/config.pbtxt", "digits/1/model.py"}
    expected = CONFIG.replace("VERSION", __version__).replace("BUNDLE", str(pixel.bundle))
    assert (repository / "digits" / "config.pbtxt").read_text(encoding="utf-8") == expected


def test_a_request_gets_the_picture_that_generate_makes(model: Any, pixel: MadeByCommands, tmp_path: Path) -> None:
    asking = [Asking(class_label=7, seed=seed) for seed in range(4)]
    model.execute(asking)
    words = ("generate", pixel.bundle, "--class-label", 7, "-n", 4, "-o", tmp_path / "x.png")
    assert run_cli(*words).code == 0
    for seed, one in enumerate(asking):
        answer = one.answer
        assert answer.error is None
        assert answer.tensors["seed"].tolist() == [seed]
        assert (answer.tensors["image"].shape, answer.tensors["image"].dtype) == ((8, 8, 3), np.uint8)
        with Image.open(tmp_path / f"x-{seed}.png") as picture:
            assert np.abs(np.asarray(picture, int) - answer.tensors["image"]).max() <= 1


def test_what_does_not_fit_is_refused_and_the_rest_is_answered(model: Any) -> None:
    bad = [Asking(class_label=70), Asking(), Asking(class_label=7, seed=-1), Asking(class_label=7, quality=b"\xff")]
    good = [Asking(class_label=7, quality=b"hd"), Asking(class_label=1)]
    model.execute([*bad, *good])
    errors = [one.answer.error for one in bad]
    assert [error.code for error in errors if error is not None] == [TritonError.INVALID_ARG] * 4
    assert "class label from 0 to 9" in errors[0].words  # type: ignore[union-attr]
    assert [one.answer.error for one in good] == [None, None]


def test_more_than_there_is_room_for_is_refused_at_once(model: Any) -> None:
    with model._engine._changed:  # the engine's thread waits meanwhile, so that none is done
        asking = [Asking(class_label=7, seed=seed) for seed in range(6)]
        model.execute(asking)
        assert [one.sent.qsize() for one in asking] == [0, 0, 0, 0, 1, 1]
    errors = [one.answer.error for one in asking]
    assert [error and error.code for error in errors] == [None] * 4 + [TritonError.UNAVAILABLE] * 2


def test_a_client_that_leaves_frees_its_place(model: Any) -> None:
    one = Asking(class_label=7, quality=b"hd")
    one.cancelled = True
    model.execute([one])
    answer = one.answer
    assert answer.error is not None
    assert answer.error.code == TritonError.CANCELLED
    last = Asking(class_label=7)
    model.execute([last])
    assert last.answer.error is None


def test_a_failed_engine_says_so_to_everybody(model: Any) -> None:
    def fail(tick: Any) -> None:
        raise RuntimeError("the device is gone")

    model._engine.maker.slots.run = fail
    first, second = Asking(class_label=7), Asking(class_label=7)
    model.execute([first])
    assert first.answer.error is not None
    model._engine.thread.join(PATIENT_S)
    model.execute([second])
    error = second.answer.error
    assert error is not None
    assert error.code == TritonError.UNAVAILABLE
    assert "device" not in error.words


def test_mistakes(pixel: MadeByCommands, repository: Path) -> None:
    answer = run_cli("export-triton", pixel.bundle, "-o", repository, "--name", "../x")
    assert (answer.code, "--name must be" in answer.error) == (2, True)
    config = repository / "digits" / "config.pbtxt"
    assert run_cli("export-triton", pixel.bundle, "-o", repository, "--name", "digits").code == 0
    config.write_text("mine", encoding="utf-8")
    answer = run_cli("export-triton", pixel.bundle, "-o", repository, "--name", "digits")
    assert (answer.code, "is not a file of a Triton model" in answer.error) == (8, True)
