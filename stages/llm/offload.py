"""A model larger than memory: its layers stay on disk, and one of them at a time is resident.

The modules are those of transformers with their weights on the meta device, so that sites, ports and
counters work on them as on any other model. `stages.llm.forward` runs it layer by layer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.errors import InputError
from stages.llm.sites import architecture

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
        self._mapping = get_model_conversion_mapping(model)
        self._path = architecture(model).layers
        self._empty = dict(model.named_parameters(remove_duplicate=False))
        self._keys = self._grouped(_files(folder))

    @property
    def layers(self) -> nn.ModuleList:
        found = self._model.get_submodule(self._path)
        assert isinstance(found, nn.ModuleList)
        return found

    @contextmanager
    def resident(self, group: int) -> Iterator[None]:
        """The group's weights on the device while the context is open.

        Raises InputError where the files lack one or hold another shape.
        """
        try:
            self._load(group)
            yield
        finally:
            for name, parameter in self._empty.items():
                path, _, own = name.rpartition(".")
                self._model.get_submodule(path)._parameters[own] = parameter

    def _load(self, group: int) -> None:
        from safetensors import safe_open
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        config = LoadStateDictConfig(
            device_map={"": self.device}, dtype=self._dtype, weight_mapping=list(self._mapping)
        )
        with ExitStack() as files:
            slices = {}
            for file, keys in self._keys.get(group, {}).items():
                opened = files.enter_context(safe_open(file, framework="pt"))
                slices |= {key: opened.get_slice(key) for key in keys}
            info, _ = convert_and_load_state_dict_in_model(self._model, slices, config)
        if group == OUTSIDE:
            self._model.tie_weights()
        self._check(group, info)

    def _check(self, group: int, info: Any) -> None:
        own = [name for name in self._empty if self._group(name) == group]
        absent = [name for name in own if self._model.get_parameter(name).is_meta]
        wrong = sorted(str(found) for found in info.mismatched_keys) or [*info.conversion_errors]
        if absent or wrong:
            raise InputError(
                f"model files: of {len(own)} weights of "
                f"{f'layer {group}' if group >= 0 else 'embedding, norm and head'} "
                f"{len(absent)} are missing or of another shape, the first is {[*wrong, *absent][0]}"
            )

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
