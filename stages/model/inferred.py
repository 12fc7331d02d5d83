"""Roles by the names that transformers gives to modules, for families that have no file of rules.

Names say which module is which; that nothing is left out, `find_sites` checks: every module that holds
the matrix of a product is fed by a site. What is read is the input of the modules that multiply, never
the output of a norm, so that it does not matter where norms and residuals stand.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from stages.model.rules import FUSED, REWRITTEN, Architecture, Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
)
# Of multi-head latent attention: what reads the layer's input, and what reads the latents.
LATENT = (("q_a_proj", "kv_a_proj_with_mqa"), ("q_proj", "kv_a_proj_with_mqa"))
EXPANDED = ("q_b_proj", "kv_b_proj")
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
HEAD_NORMS = {
    "q_norm": "attn.q",
    "k_norm": "attn.k",
    "q_layernorm": "attn.q",
    "k_layernorm": "attn.k",
    "qk_norm": "attn.q attn.k",
}
GATED = ("gate_proj", "up_proj", "down_proj")
JOINED = ("gate_up_proj", "down_proj")  # gate and up side by side
PLAIN = (
    ("up_proj", "down_proj"),
    ("fc1", "fc2"),
    ("c_fc", "c_proj"),
    ("fc_in", "fc_out"),
    ("dense_h_to_4h", "dense_4h_to_h"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act")
ROUTERS = ("gate", "router")
SHARED = ("shared_expert", "shared_experts", "shared_mlp")
MULTIPLY = {"matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention"}
SHARED_GATES = ("shared_expert_gate",)

Rules = dict[str, Rule]


class Unsaid(Exception):
    """What the names of a model's modules do not say."""


def infer(model: PreTrainedModel) -> Architecture:
    """Infer the role rules of a model from the names of its modules; raises Unsaid."""
    path, layers = _layers(model)
    routed = [layer for layer in layers if any(_is_experts(m) for m in layer.modules())]
    plain = [layer for layer in layers if layer not in routed]
    attention, latent, norms = _attention(layers[0])
    rules = _mlp(plain[0]) if plain else {}
    experts, shared = _experts(routed[0]) if routed else ({}, {})
    return Architecture(
        path,
        attention | rules,
        _head(model),
        _activation(plain[0] if plain else routed[0], routed=not plain),
        norms,
        experts,
        shared,
        latent=latent,
    )


def _layers(model: PreTrainedModel) -> tuple[str, list[nn.Module]]:
    """The decoder layers: the first list with as many modules as the config has layers."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number > 0:
            return name, list(module)
    raise Unsaid(f"there is no list of {number} decoder layers")


def _head(model: PreTrainedModel) -> Rule:
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head and isinstance(module, nn.Linear):
            return Rule(f"{name}:in", (name,))
    raise Unsaid("it has no linear module as its head")


def _attention(layer: nn.Module) -> tuple[Rules, tuple[Rule, ...], dict[str, str]]:
    """The rules of attention, those of its latents, and the norms of its queries and keys."""
    for path, module in layer.named_modules():
        children = dict(module.named_children())
        known = (*PROJECTIONS, *LATENT)
        names = next((each for each in known if set(each) <= set(children)), None)
        out = next((name for name in OUTPUTS if name in children), None)
        if names is None or out is None:
            continue
        check_interface(path, module)
        readers = tuple(f"{path}.{name}" for name in names)
        rules = {"attn.in": Rule(f"{readers[0]}:in", readers)}
        rules |= {f"attn.{port}": Rule(f"{path}:{port}") for port in ("q", "k", "v", "probs")}
        rules["attn.out"] = Rule(f"{path}.{out}:in", (f"{path}.{out}",))
        norms = {f"{path}.{n}": role for n, role in HEAD_NORMS.items() if n in children}
        behind = EXPANDED if names in LATENT else ()
        latent = [f"{path}.{name}" for name in behind if name in children]
        return rules, tuple(Rule(f"{name}:in", (name,)) for name in latent), norms
    listed = ", ".join("+".join(names) for names in (*PROJECTIONS, *LATENT))
    raise Unsaid(f"a layer has no attention with {listed} beside {', '.join(OUTPUTS)}")


def check_interface(path: str, module: Any) -> None:
    """Raise Unsaid where attention multiplies by itself, so that no port would see its operands."""
    if getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1:
        raise Unsaid(
            f"{path} ({type(module).__name__}) multiplies slices of its matrices with slow_but_exact and "
            f"pretraining_tp={module.pretraining_tp}, past the modules that hold them; give a config "
            "with slow_but_exact=false"
        )
    if type(module).__name__ in REWRITTEN:
        return
    forward: Any = inspect.unwrap(type(module).forward)
    calls = [i.argval for i in dis.get_instructions(forward) if i.argval == "attention_interface"]
    # Named where it is chosen, and where it is called: once.
    if len(calls) != 2 or set(forward.__code__.co_names) & MULTIPLY:
        raise Unsaid(
            f"{path} ({type(module).__name__}) multiplies queries and keys by itself and not once "
            "through transformers' AttentionInterface, so that they cannot be coded"
        )


def _mlp(layer: nn.Module) -> Rules:
    """The rules of the MLP: of a layer's module that has one of the known sets, or of the layer."""
    for path, module in _containers(layer):
        rules = _feed_forward(path, module)
        if rules is not None:
            return rules
    known = ", ".join("+".join(names) for names in (GATED, JOINED, *PLAIN))
    raise Unsaid(f"a layer has no MLP with one of {known}, or one with a gate has no activation")


