"""Spike-coded tensors: a product with one adds up what its spikes select, step by step.

A `Coded` tensor has the shape and the type of a value, and the planes it consists of; as a number it is
not a number. Laying it out lays out the planes; a product with it has a ternary operand at every step;
anything else that would read its value is refused. So the code of the model runs as a spiking network
without being rewritten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stages.errors import InputError
from stages.ports.events import Events, events, few
from stages.ports.planes import Planes, Product, Sum, summed

Multiply = Callable[[Tensor, Tensor], Tensor]

LAYOUT = {
    "view", "reshape", "transpose", "permute", "flatten", "unsqueeze", "squeeze", "contiguous",
    "__getitem__", "t", "pad",
}  # fmt: skip
MADE = {"new_empty", "new_zeros", "zeros_like", "empty_like"}  # of its shape and dtype only


class Coded(Tensor):
    """Values [*X] that are there as planes alone; made by `coded`."""

    planes: Planes
    found: dict[int, Events | Tensor]

    def spikes(self, number: int, plane: Tensor) -> Events | Tensor:
        """The spikes of the plane of that number, made once for all readers: one by one where they are
        few, else rows [R, C] of what selects."""
        if number not in self.found:
            if few(plane, self.dtype):
                self.found[number] = events(plane, self.planes.unit, self.dtype)
            else:
                rows = self.planes.selecting(plane, self.dtype)
                self.found[number] = rows.reshape(-1, self.shape[-1])
        return self.found[number]

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
    """Return values of `dtype` that consist of planes."""
    plane = spikes.accumulators[0].plane[0]
    nothing = torch.full((), torch.nan, dtype=dtype, device=plane.device)
    value: Coded = nothing.expand(plane.shape).as_subclass(Coded)
    value.planes, value.found = spikes, {}
    return value


def _joined(parts: Sequence[Tensor], dim: int = 0) -> _Joined:
    value = torch.cat(list(parts), dim).as_subclass(_Joined)
    value.parts = tuple(parts)
    return value


def _laid_out(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Coded:
    whole, rest = args[0], args[1:]
    value: Coded = func(whole, *rest, **kwargs).as_subclass(Coded)
    value.planes = whole.planes.map(lambda plane: func(plane, *rest, **kwargs))
    value.found = {}
    return value


def _linear(x: Coded, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of the weight are added where there is a spike; the product with the means is a bias."""
    rows: list[Tensor] = []  # of the transposed weight, once for all planes of few spikes

    def select(number: int, plane: Tensor) -> Product:
        spikes = x.spikes(number, plane)
        if isinstance(spikes, Tensor):
            return partial(_added, torch.matmul, spikes, weight.t())
        if not rows:
            rows.append(weight.t().contiguous())
        return partial(summed, spikes.selected(rows[0]))

    total = _one(x, select).view(*x.shape[:-1], len(weight))
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
        own, p = a.dtype, a.planes
        return _one(a, lambda _, plane: partial(_added, multiply, p.selecting(plane, own), b))
    assert isinstance(b, Coded)
    own, p = b.dtype, b.planes
    return _one(b, lambda _, plane: partial(_added, multiply, a, p.selecting(plane, own)))


def _added(
    multiply: Multiply, left: Tensor, right: Tensor, total: Tensor | None, factor: float
) -> Tensor:
    """The product in float32, plus `factor` times a total, in its place where one call does both."""
    fits = multiply is torch.matmul and left.dtype == torch.float32 and not torch.is_grad_enabled()
    if total is not None and fits and left.dim() == right.dim() in (2, 3):
        add = torch.addmm if left.dim() == 2 else torch.baddbmm
        return add(total, left, right, beta=factor, out=total)
    return summed(multiply(left, right).float(), total, factor)


def _one(x: Coded, select: Callable[[int, Tensor], Product]) -> Tensor:
    """The product of the values of x with what the spikes of every plane, in their order, `select`."""
    total: Tensor | float = 0.0
    numbers = itertools.count()
    for accumulator in x.planes.accumulators:
        products = Sum.of(accumulator)
        for plane, weight, _ in accumulator.spikes:
            products.add(select(next(numbers), plane), weight)
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
        fired = [list(operand.at(step)) for operand in operands]
        _arrive(traces[1], fired[1])
        for index, total in enumerate(sums):
            trace = traces[1 - index].to(dtype)
            for number, spikes, weight in fired[index]:
                chosen = spikes.to(dtype)
                pair = (trace, chosen) if index else (chosen, trace)
                total[number].add(partial(_added, multiply, *pair), weight)
        _arrive(traces[0], fired[0])
    values = [total.value() for row in sums for total in row]
    return _scaled(torch.stack(values).sum(0), a).to(dtype)


def _arrive(trace: Tensor, fired: Iterable[tuple[int, Tensor, float]]) -> None:
    """Add what the spikes of a step are worth."""
    for _, spikes, weight in fired:
        trace.add_(spikes, alpha=weight)


def _scaled(total: Tensor, x: Coded) -> Tensor:
    """Rows times the scale of the rows of x, which only the left operand has."""
    return total if x.planes.row is None else total * x.planes.row[..., :1]
