"""Spike-coded tensors: a product with one adds up what its spikes select, step by step.

A `Coded` tensor holds a decoded value and the planes it consists of. Laying it out lays out the planes;
a product with it has a ternary operand at every step; anything else that would read its value is
refused. So the code of the model runs as a spiking network without being rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stages.errors import InputError
from stages.ports.planes import Planes, Sum

Multiply = Callable[[Tensor, Tensor], Tensor]

LAYOUT = {
    "view", "reshape", "transpose", "permute", "flatten", "unsqueeze", "squeeze", "contiguous",
    "__getitem__", "t", "pad",
}  # fmt: skip
MADE = {"new_empty", "new_zeros", "zeros_like", "empty_like"}  # of its shape and dtype only


class Coded(Tensor):
    """Decoded values [*X] with their planes; made by `coded`."""

    planes: Planes

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if name == "cat":
                return _joined(*args, **kwargs)
            if isinstance(args[0], _Joined):
                if name == "chunk" and args[1] == len(args[0].parts):
                    return args[0].parts
            elif name == "type" and args[1:] == (args[0].dtype,):
                return args[0]
            elif name in LAYOUT:
                return _laid_out(func, args, kwargs)
            elif name in ("matmul", "__matmul__"):
                return _product(args[0], args[1], torch.matmul)
            elif name in ("mul", "__mul__", "__rmul__") and isinstance(args[1], Tensor):
                return _product(args[0], args[1], torch.mul)
            elif name == "linear":
                return _linear(*args, **kwargs)
            elif name == "addmm" and isinstance(args[1], Coded):  # Conv1D: (bias, x, weight [C, O])
                return _linear(args[1], args[2].t(), args[0])
            result = func(*args, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        if name == "type_as" and not isinstance(args[0], Coded):  # the dtype alone is read
            return result
        if name in MADE or not any(isinstance(part, Tensor) for part in parts):
            return result
        raise InputError(
            f"runtime.execution=stepped: {name} of a spike-coded value is no step of a spiking network; "
            "use runtime.execution=fast"
        )


class _Joined(Coded):
    """Values side by side of which some are coded: all that can be done is to take them apart."""

    parts: tuple[Tensor, ...]


def coded(spikes: Planes, dtype: torch.dtype) -> Coded:
    """Decode the values of planes in `dtype`."""
    value = spikes.value().to(dtype).as_subclass(Coded)
    value.planes = spikes
    return value


def _joined(parts: Sequence[Tensor], dim: int = 0) -> _Joined:
    value = torch.cat(list(parts), dim).as_subclass(_Joined)
    value.parts = tuple(parts)
    return value


def _laid_out(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Coded:
    whole, rest = args[0], args[1:]
    value: Coded = func(whole, *rest, **kwargs).as_subclass(Coded)
    value.planes = whole.planes.map(lambda plane: func(plane, *rest, **kwargs))
    return value


def _linear(x: Coded, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of the weight are added where there is a spike; the product with the means is a bias."""
    total = _one(x, lambda plane: torch.matmul(plane, weight.t()))
    if x.planes.centre is not None:
        total = total + torch.mv(weight, x.planes.centre.to(weight))
    return total if bias is None else total + bias


def _product(a: Tensor, b: Tensor, multiply: Multiply) -> Tensor:
    """The product of two operands, in the dtype of the values, of which one or both are coded."""
    if any(isinstance(each, Coded) and each.planes.centre is not None for each in (a, b)):
        raise InputError(
            "runtime.execution=stepped: values about the means of their channels enter linear layers "
            "alone; use runtime.execution=fast, or coding.centre=none"
        )
    if isinstance(a, Coded) and isinstance(b, Coded):
        return _both(a, b, multiply)
    if isinstance(a, Coded):
        return _one(a, lambda plane: multiply(plane, b))
    assert isinstance(b, Coded)
    return _one(b, lambda plane: multiply(a, plane))


def _one(x: Coded, select: Callable[[Tensor], Tensor]) -> Tensor:
    total: Tensor | float = 0.0
    for accumulator in x.planes.accumulators:
        products = Sum.of(accumulator)
        for plane, weight, _ in accumulator.spikes:
            products.add(select(x.planes.selecting(plane, x.dtype)).float(), weight)
        total = products.value() + total
    assert isinstance(total, Tensor)
    return _scaled(total, x).to(x.dtype)


def _both(a: Coded, b: Coded, multiply: Multiply) -> Tensor:
    """At every step the new spikes of a select what b has become, and those of b what a was before:
    A_t B_t - A_{t-1} B_{t-1} with the running sums A and B (SpikedAttention's traces)."""
    dtype = a.dtype
    traces = a.planes.none(), b.planes.none()
    operands = (a.planes, b.planes)
    sums = [[Sum.of(each) for each in operand.accumulators] for operand in operands]
    for step in range(max(operand.steps for operand in operands)):
        b.planes.arrive(traces[1], step)
        for index, operand in enumerate(operands):
            trace = traces[1 - index].to(dtype)
            for accumulator, total in zip(operand.accumulators, sums[index], strict=True):
                for plane, weight, at in accumulator.spikes:
                    if at == step:
                        spikes = operand.selecting(plane, dtype)
                        pair = (trace, spikes) if index else (spikes, trace)
                        total.add(multiply(*pair).float(), weight)
        a.planes.arrive(traces[0], step)
    values = [total.value() for row in sums for total in row]
    return _scaled(torch.stack(values).sum(0), a).to(dtype)


def _scaled(total: Tensor, x: Coded) -> Tensor:
    """Rows times the scale of the rows of x, which only the left operand has."""
    return total if x.planes.row is None else total * x.planes.row[..., :1]
