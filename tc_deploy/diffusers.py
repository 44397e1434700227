"""Back into diffusers: engines in the place of a pipeline's transformer.

In: a built bundle. Out: :class:`EngineTransformer`, which a diffusers pipeline calls as it calls its own transformer;
the pipeline keeps its scheduler, its guidance, its text encoders and its decoder. Never: guesses. A call that the plan
was not made for is refused, since caches of other steps give pictures that look almost right.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from tc_deploy.errors import UsageError
from tc_deploy.manifest import TensorRecord
from tc_deploy.models.family import DiffusionTransformer, Family
from tc_deploy.models.geometry import ModelOptions
from tc_deploy.models.loading import FAMILIES
from tc_deploy.plan import ModelRecord
from tc_deploy.runtime.binding import read_bundle
from tc_deploy.runtime.stepper import Engines, Stepper

TIMESTEP_TOLERANCE: Final = 1e-5
"""Relative: schedulers compute timesteps in single precision, some differently from machine to machine."""


class UnsupportedAttributeError(UsageError, AttributeError):
    """A pipeline asks for something that engines do not have; ``hasattr`` answers no."""


class _Config(FrozenDict):
    """A model's settings as diffusers shows them."""

    model_class: str = ""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedAttributeError(
            f"a {self.model_class} has no setting {name!r}: is the bundle in a pipeline of another model class?"
        )


