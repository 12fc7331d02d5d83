"""Rotation: a model whose activations are rotated and whose logits are the same, to rounding.

Source: QuaRot (Ashkboos et al. 2024). Scales of norms go into the weights behind them; the residual
stream, and the values of every attention head, are rotated by orthogonal matrices that the weights
absorb; only the input of down_proj is rotated while the model runs. Where a norm takes the mean of x
away (LayerNorm), the rotation of the stream is one that leaves means as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.errors import InputError
from stages.model.experts import expert_matrices, refuse_experts
from stages.model.families import architecture
from stages.model.offload import refuse_offloaded
from stages.model.rules import Architecture
from stages.model.sites import Site, find_sites, fused, matrix, rows
from stages.transforms.norms import StreamNorm, evaluating, is_norm, same_logits, stream_norms
from stages.transforms.orthogonal import Centred, Orthogonal
from stages.transforms.values import Values, value_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


def rotate(model: PreTrainedModel, seed: int) -> None:
    """Rotate a loaded model in place; embedding and head are untied.

    Raises InputError on an architecture without rules, on weights that are quantised or absent, and on
    norms that are in the way. ValueError if it is rotated already.
    """
    with evaluating(model):
        sites, norms = _rotatable(model)
        values = value_rows(model, sites)
        with same_logits(model, "a rotation"), torch.no_grad():
            _rotate(model, sites, norms, values, seed)


def _rotate(
    model: PreTrainedModel, sites: list[Site], norms: list[StreamNorm], values: Values, seed: int
) -> None:
    modules = dict(model.named_modules())
    stream, head, online = _drawn(model, sites, seed, any(norm.centred for norm in norms))
    _untie(model)
    for table in _tables(model):
        _map_rows(table.weight, stream)
    for norm in norms:
        _fuse(norm, modules, stream)
    for site in sites:
        linears = [modules[name] for name in site.consumers]
        if site.role == "attn.out":
            _write(linears[0], stream, head)
        elif site.role == "mlp.down":
            _write(linears[0], stream, online)
        elif site.role == "attn.in":
            _rotate_heads(linears[values.reader], head, values.rows)
    _rotate_online(model, sites, online)


def fuse(model: PreTrainedModel) -> None:
    """Put the scales of the norms of a loaded model into the weights behind them, in place;
    embedding and head are untied. The shift of a LayerNorm stays, divided by the scale.

    Norms in front of what is no linear module keep theirs. Raises what `rotate` does, and where there
    is none else.
    """
    with evaluating(model):
        sites = _in_memory(model)
        norms = stream_norms(model, sites)
    if not any(architecture(model).layer_of(norm.path)[0] >= 0 for norm in norms):
        raise InputError(
            "transform: no norm of a layer stands in front of linear modules (norms behind attention and "
            "MLP scale the residual stream), so there is no scale to put into weights; use transform=none"
        )
    modules = dict(model.named_modules())
    with evaluating(model), same_logits(model, "fusing"), torch.no_grad():
        _untie(model)
        for norm in norms:
            _fuse(norm, modules)


def _in_memory(model: PreTrainedModel) -> list[Site]:
    """The sites of a model whose weights can be changed; InputError says what is in the way."""
    refuse_offloaded(model, "a rotation", "use transform=none")
    sites = find_sites(model)
    _check(model, dict(model.named_modules()), sites)
    return sites


def _rotatable(model: PreTrainedModel) -> tuple[list[Site], list[StreamNorm]]:
    """Sites and norms of a model that can be rotated; InputError says what is in the way."""
    sites = _in_memory(model)
    refuse_experts(sites, "a rotation", "use transform=none")
    rules = architecture(model)
    if any(site.layer < 0 for site in sites[:-1]):
        raise InputError(
            "transform: embeddings are projected, and what is projected is not rotated; use "
            "transform=none or transform=fuse"
        )
    if rules.latent:
        raise InputError(
            "transform: values are made of a latent (multi-head latent attention), which a rotation of "
            "heads does not pass; use transform=none or transform=fuse"
        )
    norms = stream_norms(model, sites)
    behind = {name for s in sites if s.role in ("attn.out", "mlp.down") for name in s.consumers}
    inside = [norm.path for norm in norms if behind & set(norm.readers)]
    read = {norm.path for norm in norms}
    others = [n for n, module in model.named_modules() if is_norm(module) and n not in read]
    odd = inside + [n for n in others if not _of_heads(rules, n)]
    unread = _unread(norms, sites)
    if odd or unread:
        what = f"{len(odd)} norms beside those of attention and MLP ({odd[:4]})"
        raw = f"modules without a norm in front ({unread[:4]})"
        raise InputError(
            f"transform: {what if odd else raw}, where norms in front of attention, MLP and head were "
            "expected; use transform=none"
        )
    return sites, norms


def _of_heads(rules: Architecture, norm: str) -> bool:
    """Return whether a norm is that of queries or keys, which come behind the projections."""
    rest = rules.layer_of(norm)[1]
    return any(rest == name or rest.startswith(f"{name}.") for name in rules.head_norms)


def _unread(norms: list[StreamNorm], sites: list[Site]) -> list[str]:
    """Readers of the stream that are behind no norm."""
    behind = {name for norm in norms for name in norm.readers}
    readers = [n for s in sites if s.role in ("attn.in", "mlp.in", "head.in") for n in s.consumers]
    return [name for name in readers if name not in behind]


def _drawn(
    model: PreTrainedModel, sites: list[Site], seed: int, centred: bool = False
) -> tuple[Orthogonal | Centred, Orthogonal, Orthogonal]:
    """The rotations of the residual stream, of a head's values and of down_proj's input."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    width = _inputs(model, sites, "attn.out") // config.num_attention_heads
    stream = Orthogonal(config.hidden_size, generator, signs=True)
    head = Orthogonal(width, generator, signs=True)
    online = Orthogonal(_inputs(model, sites, "mlp.down"), generator)
    return Centred(stream) if centred else stream, head, online


