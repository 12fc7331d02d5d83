"""Models: from a folder, the hub, a GGUF file, or from their dimensions alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import InputError
from stages.model import tokenizers
from stages.model.files import Checkpoint, check_fit, keep_apart, stored, unreported
from stages.model.gguf_config import check_stated
from stages.model.gguf_file import check_read, read_tokenizer, save_tokenizer
from stages.model.hub import INSTEAD, SMALL, first_line, one_file, snapshot
from stages.model.quantised import SPIKING, check_method, check_plain, dequantise

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from stages.model.offload import Offload

DTYPES = ("float32", "bfloat16", "float16")
ATTENTION = None  # what transformers chooses, SDPA where there is one; ports bring their own
_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def convert_gguf(gguf: Path, out: Path) -> None:
    """Dequantise a GGUF file to float32 safetensors and its tokenizer, in the folder `out`.

    Raises InputError where that would leave out a tensor, or split text otherwise than the file has it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations.gguf import read_gguf_metadata

    source = f"GGUF file {gguf.name}"
    with readable(source), unreported():
        metadata, names = read_gguf_metadata(str(gguf))
        architecture = str(metadata["general.architecture"])
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        check_stated(config, metadata, architecture, source)
        tokenizer = read_tokenizer(gguf, metadata, source)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused by name
        )
    model, report = loaded
    check_fit(model, Checkpoint(source, {}), report)
    check_read(model, architecture, names, source)
    # The weights are dense by now, but transformers refuses to save what it takes for quantised.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    save_tokenizer(tokenizer, metadata, out, source)


def load(
    source: str, *, dtype: str, device: str, revision: str | None, device_map: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the causal language model (in evaluation mode) and tokenizer of a local folder or hub id.

    With `device_map` accelerate places the layers and `device` is not used. Raises InputError where
    the files hold anything but the weights of that model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with _of_model(source):
        folder, config, checkpoint = _opened(source, revision)
        tokenizer = tokenizers.read(folder, source, config)
        with unreported():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                **_LOCAL,
                config=config,
                dtype=getattr(torch, dtype),
                device_map=device_map,
                attn_implementation=ATTENTION,
                use_safetensors=True,  # the other format is a pickle
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused by name
            )
    model, report = loaded
    check_fit(model, checkpoint, report)
    check_plain(model, source)
    wanted = model.get_expanded_tied_weights_keys(all_submodels=True)
    tied = model.all_tied_weights_keys
    keep_apart(model, source, {one: wanted[one] for one in wanted if one not in tied})
    return (model if device_map else model.to(device)).eval(), tokenizer


def load_offloaded(
    source: str, *, dtype: str, device: str, revision: str | None, offload: Offload
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load as `load` does, with the weights left in their files until their layer computes on `device`.

    Files on the hub are downloaded first.
    """
    import torch

    from stages.model.offload import attach, skeleton

    with _of_model(source):
        folder, config, checkpoint = _opened(source, revision)
        tokenizer = tokenizers.read(folder, source, config)
        kind = getattr(torch, dtype)
        model = skeleton(config, kind, ATTENTION)
        attach(model, checkpoint, device, kind, offload)
    return model, tokenizer


def load_tokenizer(source: str, revision: str | None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local folder or hub id alone, refused where its model would be."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_folder(folder)
    config = configuration(source, revision)
    with _of_model(source):
        if not folder.is_dir():
            folder = snapshot(source, revision, SMALL)
        return tokenizers.read(folder, source, config)


def configuration(source: str, revision: str | None) -> PreTrainedConfig:
    """Read the config of a dense model on the hub or in a local folder, which may lack all other files."""
    from transformers import AutoConfig

    folder = Path(source).expanduser()
    with _of_model(source):
        if not folder.is_dir():
            folder = one_file(source, revision, "config.json").parent
        if not (folder / "config.json").is_file():
            raise InputError(f"model folder {folder} has no config.json")
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(folder), **_LOCAL)
    _refuse_spiking(config, source)
    return config


def dims_config(dims: Mapping[str, Any]) -> PreTrainedConfig:
    """Make the config of a model from its dimensions and model_type."""
    from transformers import AutoConfig

    if "model_type" not in dims:
        raise InputError(
            "model.dims is empty or names no model_type; choose a model whose yaml has dims"
        )
    fields = {name: value for name, value in dims.items() if name != "model_type"}
    try:
        config: PreTrainedConfig = AutoConfig.for_model(dims["model_type"], **fields)
    except (ValueError, TypeError) as error:
        raise InputError(f"model.dims describe no model: {first_line(error)}") from error
    return config


def meta_model(described: PreTrainedConfig | Mapping[str, Any]) -> PreTrainedModel:
    """Make a model without weights, on the meta device, from its config or its dimensions."""
    import torch
    from transformers import AutoModelForCausalLM

    config = dims_config(described) if isinstance(described, Mapping) else described
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"the model's config describes no causal language model: {first_line(error)}"
        ) from error


def _opened(source: str, revision: str | None) -> tuple[Path, Any, Checkpoint]:
    """The folder of a model, its config and what its files hold; files on the hub are downloaded."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_folder(folder)
    elif folder.is_absolute():
        raise InputError(f"model folder {source} does not exist")
    config: Any = configuration(source, revision)
    if not folder.is_dir():
        folder = snapshot(source, revision)
        check_folder(folder)
    tensors = stored(folder, config)
    scaled = check_method(config, folder, tensors, source)
    dequantise(config)
    return folder, config, Checkpoint(source, tensors, scaled)


def check_folder(folder: Path) -> None:
    """Raise InputError that names a missing file, before transformers looks for it elsewhere."""
    for what, names in {
        "config.json": ["config.json"],
        "*.safetensors": ["*.safetensors"],
        "tokenizer": ["tokenizer.json", "tokenizer.model", "vocab.json"],
    }.items():
        if not any(True for name in names for _ in folder.glob(name)):
            raise InputError(
                f"model folder {folder} has no {what}; it needs config.json, *.safetensors and a"
                " tokenizer, as save_pretrained writes them"
            )


def _refuse_spiking(config: Any, source: str) -> None:
    """Raise InputError for the config of an exported model."""
    spec = getattr(config, "quantization_config", None)
    if isinstance(spec, dict) and spec.get("quant_method") == SPIKING:
        raise InputError(
            f"model {source} is a spiking model already: stages.load reads it, "
            "python -m pipeline generate runs it; a conversion starts from a dense one"
        )


AGAIN = "save it again by save_pretrained, or download it again"


@contextmanager
def readable(what: str, instead: str = INSTEAD["model"]) -> Iterator[None]:
    """Turn what transformers raises for a missing, gated or damaged model into one line, which ends with
    what to do."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    damaged = (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ImportError,
        AssertionError,
    )
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # tokenizers raises nothing more precise than Exception
        known = isinstance(error, (*damaged, StrictDataclassError, SafetensorError))
        if not known and type(error) is not Exception:
            raise
        said = first_line(error)
        if isinstance(error, KeyError):  # which says the key alone
            said = f"{said} is missing, or a name that transformers does not know"
        raise InputError(f"{what} cannot be loaded: {said}; {instead}") from error


def _of_model(source: str) -> AbstractContextManager[None]:
    """`readable`, with what to do about a local folder or a model on the hub."""
    local = Path(source).expanduser().is_dir()
    return readable(f"model {source}", *([AGAIN] if local else []))
