"""Smoothing of `gif`: channels are divided before the code and multiplied after it, learned by blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.codings.base import site_params
from stages.codings.gif import Gif
from stages.errors import InputError
from stages.fits.statistics import Saliency, Smoothing
from stages.model.experts import refuse_experts
from stages.model.families import architecture
from stages.model.forward import Call
from stages.model.offload import refuse_offloaded
from stages.model.sites import Site, find_sites, fused, key_heads, rows
from stages.ports.hooks import attached, stream
from stages.ports.port import DensePort
from stages.statistics import measure
from stages.statistics.saliency import saliency
from stages.statistics.watch import Watch, padded

SMOOTHED = ("attn.in", "attn.out", "mlp.in")  # scales of a range and of the weights it meets
SMALLEST = 1e-5


@measure.register
def smoothing(
    statistic: Smoothing, model: PreTrainedModel, ids: Tensor, sites: Sequence[Site], batch: int
) -> dict[str, Tensor]:
    """scale [sites, C], filled up with 1; loss [sites, epochs]: that of the site's block, NaN
    for the head. Raises InputError on experts, and if ids [W, S] has too few windows."""
    refuse_offloaded(model, "smoothing", "use coding=gif")
    refuse_experts(find_sites(model), "smoothing", "use coding=gif")
    if len(ids) < statistic.windows:
        raise InputError(
            f"coding.smoothing.windows={statistic.windows}: calibration has {len(ids)}; lower it or "
            "raise calibration.windows"
        )
    gif = Gif(
        "gif", statistic.timesteps, statistic.levels, statistic.salient_fraction, "unary", None
    )
    statistics = {}
    if gif.salient:
        meter = saliency(Saliency(), model, ids, sites, {})
        meter.run(batch)
        statistics[Saliency.name] = meter.tensors()
    params = gif.parameters(len(sites), statistics)
    ids = ids[: statistic.windows].to(model.device)
    blocks = _blocks(model, ids, batch, statistic.alpha)
    ports = {}
    for index, site in enumerate(sites):
        if site.layer >= 0 and site.role not in gif.dense_roles:
            row = {k: v.to(model.device) for k, v in site_params(params, index).items()}
            ports[site.name] = TrainPort(gif, row, blocks[site.layer], site.role)
    losses = _train(statistic, model, ids, blocks, ports)
    scales = [blocks[s.layer].scale(s.role) if s.layer >= 0 else None for s in sites]
    rows = [None if scale is None else scale.detach().flatten() for scale in scales]
    unknown = [torch.nan] * statistic.epochs
    curve = torch.tensor([losses[s.layer] if s.layer >= 0 else unknown for s in sites])
    return {"scale": padded(rows, 1.0), "loss": curve}


def _train(
    statistic: Smoothing,
    model: PreTrainedModel,
    ids: Tensor,
    blocks: Sequence[Block],
    ports: Mapping[str, TrainPort],
) -> list[list[float]]:
    """Learn the scales of every block in turn; return the mean loss of its epochs."""
    layers = dict(model.named_modules())[architecture(model).layers]
    assert isinstance(layers, nn.ModuleList)
    losses = []
    with attached(model, find_sites(model), ports):
        hidden, settings = _inputs(model, layers, ids)
        dense = coded = hidden
        for layer, block, call in zip(
            tqdm(layers, desc=statistic.name, unit="block", disable=None),
            blocks,
            settings,
            strict=True,
        ):
            target = _through(layer, dense, call)
            block.coded = True
            losses.append(_descend(statistic, layer, block, coded, target, call))
            coded, dense = _through(layer, coded, call), target
    return losses


def _descend(
    statistic: Smoothing,
    layer: nn.Module,
    block: Block,
    x: Tensor,
    target: Tensor,
    call: Call,
) -> list[float]:
    """Adam on one block's log scales: x, target [W, S, C]."""
    logs = list(block.logs.values())
    optimiser = torch.optim.Adam(logs, lr=statistic.lr)
    curve = []
    for _ in range(statistic.epochs):
        total = 0.0
        for window, wanted in zip(x.split(1), target.split(1), strict=True):
            loss = functional.mse_loss(_called(layer, window, call).float(), wanted.float())
            grads = torch.autograd.grad(loss, logs, allow_unused=True)  # weights get none
            for log, grad in zip(logs, grads, strict=True):
                log.grad = grad
            optimiser.step()
            total += float(loss.detach()) / len(x)
        curve.append(total)
    return curve


