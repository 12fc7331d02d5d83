"""What a run really computes: every product, of what, and the multiplications by a weight alone."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

PRODUCTS = {
    "mm", "bmm", "addmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "matmul", "linear",
    "einsum", "outer", "ger", "convolution", "_grouped_mm", "_scaled_dot_product_attention_math",
    "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
}  # fmt: skip


class Products(TorchDispatchMode):
    """Every product of a run: `seen` tells its module, its name and whether one operand is in
    {-1, 0, 1}.

    By module and length of the inner dimension: `additions`, what the spikes of a product select;
    `scalings`, multiplications of a product by one number; `merges`, additions of a sum of products to
    another one. A sum added to itself is a shift."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.seen: list[tuple[str, str, bool]] = []
        self.additions: dict[tuple[str, int], float] = defaultdict(float)
        self.scalings: dict[tuple[str, int], float] = defaultdict(float)
        self.merges: dict[tuple[str, int], float] = defaultdict(float)
        self._products: dict[int, tuple[Tensor, tuple[str, int]]] = {}
        self._sums: set[int] = set()  # of them: no product by itself
        self._handles = []
        for name, module in model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._enter(name), prepend=True))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda module, args: self.inside.append(name)

    def _leave(self, *_: Any) -> None:
        self.inside.pop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        found = function(*args, **(kwargs or {}))
        where = self.inside[-1] if self.inside else ""
        if name in PRODUCTS:
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            label = (where, left.shape[-1])
            self.seen.append((where, name, ternary(left) or ternary(right)))
            if ternary(left) and (left.any() or not ternary(right)):  # a trace begins with zeros
                self.additions[label] += float(left.abs().sum()) * right.shape[-1]
            elif ternary(right):
                self.additions[label] += float(right.abs().sum()) * left.shape[-2]
            self._products[id(found)] = (found, label)  # kept alive, so that the id stays its own
            if name in ("addmm", "baddbmm") and id(args[0]) in self._products:  # a sum of products
                self._sums.add(id(found))
        elif name.startswith("_embedding_bag"):  # rows of a weight, added up where there are spikes
            weight, sign, label = args[0], args[6], (where, len(args[0]))
            self.seen.append((where, name, ternary(sign)))
            self.additions[label] += float(sign.abs().sum()) * weight.shape[-1]
            self._products[id(found[0])] = (found[0], label)
        elif known := self._products.get(id(args[0]) if args else 0):
            # A product, laid out or added to another one, is multiplied by one number.
            if name == "mul" and not isinstance(args[1], Tensor):
                self.scalings[known[1]] += found.numel()
            elif name in ("view", "_unsafe_view", "add", "zeros_like", "detach"):
                self._products[id(found)] = (found, known[1])
            if name == "add":
                left, right = (id(operand) for operand in args[:2])
                if left != right and {left, right} <= self._sums:
                    self.merges[known[1]] += found.numel()
            if name in ("add", "zeros_like") or (name == "detach" and id(args[0]) in self._sums):
                self._sums.add(id(found))
        return found

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def ternary(x: Tensor) -> bool:
    return bool(((x == 0) | (x.abs() == 1)).all())


@contextmanager
def watched(model: PreTrainedModel) -> Iterator[Products]:
    mode = Products(model)
    try:
        with mode:
            yield mode
    finally:
        mode.close()


def real_products(seen: Products) -> set[str]:
    """Modules that multiply two real operands; the angles of positions are part of RoPE."""
    return {where for where, _, spiking in seen.seen if not spiking and "rotary" not in where}
