"""Sites: the operands of a transformer's matmuls, each with a role."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stages.errors import InputError, nearest
from stages.model.experts import EXPERT_PORTS, check_experts, expert_matrices
from stages.model.families import architecture
from stages.model.rules import Architecture, Rule, multiplying

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROLES = (
    "attn.in",
    "attn.q",
    "attn.k",
    "attn.v",
    "attn.probs",
    "attn.out",
    "mlp.in",
    "mlp.act",
    "mlp.up",
    "mlp.down",
    "head.in",
)
ATTENTION_PORTS = ("q", "k", "v", "probs")


@dataclass(frozen=True)
class SiteSelection:
    """Which roles are converted, without the sites of `exclude`, which stay dense.

    A name in `exclude` may hold `*`: `model.layers.3.*`. Raises InputError on an unknown, repeated or
    missing role.
    """

    roles: tuple[str, ...] = ROLES
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        object.__setattr__(self, "exclude", tuple(self.exclude))
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles or len(set(self.roles)) != len(self.roles):
            raise InputError(
                f"sites.roles={list(self.roles)}: give distinct roles out of {', '.join(ROLES)}"
            )


@dataclass(frozen=True)
class Site:
    """One operand, e.g. `model.layers.3.mlp.down_proj:in` of role `mlp.down` in layer 3, or
    `model.layers.3.mlp.experts:down[17]`, that of one expert.

    `consumers` are the modules that multiply it; the head has layer -1.
    """

    name: str
    role: str
    layer: int
    consumers: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        return self.name.rsplit(":", 1)[0]

    @property
    def port(self) -> str:
        return self.name.rsplit(":", 1)[1]

    @property
    def expert(self) -> tuple[str, int] | None:
        """The port and the number of an expert's operand; None of any other."""
        kind, _, number = self.port.partition("[")
        return (kind, int(number[:-1])) if kind in EXPERT_PORTS else None

    @property
    def operand(self) -> str:
        """The name of what is multiplied: the site, or `…experts:down[*]` for those of all experts."""
        return self.name if self.expert is None else pooled(self.name)


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Find every site of the model in forward order, those outside of layers and the head last.

    Raises InputError if a rule names a module the model lacks, or if a module that multiplies is fed
    by no site (it would silently stay dense), or if tokens see those behind them.
    """
    rules = architecture(model)
    modules = dict(model.named_modules())
    layers = modules.get(rules.layers)
    count = len(layers) if isinstance(layers, nn.ModuleList) else 0
    sites = []
    for index in range(count):
        prefix = f"{rules.layers}.{index}."
        for role, rule in _layer_rules(rules, prefix, modules):
            sites += _sites(rule, role, index, prefix, modules)
    present = [rule for rule in rules.outside if set(rule.consumers) <= set(modules)]
    for rule in (*present, rules.head):
        sites += _sites(rule, "head.in", -1, "", modules)
    missing = [s.name for s in sites if s.path not in modules]
    missing += [c for s in sites for c in s.consumers if c not in modules]
    fed = {consumer for site in sites for consumer in site.consumers}
    unfed = [name for name in multiplying(model) if name not in fed]
    if missing or unfed or not count:
        raise InputError(
            f"sites of {type(model).__name__} cannot be resolved: missing {missing[:4]}, "
            f"linear modules fed by no site {unfed[:4]}, {count} decoder layers"
        )
    _refuse_bidirectional(model, [modules[site.path] for site in sites if site.port == "q"])
    return sites


def _refuse_bidirectional(model: PreTrainedModel, attention: Iterable[nn.Module]) -> None:
    """Raise InputError where a token sees those behind it, as in models that embed texts."""
    config = model.config.get_text_config()
    causal = [getattr(each, "is_causal", True) for each in (config, *attention)]
    if not all(causal):
        option = "is_causal=false" if not causal[0] else "use_bidirectional_attention"
        raise InputError(
            f"{type(model).__name__} is no causal language model: with {option} in its config a token "
            "sees those behind it; give the model that this one was made from"
        )


@dataclass(frozen=True)
class Matrix:
    """What multiplies a site, for one token: `inputs` of its values, `outputs` products of each of
    them, `accumulators` that take the products."""

    inputs: int
    outputs: int
    accumulators: int


def matrix(module: Any, site: Site, config: Any) -> Matrix:
    """Return the matrix of a consumer, or of experts the matrices that a token is routed to."""
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        outputs, inputs = rows(module).shape
        return Matrix(inputs, outputs, outputs)
    routes = config.num_experts_per_tok
    if site.expert is None:
        _, outputs, inputs = expert_matrices(module)[0].shape
        return Matrix(inputs, routes * outputs, routes * outputs)
    _, outputs, inputs = expert_matrices(module)[1].shape
    return Matrix(routes * inputs, outputs, routes * outputs)


def rows(module: Any) -> Tensor:
    """Return the weight [outputs, inputs] of a linear module or router, itself or a view of it:
    transformers' Conv1D keeps (inputs, outputs)."""
    weight: Tensor = module.weight
    return weight.t() if _conv1d(module) else weight


