"""The tensors that graphs read and write: what each is for, and what it is called.

A tensor's role, age and group stand in its record; its name is made of them here, and nobody takes a name apart. In: a
role. Out: names and records. Never: knows a graph, a plan or a buffer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Self, TypeAlias

import numpy as np
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from tc_deploy.bounds import MAX_AXES, Count, Size
from tc_deploy.bundle import Document
from tc_deploy.libraries import imported

MODEL_BATCH: Final = "model_batch"
"""The model's batch axis: one row per sample, or two with guidance (all conditional ones, then all unconditional)."""
BATCH: Final = "batch"
"""The samples' own batch axis."""
RUN_BATCH: Final = "run_batch"
"""The batch axis of what is computed for all steps at once: the model's batch for each step, one after the other."""

ElementType: TypeAlias = Annotated[str, Field(pattern="^(float32|float16|bfloat16|int32|int64|bool)$")]
"""As numpy calls it."""
Axis: TypeAlias = Size | Annotated[str, Field(pattern="^[a-z][a-z_]*[0-9]*$")]
"""A size, or the name of an open axis."""


class Role(StrEnum):
    """What a tensor is for. Each is also the name of a tensor that is the only one of its role."""

    HIDDEN_STATES = "hidden_states"
    """What the model makes its output of, at every step anew; the solver writes it."""
    TIMESTEP = "timestep"
    """(model batch,) float32, from a table."""
    CONDITION = "condition"
    """What a request gives, or the text encoder makes: it has the name of the model's argument."""
    TOKEN_INDEX = "token_index"  # noqa: S105 - a tensor's name
    """Input of a cached step that prunes: (model batch, sum of M over pruned blocks) int32. Where one graph holds all
    variants, one for each group of blocks (``groups.py``)."""
    COMPUTED = "computed"
    """Input of such a graph for a group that keeps nothing in some variant: (model batch,) int32, 0 in that one, else
    1."""
    PROLOGUE = "prologue"
    """What a step reads of what a request's conditions alone have made: (model batch, ...), the same at every step."""
    SCHEDULED = "scheduled"
    """What a step reads of what its timestep has made, and maybe conditions: (model batch, ...), its row."""
    FORECAST_WEIGHTS = "forecast_weights"
    """Input of a cached step with forecast order r > 0: (model batch, r + 1) float32."""
    CACHE = "cache"
    """What a full step leaves for cached ones, and what these read of it at an age."""
    SAMPLE = "sample"
    """Output of every step's graph: the model's output. The solver reads it as ``model_output``."""
    LATENTS = "latents"
    """The solver reads those of this step and of earlier ones, and writes ``next_latents``; the decoder reads the
    last."""
    GUIDED_OUTPUT = "guided_output"
    """The solver's history: the model's output after guidance."""
    COEFFICIENTS = "coefficients"
    """(batch, 2(h+1)), from a table: the solver's weights."""
    INPUT_SCALE = "input_scale"
    """(batch,), from a table: scale of the model's next input."""
    GUIDANCE_SCALE = "guidance_scale"
    """(batch,): the solver's, from the request."""
    IMAGES = "images"
    """The decoder's output: (B, 3, H, W), or (B, 3, F, H, W) for video, in [-1, 1] where the decoder does not
    overshoot."""
    TOKEN_IDS = "token_ids"  # noqa: S105
    """The text encoder's input, as a tokenizer makes it."""
    TOKEN_MASK = "token_mask"  # noqa: S105
    """Likewise: 1 for the prompt, 0 for padding."""
    VALUE = "value"
    """One inside a graph, shown to find what is to blame for a fault."""


TABLE_ROLES: Final = (
    Role.TIMESTEP,
    Role.TOKEN_INDEX,
    Role.COMPUTED,
    Role.FORECAST_WEIGHTS,
    Role.COEFFICIENTS,
    Role.INPUT_SCALE,
)
"""What a step takes from a table."""
GIVEN_ROLES: Final = (Role.HIDDEN_STATES, Role.CONDITION)
"""What the model's graph takes of whoever drives it."""
PROLOGUE_ROLES: Final = (Role.PROLOGUE, Role.SCHEDULED)
"""What it takes of what is made before the first one."""
INDEX_ROLES: Final = (Role.TOKEN_INDEX, Role.COMPUTED)
"""Which tokens a step computes."""