def _containers(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a layer that may be its MLP, and the layer, without its attention."""
    for name, module in layer.named_children():
        children = {child for child, _ in module.named_children()}
        if not any(set(names) <= children for names in PROJECTIONS):
            yield f"{name}.", module
    yield "", layer


def _feed_forward(prefix: str, module: nn.Module) -> Rules | None:
    """The rules of one MLP whose modules have names behind `prefix`."""
    children = dict(module.named_children())
    gated, joined = set(GATED) <= set(children), set(JOINED) <= set(children)
    if gated or joined:
        act = next((name for name in ACTIVATIONS if name in children), None)
        if act is None:
            return None
        readers = GATED[:2] if gated else JOINED[:1]
        up = f"{prefix}up_proj:out" if gated else f"{prefix}gate_up_proj:out[1/2]"
        rules = _ends(prefix, readers, "down_proj")
        middle = {"mlp.act": Rule(f"{prefix}{act}:out"), "mlp.up": Rule(up)}
        return {"mlp.in": rules["mlp.in"], **middle, "mlp.down": rules["mlp.down"]}
    for up, down in PLAIN:
        if {up, down} <= set(children):
            return _ends(prefix, (up,), down)
    return None


def _ends(prefix: str, readers: tuple[str, ...], last: str) -> Rules:
    names = tuple(prefix + name for name in readers)
    down = prefix + last
    return {"mlp.in": Rule(f"{names[0]}:in", names), "mlp.down": Rule(f"{down}:in", (down,))}


def _is_experts(module: nn.Module) -> bool:
    return any(p.dim() == FUSED for p in module.parameters(recurse=False))


def _experts(layer: nn.Module) -> tuple[Rules, Rules]:
    """The rules of a mixture of experts, and those of its shared expert."""
    for path, module in layer.named_modules():
        children = dict(module.named_children())
        name = next((name for name, child in children.items() if _is_experts(child)), None)
        router = next((each for each in ROUTERS if each in children), None)
        if name is None or router is None:
            continue
        experts = f"{path}.{name}"
        inside, shared = _shared(path, children)
        readers = (f"{path}.{router}", experts, *inside)
        rules = {"mlp.in": Rule(f"{path}:in", readers)}
        rules |= {f"mlp.{port}": Rule(f"{experts}:{port}") for port in ("act", "up")}
        return rules | {"mlp.down": Rule(f"{experts}:down", (experts,))}, shared
    raise Unsaid(f"a layer has experts without a router beside them ({' or '.join(ROUTERS)})")


def _shared(path: str, children: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], Rules]:
    """What of a shared expert reads the layer's input, and the other rules of it."""
    gates = tuple(f"{path}.{name}" for name in SHARED_GATES if name in children)
    name = next((name for name in SHARED if name in children), None)
    rules = None if name is None else _feed_forward(f"{path}.{name}.", children[name])
    if rules is None:
        return gates, {}
    return (*rules.pop("mlp.in").consumers, *gates), rules


def _activation(layer: nn.Module, routed: bool) -> str:
    """The module of the nonlinearity of an MLP; experts name theirs by themselves."""
    if routed:
        return ""
    for path, module in _containers(layer):
        children = dict(module.named_children())
        if _feed_forward(path, module) is not None:
            return next((path + name for name in ACTIVATIONS if name in children), f"{path}act")
    return ""