class EngineTransformer(nn.Module):
    """Stands in for ``pipe.transformer``.

    It takes the arguments of the diffusers class that the bundle was exported from and has its ``config``. The first
    timestep of the plan begins a run, also after one that was left early; ``cache_context``, by which pipelines that
    call their transformer once for each half of guidance tell the halves apart, gives each half caches of its own.
    Buffers are made at the first run of a batch and kept. One pipeline at a time: two that share an engine
    transformer mix their caches.

    Args:
        path: ``engines/NAME``, built.
        backend: which of the bundle's targets; None takes the only one, or the first by name.
        full: run every step in full, for comparison.

    Raises:
        BundleError: nothing exported or built there, or a file is missing, truncated or altered.
        BackendError: the engine is not installed or refuses the graphs.
        UsageError: the bundle is not of a diffusers class, or its plan begins a run as it goes on.
    """

    _place: Tensor

    def __init__(self, path: str | Path, backend: str | None = None, *, full: bool = False) -> None:
        super().__init__()
        bundle = read_bundle(Path(path), backend)
        self.path, self._full, self._plan = Path(path), full, bundle.plan
        family = FAMILIES.get(bundle.plan.model.model_class)
        if family is None:
            raise UsageError(
                f"{path}: {bundle.plan.model.model_class} is no class of diffusers, so no pipeline of its calls it; run"
                " the bundle with tc_deploy.load"
            )
        timesteps = torch.from_numpy(bundle.step_tables["timestep"])
        module, call = _usual_call(family, bundle.plan.model, timesteps)
        self.config = _Config(module.config)  # type: ignore[no-untyped-call]
        self.config.model_class = family.model_class
        self._signature = inspect.signature(type(module).forward.__get__(module))
        self._timesteps: NDArray[Any] = call.pop("timestep").numpy()
        if self._is_step(slice(1, None), self._timesteps[0]).any():
            raise UsageError(
                f"{path}: the plan's first timestep, {self._timesteps[0]:g}, occurs again, so a run that begins could"
                " not be told from one that goes on; calibrate with fewer steps"
            )
        self._engines = Engines(bundle)
        self._inputs = {tensor.name: tensor for tensor in self._engines.inputs}
        self._constants = {name: value for name, value in call.items() if name not in self._inputs}
        self._classes = {condition.name: condition.classes for condition in bundle.manifest.conditions}
        self._steppers: dict[tuple[str | None, int], Stepper] = {}
        self._running: dict[str | None, tuple[int, Stepper]] = {}
        self._context: str | None = None
        # Without parameters a module has no place; this one goes where the pipeline is moved.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where outputs are put; engines run where their backend runs. Anything but a CPU has not been run yet."""
        return self._place.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents that the engines take, which a pipeline makes its own in."""
        return _torch_dtype(self._inputs["hidden_states"])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise UnsupportedAttributeError(
                f"EngineTransformer has no {name!r}: engines are fixed when they are built; merge LoRA and other"
                " adapters into the checkpoint, then: tc-deploy calibrate, export, build"
            ) from None

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Calls inside have caches of their own, by name, as in diffusers' ``CacheMixin``."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run the next step; the arguments are those of the diffusers class.

        Returns:
            The model's output as ``sample``, or a tuple of it with ``return_dict=False``.

        Raises:
            UsageError: an argument that the engines cannot honour, or a size, dtype, batch, label or timestep that the
                bundle was not made for; says how to get one that is.
            BackendError: the engine fails.
        """
        given = self._arguments(args, kwargs)
        return_dict, timestep = given.pop("return_dict", True), given.pop("timestep", None)
        tensors = {name: given.pop(name, None) for name in self._inputs}
        arrays = {name: self._array(self._inputs[name], value) for name, value in tensors.items()}
        batch = len(arrays["hidden_states"])
        for name, array in arrays.items():
            if len(array) != batch:
                raise UsageError(f"{name}: expected a batch of {batch}, as hidden_states has, found {len(array)}")
        for name, value in given.items():
            if not _says_nothing(value) and not _is_equal(value, self._constants.get(name, self._default(name))):
                raise UsageError(
                    f"{name}: engines cannot honour it: their graphs were exported without, or for another value; leave"
                    f" it out, or keep the {self._plan.model.model_class} itself for this call"
                )
        output = self._stepper(timestep, batch).step(arrays)
        sample = torch.from_numpy(output).to(tensors["hidden_states"].device)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            return dict(self._signature.bind(*args, **kwargs).arguments)
        except TypeError as error:
            raise UsageError(
                f"{self.path}: {self._plan.model.model_class} is called otherwise: {error}; is the bundle in a pipeline"
                " of another model class?"
            ) from None

    def _array(self, tensor: TensorRecord, value: Any) -> NDArray[Any]:
        """An argument as the graph takes it; on a CPU and of the right dtype, without a copy."""
        name, shape = tensor.name, tensor.shape[1:]
        if not isinstance(value, Tensor):
            found = "nothing" if value is None else type(value).__name__
            raise UsageError(f"{name}: expected a tensor ({_sizes(('B', *shape))}), found {found}")
        if value.ndim != len(tensor.shape) or tuple(value.shape[1:]) != shape:
            option = " --latent-size SIZE" if name == "hidden_states" else " --text-tokens N"
            raise UsageError(
                f"{name}: expected ({_sizes(('B', *shape))}), found ({_sizes(value.shape)}); for another size"
                f" {self._how_to_get(option)}"
            )
        expected = _torch_dtype(tensor)
        if value.dtype.is_floating_point and value.dtype != expected:
            raise UsageError(
                f"{name}: expected {expected}, found {value.dtype}; load the pipeline with torch_dtype={expected}"
            )
        classes = self._classes.get(name)
        if classes is not None and value.numel() and not 0 <= int(value.min()) <= int(value.max()) <= classes:
            worst = int(value.min()) if value.min() < 0 else int(value.max())
            raise UsageError(f"{name}: expected labels in 0..{classes} ({classes} stands for none), found {worst}")
        return np.asarray(value.detach().cpu().to(expected).numpy())

    def _stepper(self, timestep: Any, batch: int) -> Stepper:
        """The trajectory that a call goes on with, or begins.

        Raises:
            UsageError: the timestep is not the plan's next, or the batch not the run's.
        """
        found = np.atleast_1d(np.asarray(timestep.detach().cpu() if isinstance(timestep, Tensor) else timestep))
        if found.ndim != 1 or not found.size or found.dtype == object or not (found == found[0]).all():
            what = "nothing" if timestep is None else f"{type(timestep).__name__} ({_sizes(found.shape)})"
            raise UsageError(f"timestep: expected one number for the whole batch, found {what}; engines take no other")
        if self._is_step(0, found[0]):
            key = self._context, batch
            if key not in self._steppers:
                self._steppers[key] = self._engines.stepper(batch, full=self._full)
            self._steppers[key].start()
            self._running[self._context] = batch, self._steppers[key]
            return self._steppers[key]
        steps = len(self._timesteps)
        running, stepper = self._running.get(self._context, (batch, None))
        position = 0 if stepper is None else stepper.position % steps
        if position == 0 or stepper is None or not self._is_step(position, found[0]):
            raise UsageError(
                f"timestep: expected {self._timesteps[position]:g} at step {position}, found {found[0]:g}: the plan is"
                f" for {steps} steps of {self._plan.sampling.scheduler_class}; call the pipeline with that scheduler"
                f" and num_inference_steps={steps}; for other steps {self._how_to_get(' --steps N')}"
            )
        if running != batch:
            raise UsageError(
                f"hidden_states: expected a batch of {running}, which this run began with, found {batch} at step"
                f" {position}; keep guidance on, or off, for the whole run"
            )
        return stepper

    def _is_step(self, position: int | slice, timestep: Any) -> NDArray[np.bool_]:
        return np.asarray(np.isclose(self._timesteps[position], float(timestep), rtol=TIMESTEP_TOLERANCE, atol=0))

    def _default(self, name: str) -> Any:
        return self._signature.parameters[name].default

    def _how_to_get(self, option: str) -> str:
        return (
            f"make a plan: tc-deploy calibrate {self._plan.model.source}{option} -o calibration/NAME, then export and"
            " build"
        )


