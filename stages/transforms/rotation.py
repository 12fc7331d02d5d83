"""Rotation: a model whose activations are rotated and whose logits are the same, to rounding.

Source: QuaRot (Ashkboos et al. 2024). RMSNorm scales go into the weights behind them; the residual
stream, and the values of every attention head, are rotated by orthogonal matrices that the weights
absorb; only the input of down_proj is rotated while the model runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.model.experts import refuse_experts
from stages.model.families import architecture
from stages.model.offload import refuse_offloaded
from stages.model.rules import Architecture
from stages.model.sites import Site, find_sites

_RECORD = "online_rotation"
_ROWS = 8192  # of an embedding, rotated in double precision at a time


@dataclass(frozen=True)
class OnlineRotation:
    """What one token costs at every down_proj: `width` = `block` (a power of two) x `factor`.

    The fast Hadamard transform adds log2(block) times per value, the factor multiplies `factor`
    times per value. The constant 1/sqrt(block) is part of a neighbouring weight, not counted.
    """

    width: int

    @property
    def block(self) -> int:
        return self.width & -self.width

    @property
    def factor(self) -> int:
        return self.width // self.block

    @property
    def additions(self) -> int:
        return self.width * (self.block.bit_length() - 1)

    @property
    def multiplications(self) -> int:
        return self.width * self.factor if self.factor > 1 else 0


class Orthogonal:
    """x [..., width] -> x · diag(signs) · (H kron O), orthogonal for any width.

    H is the Hadamard matrix of the largest power of two in `width`, over its root; O a random
    orthogonal matrix of the odd rest. Both are drawn from `generator`, in double precision.
    """

    def __init__(self, width: int, generator: torch.Generator, signs: bool = False) -> None:
        block = width & -width
        rest = width // block
        # H of a power of two is the product of two smaller ones, applied one after the other.
        sizes = [2**power for power in range(block.bit_length())]
        left = min(sizes, key=lambda size: size + block // size * rest)
        right = block // left
        drawn = torch.randint(0, 2, (width,), generator=generator) if signs else torch.ones(width)
        self.width = width
        self._signs = drawn.double() * 2 - 1
        self._left = _hadamard(left)
        self._right = torch.kron(_hadamard(right), _orthogonal(rest, generator))
        self._cast: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """Compute in float32 at least and return the dtype of x."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        signs, left, right = self._on(x.device, dtype)
        parts = (x.to(dtype) * signs).reshape(-1, left.shape[0], right.shape[0])
        return (left @ (parts @ right)).view(x.shape).to(x.dtype)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        if (device, dtype) not in self._cast:
            with torch.inference_mode(False):  # what is kept must serve every later mode
                signs, left, right = (
                    t.to(device, dtype) for t in (self._signs, self._left, self._right)
                )
            self._cast[device, dtype] = signs, left, right
        return self._cast[device, dtype]


def _hadamard(size: int) -> Tensor:
    """The symmetric orthogonal Hadamard matrix of a power of two (Sylvester)."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / size**0.5


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform (the signs of R taken into Q); [[1]] for size 1."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    return (q * r.diagonal().sign()).contiguous()


def rotate(model: PreTrainedModel, seed: int) -> None:
    """Rotate a loaded model in place; embedding and head are untied.

    Raises InputError on an architecture without rules, on weights that are quantised or absent,
    and on norms that are not x / rms(x) * weight. ValueError if it is rotated already.
    """
    sites, norms = _rotatable(model)
    modules = dict(model.named_modules())
    stream, head, online = _drawn(model, sites, seed)
    with torch.no_grad():
        _untie(model)
        _map_rows(_weight(model.get_input_embeddings()), stream)
        for site in sites:
            linears = [modules[name] for name in site.consumers]
            if site.path in norms:
                _fuse(linears, modules[site.path], stream)
            elif site.role == "attn.out":
                _write(linears[0], stream, head)
            elif site.role == "mlp.down":
                _write(linears[0], stream, online)
            if site.role == "attn.in":
                # The order of the rule is q, k, v, of modules or of the rows of one.
                _rotate_heads(linears[-1], head, model.config.num_key_value_heads)
        _fuse([model.get_output_embeddings()], modules[norms[-1]], stream)
        for name in norms:
            modules[name].weight.fill_(1)
    _rotate_online(model, sites, online)


def fuse(model: PreTrainedModel) -> None:
    """Put the scales of the norms of a loaded model into the weights behind them, in place;
    embedding and head are untied. Raises what `rotate` does."""
    sites, norms = _rotatable(model)
    modules = dict(model.named_modules())
    with torch.no_grad():
        _untie(model)
        for site in sites:
            if site.path in norms:
                _fuse([modules[name] for name in site.consumers], modules[site.path])
        _fuse([model.get_output_embeddings()], modules[norms[-1]])
        for name in norms:
            modules[name].weight.fill_(1)


def _rotatable(model: PreTrainedModel) -> tuple[list[Site], list[str]]:
    """Sites and norms of a model whose scales can be fused; InputError says what is in the way."""
    refuse_offloaded(model, "a rotation", "use transform=none")
    sites = find_sites(model)
    refuse_experts(sites, "a rotation", "use transform=none")
    modules = dict(model.named_modules())
    norms = _norms(architecture(model), modules, sites)
    _check(model, modules, sites, norms)
    return sites, norms


def _drawn(
    model: PreTrainedModel, sites: list[Site], seed: int
) -> tuple[Orthogonal, Orthogonal, Orthogonal]:
    """The rotations of the residual stream, of a head's values and of down_proj's input."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    width = next(modules[s.path].head_dim for s in sites if s.role == "attn.q")
    return (
        Orthogonal(config.hidden_size, generator, signs=True),
        Orthogonal(width, generator, signs=True),
        Orthogonal(config.intermediate_size, generator),
    )


