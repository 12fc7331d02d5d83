"""A model larger than memory: its layers stay on disk, and one of them is resident, with the one behind it
while that is read.

The modules are those of transformers with their weights on the meta device, so that sites, ports and
counters work on them as on any other model. `stages.model.forward` runs it layer by layer.
"""

from __future__ import annotations

import ctypes
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stages.errors import InputError
from stages.model.families import architecture
from stages.model.files import Checkpoint, Stored, check_fit, keep_apart
from stages.model.hub import first_line
from stages.model.quantised import quantiser

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Turn = Callable[[], AbstractContextManager[None]]
BOUNDARIES = ("memory", "disk")
OUTSIDE = -1  # what is in no decoder layer: embedding, final norm, head
_RECORD = "offload"


@dataclass(frozen=True)
class Offload:
    """`boundary`: where hidden states between two layers wait, in `memory` or in a file on `disk`."""

    boundary: str

    def __post_init__(self) -> None:
        if self.boundary not in BOUNDARIES:
            raise InputError(
                f"runtime.offload.boundary={self.boundary!r}: choose {' or '.join(BOUNDARIES)}"
            )

    @contextmanager
    def states(self, shape: Sequence[int], dtype: torch.dtype) -> Iterator[Tensor]:
        """Give an unfilled CPU tensor for hidden states [windows, length, hidden]."""
        if self.boundary == "memory":
            yield torch.empty(*shape, dtype=dtype)
            return
        with tempfile.NamedTemporaryFile(prefix="boundary-") as file:
            size = torch.Size(shape).numel()
            file.truncate(size * dtype.itemsize)
            yield torch.from_file(file.name, shared=True, size=size, dtype=dtype).view(*shape)


