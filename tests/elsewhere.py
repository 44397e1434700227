"""A second device without a GPU: its tensors hold their data on the CPU, call themselves another device's, and refuse
what CUDA's refuse.

So a whole calibration can run "on a GPU" anywhere, and come to the numbers of the CPU, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from tc_deploy.models.family import DiffusionTransformer

DEVICE = torch.device("meta")
"""The one name of a device, beside the CPU's, that every build of PyTorch lets autograd run on."""
CROSSING = (torch.ops.aten.copy_, torch.ops.aten._to_copy)
"""Copies, which alone may read on one device and write on the other."""


@contextlib.contextmanager
def elsewhere() -> Iterator[torch.device]:
    """Within it :data:`DEVICE` is a device with data.

    Operations on tensors of both devices are refused, but for scalars of the CPU, and so are random draws: a seed gives
    other numbers there than on the CPU.
    """
    with _Literals(), _Operations():
        yield DEVICE


class _Literals(TorchFunctionMode):
    """Makes tensors of Python's numbers on the CPU first: on this device PyTorch would take their shape alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Runs whatever is asked of that device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))


class _There(Tensor):
    """A tensor of that device."""

    data_here: Tensor

    @staticmethod
    def __new__(cls, data: Tensor) -> Self:
        # A wrapper does not show that its data are marked as conjugate, and autograd would pass over it.
        data = data.resolve_conj().resolve_neg()
        there: Self = Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
        )
        there.data_here = data
        return there

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _run(func, args, dict(kwargs or {}))

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"elsewhere({self.data_here})"

    def tolist(self) -> Any:
        return self.data_here.tolist()

    def numpy(self) -> Any:  # type: ignore[override]
        raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")

    def __array__(self, dtype: object = None, copy: object = None) -> Any:
        return self.numpy()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the data, and give its results the device that they would have."""
    tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    wrappers = {id(tensor.data_here): tensor for tensor in tensors if isinstance(tensor, _There)}
    there = bool(wrappers)
    if kwargs.get("device") is not None:
        there = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs["device"] = "cpu"
    if func.overloadpacket not in CROSSING:
        _check(func, args, kwargs, tensors, there=there)
    elif func.overloadpacket is torch.ops.aten.copy_:
        there = isinstance(args[0], _There)

    def here(leaf: Any) -> Any:
        return leaf.data_here if isinstance(leaf, _There) else leaf

    def back(leaf: Any) -> Any:
        if not (there and isinstance(leaf, Tensor)):
            return leaf
        # An operation in place gives what it was given.
        return wrappers[id(leaf)] if id(leaf) in wrappers else _There(leaf)

    made = func(*tree_map(here, args), **tree_map(here, kwargs))
    return tree_map(back, made)


def _check(func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor], *, there: bool) -> None:
    there = there or any(isinstance(tensor, _There) for tensor in tensors)
    if not there:
        return
    if any(not isinstance(tensor, _There) and tensor.ndim for tensor in tensors):
        raise AssertionError(f"{func} on tensors of two devices")
    for several in (value for value in (*args, *kwargs.values()) if isinstance(value, list | tuple)):
        kinds = {type(item) is _There for item in several if isinstance(item, Tensor)}
        if len(kinds) > 1:
            raise AssertionError(f"{func} on a list of tensors of two devices")
    if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func.name():
        raise AssertionError(f"{func} draws numbers on the device, which are not the CPU's")


def moved(model: DiffusionTransformer) -> DiffusionTransformer:
    """A copy of a model on that device; to be called within :func:`elsewhere`, and the copy used there."""
    return dataclasses.replace(model, module=deepcopy(model.module).to(DEVICE))