def rotate_online(model: PreTrainedModel, seed: int) -> None:
    """Rotate the input of every down_proj while the model runs."""
    sites = find_sites(model)
    _rotate_online(model, sites, _drawn(model, sites, seed)[2])


def _rotate_online(model: PreTrainedModel, sites: list[Site], online: Orthogonal) -> None:
    for site in sites:
        if site.role == "mlp.down":
            model.get_submodule(site.consumers[0]).register_forward_pre_hook(_online(online))
    declare(model)


def declare(model: PreTrainedModel) -> None:
    """Record that the model rotates while it runs; alone for a model without weights."""
    model.__dict__[_RECORD] = OnlineRotation(model.config.intermediate_size)


def online_rotation(model: PreTrainedModel) -> OnlineRotation | None:
    """Return what a rotated model does at every down_proj; None for any other model."""
    online: OnlineRotation | None = model.__dict__.get(_RECORD)
    return online


def _online(rotation: Orthogonal) -> Callable[..., Any]:
    return lambda module, args: (rotation(args[0]), *args[1:])


def _norms(rules: Architecture, modules: dict[str, Any], sites: list[Site]) -> list[str]:
    """The paths of the norms of the stream; the last is the one behind the layers, which is no site.

    Norms of the queries and keys of every head stay as they are: they come behind the projections.
    """
    paths = {site.path for site in sites if site.role in ("attn.in", "mlp.in")}
    others = [name for name, m in modules.items() if "norm" in type(m).__name__.lower()]
    inner = [name for name in others if rules.layer_of(name)[1] in rules.head_norms]
    extra = [name for name in others if name not in paths and name not in inner]
    if len(extra) != 1:
        raise InputError(
            f"transform: {len(extra)} norms beside those of attention and MLP ({extra[:4]}), where "
            "one before the head was expected; use transform=none"
        )
    return [*sorted(paths), *extra]


def _check(
    model: PreTrainedModel, modules: dict[str, Any], sites: list[Site], norms: list[str]
) -> None:
    if online_rotation(model) is not None:
        raise ValueError("the model is rotated already")
    absent = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    odd = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    odd += [n for site in sites for n in site.consumers if not isinstance(modules[n], nn.Linear)]
    if absent or odd or getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"transform: {'weights are not in memory' if absent else 'weights are quantised'} "
            f"({', '.join([*absent, *odd][:3])}); a rotation needs dense weights in memory: "
            "use transform=none or load the model without quantization and offloading"
        )
    for name in norms:
        _check_norm(name, modules[name])


def _check_norm(name: str, norm: nn.Module) -> None:
    """A rotation passes a norm only if all it does is to divide by the rms, then to scale."""
    weight = _weight(norm)
    with torch.no_grad():
        x = torch.linspace(-900, 1000, weight.numel(), device=weight.device).to(weight.dtype)
        exact = x.double() * x.double().square().mean().rsqrt() * weight.double()
        error = (norm(x[None])[0].double() - exact).abs().max()
    if getattr(norm, "bias", None) is not None or not error <= 0.02 * exact.abs().max():
        raise InputError(
            f"transform: {name} is a {type(norm).__name__}, which is not x / rms(x) * weight; only "
            "models with RMSNorm can be rotated, use transform=none"
        )


def _untie(model: PreTrainedModel) -> None:
    head: Any = model.get_output_embeddings()
    weight = head.weight
    if weight is _weight(model.get_input_embeddings()):
        head.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _weight(module: Any) -> Tensor:
    weight: Tensor = module.weight
    return weight


def _map_rows(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the rows of weight [rows, width] in place, in double precision."""
    for part in weight.split(_ROWS):
        part.copy_(change(part.double()))


def _fuse(
    linears: list[Any], norm: Any, stream: Callable[[Tensor], Tensor] = lambda rows: rows
) -> None:
    """Readers of the stream: W <- W diag(g) Q, so that they take the bare norm of x Q."""
    scale = norm.weight.double()
    for linear in linears:
        _map_rows(linear.weight, lambda rows: stream(rows * scale))


def _write(linear: Any, stream: Orthogonal, inner: Orthogonal) -> None:
    """Writers to the stream: W <- Qᵀ W R, with R the rotation of every stretch of their input."""

    def rotated(columns: Tensor) -> Tensor:
        return stream(columns.t()).t()

    weight = linear.weight
    double = weight.double().view(weight.shape[0], -1, inner.width)
    weight.copy_(rotated(inner(double).view(weight.shape)))
    if linear.bias is not None:
        linear.bias.copy_(stream(linear.bias.double()))


def _rotate_heads(linear: Any, head: Orthogonal, groups: int) -> None:
    """The values of every key head: v <- v R, as rows of the weight and as parts of the bias.

    They are all rows of a separate projection, and the last of one of q, k and v in turn.
    """
    rows = groups * head.width
    for part in linear.weight[-rows:].split(head.width):
        part.copy_(head(part.double().t()).t())
    if linear.bias is not None:
        values = linear.bias[-rows:]
        values.copy_(head(values.double().view(-1, head.width)).flatten())