class TensorName(Document):
    """A tensor by what it is for."""

    name: str
    """In the graph's file."""
    role: Role
    age: Count = 0
    """How many full steps, or of the solver's own history steps, before the latest it is of."""
    cache: str | None = None
    """Which cached value it is, where it is one: ``cache.3.mlp``, whatever its age."""
    rows: bool = False
    """Of a cached value the rows that a step computes, where one graph holds all variants: it also reads it. A full
    step's are the cached value itself."""
    group: Count | None = None
    """Of blocks, where one graph holds all variants."""

    @model_validator(mode="after")
    def _check_fits_role(self) -> Self:
        if (self.role is Role.CACHE) != (self.cache is not None):
            raise ValueError(f"{self.name}: a cached value says which it is, and nothing else does")
        return self

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is as it is for most."""
        fields: dict[str, Any] = handler(self)
        return {name: value for name, value in fields.items() if value != type(self).model_fields[name].default}


class TensorRecord(TensorName):
    """A graph's input or output, as stored."""

    dtype: ElementType
    shape: Annotated[tuple[Axis, ...], Field(max_length=MAX_AXES)]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The type of an array that holds it.

        Raises:
            BackendError: it is bfloat16, which numpy has from ml_dtypes, and that is not installed.
        """
        if self.dtype == "bfloat16":
            ml_dtypes = imported("ml_dtypes", purpose=f"{self.name} is bfloat16, which numpy has from a library: ")
            found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
            return found
        return np.dtype(self.dtype)

    def sized(self, axes: Mapping[str, int]) -> TensorRecord:
        """The tensor with some of its open axes closed."""
        shape = tuple(axes.get(size, size) if isinstance(size, str) else size for size in self.shape)
        return self.model_copy(update={"shape": shape})

    def shape_at(self, axes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape, with every open axis closed."""
        return tuple(axes[size] if isinstance(size, str) else size for size in self.shape)


def only_tensor(role: Role) -> TensorName:
    """The only tensor of a role."""
    return TensorName(name=role.value, role=role)


def condition_tensor(name: str) -> TensorName:
    """A condition, by the name of the model's argument."""
    return TensorName(name=name, role=Role.CONDITION)


def cache_tensor(cache: str, age: int = 0) -> TensorName:
    """A cached value ``age`` full steps before the latest: ``cache.3.mlp``, then ``cache.3.mlp.1``."""
    return TensorName(name=_aged(cache, age), role=Role.CACHE, cache=cache, age=age)


def cache_rows_tensor(cache: str) -> TensorName:
    """The rows of a cached value that a step computes."""
    return TensorName(name=f"{cache}.rows", role=Role.CACHE, cache=cache, rows=True)


def prologue_tensor(role: Role, number: int) -> TensorName:
    """What a step reads in the place of computing it: ``prologue.0``, ``scheduled.0``."""
    return TensorName(name=f"{role}.{number}", role=role)


def group_tensor(role: Role, group: int) -> TensorName:
    """What a group of blocks takes of a role: ``token_index.0``."""
    return TensorName(name=f"{role}.{group}", role=role, group=group)


def latents_tensor(age: int = 0) -> TensorName:
    """The latents ``age`` steps before this one."""
    return TensorName(name=_aged(Role.LATENTS, age), role=Role.LATENTS, age=age)


def guided_output_tensor(age: int = 0) -> TensorName:
    """The guided output ``age`` steps before this one."""
    return TensorName(name=_aged(Role.GUIDED_OUTPUT, age), role=Role.GUIDED_OUTPUT, age=age)


MODEL_OUTPUT: Final = TensorName(name="model_output", role=Role.SAMPLE)
"""The model's output as the solver's input."""
NEXT_LATENTS: Final = TensorName(name="next_latents", role=Role.LATENTS)
"""The solver's output."""


def solver_inputs(history: int, *, guided: bool) -> tuple[TensorName, ...]:
    """What the solver's graph reads, in order; ``export/solver_graph.py`` says what it computes.

    Args:
        history: h, earlier latents and guided outputs that one update reads.
        guided: whether the model runs on conditional and unconditional rows.
    """
    scale = (only_tensor(Role.GUIDANCE_SCALE),) if guided else ()
    return (
        MODEL_OUTPUT,
        *(latents_tensor(age) for age in range(history + 1)),
        *(guided_output_tensor(age) for age in range(1, history + 1)),
        only_tensor(Role.COEFFICIENTS),
        only_tensor(Role.INPUT_SCALE),
        *scale,
    )


def solver_outputs(history: int) -> tuple[TensorName, ...]:
    """What it writes; the guided output only where a later update reads it."""
    return (NEXT_LATENTS, only_tensor(Role.HIDDEN_STATES), *((guided_output_tensor(),) if history else ()))


def model_inputs(names: Iterable[str]) -> tuple[TensorName, ...]:
    """The inputs of the model's own forward: latents, timestep, and conditions by whatever name."""
    own = {str(role): only_tensor(role) for role in (Role.HIDDEN_STATES, Role.TIMESTEP)}
    return tuple(own.get(name) or condition_tensor(name) for name in names)


def token_inputs(ids: str, mask: str | None) -> tuple[TensorName, ...]:
    """What a text encoder reads of one tokenizer, by the inputs' names."""
    named = TensorName(name=ids, role=Role.TOKEN_IDS)
    return (named,) if mask is None else (named, TensorName(name=mask, role=Role.TOKEN_MASK))


def names_of(tensors: Iterable[TensorName]) -> tuple[str, ...]:
    """Their names, in order."""
    return tuple(tensor.name for tensor in tensors)


def _aged(name: str, age: int) -> str:
    return name if age == 0 else f"{name}.{age}"
