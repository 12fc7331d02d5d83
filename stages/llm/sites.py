"""Sites: the operands of a transformer's matmuls, each with a role."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from stages.errors import InputError

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
class Rule:
    """Where one role lives in a decoder layer: `path:port` and the linear modules it feeds."""

    port: str
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The role rules of one family of decoders; `head` is relative to the model, the rest to a layer."""

    layers: str
    rules: Mapping[str, Rule]
    head: Rule
    attention: str = "self_attn"


LLAMA = Architecture(
    layers="model.layers",
    rules={
        "attn.in": Rule(
            "input_layernorm:out", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        ),
        "attn.q": Rule("self_attn:q"),
        "attn.k": Rule("self_attn:k"),
        "attn.v": Rule("self_attn:v"),
        "attn.probs": Rule("self_attn:probs"),
        "attn.out": Rule("self_attn.o_proj:in", ("self_attn.o_proj",)),
        "mlp.in": Rule("post_attention_layernorm:out", ("mlp.gate_proj", "mlp.up_proj")),
        "mlp.act": Rule("mlp.act_fn:out"),
        "mlp.up": Rule("mlp.up_proj:out"),
        "mlp.down": Rule("mlp.down_proj:in", ("mlp.down_proj",)),
    },
    head=Rule("lm_head:in", ("lm_head",)),
)
ARCHITECTURES: Mapping[str, Architecture] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA}


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


def architecture(model: PreTrainedModel) -> Architecture:
    """The role rules of a model; raises InputError where none is known."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise InputError(
            f"no role rules for model_type={kind!r} (known: {', '.join(ARCHITECTURES)}); "
            f"modules that could not be placed: {', '.join(linears[:8])}…"
        )
    return ARCHITECTURES[kind]


def find_sites(model: PreTrainedModel) -> list[Site]:
    """Every site of the model in forward order, the head last.

    Raises InputError if a rule names a module the model lacks, or if a linear module is fed by no
    site (it would silently stay dense).
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
    unfed = [n for n, m in modules.items() if isinstance(m, nn.Linear) and n not in fed]
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
