import json
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from stages.errors import InputError
from stages.model.loading import convert_gguf, load, meta_model

CONF = Path(__file__).parents[2] / "conf" / "model"
IDS = torch.arange(10, 22)[None]


@pytest.fixture
def saved(tmp_path, tiny_llama, byte_tokenizer):
    tiny_llama.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def loaded(source, dtype="float32"):
    return load(str(source), dtype=dtype, device="cpu", revision=None, device_map=None)


def test_a_folder_gives_the_model_that_was_saved(saved, tiny_llama, byte_tokenizer):
    model, tokenizer = loaded(saved)
    assert model.config._attn_implementation == "sdpa" and not model.training
    model.set_attn_implementation(tiny_llama.config._attn_implementation)
    assert torch.equal(model(IDS).logits, tiny_llama(IDS).logits)
    assert tokenizer("some text").input_ids == byte_tokenizer("some text").input_ids
    assert loaded(saved, "bfloat16")[0].dtype == torch.bfloat16


def remove(folder, pattern):
    for path in folder.glob(pattern):
        path.unlink()


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def only_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    remove(folder, "*.safetensors")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def rope_of_no_kind(folder):
    file = folder / "config.json"
    rope = {"rope_type": "none such", "rope_theta": 1e4}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_parameters": rope}))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (rope_of_no_kind, "'none such' is missing, or a name that transformers .*; save it again"),
        (lambda folder: remove(folder, "config.json"), "has no config.json"),
        (lambda folder: remove(folder, "tokenizer.json"), "has no tokenizer"),
        (only_a_pickle, r"has no \*.safetensors"),
        (drop_a_weight, "lack 1 weights, the first is model.layers.1.mlp.up_proj.weight"),
        (truncate, "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{}"), "cannot be loaded"),
    ],
)
def test_an_unreadable_folder_is_one_line(saved, break_it, message):
    break_it(saved)
    with pytest.raises(InputError, match=message) as error:
        loaded(saved)
    assert "\n" not in str(error.value)


def test_a_model_that_is_nowhere_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="does not exist"):
        loaded(tmp_path / "absent")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"nobody/nothing.*model.path=FOLDER") as error:
        loaded("nobody/nothing")
    assert "\n" not in str(error.value)


def write_gguf(path, model, tokenizer, pre="gpt-2", more=None):
    """The tiny model as llama.cpp's converter writes it: rows of q and k interleaved for RoPE."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    tokens = tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * config.vocab_size)  # no merges: bytes alone
    writer.add_token_types([1] * 256 + [3, 3])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        for port, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if port in name:
                rows, columns = weight.shape
                halves = weight.reshape(heads, 2, rows // heads // 2, columns)
                weight = halves.swapaxes(1, 2).reshape(rows, columns)
        target = names.get_name(name, try_suffixes=(".weight",))
        blocks = "_proj" in name and weight.shape[-1] % 32 == 0
        kind = gguf.GGMLQuantizationType.Q4_1 if blocks else None
        data = weight.numpy()
        if kind:
            data = gguf.quants.quantize(data, kind)
        writer.add_tensor(target, data, raw_dtype=kind)
    for name, weight in (more or {}).items():
        writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_four_bit(model):
    """Round each projection to 16 levels between the extremes of every 32 numbers of a row."""
    for name, weight in model.named_parameters():
        if "_proj" in name:
            blocks = weight.data.reshape(-1, 32)
            low = blocks.amin(1, keepdim=True)
            step = (blocks.amax(1, keepdim=True) - low) / 15
            levels = ((blocks - low) / step + 0.5).floor().clamp(0, 15)
            weight.data = (levels * step.half() + low.half()).reshape(weight.shape).float()


def test_gguf_becomes_dense_safetensors(tmp_path, tiny_llama, byte_tokenizer):
    (tmp_path / "gguf").mkdir()
    for layer in tiny_llama.model.layers:  # Q4_1 works on rows of a multiple of 32 numbers
        mlp = layer.mlp
        mlp.down_proj.weight.data = torch.cat([mlp.down_proj.weight.data, torch.randn(32, 16)], 1)
        for port in (mlp.up_proj, mlp.gate_proj):
            port.weight.data = torch.cat([port.weight.data, torch.randn(16, 32)])
    tiny_llama.config.intermediate_size = 64
    write_gguf(tmp_path / "gguf" / "tiny.gguf", tiny_llama, byte_tokenizer)
    convert_gguf(tmp_path / "gguf" / "tiny.gguf", tmp_path / "out")
    model, tokenizer = loaded(tmp_path / "out")
    assert model.dtype == torch.float32 and not hasattr(model.config, "quantization_config")
    as_four_bit(tiny_llama)
    torch.testing.assert_close(model(IDS).logits, tiny_llama(IDS).logits, rtol=1e-4, atol=1e-3)
    assert tokenizer("Some text 12").input_ids == byte_tokenizer("Some text 12").input_ids


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134_515_008), ("llama2-7b", 6_738_415_616), ("llama3-8b", 8_030_261_248)],
)
def test_published_dimensions_give_the_published_size_without_memory(name, parameters):
    model = meta_model(yaml.safe_load((CONF / f"{name}.yaml").read_text())["dims"])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(p.is_meta for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("dims", [{}, {"hidden_size": 8}, {"model_type": "no-such-model"}])
def test_dimensions_need_a_known_model_type(dims):
    with pytest.raises(InputError, match=r"model.dims"):
        meta_model(dims)
