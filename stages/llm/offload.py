"""A model larger than memory: its layers stay on disk, and one of them at a time is resident.

The modules are those of transformers with their weights on the meta device, so that sites, ports and
counters work on them as on any other model. `stages.llm.forward` runs it layer by layer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.llm.rules import architecture

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
        """An unfilled CPU tensor for hidden states [windows, length, hidden]."""
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
        self, model: PreTrainedModel, folder: Path, device: str, dtype: torch.dtype, spec: Offload
    ) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        self.device, self.spec = torch.device(device), spec
        self._model, self._dtype = model, dtype
        self._mapping: list[Any] = [*get_model_conversion_mapping(model)]
        self._path = architecture(model).layers
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._keys = self._grouped(_files(folder))
        self._check(folder)

    @property
    def layers(self) -> nn.ModuleList:
        found = self._model.get_submodule(self._path)
        assert isinstance(found, nn.ModuleList)
        return found

    @contextmanager
    def resident(self, group: int) -> Iterator[None]:
        """The group's weights on the device while the context is open."""
        from safetensors import safe_open

        try:
            with ExitStack() as files:
                slices: dict[str, Any] = {}
                for file, keys in self._keys[group].items():
                    opened = files.enter_context(safe_open(file, framework="pt"))
                    slices |= {key: opened.get_slice(key) for key in keys}
                self._fill(slices, self.device)
            yield
        finally:
            self._release()

    def _fill(self, tensors: Mapping[str, Any], device: torch.device) -> Any:
        """Lets transformers name, convert and place tensors as it does for a whole model."""
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": device}, dtype=self._dtype, weight_mapping=self._mapping
        )
        info, _ = convert_and_load_state_dict_in_model(self._model, dict(tensors), config)
        self._model.tie_weights()
        return info

    def _release(self) -> None:
        for name, parameter in self._empty.items():
            path, _, own = name.rpartition(".")
            self._model.get_submodule(path)._parameters[own] = parameter

    def _check(self, folder: Path) -> None:
        """Raises InputError unless the files hold every weight in its shape; reads headers only."""
        from safetensors import safe_open

        tensors = {}
        for file in {file for own in self._keys.values() for file in own}:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, it is no mapping
                    shape = opened.get_slice(key).get_shape()
                    tensors[key] = torch.empty(shape, dtype=self._dtype, device="meta")
        try:
            info = self._fill(tensors, torch.device("meta"))
        finally:
            self._release()
        absent = sorted(info.missing_keys - set(self._model.all_tied_weights_keys))
        if absent:  # a layer without them would compute with nothing
            raise InputError(
                f"model {folder}: its files lack {len(absent)} weights, the first is {absent[0]}"
            )
        wrong = sorted(f"{n} {list(got)}" for n, got, _ in info.mismatched_keys)
        if wrong or info.conversion_errors:
            first = [*wrong, *info.conversion_errors][0]
            raise InputError(f"model {folder}: a weight does not fit its config.json: {first}")

    def _group(self, name: str) -> int:
        """The layer of a weight by its name in the model or in its files."""
        inside = name.partition(f"{self._path.rpartition('.')[2]}.")[2].partition(".")[0]
        return int(inside) if inside.isdecimal() else OUTSIDE

    def _grouped(self, files: dict[str, Path]) -> dict[int, dict[Path, list[str]]]:
        groups: dict[int, dict[Path, list[str]]] = {}
        for key, file in files.items():
            groups.setdefault(self._group(key), {}).setdefault(file, []).append(key)
        return groups


def _files(folder: Path) -> dict[str, Path]:
    """The file of every weight of a folder in safetensors, whole or sharded."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = json.loads(index.read_text())["weight_map"]
        absent = sorted({name for name in shards.values() if not (folder / name).is_file()})
        if absent:
            raise InputError(f"model folder {folder} lacks {absent[0]}, which its index names")
        return {key: folder / name for key, name in shards.items()}
    (file, *more) = sorted(folder.glob("*.safetensors"))
    if more:
        raise InputError(f"model folder {folder} has several safetensors files and no {index.name}")
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file)


def skeleton(config: Any, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The model of a config, weights on the meta device, buffers (such as RoPE frequencies) real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()
    return model.eval()


def attach(
    model: PreTrainedModel, folder: Path, device: str, dtype: torch.dtype, spec: Offload
) -> None:
    """Names the files that the weights of a `skeleton` are read from."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    model.__dict__[_RECORD] = Weights(model, folder, device, dtype, spec)


def offloaded(model: PreTrainedModel) -> Weights | None:
    """The weights of a model that is run layer by layer, None for one in memory."""
    found: Weights | None = model.__dict__.get(_RECORD)
    return found


def device_of(model: PreTrainedModel) -> torch.device:
    """Where the model computes."""
    weights = offloaded(model)
    return model.device if weights is None else weights.device


def refuse_offloaded(model: PreTrainedModel, what: str, instead: str) -> None:
    """Raises InputError for a model in files, which `what` cannot work with."""
    if offloaded(model) is not None:
        raise InputError(f"runtime=offload: {what} needs the whole model in memory; {instead}")
