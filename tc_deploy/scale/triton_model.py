"""A bundle's engines as a model of Triton's Python backend, which the ``model.py`` of a repository imports.

In: requests for a picture each, as Triton hands them over. Out: pictures, sent as they are done. The model is
decoupled, and Triton's batcher has no part in it: requests that come later join those that run at their next step.
Never: answers a request twice.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from tc_deploy.bundle import first_problem
from tc_deploy.scale.triton_repository import GIVEN, IMAGE, SEED
from tc_deploy.serving.engine import End, Engine, Event, Full, Order, State, Unavailable, reason_of
from tc_deploy.serving.maker import Maker
from tc_deploy.serving.wire import ApiError, Asked, ImagesBody, asked_of

LOG = logging.getLogger(__name__)
_WORDS = {
    End.REFUSED: "the picture came to values that are not finite; give another seed or guidance_scale",
    End.FAILED: "something went wrong here",
    End.UNAVAILABLE: "the engine failed; load the model again",
}


class TritonPythonModel:
    """What Triton looks for in a ``model.py``; its stub calls the methods, one at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle that the configuration names.

        Raises:
            TcDeployError: it cannot be loaded; Triton shows why.
        """
        self._triton: Any = importlib.import_module("triton_python_backend_utils")
        config = json.loads(args["model_config"])
        given = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        if args.get("model_instance_kind") == "GPU":
            # Every instance is a process, and the runtime takes the first GPU that it sees.
            os.environ["CUDA_VISIBLE_DEVICES"] = args["model_instance_device_id"]
        self._error: BaseException | None = None
        load = functools.partial(Maker, Path(given["bundle"]), given.get("backend"), slots=int(given["slots"]))
        self._engine = Engine(config["name"], load, queue=int(given["queue"]), failed=self._failed)
        self._engine.start()
        self._engine.settled.wait()
        if self._engine.state is State.FAILED:
            self._engine.thread.join()  # whose last act is to say why
            assert self._error is not None, "it has said why"
            raise self._error

    def execute(self, requests: list[Any]) -> None:
        """Order a picture for each request; the engine's thread sends it."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._order(self._asked(request), sender)
            except ApiError as error:
                self._refuse(sender, error.message, self._triton.TritonError.INVALID_ARG)
            except Full:
                self._refuse(sender, "the queue is full; come back later", self._triton.TritonError.UNAVAILABLE)
            except Unavailable:
                self._refuse(sender, _WORDS[End.UNAVAILABLE], self._triton.TritonError.UNAVAILABLE)

    def finalize(self) -> None:
        """Answer what was taken, and end."""
        self._engine.drain()
        self._engine.thread.join()

    def _asked(self, request: Any) -> Asked:
        """What a request asks for.

        Raises:
            ApiError: it does not fit the bundle.
        """
        fields: dict[str, Any] = {}
        for name in GIVEN:
            tensor = self._triton.get_input_tensor_by_name(request, name)
            if tensor is not None:
                value = tensor.as_numpy().reshape(-1)[0].item() if tensor.as_numpy().size == 1 else None
                fields[name] = value if not isinstance(value, bytes) else value.decode(errors="replace")
        try:
            body = ImagesBody.model_validate(fields)
        except ValidationError as error:
            where, reason = first_problem(error)
            raise ApiError(400, f"{where}: {reason}") from None
        maker = self._engine.maker
        return asked_of(body, maker.manifest, maker.size, 1)

    def _order(self, asked: Asked, sender: Any) -> None:
        """Order a picture.

        Raises:
            Full: there is no room.
            Unavailable: the engine takes nothing any more.
        """

        def tell(event: Event) -> None:
            if event.is_last:
                assert event.pixels is not None, "a picture that is done is shown"
                tensors = [
                    self._triton.Tensor(IMAGE, event.pixels),
                    self._triton.Tensor(SEED, np.array([asked.seed], np.int64)),
                ]
                self._send(sender, self._triton.InferenceResponse(output_tensors=tensors))
            elif event.end is End.CANCELLED:
                self._refuse(sender, "cancelled", self._triton.TritonError.CANCELLED)
            elif event.end in _WORDS:
                self._refuse(sender, _WORDS[event.end], self._triton.TritonError.INTERNAL)
            elif event.end is None and sender.is_cancelled():
                self._engine.cancel(order)

        order = Order(request=asked.request, course=asked.course, deadline_s=math.inf, tell=tell)
        self._engine.submit(order)

    def _refuse(self, sender: Any, words: str, code: Any) -> None:
        self._send(sender, self._triton.InferenceResponse(error=self._triton.TritonError(words, code)))

    def _send(self, sender: Any, response: Any) -> None:
        sender.send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _failed(self, error: BaseException) -> None:
        LOG.error("the engine failed: %s", reason_of(error))
        self._error = error
