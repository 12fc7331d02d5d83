"""What a model can read, from its config: the limit is where a forward pass stops working or meaning."""

import pytest
import torch
from transformers import AutoConfig

from stages.errors import InputError
from stages.model.limits import (
    check_positions,
    check_tokens,
    check_window,
    learned,
    positions,
    vocabulary,
)
from tests.model import families


def config(kind="llama", **fields):
    return AutoConfig.for_model(kind, **fields)


def rope(kind, **fields):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 2048),
        (rope("linear", factor=4.0), 8192),  # vicuna-16k keeps max_position_embeddings=4096
        (rope("yarn", factor=4.0, original_max_position_embeddings=2048), 8192),
        (rope("yarn", factor=0.5, original_max_position_embeddings=2048), 2048),
        (rope("dynamic", factor=2.0), None),
    ],
)
def test_a_rotary_embedding_reaches_as_far_as_it_was_made_for(fields, expected):
    made = config(max_position_embeddings=2048, **fields)
    assert positions(made) == expected and not learned(made)


def test_the_kinds_of_layers_of_one_model_have_one_limit():
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    kinds = {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    made = config("gemma3_text", max_position_embeddings=100, rope_parameters=kinds)
    assert positions(made) == 800 and not learned(made)


@pytest.mark.parametrize("kind", ["opt", "gpt2", "gpt2 2", "gpt_neo", "gpt_bigcode", "gptj", "mpt"])
def test_a_learned_table_ends_where_the_forward_pass_does(kind):
    """OPT's has two rows more than positions; GPT-J's angles and MPT's slopes are tables too."""
    field = "max_seq_len" if kind == "mpt" else "max_position_embeddings"
    model = families.made(kind, **{field: 20})
    assert positions(model.config) == 20 and learned(model.config)
    check_window(model.config, 20, kind)
    model(torch.ones(1, 20, dtype=torch.long))
    with pytest.raises(InputError, match=f"a window of 21 tokens: {kind} has 20 positions"):
        check_window(model.config, 21, kind)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.ones(1, 21, dtype=torch.long))


def test_a_text_that_is_too_long_is_refused_by_the_option_that_says_so():
    rotary, table = config(max_position_embeddings=64), config("opt", max_position_embeddings=64)
    for made in (rotary, table):
        check_positions(made, {"evaluation.length": 64}, "m")
        with pytest.raises(InputError, match="evaluation.length=65: m has 64 positions") as error:
            check_positions(made, {"energy.tokens": 9, "evaluation.length": 65}, "m")
        assert ("model.positions=65" in str(error.value)) == (made is rotary)
        with pytest.raises(InputError, match="behind a prefix of 3: m has 64 positions; give 61"):
            check_positions(made, {"evaluation.length": 62}, "m", prefix=3)


def test_what_is_allowed_replaces_what_a_rotary_embedding_was_made_for_only():
    rotary, table = config(max_position_embeddings=64), config("opt", max_position_embeddings=64)
    check_positions(rotary, {"evaluation.length": 100}, "m", allowed=100)
    with pytest.raises(InputError, match="has 100 positions"):
        check_positions(rotary, {"evaluation.length": 101}, "m", allowed=100)
    with pytest.raises(InputError, match="has 64 positions"):
        check_positions(table, {"evaluation.length": 100}, "m", allowed=100)
    with pytest.raises(InputError, match="has 32 positions"):
        check_positions(table, {"evaluation.length": 64}, "m", allowed=32)


def test_a_token_behind_the_end_of_the_embedding_is_named(tiny_llama, byte_tokenizer):
    rows = vocabulary(tiny_llama.config)
    assert rows == tiny_llama.get_input_embeddings().num_embeddings == 258
    check_tokens(torch.tensor([3, 257]), rows, "a text", byte_tokenizer)
    check_tokens([], rows, "a text", byte_tokenizer)
    for ids in (torch.tensor([3, 257]), [3, 257]):
        with pytest.raises(InputError, match="a text has the token 257 .'</s>'., and .* 257 rows"):
            check_tokens(ids, 257, "a text", byte_tokenizer)
    with pytest.raises(InputError, match="a text has the token 257, and the model's embedding"):
        check_tokens(torch.tensor([3, 257]), 257, "a text")
