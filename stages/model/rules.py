"""Architectures: where a family of decoders keeps the operands of its products."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    pass

# Classes of attention that multiply by themselves, for which `stages.ports.rewritten` has another pass.
REWRITTEN = ("GPTNeoSelfAttention", "BloomAttention", "MptAttention", "FalconAttention")
# So are these mixtures of experts, whose experts transformers calls in another way.
REWRITTEN_EXPERTS = ("Llama4TextMoe",)
FUSED = 3  # dimensions of a weight that holds one matrix an expert


@dataclass(frozen=True)
class Rule:
    """Where one role lives in a decoder layer: `path:port`, and the modules that multiply it.

    Ports: `out` of a module, `in` its first argument (of every consumer that is given the same
    tensor, or of a module that has all of them inside), `out[i/n]` the i-th of n equal parts of the
    last dimension of its output, the four of an attention module, and `act`, `up`, `down` of a module
    of experts, each expert a site.
    """

    port: str
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The role rules of one family; `head` is relative to the model, all else to a layer.

    `activation` is the module of the nonlinearity, `head_norms` the norms inside attention by the role
    whose values they scale, or two with a space between. `experts` replaces rules in layers whose MLP
    is a mixture of experts, and `shared` are those of an expert beside them that every token meets.
    `outside` are projections in front of the head or behind the embedding, where a model has them
    (OPT-350m), `latent` what further projections of attention read: latents of queries, or of keys and
    values (DeepSeek).
    """

    layers: str
    rules: Mapping[str, Rule]
    head: Rule
    activation: str
    head_norms: Mapping[str, str] = field(default_factory=dict)
    experts: Mapping[str, Rule] = field(default_factory=dict)
    shared: Mapping[str, Rule] = field(default_factory=dict)
    outside: tuple[Rule, ...] = ()
    latent: tuple[Rule, ...] = ()

    def layer_of(self, name: str) -> tuple[int, str]:
        """Return the decoder layer of a module or weight and its name in there; -1 outside of layers."""
        prefix = f"{self.layers}."
        if not name.startswith(prefix):
            return -1, name
        number, _, rest = name.removeprefix(prefix).partition(".")
        return int(number), rest

    def activation_of(self, layer: int, routed: bool) -> str:
        """Return the module of the nonlinearity of a layer, or of its experts."""
        experts = self.experts["mlp.act"].port.rpartition(":")[0] if routed else ""
        inner = f"{experts}.act_fn" if routed else self.activation
        return f"{self.layers}.{layer}.{inner}"


def multiplying(model: nn.Module) -> list[str]:
    """List the modules that hold the matrix of a product themselves: linear, routers, fused experts."""
    return [name for name, module in model.named_modules() if _multiplies(module)]


def _multiplies(module: nn.Module) -> bool:
    weights: Any = [p for _, p in module.named_parameters(recurse=False)]
    matrices = any(p.dim() in (2, FUSED) for p in weights)
    scales = "Norm" in type(module).__name__  # one for every value of every head (Cohere)
    return matrices and not scales and not isinstance(module, nn.Embedding)


def shortened(names: Iterable[str]) -> str:
    """Return names with one star for their layer numbers, each once."""
    starred = dict.fromkeys(
        ".".join("*" if part.isdecimal() else part for part in name.split(".")) for name in names
    )
    return ", ".join(starred)
