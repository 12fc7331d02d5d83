"""What a forward pass through the decoder of a model begins with: its arguments, the positions of its
tokens, and RoPE frequencies that no earlier pass has moved."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stages.errors import InputError
from stages.ports.attention import NAME
from stages.ports.experts import NAME as EXPERTS
from stages.ports.visibility import ForwardState

_MARK = "spiking_tokens"  # on a cache: whose codes it holds, of how many tokens
_NUMBERS = itertools.count()
_GROWING = "dynamic"  # the RoPE type whose frequencies follow the longest text so far


def decoder(model: PreTrainedModel) -> Any:
    """Return the module that every pass goes through, also one that asks for hidden states alone."""
    return model.get_decoder()


def argument_names(module: Any) -> tuple[str, ...]:
    """Return the names of forward's arguments, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return all arguments of a pass by name; a cache is `cache` under its former name, too."""
    given = dict(zip(names, args, strict=False)) | kwargs
    old = given.pop("past_key_values", None)
    return given if old is None else given | {"cache": old}


def new_tokens(given: Mapping[str, Any]) -> tuple[int, int]:
    """Return rows and new tokens of a pass."""
    tokens = given.get("input_ids")
    shape = (given["inputs_embeds"] if tokens is None else tokens).shape
    return shape[0], shape[1]


def cached_tokens(given: Mapping[str, Any]) -> int:
    """Count the tokens that stand in the cache of a pass."""
    cache = given.get("cache")
    return 0 if cache is None else int(cache.get_seq_length())


def _grows(cache: Any) -> bool:
    """Whether a cache holds what it gives, on the device and in the precision of the pass."""
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and all(type(layer) in plain for layer in cache.layers)
    )


def positions(mask: Tensor, length: int) -> Tensor:
    """Number the last tokens of mask [B, S] [B, length] without counting pads, as `generate` does.

    A plain forward pass of transformers counts pads on the left. Neurons code queries and keys behind
    RoPE, so the same text would spike otherwise in another batch.
    """
    counted: Tensor = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted[:, -length:]


def restart_rope(model: PreTrainedModel) -> None:
    """Let dynamic RoPE begin as in a fresh process, so that a pass depends on its length alone.

    transformers keeps the frequencies of the longest text so far until a shorter one than the trained
    length comes.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds == _GROWING:
            _restart(module, "")
        elif isinstance(kinds, dict):  # one for every type of layer
            for layer_type, kind in kinds.items():
                if kind == _GROWING:
                    _restart(module, f"{layer_type}_")


def _restart(module: Any, prefix: str) -> None:
    longest = f"{prefix}max_seq_len_cached"
    if int(getattr(module, longest, 0)) > module.original_max_seq_len:
        original = getattr(module, f"{prefix}original_inv_freq")
        module.register_buffer(f"{prefix}inv_freq", original.clone(), persistent=False)
        setattr(module, longest, module.original_max_seq_len)


def held(model: nn.Module, paths: Iterable[str]) -> dict[str, tuple[nn.Module, str, nn.Module]]:
    """Return what must stay for the modules at `paths` to be the model's, by the path of every module on
    the way: the one that holds it, under which name, and itself."""
    links: dict[str, tuple[nn.Module, str, nn.Module]] = {}
    for path in paths:
        above, so_far = model, ""
        for name in path.split("."):
            so_far = f"{so_far}.{name}".lstrip(".")
            links[so_far] = above, name, above.get_submodule(name)
            above = links[so_far][2]
    return links


class Pass(ForwardState):
    """The state of the passes through a model whose ports are attached."""

    renew: Callable[[], bool] | None = None  # whether the parameters of neurons have changed

    def __init__(
        self,
        model: PreTrainedModel,
        prefix: int,
        experts: bool,
        counted: bool,
        ported: Iterable[str],
    ) -> None:
        """Take what determines a pass.

        prefix: tokens that stand in the cache of a text's first pass; experts: whether some are
        ported; counted: whether a port counts; ported: the paths of the modules that ports are on.
        """
        super().__init__()
        self._number = next(_NUMBERS)
        # Layers that read the keys of others would code them once more.
        self._shares = bool(getattr(model.config, "num_kv_shared_layers", 0))
        self._held = held(model, ported)
        self._model, self._prefix, self._counted = model, prefix, counted
        self.wanted = {"attn": NAME} | ({"experts": EXPERTS} if experts else {})
        self._names = argument_names(decoder(model))

    def enter(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin the pass; a hook in front of the decoder's forward."""
        self._check_implementations()
        self._check_modules()
        if self.renew is not None and self.renew():
            self._number = next(_NUMBERS)  # caches hold what the former neurons made
        given = named(self._names, args, kwargs)
        mask, (_, length) = given.get("attention_mask"), new_tokens(given)
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            self._check_uncounted()
            mask = None  # prepared by `generate` for a cache of a fixed size
        self.begin(mask, length)
        self._keep(given, length)
        if cached_tokens(given) <= self._prefix:
            restart_rope(self._model)
        if mask is None or given.get("position_ids") is not None:
            return None
        return (), given | {"position_ids": positions(mask, length)}

    def _keep(self, given: Mapping[str, Any], length: int) -> None:
        """Find out whether the cache of the pass keeps codes, and whether all that it holds are codes.

        A cache that grows holds them instead of what they code, so that a token is coded once; counters
        ask for the spikes of all of them.
        """
        cache, before = given.get("cache"), cached_tokens(given)
        number, count = getattr(cache, _MARK, (self._number, 0))
        now = self.now
        now.keeps = _grows(cache) and not (self._counted or self._shares or torch.is_grad_enabled())
        now.cache = cache if now.keeps else None
        if count and (number != self._number or not now.keeps):
            raise InputError(
                "this cache holds keys and values coded by other neurons, or by these without counters or "
                "gradients: begin with an empty one, past_key_values=None"
            )
        now.kept = now.keeps and count >= before > 0
        if now.keeps:
            setattr(cache, _MARK, (self._number, before + length))

    def _check_implementations(self) -> None:
        for part, wanted in self.wanted.items():
            got = getattr(self._model.config, f"_{part}_implementation")
            if got != wanted:
                raise InputError(
                    f"{part}_implementation={got!r} would leave out neurons of this model: "
                    f"model.set_{part}_implementation({wanted!r}) sets it back, "
                    "stages.restore(model) makes it dense"
                )

    def _check_modules(self) -> None:
        for path, (above, name, module) in self._held.items():
            if above._modules.get(name) is not module:
                raise InputError(
                    f"{path} of this model was replaced after its neurons were put on, which would leave "
                    "them out: put it back, merge an adapter (merge_and_unload of peft), or take "
                    "the neurons off by stages.restore(model), change the dense model and convert it"
                )

    def _check_uncounted(self) -> None:
        if self._counted:
            raise InputError(
                "counters need an attention_mask [batch, past + new tokens] or none, to tell pads "
                "from tokens: use a cache that grows, cache_implementation='dynamic'"
            )