def _usual_call(family: Family, record: ModelRecord, timesteps: Tensor) -> tuple[Any, dict[str, Any]]:
    """What a family's pipelines call the model with, learnt from how the package itself calls it.

    Returns:
        The module, without weights, and the arguments by name: the timesteps (T,) as pipelines give them, and what the
        graphs hold as constants, such as positions.
    """
    with torch.device("meta"):
        module: Any = getattr(diffusers, family.model_class).from_config(record.config)
    options = ModelOptions.of(record)
    geometry = family.geometry(module, options)
    model = DiffusionTransformer(
        source=record.source,
        module=module,
        family=family,
        geometry=geometry,
        config=record.config,
        weights_sha256=record.weights_sha256,
        options=options,
    )
    arguments: dict[str, Any] = {}

    def note(**given: Any) -> tuple[Tensor]:
        arguments.update(given)
        return (torch.empty(0),)

    module.forward = note
    sample = {"hidden_states": torch.zeros(1, *geometry.latent_shape), "timestep": timesteps}
    model.forward(sample | model.random_conditions(1, torch.Generator()))
    return module, arguments


def _torch_dtype(tensor: TensorRecord) -> torch.dtype:
    dtype = getattr(torch, tensor.dtype)
    assert isinstance(dtype, torch.dtype), "graphs have no types that torch lacks"
    return dtype


def _says_nothing(value: Any) -> bool:
    """Whether an argument that no graph takes asks for nothing either."""
    return value is None or (isinstance(value, Mapping) and all(map(_says_nothing, value.values())))


def _is_equal(value: Any, constant: Any) -> bool:
    """Whether an argument is what the graphs hold; where they hold it once, the whole batch must have it."""
    if isinstance(constant, Mapping):
        return isinstance(value, Mapping) and all(_is_equal(item, constant.get(name)) for name, item in value.items())
    if isinstance(constant, Tensor):
        same_axes = isinstance(value, Tensor) and value.shape[1:] == constant.shape[1:]
        return same_axes and len(constant) in (1, len(value)) and bool((value.cpu() == constant).all())
    return value is None if constant is None else type(value) is type(constant) and bool(value == constant)


def _sizes(shape: Iterable[object]) -> str:
    return ", ".join(map(str, shape))
