"""A prefix of attention sinks in front of every text, kept as a cache of keys and values.

Source: PrefixQuant (Chen et al. 2024): the tokens that become outliers, once in front of a text,
keep every later token from becoming one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from stages.errors import InputError
from stages.model.families import architecture
from stages.model.prefix import prefix_length, record_prefix
from stages.ports.passes import argument_names, decoder, named, new_tokens, positions
from stages.ports.port import DensePort
from stages.ports.visibility import View

KEYS, VALUES = "prefix_keys", "prefix_values"  # buffers of every decoder layer


class PeakPort(DensePort):
    """Keeps max|x| of every token."""

    def __init__(self) -> None:
        super().__init__()
        self._peaks: list[Tensor] = []

    @property
    def peaks(self) -> Tensor:
        """[windows, length], on the CPU."""
        return torch.cat(self._peaks)

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self._peaks.append(x.abs().amax(-1).float().cpu())
        return x

    def softmax(self, scores: Tensor, scaling: float, view: View) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError("peaks are those of a token, not of a pair")


@dataclass(frozen=True)
class Limit:
    """The most keys, prefix among them, that a text may have, and what comes behind them."""

    keys: int
    reason: str

    def instead(self, prefix: int) -> str:
        """Say why a longer text is refused, and what to do."""
        rotated = "convert with transform=rotate, which has no prefix"
        most = self.keys - prefix
        return f"{self.reason}; {f'give at most {most} tokens, or ' if most > 1 else ''}{rotated}"


@dataclass(frozen=True, eq=False)
class PrefixCache:
    """The decoder layers with the prefix' keys and values [1, G, P, D], the names of forward's
    arguments, and how long a text may be."""

    ids: tuple[int, ...]
    layers: nn.ModuleList
    names: tuple[str, ...]
    limits: tuple[Limit, ...]

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a pass behind the prefix: give it a cache that holds it, mask and positions to match.

        An empty cache is filled; one that is not holds the prefix since the pass that filled it.
        Positions count from the end of the prefix, and no pad. Raises InputError on masks and caches
        that leave no place for the prefix, and on texts that it would not reach.
        """
        given = named(self.names, args, kwargs)
        batch, length = new_tokens(given)
        cache: Cache | None = given.get("cache")
        if cache is None:
            cache = DynamicCache(config=module.config)
        past = int(cache.get_seq_length())
        mask, at = given.get("attention_mask"), given.get("position_ids")
        keys = (past or len(self.ids)) + length
        self._check(mask, keys)
        if past and mask is None and at is not None:
            self._check_start(int(at[..., 0].max()) + len(self.ids), past)
        if past == 0:
            for index, layer in enumerate(self.layers):
                states: Any = layer
                cache.update(
                    _expand(states.prefix_keys, batch), _expand(states.prefix_values, batch), index
                )
        given["cache"] = cache
        if mask is not None:
            at = positions(mask, length) if at is None else at
            ones = mask.new_ones(mask.shape[0], len(self.ids))
            given["attention_mask"] = torch.cat([ones, mask], dim=1)
        if at is not None:
            given["position_ids"] = at + len(self.ids)
        return (), given

    def _check_start(self, start: int, past: int) -> None:
        """`generate` with the cache of an earlier text takes the prefix in it for the text's."""
        if start != past:
            raise InputError(
                f"tokens from position {start} on behind a cache of {past}, {len(self.ids)} of them "
                "the prefix of this model: a cache of an earlier text, or of an assistant model, "
                "cannot be continued, give the whole text without a cache"
            )

    def _check(self, mask: Any, keys: int) -> None:
        size = len(self.ids)
        flat = isinstance(mask, Tensor) and mask.dim() == 2
        if mask is not None and not (flat and mask.shape[1] + size == keys):
            got = f"{list(mask.shape)}" if isinstance(mask, Tensor) else f"of {[*mask]}"
            raise InputError(
                f"attention_mask {got} for {keys} keys, {size} of them the prefix of this model: "
                "give a mask [batch, past + new tokens] without the prefix, and no cache of a fixed "
                "size or of an earlier text"
            )
        for limit in self.limits:
            if keys > limit.keys:
                raise InputError(
                    f"a text of {keys - size} tokens, pads among them, behind a prefix of {size}: "
                    f"{limit.instead(size)}"
                )

    def leave(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """Take from the output a cache that nobody asked for: `generate` would go on with it."""
        used = kwargs.get("use_cache")
        wanted = module.config.use_cache if used is None else used
        if wanted or not hasattr(output, "items"):
            return output
        return type(output)(**{k: v for k, v in output.items() if k != "cache"})


def _expand(states: Tensor, batch: int) -> Tensor:
    return states.expand(batch, -1, -1, -1)


def _limits(config: Any) -> tuple[Limit, ...]:
    """A prefix that a sliding window leaves behind shields no token, and one that was rotated with
    other frequencies than the text stands elsewhere."""
    windows = [
        int(layer.sliding_window)
        for layer in DynamicCache(config=config).layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo's mask, whose cache is whole
        windows.append(int(config.window_size))
    limits = [Limit(w, f"the model's window of {w} would leave the prefix") for w in set(windows)]
    rope = getattr(config, "rope_parameters", None) or {}
    kind, trained = rope.get("rope_type"), config.max_position_embeddings
    if kind in ("dynamic", "longrope"):
        trained = rope.get("original_max_position_embeddings") or trained
        limits.append(Limit(trained, f"rope_type {kind!r} turns longer texts otherwise"))
    return tuple(limits)


def check_lengths(config: Any, prefix: int, lengths: Mapping[str, int]) -> None:
    """Raise InputError where a text, by the option that gives its length, is longer than a model of this
    config reads behind a prefix of at least so many tokens."""
    for limit in _limits(config):
        for option, length in lengths.items():
            if length + prefix > limit.keys:
                raise InputError(
                    f"{option}={length} behind a prefix of {prefix}: {limit.instead(prefix)}"
                )


def attach_prefix(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Keep the prefix in front of every later pass of the model; its logits are not returned.

    Call it on the dense model, once, and before any port is attached: hooks run in order.
    """
    if not ids or prefix_length(model):
        raise ValueError(f"prefix {list(ids)} on a model with a prefix of {prefix_length(model)}")
    cache = DynamicCache()  # not the kind of the model, which forgets what leaves a window
    with torch.no_grad():
        model(torch.tensor([list(ids)], device=model.device), cache=cache, use_cache=True)
    filled: Any = cache.layers
    layers: Any = model.get_submodule(architecture(model).layers)
    for layer, states in zip(layers, filled, strict=True):  # as buffers they go where a model goes
        layer.register_buffer(KEYS, states.keys, persistent=False)
        layer.register_buffer(VALUES, states.values, persistent=False)
    inner = decoder(model)
    kept = PrefixCache(tuple(ids), layers, argument_names(inner), _limits(model.config))
    inner.register_forward_pre_hook(kept.enter, with_kwargs=True)
    inner.register_forward_hook(kept.leave, with_kwargs=True)
    record_prefix(model, kept.ids)
