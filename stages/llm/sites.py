"""Sites: the operands of a transformer's matmuls, each with a role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.llm.rules import Rule, architecture, multiplying

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
    """Which roles are converted.

    Raises InputError on an unknown, repeated or missing role.
    """

    roles: tuple[str, ...] = ROLES

    def __post_init__(self) -> None:
        object.__setattr__(self, "roles", tuple(self.roles))
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles or len(set(self.roles)) != len(self.roles):
            raise InputError(
                f"sites.roles={list(self.roles)}: give distinct roles out of {', '.join(ROLES)}"
            )


@dataclass(frozen=True)
class Site:
    """One operand, e.g. `model.layers.3.mlp.down_proj:in` of role `mlp.down` in layer 3.

    `consumers` are the linear modules that read it; the head has layer -1.
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


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Every site of the model in forward order, the head last.

    Raises InputError if a rule names a module the model lacks, or if a module that multiplies is fed
    by no site (it would silently stay dense).
    """
    rules = architecture(model)
    modules = dict(model.named_modules())
    layers = modules.get(rules.layers)
    count = len(layers) if isinstance(layers, nn.ModuleList) else 0
    sites = [
        _site(rule, role, index, f"{rules.layers}.{index}.")
        for index in range(count)
        for role, rule in rules.rules.items()
    ]
    sites.append(_site(rules.head, "head.in", -1, ""))
    missing = [s.name for s in sites if s.path not in modules]
    missing += [c for s in sites for c in s.consumers if c not in modules]
    fed = {consumer for site in sites for consumer in site.consumers}
    unfed = [name for name in multiplying(model) if name not in fed]
    if missing or unfed or not count:
        raise InputError(
            f"sites of {type(model).__name__} cannot be resolved: missing {missing[:4]}, "
            f"linear modules fed by no site {unfed[:4]}, {count} decoder layers"
        )
    return sites


def select(sites: Iterable[Site], selection: SiteSelection) -> list[Site]:
    """The sites whose role is selected."""
    return [site for site in sites if site.role in selection.roles]


def _site(rule: Rule, role: str, layer: int, prefix: str) -> Site:
    consumers = tuple(prefix + consumer for consumer in rule.consumers)
    return Site(prefix + rule.port, role, layer, consumers)
