"""How ports are attached to a model: hooks on its modules, its attention and its experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.model.forward import Windows, windows
from stages.model.prefix import prefix_length
from stages.model.sites import ATTENTION_PORTS, Site, find_sites, matrix
from stages.ports.attachment import pinned, refuse_spiking
from stages.ports.attention import AttentionPorts, Port, set_ports
from stages.ports.experts import NAME as EXPERTS
from stages.ports.experts import ExpertPorts, set_expert_ports, switch_experts
from stages.ports.passes import Pass, decoder
from stages.ports.port import DensePort
from stages.ports.rewritten import rewritten
from stages.ports.visibility import ForwardState


@contextmanager
def attached(
    model: PreTrainedModel, sites: Sequence[Site], ports: Mapping[str, Port]
) -> Iterator[Pass]:
    """Let every site's value pass through its port while the context is open.

    `ports` maps site names to ports; sites without one stay dense. Raises InputError if a port's
    site is unknown, and for a loaded spiking model. Leaving the context restores the model exactly.
    """
    refuse_spiking(model)
    unknown = set(ports) - {site.name for site in sites}
    if unknown:
        raise InputError(f"no such site in this model: {', '.join(sorted(unknown)[:4])}")
    modules = dict(model.named_modules())
    counted = any(getattr(port, "counter", None) is not None for port in ports.values())
    mixture = any(site.expert is not None for site in sites)
    state = Pass(model, prefix_length(model), mixture, counted, _ported(model, sites, ports))
    experts = _expert_ports(sites, ports, state)
    with ExitStack() as undo:
        entry = decoder(model).register_forward_pre_hook(state.enter, with_kwargs=True)
        undo.callback(entry.remove)
        for site in sites:
            inside = site.port in ATTENTION_PORTS or site.expert is not None
            if not inside and site.name in ports:
                fanout = _fanout(site, modules, model.config)
                for handle in _hooks(modules, site, ports[site.name], state, fanout):
                    undo.callback(handle.remove)
        for path, group in _attention_ports(sites, ports).items():
            set_ports(modules[path], AttentionPorts(**group, state=state))
            undo.callback(set_ports, modules[path], None)
        for path, bank in experts.items():
            set_expert_ports(modules[path], bank)
            undo.callback(set_expert_ports, modules[path], None)
        attention = [modules[site.path] for site in sites if site.port == "q"]
        undo.enter_context(rewritten(model, attention, bool(experts)))
        if experts:
            undo.callback(switch_experts, model, switch_experts(model, EXPERTS))
        undo.enter_context(pinned(model, state.wanted))
        yield state


def stream(
    model: PreTrainedModel,
    ids: Windows,
    batch: int,
    ports: Mapping[str, Port],
    name: str,
    after: Callable[[], None] = lambda: None,
    through: Callable[[int], None] = lambda layer: None,
    logits: int = 0,
) -> None:
    """Run full windows ids [W, S] through the dense model with `ports` on its sites.

    `ids` by batches, `after`, `through` and `logits` are those of `stages.model.forward.windows`.
    """
    with torch.inference_mode(), attached(model, find_sites(model), ports), _last_logits(model):
        windows(model, ids, batch, name, after=after, through=through, logits=logits)


@contextmanager
def _last_logits(model: PreTrainedModel) -> Iterator[None]:
    """Let the head multiply the last token of a window alone, behind its port: nobody reads logits."""

    def cut(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][..., -1:, :], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def _ported(model: PreTrainedModel, sites: Sequence[Site], ports: Mapping[str, Port]) -> list[str]:
    """The paths of the modules whose operands a port changes or counts, and of the embedding: an
    adapter in its place multiplies, too."""
    paths = []
    for site in sites:
        port = ports.get(site.name)
        idle = port is None or (isinstance(port, DensePort) and port.counter is None)
        if not idle:
            paths += [site.path, *site.consumers]
    table = model.get_input_embeddings()
    if paths:
        paths += [name for name, module in model.named_modules() if module is table]
    return list(dict.fromkeys(paths))


def _attention_ports(
    sites: Sequence[Site], ports: Mapping[str, Port]
) -> dict[str, dict[str, Port]]:
    groups: dict[str, dict[str, Port]] = {}
    for site in sites:
        if site.port in ATTENTION_PORTS:
            group = groups.setdefault(site.path, {})
            group[site.port] = ports.get(site.name, DensePort())
    return groups


def _expert_ports(
    sites: Sequence[Site], ports: Mapping[str, Port], state: ForwardState
) -> dict[str, ExpertPorts]:
    """The ports of every module of experts; sites are in the order of the experts."""
    groups: dict[str, dict[str, list[Port]]] = {}
    for site in sites:
        if site.expert is not None:
            group = groups.setdefault(site.path, {})
            group.setdefault(site.expert[0], []).append(ports.get(site.name, DensePort()))
    return {path: ExpertPorts(**group, state=state) for path, group in groups.items()}


def _fanout(site: Site, modules: Mapping[str, nn.Module], config: Any) -> int:
    """Multiplications that each value of a site enters; 0 for an element-wise product."""
    return sum(matrix(modules[name], site, config).outputs for name in site.consumers)


def _hooks(
    modules: Mapping[str, nn.Module], site: Site, port: Port, state: Pass, fanout: int
) -> list[torch.utils.hooks.RemovableHandle]:
    def passed(x: Tensor) -> Tensor:
        now = state.now
        if now.real is None and x.dim() == 3:
            return port(x, None, fanout)
        rows = x if x.dim() > 2 else x.view(-1, now.length, x.shape[-1])  # OPT has them flat
        if rows.dim() > 3:  # latents [B, 1, S, C], those of a cache in front of the new ones
            return port(rows, _fresh(rows, state), fanout)
        real = state.real_at(x)
        real = None if real is None else real[:, -rows.shape[1] :]  # the head sees few
        return port(rows, real, fanout).view(x.shape)

    module = modules[site.path]
    if site.port == "in":
        around = site.path not in site.consumers  # a module with all consumers inside
        readers = [modules[name] for name in ((site.path,) if around else site.consumers)]
        shared = _Shared(passed, readers, state)
        return [reader.register_forward_pre_hook(shared.enter) for reader in readers]
    if site.port == "out":
        return [module.register_forward_hook(lambda _, args, x: passed(x))]
    index, parts = map(int, site.port.removeprefix("out[").removesuffix("]").split("/"))

    def replaced(_: nn.Module, args: Any, x: Tensor) -> Tensor:
        pieces = list(x.chunk(parts, -1))
        pieces[index] = passed(pieces[index].contiguous())
        return torch.cat(pieces, -1)

    return [module.register_forward_hook(replaced)]


def _fresh(x: Tensor, state: Pass) -> Tensor | None:
    """The rows of latents [B, 1, S, C] that are new, real tokens, [B, 1, S]; None for all."""
    length, real = state.now.length, state.real_at(x)
    old = x.shape[2] - length
    if real is None and not old:
        return None
    new = torch.ones(len(x), length, dtype=torch.bool, device=x.device)
    return nn.functional.pad(new if real is None else real, (old, 0))[:, None]


class _Shared:
    """Gives all readers of one tensor the same coded value, which is coded and counted once a pass and let
    go with the last of them."""

    def __init__(
        self, passed: Callable[[Tensor], Tensor], readers: Sequence[nn.Module], state: ForwardState
    ) -> None:
        self._passed, self._readers, self._state = passed, readers, state

    def enter(self, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        if len(self._readers) == 1:
            return (self._passed(x), *args[1:])
        shared = self._state.now.shared
        last = shared.get(self)
        if last is None or last[0] is not x or reader not in last[2]:
            last = shared[self] = x, self._passed(x), {*self._readers}
        _, value, waiting = last
        waiting.discard(reader)
        if not waiting:
            shared.pop(self, None)
        return (value, *args[1:])
