"""Operations: all arithmetic of a decoder, in amounts a token and amounts a query-key pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from torch import nn

from stages.analysis.shapes import Chunk, Shape, shape_of
from stages.model.families import architecture
from stages.model.prefix import prefix_length
from stages.model.rules import Architecture
from stages.model.sites import Site, fused, matrix
from stages.transforms.rotation import OnlineRotation, online_rotation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRODUCTS = ("linear", "qk", "pv")
ELEMENTWISE = ("norm", "rope", "softmax", "activation", "product", "residual")
ROTATION = ("hadamard", "mixing")  # what a rotated model adds, see `OnlineRotation`


@dataclass(frozen=True)
class Amount:
    """So many for every new token, and so many for every pair of a new query and a key."""

    per_token: int = 0
    per_pair: int = 0

    def at(self, tokens: int, pairs: int) -> int:
        return self.per_token * tokens + self.per_pair * pairs


@dataclass(frozen=True)
class Operation:
    """One step of the forward pass, e.g. `model.layers.0.self_attn:qk` of kind `qk` in layer 0.

    `operands` are the sites it multiplies: one of a linear layer, two of an attention product.
    `work` is multiplications of a product, elements of anything else and comparisons of a `gate`,
    which is what one coded site needs if its coding chooses among neurons. `outputs` are the
    accumulators of a product, `inputs` the values that enter it beside `weights`: those of a linear
    layer that a token meets, of `stored`, which has those of all experts. `cached`: values that every
    key adds to the other operand of an attention product. `window` is the number of keys a query sees at
    most, `prefix` that of the keys that a transform keeps in front of every context.
    """

    name: str
    kind: str
    layer: int
    work: Amount
    operands: tuple[str, ...] = ()
    outputs: Amount = Amount()
    window: int | None = None
    prefix: int = 0
    inputs: Amount = Amount()
    weights: int = 0
    stored: int = 0
    cached: int = 0


def operations(model: PreTrainedModel, sites: Sequence[Site]) -> list[Operation]:
    """List every operation of a model, whose weights may be on the meta device.

    `sites` are all that `find_sites` gives, selected for conversion or not. The embedding is a
    look-up and costs nothing; what adds or scales a value once (biases, learned positions, the scale of an
    embedding) is not counted.
    """
    modules = dict(model.named_modules())
    rules = architecture(model)
    sites = _pooled(sites)
    plan = [_linear(name, s, modules[name], model.config) for s in sites for name in s.consumers]
    layers: dict[int, dict[str, Site]] = {}
    latent: list[Site] = []
    shared: dict[int, dict[str, Site]] = {}  # of the expert that every token meets beside others
    for site in sites:
        if site.layer >= 0:
            roles = layers.setdefault(site.layer, {})
            if site.role in roles and site.role == "attn.in":
                latent.append(site)
            elif site.role in roles:
                shared.setdefault(site.layer, {})[site.role] = site
            else:
                roles[site.role] = site
    prefix = prefix_length(model)
    shapes = {i: shape_of(model.config, modules, roles, prefix) for i, roles in layers.items()}
    plan += _norms(modules, rules, shapes)
    online = online_rotation(model)
    if online is not None:
        plan += _rotation(online, [site for site in sites if site.role == "mlp.down"])
    for layer, roles in layers.items():
        shape = shapes[layer]
        plan += _attention(layer, roles, shape)
        plan += _scores(layer, modules[roles["attn.q"].path], roles, shape)
        plan += _elementwise(
            layer, rules.activation_of(layer, roles["mlp.down"].expert is not None), roles, shape
        )
        plan += _gates(roles, shape)
        if layer in shared:
            plan += _shared(layer, shared[layer], shape, modules)
    outside = [*latent, *(site for site in sites if site.layer < 0)]
    inputs = [matrix(modules[site.consumers[0]], site, model.config).inputs for site in outside]
    return plan + [_gate(site, Amount(n)) for site, n in zip(outside, inputs, strict=True)]


def _pooled(sites: Sequence[Site]) -> list[Site]:
    """The sites with one for all experts of a layer: a token meets some of them, not all."""
    return list({site.operand: site for site in reversed(sites)}.values())[::-1]


def _linear(name: str, site: Site, module: Any, config: Any) -> Operation:
    """A linear module, a router, or one of the two matrices that a token meets in its experts."""
    shape = matrix(module, site, config)
    met = stored = shape.inputs * shape.outputs
    if fused(module):
        name += ":gate_up" if site.expert is None else ":down"
        stored = met // config.num_experts_per_tok * module.num_experts
    return Operation(
        name,
        "linear",
        site.layer,
        Amount(met),
        (site.operand,),
        Amount(shape.accumulators),
        inputs=Amount(shape.inputs),
        weights=met,
        stored=stored,
    )


def _norms(
    modules: Mapping[str, Any], rules: Architecture, shapes: Mapping[int, Shape]
) -> Iterator[Operation]:
    """Every norm; one inside attention scales all heads of its role. One that does not say its width
    works on the stream."""
    hidden = next(iter(shapes.values())).hidden
    for name, module in modules.items():
        if not _is_norm(module):
            continue
        layer, rest = rules.layer_of(name)
        if rest in rules.head_norms:
            shape = shapes[layer]
            both = {"attn.q": shape.heads, "attn.k": shape.groups}
            heads = sum(both[role] for role in rules.head_norms[rest].split())
            yield Operation(name, "norm", layer, Amount(heads * shape.width))
        else:
            yield Operation(name, "norm", layer, Amount(math.prod(_normalised(module, hidden))))


def _is_norm(module: nn.Module) -> bool:
    """Return whether a module is an RMSNorm or a LayerNorm, not a list of those of every head."""
    name = type(module).__name__
    leaf = next(module.children(), None) is None
    return leaf and any(part in name for part in ("RMSNorm", "LayerNorm", "L2Norm"))


def _normalised(norm: Any, hidden: int) -> Sequence[int]:
    """The dimensions a norm works on; it may have no weight."""
    weight: Any = getattr(norm, "weight", None)
    whole: Sequence[int] = (hidden,) if weight is None else weight.shape
    return getattr(norm, "normalized_shape", None) or whole


def untransformed(plan: Sequence[Operation]) -> list[Operation]:
    """Return the same model before its transform: without rotations and without a prefix."""
    return [replace(o, prefix=0) for o in plan if o.kind not in ROTATION]


def _rotation(online: OnlineRotation, sites: Sequence[Site]) -> Iterator[Operation]:
    """The rotation in front of every down_proj."""
    for site in sites:
        work = Amount(online.additions)
        yield Operation(f"{site.path}:hadamard", "hadamard", site.layer, work)
        if online.multiplications:
            work = Amount(online.multiplications)
            yield Operation(f"{site.path}:mixing", "mixing", site.layer, work)


def _attention(layer: int, roles: Mapping[str, Site], shape: Shape) -> Iterator[Operation]:
    path, window, prefix = roles["attn.q"].path, shape.window, shape.prefix
    q, k, probs, v = (roles[f"attn.{port}"].name for port in ("q", "k", "probs", "v"))
    queries, values = shape.heads * shape.width, shape.heads * shape.value
    scores = Amount(per_pair=shape.heads)
    if shape.rotated:
        yield Operation(f"{path}:rope", "rope", layer, Amount(shape.rotated))
    product = partial(Operation, layer=layer, window=window, prefix=prefix)
    yield product(
        f"{path}:qk",
        "qk",
        work=Amount(per_pair=queries),
        operands=(q, k),
        outputs=scores,
        inputs=Amount(queries),
        cached=shape.groups * shape.width,
    )
    yield Operation(f"{path}:softmax", "softmax", layer, scores, (), Amount(), window, prefix)
    yield product(
        f"{path}:pv",
        "pv",
        work=Amount(per_pair=values),
        operands=(probs, v),
        outputs=Amount(values),
        inputs=scores,
        cached=shape.groups * shape.value,
    )


def _scores(
    layer: int, attention: Any, roles: Mapping[str, Site], shape: Shape
) -> Iterator[Operation]:
    """What stands between scores and softmax: the tanh of a soft-cap, and a sink, whose share is one
    more product of every value that attention gives."""
    path = roles["attn.q"].path
    if getattr(attention, "attn_logit_softcapping", None) is not None:
        work = Amount(per_pair=shape.heads)
        yield Operation(
            f"{path}:softcap", "activation", layer, work, (), Amount(), shape.window, shape.prefix
        )
    if getattr(attention, "sinks", None) is not None:
        yield Operation(f"{path}:sink", "product", layer, Amount(shape.heads * shape.value))


def _elementwise(
    layer: int, activation: str, roles: Mapping[str, Site], shape: Shape
) -> Iterator[Operation]:
    """The rest of a layer; the product stays a product where its operands are spikes.

    A router's softmax is over all experts; the outputs of those chosen are weighted and summed.
    """
    attention, mlp = roles["attn.q"].path, roles["mlp.down"].path.rpartition(".")[0]
    yield Operation(f"{attention}:residual", "residual", layer, Amount(shape.hidden))
    yield Operation(activation, "activation", layer, Amount(shape.inner))
    if "mlp.up" in roles:
        yield Operation(f"{mlp}:product", "product", layer, Amount(shape.inner))
    if shape.experts:
        yield Operation(f"{mlp}:routing", "softmax", layer, Amount(shape.experts))
        weighted = Amount(shape.routes * shape.hidden)
        yield Operation(f"{mlp}:weighting", "product", layer, weighted)
        summed = Amount((shape.routes - 1) * shape.hidden)
        yield Operation(f"{mlp}:sum", "residual", layer, summed)
    yield Operation(f"{mlp}:residual", "residual", layer, Amount(shape.hidden))


def _shared(
    layer: int, roles: Mapping[str, Site], shape: Shape, modules: Mapping[str, Any]
) -> Iterator[Operation]:
    """An expert that every token meets: its activation, its product, and its sum with the others'.

    Where a gate weights its output, that is a sigmoid and one product a value.
    """
    mlp = roles["mlp.down"].path.rpartition(".")[0]
    inner = Amount(modules[roles["mlp.down"].path].in_features)
    yield Operation(roles["mlp.act"].path, "activation", layer, inner)
    yield Operation(f"{mlp}:product", "product", layer, inner)
    if f"{mlp}_gate" in modules:
        yield Operation(f"{mlp}_gate:sigmoid", "activation", layer, Amount(1))
        yield Operation(f"{mlp}:weighting", "product", layer, Amount(shape.hidden))
    yield Operation(f"{mlp}:sum", "residual", layer, Amount(shape.hidden))
    for site in roles.values():
        yield _gate(site, inner)


def _gates(roles: Mapping[str, Site], shape: Shape) -> Iterator[Operation]:
    queries, keys = Amount(shape.heads * shape.width), Amount(shape.groups * shape.width)
    values_kept, given = Amount(shape.groups * shape.value), Amount(shape.heads * shape.value)
    hidden, inner = Amount(shape.hidden), Amount(shape.inner)
    values = {
        "attn.in": hidden,
        "attn.q": queries,
        "attn.k": keys,  # of new tokens only: a cache holds spikes
        "attn.v": values_kept,
        "attn.probs": Amount(per_pair=shape.heads),
        "attn.out": given,
        "mlp.in": hidden,
        "mlp.act": inner,
        "mlp.up": inner,
        "mlp.down": inner,
    }
    for role, site in roles.items():
        yield _gate(site, values[role], shape.window, shape.prefix)


def _gate(site: Site, values: Amount, window: int | None = None, prefix: int = 0) -> Operation:
    operands = (site.operand,)
    return Operation(
        site.operand, "gate", site.layer, values, operands, window=window, prefix=prefix
    )


def keys_met(queries: int, context: int, attention: str, window: int | None, prefix: int) -> int:
    """Different keys that the last `queries` positions of a context meet."""
    keys = prefix + context
    if attention == "full":
        return keys
    if isinstance(window, Chunk):
        return keys - (keys - queries) // window * window
    return min(keys, (window or keys) + queries - 1)


@lru_cache(maxsize=None, typed=True)
def pairs_met(queries: int, context: int, attention: str, window: int | None, prefix: int) -> int:
    """Pairs of the last `queries` positions of a context and the keys they meet."""
    if attention == "full":
        return queries * (prefix + context)
    seen = range(prefix + context - queries + 1, prefix + context + 1)
    if isinstance(window, Chunk):
        return sum((keys - 1) % window + 1 for keys in seen)
    return sum(min(keys, window or keys) for keys in seen)