class Block:
    """The learnable log scales of one decoder block; `coded` switches its ports on."""

    def __init__(self, logs: dict[str, Tensor], groups: int, shared: int) -> None:
        """groups: key heads, each read by `shared` query heads."""
        self.logs = {name: log.requires_grad_() for name, log in logs.items()}
        self.coded = False
        self._groups, self._shared = groups, shared

    def scale(self, role: str) -> Tensor | None:
        """s of a role's channels [C], None where there is none."""
        if role in ("attn.in", "mlp.in"):
            return self.logs[role].exp()
        if role == "attn.v":
            return self.logs["attn.out"].exp()
        if role == "attn.k":
            return (-self.logs["qk"]).exp()
        if role in ("attn.q", "attn.out"):
            log = self.logs["qk" if role == "attn.q" else "attn.out"]
            heads = log.view(self._groups, -1).repeat_interleave(self._shared, 0)
            return heads.flatten().exp()
        return None


class TrainPort(DensePort):
    """The code with its current scale, differentiable; the dense value until its block's turn."""

    def __init__(self, gif: Gif, params: dict[str, Tensor], block: Block, role: str) -> None:
        super().__init__()
        self._gif, self._params, self._block, self._role = gif, params, block, role

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        if not self._block.coded:
            return x
        smooth = self._block.scale(self._role)
        params = self._params if smooth is None else self._params | {"smooth": smooth}
        return self._gif.value(x, params, _straight_through).to(x.dtype)


def _straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _through(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """The block's outputs, one window at a time, [W, S, C]."""
    with torch.no_grad():
        return torch.cat([_called(layer, window, call) for window in x.split(1)])


def _called(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    out = layer(x, *call[0], **call[1])
    hidden: Tensor = out[0] if isinstance(out, tuple) else out
    return hidden


def _inputs(
    model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor
) -> tuple[Tensor, list[Call]]:
    """What the first block sees, [W, S, C], and the other arguments of every block, which are the
    same for every full window."""
    hidden: list[Tensor] = []
    settings: list[Call] = [((), {}) for _ in layers]

    def note(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            settings[index] = args[1:], kwargs
            if index == 0:
                hidden.append(args[0])

        return hook

    handles = [
        layer.register_forward_pre_hook(note(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            for window in ids.split(1):
                model(window, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(hidden), settings


def _blocks(model: PreTrainedModel, ids: Tensor, batch: int, alpha: float) -> list[Block]:
    """Every block's scales where they start."""
    sites = [site for site in find_sites(model) if site.role in SMOOTHED]
    modules = dict(model.named_modules())
    largest: dict[str, Tensor] = {}

    def see(name: str) -> Watch:
        def note(x: Tensor) -> None:
            top = x.abs().flatten(0, -2).amax(0).float()
            largest[name] = torch.maximum(largest[name], top) if name in largest else top

        return Watch(note)

    stream(model, ids, batch, {site.name: see(site.name) for site in sites}, "ranges")
    heads = model.config.num_attention_heads
    attention = next(modules[site.path] for site in find_sites(model) if site.port == "q")
    groups = key_heads(attention, heads)
    logs: dict[int, dict[str, Tensor]] = {}
    for site in sites:
        linears = [modules[name] for name in site.consumers if not fused(modules[name])]
        weight = torch.stack([rows(m).detach().abs().amax(0).float() for m in linears]).amax(0)
        pair = [largest[site.name].clone(), weight]
        if site.role == "attn.out":  # one scale for the query heads that read a value head
            pair = [t.view(groups, heads // groups, -1).amax(1).flatten() for t in pair]
            logs.setdefault(site.layer, {})["qk"] = torch.zeros_like(pair[0])
        x, w = (t.clamp(min=SMALLEST).log() for t in pair)
        logs.setdefault(site.layer, {})[site.role] = alpha * x - (1 - alpha) * w
    return [Block(logs[layer], groups, heads // groups) for layer in sorted(logs)]
