"""`python -m pipeline simulate` on an exported model and a stand-in for the simulator."""

import json
import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import stages
from pipeline.commands import simulate
from stages.errors import InputError
from tests.analysis.simulator import VERSION, SpikingChip, install

SITE = "model.layers.0.mlp.down_proj:in"
TEXT = "a spike is sent, and then another one; " * 5


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """Exports of a random model in codes of one neuron a value and of two."""
    import torch
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("simulated")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=258, max_position_embeddings=64, initializer_range=0.5, **size, **heads
    )
    codings = {
        "las": stages.Las("las", 4, "half_step"),
        "digit": stages.SignedDigit("signed_digit", 4, 1),
        "gated": stages.Gated("gated", 4, 2),
    }
    for name, coding in codings.items():
        model = LlamaForCausalLM(config).eval()
        stages.convert(model, TEXT, coding, tokenizer=byte_tokenizer, length=32)
        stages.save(model, folder / name, byte_tokenizer)
    return folder


@pytest.fixture
def chip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[SpikingChip]:
    return install(monkeypatch, tmp_path, max_neurons_supported=100)


@pytest.mark.parametrize("coding", ["las", "digit"])
def test_a_layer_is_run_and_its_numbers_stand_in_a_file(
    chip: type[SpikingChip], folders: Path, tmp_path: Path, capsys, coding: str
) -> None:
    file = tmp_path / "out.json"
    arguments = [str(folders / coding), f"site={SITE}", "tokens=3", f"text={TEXT}"]
    assert simulate.main([*arguments, f"out={file}"]) == 0
    out = capsys.readouterr().out
    assert "potentials equal the integer sums: 96 of 96 (3 x 32)" in out
    assert f"{SITE} -> model.layers.0.mlp.down_proj\n48 x 32, two groups" in out
    assert "rounded to the nearest, ties to even" in out and f"SANA-FE {VERSION}" in out
    assert "the four counts of the loihi profile: +0.000% with the updates" in out
    assert max(map(len, out.splitlines())) <= 120
    row = json.loads(file.read_text())
    assert (row["potentials_equal"], row["potentials"], row["tokens"]) == (96, 96, 3)
    assert row["counts"]["deliveries"] == row["spikes"] * 32 > 0
    assert row["spikes_per_value"] == pytest.approx(row["spikes"] / (3 * 48))
    costs = row["energy"]
    parts = [costs[name]["chip_uJ"] for name in ("synapse", "dendrite", "soma", "messages", "hops")]
    assert costs["total"]["chip_uJ"] == pytest.approx(sum(parts))
    assert costs["total"]["chip_uJ"] == pytest.approx(costs["total"]["profile_uJ"], rel=1e-9)
    assert costs["hops"]["profile_uJ"] is None
    missing = 3 * 32 * 4 - row["counts"]["updates"]  # of T updates of every output and token
    most = costs["total"]["profile_uJ"] + missing * 21.6e-6
    assert 0 <= missing < 3 * 32 * 4 and row["profile_most_uJ"] == pytest.approx(most)
    assert [step["step"] for step in row["steps"]] == [1, 2, 3, 4, 5]
    assert sum(step["messages"] for step in row["steps"]) == row["counts"]["messages"]
    milliseconds = float(re.search(r"^time ([\d.]+) ms", out, re.MULTILINE)[1])
    assert sum(s["time_us"] for s in row["steps"]) / 1e3 == pytest.approx(milliseconds, abs=1e-3)


def test_a_chip_that_computes_something_else_is_an_error(
    chip: type[SpikingChip], folders: Path, capsys
) -> None:
    chip.doubles = False
    arguments = [str(folders / "las"), f"site={SITE}", f"text={TEXT}", "out=-"]
    assert simulate.main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    equal = int(
        re.match(r"potentials equal the integer sums: (\d+) of 128 \(4 x 32\)", lines[-2])[1]
    )
    assert equal < 128 and json.loads(lines[-1])["potentials_equal"] == equal


def test_which_of_several_layers_it_was_is_said(
    chip: type[SpikingChip], folders: Path, capsys
) -> None:
    arguments = [str(folders / "las"), "site=model.layers.0.input_layernorm:out", "tokens=2"]
    attention = "model.layers.0.self_attn"
    assert simulate.main(arguments) == 0
    assert f"-> {attention}.q_proj, and not k_proj, v_proj (consumer=)" in capsys.readouterr().out
    assert simulate.main([*arguments, "consumer=v_proj"]) == 0
    assert f"-> {attention}.v_proj, and not q_proj, k_proj (consumer=)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["las"], "give site=…"),
        (["las", f"site={SITE}", "tokens=0"], "give tokens of 1 or more and a text; got tokens=0"),
        (["las", f"site={SITE}", "text="], "got tokens=4 text=''"),
        (["las", f"site={SITE}", "tokens=x"], "tokens='x': give a number"),
        (["las", f"site={SITE}", "tokens=3", "text=ab"], "text='ab' has 2 tokens; give a longer"),
        (["las", f"site={SITE}", "tokens=65", f"text={TEXT}"], "has 64 positions"),
        (["las", f"site={SITE}", "token=3"], "got 'token=3': did you mean tokens?"),
        (["las", f"site={SITE}", "chip=truenorth"], "chip=truenorth: give loihi, or the FILE.yaml"),
        (["las", f"site={SITE}", "chip=no.yaml"], "chip=no.yaml: there is no such file"),
        (["las", f"site={SITE}", "out=no/x.json"], "out=no/x.json: there is no folder no; make it"),
        (["las", f"site={SITE}", "dtype=int8"], "dtype=int8: choose float32"),
        (["las", f"site={SITE}", "consumer=up_proj"], "is read by down_proj; choose"),
        (["las", "site=model.layers.0.mlp.down_poj:in"], "did you mean model.layers.0.mlp.down"),
        (["las", "site=model.layers.0.self_attn:q"], "enters no linear layer of its own"),
        (["gated", f"site={SITE}"], "coding=gated has 2 neurons or floors a value here"),
        (["absent", f"site={SITE}"], "absent holds no spiking model"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(
    chip: type[SpikingChip], folders: Path, capsys, more: list[str], message: str
) -> None:
    assert simulate.main([str(folders / more[0]), *more[1:]]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_without_the_simulator_no_model_is_loaded(
    folders: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "sanafe", None)
    monkeypatch.setattr(stages, "load", None)
    assert simulate.main([str(folders / "las"), f"site={SITE}"]) == 1
    assert "python -m pip install sanafe==2.2.9" in capsys.readouterr().err


def test_a_folder_needs_no_key_and_a_text_keeps_its_signs() -> None:
    keyed = simulate.parsed(["model_path=a", "site=b:in", "text=x: y=3"])
    assert simulate.parsed(["a", "site=b:in", "text=x: y=3"]) == keyed
    with pytest.raises(InputError, match="give model_path=… and site=…"):
        simulate.parsed([])