class Weights:
    """The files of a model's weights, read group by group: one decoder layer, or `OUTSIDE`."""

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        device: str,
        dtype: torch.dtype,
        spec: Offload,
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.device, self.spec = torch.device(device), spec
        self._model, self._dtype, self._source = model, dtype, checkpoint.source
        self._mapping: list[Any] = [*get_model_conversion_mapping(model)]
        self._quantiser = quantiser(model)
        if self._quantiser is not None:
            self._mapping = self._quantiser.update_weight_conversions(self._mapping, model)
        rules = architecture(model)
        self._path = rules.layers
        modules = dict(model.named_modules())
        if any(consumer in modules for rule in rules.outside for consumer in rule.consumers):
            raise InputError(
                f"runtime=offload: {checkpoint.source} projects its embeddings, which would be counted "
                "twice where layers run one by one; load it whole, with runtime=default"
            )
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._names = self._grouped_names()
        self._keys = self._grouped(checkpoint.tensors)
        self._tied: dict[str, str] = {}  # {a weight that is in no file, or equal: the one it is}
        self._untie(self._check(checkpoint), checkpoint.source)

    @property
    def layers(self) -> nn.ModuleList:
        layers = self._model.get_submodule(self._path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @contextmanager
    def resident(self, group: int) -> Iterator[None]:
        """Hold the group's weights on the device while the context is open."""
        with self.in_turn([group]) as turn, turn():
            yield

    @contextmanager
    def in_turn(self, groups: Sequence[int]) -> Iterator[Turn]:
        """Give what opens a context for one group after the other, which holds its weights on the device.

        A thread reads those of the next group meanwhile, so that two of them are in memory. Whatever is
        in memory goes with the outer context. Raises InputError, in the turn of the group, where a file is
        no longer what it was when the model was opened.
        """
        waiting = iter(groups)
        inference = torch.is_inference_mode_enabled()  # of a thread
        reader = ThreadPoolExecutor(1, "weights")
        read = partial(self._read, inference=inference)

        def ask() -> tuple[int, Future[None]] | None:
            group = next(waiting, None)
            return None if group is None else (group, reader.submit(read, group))

        following = ask()

        @contextmanager
        def turn() -> Iterator[None]:
            nonlocal following
            assert following is not None
            group, reading = following
            self._wait(reading)
            following = ask()
            try:
                yield
            finally:
                _trim()
                self._release(group)

        try:
            yield turn
        finally:
            reader.shutdown(cancel_futures=True)
            self._release(*{*groups})
            _trim()

    def _wait(self, reading: Future[None]) -> None:
        from safetensors import SafetensorError

        try:
            reading.result()
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"model {self._source}: its files have changed since it was opened: {first_line(error)}; "
                "run the same command again"
            ) from error

    def _read(self, group: int, inference: bool) -> None:
        from safetensors import safe_open

        with ExitStack() as files, torch.inference_mode(inference):
            slices: dict[str, Any] = {}
            for file, keys in self._keys[group].items():
                opened = files.enter_context(safe_open(file, framework="pt"))
                slices |= {key: opened.get_slice(key) for key in keys}
            self._fill(slices, self.device)
            self._tie(group)

    def _fill(self, tensors: Mapping[str, Any], device: torch.device) -> Any:
        """Let transformers name, convert and place tensors as it does for a whole model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": device},
            dtype=self._dtype,
            weight_mapping=self._mapping,
            hf_quantizer=self._quantiser,
        )
        info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        return info

    def _tie(self, group: int) -> None:
        for name in self._tied.keys() & self._names[group]:
            self._place(name, self._model.get_parameter(self._tied[name]))

    def _release(self, *groups: int) -> None:
        for name in itertools.chain.from_iterable(self._names[group] for group in groups):
            self._place(name, self._empty[name])

    def _place(self, name: str, parameter: nn.Parameter) -> None:
        path, _, last = name.rpartition(".")
        self._model.get_submodule(path)._parameters[last] = parameter

    def _check(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Raise InputError unless the files hold every weight in its shape, and nothing else.

        Returns the pairs that the config ties and of which the files hold both.
        """
        empty = {
            name: torch.empty(tensor.shape, dtype=self._dtype, device="meta")
            for name, tensor in checkpoint.tensors.items()
        }
        try:
            info = self._fill(empty, torch.device("meta"))
        finally:
            self._release(*self._names)
        absent, pairs = set(info.missing_keys), self._model.all_tied_weights_keys
        for name, origin in pairs.items():
            if name in absent and origin not in absent:
                self._tied[name] = origin
            elif origin in absent and name not in absent:
                self._tied[origin] = name
        info.missing_keys -= self._tied.keys()
        check_fit(self._model, checkpoint, info.to_dict())
        if info.conversion_errors:
            first = sorted(info.conversion_errors)[0]
            raise InputError(
                f"model {checkpoint.source}: {first} cannot be made of the weights in its files"
            )
        return {name: origin for name, origin in pairs.items() if not absent & {name, origin}}

    def _untie(self, both: Mapping[str, str], source: str) -> None:
        """Tie the pairs that are equal in the files, and let the others be two weights."""
        if not both:
            return
        for name in both:
            self._empty[name] = nn.Parameter(self._empty[name].detach().clone())
            self._place(name, self._empty[name])
        with self.resident(OUTSIDE):
            weight = self._model.get_parameter
            equal = {n: o for n, o in both.items() if torch.equal(weight(n), weight(o))}
        self._tied |= equal
        self._empty |= {name: self._empty[origin] for name, origin in equal.items()}
        self._release(OUTSIDE)
        keep_apart(self._model, source, {n: o for n, o in both.items() if n not in equal})

    def _group(self, name: str) -> int:
        """The layer of a weight by its name in the model or in its files."""
        inside = name.partition(f"{self._path.rpartition('.')[2]}.")[2].partition(".")[0]
        return int(inside) if inside.isdecimal() else OUTSIDE

    def _grouped(self, tensors: Mapping[str, Stored]) -> dict[int, dict[Path, list[str]]]:
        groups: dict[int, dict[Path, list[str]]] = {}
        for key, tensor in tensors.items():
            groups.setdefault(self._group(key), {}).setdefault(tensor.file, []).append(key)
        return groups

    def _grouped_names(self) -> dict[int, list[str]]:
        groups: dict[int, list[str]] = {}
        for name in self._empty:
            groups.setdefault(self._group(name), []).append(name)
        return groups


def _trim() -> None:
    """Give back what has been freed so far, where glibc keeps it: a layer that goes now leaves its memory
    to the one behind the next, and there is no other free memory than that."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def skeleton(config: Any, dtype: torch.dtype, attention: str | None) -> PreTrainedModel:
    """Make the model of a config, weights on the meta device, buffers (such as RoPE frequencies) real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()
    return model.eval()


def attach(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    device: str,
    dtype: torch.dtype,
    spec: Offload,
) -> None:
    """Name the files that the weights of a `skeleton` are read from."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.__dict__[_RECORD] = Weights(model, checkpoint, device, dtype, spec)


def offloaded(model: PreTrainedModel) -> Weights | None:
    """Return the weights of a model that is run layer by layer, None for one in memory."""
    weights: Weights | None = model.__dict__.get(_RECORD)
    return weights


def device_of(model: PreTrainedModel) -> torch.device:
    """Return where the model computes."""
    weights = offloaded(model)
    if weights is not None:
        return weights.device
    if model.device.type != "meta":
        return model.device
    # accelerate brings a layer that it keeps elsewhere when it is called
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    return model.device if place is None else torch.device(place)


def refuse_offloaded(model: PreTrainedModel, what: str, instead: str) -> None:
    """Raise InputError for a model in files, which `what` cannot work with."""
    if offloaded(model) is not None:
        raise InputError(f"runtime=offload: {what} needs the whole model in memory; {instead}")