def linear(module: Any) -> bool:
    """Return whether a module multiplies by one matrix, nn.Linear or transformers' Conv1D."""
    return isinstance(module, nn.Linear) or _conv1d(module)


def _conv1d(module: Any) -> bool:
    """By name: importing transformers' class takes seconds."""
    return type(module).__name__ == "Conv1D"


def key_heads(attention: Any, heads: int) -> int:
    """Return the number of heads of keys and values of an attention module with `heads` of queries."""
    if hasattr(attention, "num_key_value_groups"):  # queries of each
        return heads // int(attention.num_key_value_groups)
    return int(getattr(attention, "num_kv_heads", heads))


def fused(module: Any) -> bool:
    """Return whether a module holds the matrices of all its experts."""
    return isinstance(getattr(module, "down_proj", None), nn.Parameter)


def pooled(site: str) -> str:
    """Return the name that all experts of a layer share for one operand; of any other site its name."""
    head, _, port = site.rpartition(":")
    kind, numbered, _ = port.partition("[")
    return f"{head}:{kind}[*]" if numbered and kind in EXPERT_PORTS else site


def select(sites: Iterable[Site], selection: SiteSelection) -> list[Site]:
    """Select the sites of the chosen roles, without those that are excluded.

    Raises InputError where an excluded name is that of no site, or where nothing is left.
    """
    sites = list(sites)
    excluded: set[str] = set()
    for name in selection.exclude:
        pattern = re.compile(".*".join(map(re.escape, name.split("*"))))
        matching = {site.name for site in sites if pattern.fullmatch(site.name)}
        if not matching:
            near = nearest(name, (site.name for site in sites))
            meant = f"; {near}" if near else ""
            raise InputError(f"sites.exclude: the model has no site {name}{meant}")
        excluded |= matching
    chosen = [s for s in sites if s.role in selection.roles and s.name not in excluded]
    if not chosen:
        raise InputError("sites.roles and sites.exclude leave no site to convert")
    return chosen


def _layer_rules(
    rules: Architecture, prefix: str, modules: Mapping[str, nn.Module]
) -> list[tuple[str, Rule]]:
    """The rules of one layer: those of experts where it has the module that they name, those of latents,
    and behind them those of the expert that every token meets."""
    paths = {prefix + rule.port.rpartition(":")[0] for rule in rules.experts.values()}
    routed = bool(paths) and paths <= set(modules)
    own = {**rules.rules, **(rules.experts if routed else {})}
    first = [("attn.in", own.pop("attn.in")), *(("attn.in", rule) for rule in rules.latent)]
    return [*first, *own.items(), *(rules.shared.items() if routed else ())]


def _sites(
    rule: Rule, role: str, layer: int, prefix: str, modules: Mapping[str, Any]
) -> list[Site]:
    """The site of a rule, or one an expert."""
    name = prefix + rule.port
    consumers = tuple(prefix + consumer for consumer in rule.consumers)
    path, _, port = name.rpartition(":")
    if port not in EXPERT_PORTS:
        return [Site(name, role, layer, consumers)]
    check_experts(path, modules[path])
    number = range(modules[path].num_experts)
    return [Site(f"{name}[{expert}]", role, layer, consumers) for expert in number]
