"""A model whose matrix products run in half precision and whose everything else stays in fp32.

Half are: linear layers, convolutions and embedding tables with their weights, scaled_dot_product_attention, and
what leaves a branch or enters attention as keys and values, so caches too. fp32 are: norms, adaLN modulation, gates,
rotary and positional embeddings, activations, the sum of a forecast, the residual stream, the model's inputs and its
output, and so what is cached of these: a block's residual, the model's output. The module is cast before it is
exported, so PyTorch runs the very numbers that its engines are compared with.

In fp16 that means every layer, since Turing has no fp32 matrix product. In bf16, which Turing has not either, it means
those of the blocks: latents rounded to 8 bits at the entry and the head show in the picture. (The digits' full run is
63.1 dB from its fp32 run, and 53.4 dB with every layer in bf16; in fp16 it is 76.0 dB with every layer. Ten digits,
PyTorch, 2026-11-24.)

Single blocks can stay in fp32 altogether, with what is cached of them: where fp16, which ends at 65504, overflows.

Never: changes the module for longer than it is asked to, names a parameter anew, or knows a family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tc_deploy.errors import ExportError, UsageError
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.precisions import PRECISIONS
from tc_deploy.tokencache.cache_points import replace_forward
from tc_deploy.types import Precision

_LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.Embedding)
_PRODUCTS = (F.linear, F.conv2d, F.conv3d, F.embedding)
"""What these layers call: with the input and the weight as the first two arguments."""


class _HalfProducts(TorchFunctionMode):
    """Casts what goes into a product to half, and what comes out back to fp32. Works under torch.export."""

    def __init__(self, half: torch.dtype, rounded: Collection[int]) -> None:
        super().__init__()
        self.half, self.rounded = half, rounded
        self.paused = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            # A mask that is added must have the queries' type; one of booleans, and indices, stay what they are.
            args, kwargs = (self.narrow(given) for given in (args, kwargs))
        elif func in _PRODUCTS and len(args) > 1 and args[1].dtype == self.half:
            args = (self.narrow(args[0]), *args[1:])
        elif func in _PRODUCTS and len(args) > 1 and id(args[1]) in self.rounded:
            given = self.narrow(args[0])
            given = given.float() if given.is_floating_point() else given
            return func(given, *args[1:], **kwargs).to(self.half).float()
        else:
            return func(*args, **kwargs)
        return func(*args, **kwargs).float()

    def narrow(self, value: Any) -> Any:
        """Every floating tensor in ``value`` in half."""
        if isinstance(value, Tensor):
            return value.to(self.half) if value.is_floating_point() else value
        if isinstance(value, tuple):
            return tuple(self.narrow(part) for part in value)
        if isinstance(value, dict):
            return {name: self.narrow(part) for name, part in value.items()}
        return value


def block_names(model: DiffusionTransformer) -> tuple[str, ...]:
    """The blocks by name; of a model that is taken as one piece, what stands in its lists of modules."""
    if model.family.blocks:
        return model.block_names
    named = list(model.module.named_modules())
    lists = [name for name, module in named if isinstance(module, nn.ModuleList)]
    outermost = [name for name in lists if not any(_is_within(name, other) for other in lists)]
    return tuple(name for name, _ in named if name.rpartition(".")[0] in outermost)


@contextlib.contextmanager
def half_products(
    model: DiffusionTransformer, precision: Precision, fp32_blocks: Collection[str] = (), *, stored: bool = True
) -> Iterator[None]:
    """While open, ``model`` computes its matrix products in ``precision``, as :func:`cast_products` makes it.

    The cast weights lie beside the fp32 ones, which come back in the end. Not for two threads on one model at once.

    Raises:
        UsageError: the model has no block of a name.
    """
    restore = cast_products(model, precision, fp32_blocks, stored=stored)
    try:
        yield
    finally:
        restore()


def cast_products(
    model: DiffusionTransformer, precision: Precision, fp32_blocks: Collection[str] = (), *, stored: bool = True
) -> Callable[[], None]:
    """Let ``model`` compute its matrix products in ``precision`` from now on; fp32 changes nothing.

    Args:
        model: the model.
        precision: of its products.
        fp32_blocks: names of blocks that stay as they are.
        stored: hold the weights in half, as a graph does. Otherwise they are rounded and stay in fp32, and operands and
            results of each product are rounded: the same numbers but for the order of summation, where a CPU has no
            fp16 arithmetic four times as fast, and so for whole sampling runs.

    Returns:
        What gives the model its fp32 weights back; whoever drops it drops them.

    Raises:
        UsageError: the model has no block of a name.
    """
    blocks = block_names(model)
    unknown = [name for name in fp32_blocks if name not in blocks]
    if unknown:
        known = f"its blocks are {blocks[0]} to {blocks[-1]}" if blocks else "it has no list of blocks"
        raise UsageError(f"the model has no block {unknown[0]}; {known}")
    if precision is Precision.FP32:
        return lambda: None
    half = getattr(torch, PRECISIONS[precision].element_type)
    rounded: set[int] = set()
    mode = _HalfProducts(half, rounded)

    def whole(original: Any, *args: Any, **kwargs: Any) -> Any:
        with mode:
            return original(*args, **kwargs)

    def leave(original: Any, *args: Any, **kwargs: Any) -> Any:
        # Two casts that cancel each other: the value comes out of a product. What a cache holds is then half, and the
        # gate, which is fp32, brings it back to fp32.
        return mode.narrow(original(*args, **kwargs))

    def exact(original: Any, *args: Any, **kwargs: Any) -> Any:
        mode.paused = True
        try:
            return original(*args, **kwargs)
        finally:
            mode.paused = False

    with contextlib.ExitStack() as stack:
        for layer in _layers(model, precision, fp32_blocks).values():
            for name, parameter in list(layer.named_parameters(recurse=False)):
                stack.callback(setattr, layer, name, parameter)
                cast = parameter.to(half) if stored else parameter.to(half).float()
                setattr(layer, name, nn.Parameter(cast, requires_grad=False))
                if not stored:
                    rounded.add(id(layer.get_parameter(name)))
        for name in fp32_blocks:
            stack.callback(replace_forward(model.module.get_submodule(name), exact))
        for name, (module, block) in zip(model.block_names, model.described_blocks, strict=True):
            for branch in () if name in fp32_blocks else block.branches:
                stack.callback(replace_forward(module.get_submodule(branch.exit), leave))
        stack.callback(replace_forward(model.module, whole))
        return stack.pop_all().close


@contextlib.contextmanager
def overflow_refused(
    model: DiffusionTransformer, precision: Precision, fp32_blocks: Collection[str] = ()
) -> Iterator[None]:
    """While open, a half product of ``model`` that is not finite is an error.

    Raises:
        ExportError: names the layer, and its block where it is in one.
    """
    hooks = []
    for name, layer in _layers(model, precision, fp32_blocks).items() if precision is not Precision.FP32 else ():
        block = next((block for block in block_names(model) if _is_within(name, block)), None)
        way_out = f"keep its block in fp32 with --fp32-block {block}" if block else "export in fp32"
        message = f"{name} overflows {precision.value} in a sampling run; {way_out}, or take --precision bf16"

        def check(_: nn.Module, __: Any, output: Tensor, message: str = message) -> None:
            if not bool(output.isfinite().all()):
                raise ExportError(message)

        hooks.append(layer.register_forward_hook(check))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: DiffusionTransformer, precision: Precision, fp32_blocks: Collection[str]) -> dict[str, nn.Module]:
    """The layers whose weights become half, by name."""
    roots = ("",) if PRECISIONS[precision].whole_model else block_names(model)
    return {
        name: layer
        for name, layer in model.module.named_modules()
        if isinstance(layer, _LAYERS)
        and any(_is_within(name, root) for root in roots)
        and not any(_is_within(name, block) for block in fp32_blocks)
    }


def _is_within(name: str, module: str) -> bool:
    return not module or name.startswith(f"{module}.")
