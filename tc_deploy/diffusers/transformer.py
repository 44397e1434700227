"""A module in the place of a pipeline's transformer, that runs engines.

In: what a pipeline calls its transformer with. Out: the model's output. Never: guesses. An argument, a size or a run
that the engines were not made for is refused.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from numpy.typing import NDArray
from torch import Tensor, nn

from tc_deploy.bundle import reading
from tc_deploy.diffusers.caller import TIMESTEP_TOLERANCE, PipelineRun, PlannedScheduler, calling_run
from tc_deploy.diffusers.runs import LATENTS, Call, NamedRun, Runs
from tc_deploy.errors import UsageError
from tc_deploy.manifest import BUNDLE_FOLDER, Role, TensorRecord
from tc_deploy.models.family import DiffusionTransformer, Family
from tc_deploy.models.geometry import ModelOptions, Values
from tc_deploy.models.loading import family_of_class
from tc_deploy.plan import ModelRecord
from tc_deploy.remarks import warn_of_plan
from tc_deploy.runtime.binding import Bundle, read_bundle
from tc_deploy.runtime.stepper import Engines


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

    It takes the arguments of the diffusers class that the bundle was exported from and has its ``config``.

    A cached step needs the caches of its own run, so every call is held against the run that it comes from. In a
    diffusers pipeline that is one call of the pipeline: its scheduler must be the plan's, the first timestep begins the
    run, steps follow in order, and batch and conditions stay what they were. Each half of guidance has caches of its
    own, also where the halves come one by one, and so have pipelines that take turns. Latents that a callback changes
    are taken as they are. A loop that is no pipeline's may do the same without changes to the latents, which must be
    what the plan's scheduler makes of the outputs; one that changes them calls :meth:`new_run`. Everything else is
    refused, and leaves no trace: the first timestep begins anew.

    Buffers are kept for a few trajectories (:data:`tc_deploy.diffusers.runs.KEPT`); those that wait longest are freed.

    Args:
        path: ``engines/NAME``, built.
        backend: which of the bundle's targets; may be left out where there is one.
        full: run every step in full, for comparison.
        require_signature: as for :func:`tc_deploy.load`.

    Raises:
        BundleError: nothing exported or built there, a file is missing, truncated or altered, or the signature that is
            required is missing or does not fit.
        BackendError: the engine is not installed or refuses the graphs.
        ModelError: diffusers has no such model or scheduler any more, or an installed family cannot be imported.
        UsageError: the bundle has several targets and none is named, its class is unknown or not diffusers', or its
            plan begins a run as it goes on or has a fitted solver.
    """

    def __init__(
        self,
        path: str | Path,
        backend: str | None = None,
        *,
        full: bool = False,
        require_signature: str | Path | None = None,
    ) -> None:
        super().__init__()
        key = None if require_signature is None else Path(require_signature)
        with reading(Path(path), BUNDLE_FOLDER):
            self._open(read_bundle(Path(path), backend, key), full=full)

    def _open(self, bundle: Bundle, *, full: bool) -> None:
        path = bundle.path
        if bundle.plan.solver_fitted:
            raise UsageError(
                f"{path}: the plan's solver is fitted, and a pipeline's scheduler is its own; run the bundle with"
                " tc_deploy.load, or calibrate with --target full"
            )
        warn_of_plan(bundle.plan, path)
        self.path, self._backend, self._plan = path, bundle.backend, bundle.plan
        family = family_of_class(bundle.plan.model.model_class, bundle.plan.model.pipeline)
        # Of a model with blocks the plan is no use to one that is taken as one piece.
        if family is None or bool(family.blocks) != bool(bundle.plan.model.blocks):
            raise UsageError(
                f"{path}: no family for model class {bundle.plan.model.model_class!r} here; install the package that"
                " describes it, or register_family() it first, as when the plan was made"
            )
        if not hasattr(diffusers, family.model_class):
            raise UsageError(
                f"{path}: {bundle.plan.model.model_class} is no class of diffusers, so no pipeline of its calls it; run"
                " the bundle with tc_deploy.load"
            )
        timesteps = torch.from_numpy(bundle.step_tables[Role.TIMESTEP])
        model, call = _usual_call(family, bundle.plan.model, timesteps)
        module: Any = model.module
        self._model = model
        self.config = _Config(module.config)  # type: ignore[no-untyped-call]
        self.config.model_class = family.model_class
        self._signature = inspect.signature(type(module).forward.__get__(module))
        self._timesteps: NDArray[Any] = call.pop("timestep").numpy()
        if np.isclose(self._timesteps[1:], self._timesteps[0], rtol=TIMESTEP_TOLERANCE, atol=0).any():
            raise UsageError(
                f"{path}: the plan's first timestep, {self._timesteps[0]:g}, occurs again, so a run that begins could"
                " not be told from one that goes on; calibrate with fewer steps"
            )
        self._engines = Engines(bundle)
        self._inputs = {tensor.name: tensor for tensor in self._engines.inputs}
        self._constants = {name: value for name, value in call.items() if name not in self._inputs}
        self._masks = {item.name: item.shape for item in model.geometry.conditions if item.values is Values.MASK}
        self._classes = {condition.name: condition.classes for condition in bundle.manifest.conditions}
        self._runs = Runs(self._engines, self._timesteps, PlannedScheduler(bundle.plan), full=full)
        self._lock = threading.Lock()
        self._here = _Here()
        # It goes where the pipeline is moved; accelerate asks a module's first parameter where that is.
        self._place = nn.Parameter(torch.empty(0), requires_grad=False)

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
            model = self.__dict__.get("_model")
            # Sizes, which some pipelines ask the module for, and not its configuration.
            if model is not None and isinstance(size := vars(model.module).get(name), int | float):
                return size
            raise UnsupportedAttributeError(
                f"EngineTransformer has no {name!r}: engines are fixed when they are built; merge LoRA and other"
                " adapters into the checkpoint, then: tc-deploy calibrate, export, build"
            ) from None

    def __repr__(self) -> str:
        """In one line: diffusers shows it where it saves a pipeline, and leaves out what is not its own."""
        return f"EngineTransformer({str(self.path)!r}, {self._backend!r}), whose weights stay in that bundle"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse copies: engines and their buffers are of this process and this object.

        Raises:
            UsageError: always; says how to have another.
        """
        raise UsageError(
            f"{self!r}, can be neither copied nor pickled: engines are of the process that opened them; for another"
            f" call EngineTransformer({str(self.path)!r}, {self._backend!r}) where it is needed"
        )

    def _save_to_state_dict(self, *_: Any) -> None:
        """Give nothing: the weights are in the bundle."""

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Calls inside have caches of their own, by name, as in diffusers' ``CacheMixin``."""
        before, self._here.context = self._here.context, name
        try:
            yield
        finally:
            self._here.context = before

    def new_run(self) -> Callable[..., Transformer2DModelOutput | tuple[Tensor]]:
        """A run that is told by its object: for a loop of one's own that changes the latents between the steps.

        Its first call begins the run at the first timestep. A diffusers pipeline needs no such help.

        Returns:
            What takes the arguments of :meth:`forward`, all of one run.
        """
        return functools.partial(self._answer, NamedRun())

    def forward(self, *args: Any, **kwargs: Any) -> Transformer2DModelOutput | tuple[Tensor]:
        """Run the next step; the arguments are those of the diffusers class.

        Returns:
            The model's output as ``sample``, or a tuple of it with ``return_dict=False``.

        Raises:
            UsageError: an argument that the engines cannot honour, or a size, dtype, batch, label or timestep that the
                bundle was not made for; says how to get one that is.
                So is a step of a run that these engines have not run from its first timestep on.
            NotFiniteError: the model's output is not finite.
            BackendError: the engine fails.
        """
        return self._answer(calling_run(), *args, **kwargs)

    def _answer(
        self, run: PipelineRun | NamedRun | None, *args: Any, **kwargs: Any
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        given = dict(self._model.family.received(self._arguments(args, kwargs)))
        return_dict, timestep = given.pop("return_dict", True), given.pop("timestep", None)
        tensors = {name: given.pop(name, None) for name in self._inputs}
        latents = tensors[LATENTS]
        for name, shape in self._masks.items():
            if tensors[name] is None and isinstance(latents, Tensor):
                # Pipelines leave a mask out where every token of a prompt counts.
                tensors[name] = torch.ones(latents.shape[0], *shape, device=latents.device)
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
        call = Call(
            timestep=_one_timestep(timestep),
            context=self._here.context,
            latents=arrays.pop(LATENTS),
            conditions=arrays,
        )
        with self._lock:
            output = self._runs.answer(call, run)
        sample = self._model.family.returned(torch.from_numpy(output).to(tensors[LATENTS].device))
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
            option = " --height H --width W" if name == "hidden_states" else " --text-tokens N"
            raise UsageError(
                f"{name}: expected ({_sizes(('B', *shape))}), found ({_sizes(value.shape)}); for another size"
                f" {self._how_to_get(option)}"
            )
        expected = _torch_dtype(tensor)
        if value.dtype.is_floating_point and value.dtype != expected:
            cure = (
                f"load the pipeline with torch_dtype={expected}" if expected.is_floating_point else "give whole numbers"
            )
            raise UsageError(f"{name}: expected {expected}, found {value.dtype}; {cure}")
        classes = self._classes.get(name)
        if classes is not None and value.numel() and not 0 <= int(value.min()) <= int(value.max()) <= classes:
            worst = int(value.min()) if value.min() < 0 else int(value.max())
            raise UsageError(f"{name}: expected labels in 0..{classes} ({classes} stands for none), found {worst}")
        if value.dtype.is_floating_point and not torch.isfinite(value).all():
            raise UsageError(f"{name}: expected finite values, found NaN or infinity")
        return np.asarray(value.detach().cpu().to(expected).numpy())

    def _default(self, name: str) -> Any:
        return self._signature.parameters[name].default

    def _how_to_get(self, option: str) -> str:
        return (
            f"make a plan: tc-deploy calibrate {self._plan.model.source}{option} -o calibration/NAME, then export and"
            " build"
        )


class _Here(threading.local):
    """What the caller's thread has said of its calls."""

    context: str | None = None


def _one_timestep(timestep: Any) -> float:
    """The timestep of a call.

    Raises:
        UsageError: it is not one number for the whole batch.
    """
    found = np.atleast_1d(np.asarray(timestep.detach().cpu() if isinstance(timestep, Tensor) else timestep))
    if found.ndim != 1 or not found.size or found.dtype == object or not (found == found[0]).all():
        what = "nothing" if timestep is None else f"{type(timestep).__name__} ({_sizes(found.shape)})"
        raise UsageError(f"timestep: expected one number for the whole batch, found {what}; engines take no other")
    return float(found[0])


def _usual_call(family: Family, record: ModelRecord, timesteps: Tensor) -> tuple[DiffusionTransformer, dict[str, Any]]:
    """What a family's pipelines call the model with, learnt from how the package itself calls it.

    Returns:
        The model, without weights, and the arguments by name: the timesteps (T,) as pipelines give them, and what the
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

    def note(**given: Any) -> NoReturn:
        arguments.update(given)
        raise _NotedError

    module.forward = note
    sample = {"hidden_states": torch.zeros(1, *geometry.latent_shape), "timestep": timesteps}
    with contextlib.suppress(_NotedError):
        model.forward(sample | model.random_conditions(1, torch.Generator()))
    return model, dict(family.received(arguments))


class _NotedError(Exception):
    """Ends a call once its arguments are known."""


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
    if isinstance(constant, list | tuple):
        if not isinstance(value, list | tuple) or len(constant) not in (1, len(value)):
            return False
        return all(map(_is_equal, value, constant * (len(value) // len(constant))))
    return value is None if constant is None else type(value) is type(constant) and bool(value == constant)


def _sizes(shape: Iterable[object]) -> str:
    return ", ".join(map(str, shape))