def _inputs(model: PreTrainedModel, sites: list[Site], role: str) -> int:
    """The width of what the matrix of a role reads."""
    site = next(site for site in sites if site.role == role)
    return matrix(model.get_submodule(site.consumers[0]), site, model.config).inputs


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
    model.__dict__[_RECORD] = OnlineRotation(_inputs(model, find_sites(model), "mlp.down"))


def online_rotation(model: PreTrainedModel) -> OnlineRotation | None:
    """Return what a rotated model does at every down_proj; None for any other model."""
    online: OnlineRotation | None = model.__dict__.get(_RECORD)
    return online


def _online(rotation: Orthogonal) -> Callable[..., Any]:
    return lambda module, args: (rotation(args[0]), *args[1:])


def _check(model: PreTrainedModel, modules: dict[str, Any], sites: list[Site]) -> None:
    if online_rotation(model) is not None:
        raise ValueError("the model is rotated already")
    absent = [n for n, p in model.named_parameters() if p.device.type == "meta"]
    odd = [n for n, p in model.named_parameters() if not p.is_floating_point()]
    odd += [n for site in sites for n in site.consumers if not _plain(modules[n])]
    if absent or odd or getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            f"transform: {'weights are not in memory' if absent else 'weights are quantised'} "
            f"({', '.join([*absent, *odd][:3])}); a rotation needs dense weights in memory: "
            "use transform=none or load the model without quantization and offloading"
        )


def _plain(module: Any) -> bool:
    """Return whether a module has its weight as numbers: linear, a router, or fused experts."""
    return fused(module) or isinstance(getattr(module, "weight", None), nn.Parameter)


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


def _tables(model: PreTrainedModel) -> list[Any]:
    """What is added up to the stream in front of the layers: tokens, and learned positions."""
    width = model.config.hidden_size
    modules = (m for m in model.modules() if isinstance(m, nn.Embedding))
    return [module for module in modules if module.embedding_dim == width]


def _map_rows(weight: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Replace the rows of weight [rows, width] in place, in double precision."""
    for part in weight.split(_ROWS):
        part.copy_(change(part.double()))


def _fuse(
    norm: StreamNorm,
    modules: dict[str, Any],
    stream: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> None:
    """Readers of the stream: W <- W diag(g) Q, so that they take the bare norm of x Q."""
    scale = norm.scale()
    for name in norm.readers:
        module = modules[name]
        for weight in expert_matrices(module)[0] if fused(module) else (rows(module),):
            _map_rows(weight, lambda each: stream(each if scale is None else each * scale))
    norm.make_plain(stream)


def _write(linear: Any, stream: Callable[[Tensor], Tensor], inner: Orthogonal) -> None:
    """Writers to the stream: W <- Qᵀ W R, with R the rotation of every stretch of their input."""

    def rotated(columns: Tensor) -> Tensor:
        return stream(columns.t()).t()

    weight = rows(linear)
    double = weight.double().reshape(weight.shape[0], -1, inner.width)
    weight.copy_(rotated(inner(double).view(weight.shape)))
    if linear.bias is not None:
        linear.bias.copy_(stream(linear.bias.double()))


def _rotate_heads(linear: Any, head: Orthogonal, values: Tensor) -> None:
    """The values of every key head: v <- v R, as rows [G, D] of the weight and as parts of the bias."""
    weight = rows(linear)
    for part in values:
        weight[part] = head(weight[part].double().t()).t().to(weight.dtype)
        if linear.bias is not None:
            linear.bias[part] = head(linear.bias[part].double()).to(weight.dtype)
