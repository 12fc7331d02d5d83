"""An export as a user makes it, and `python -m pipeline generate` on it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import stages
from pipeline.commands import generate
from stages.errors import InputError
from stages.export import Export, card

GATED = ("experiment=null", "coding=gated", "coding.timesteps=4", "export.enabled=true")


@pytest.fixture(scope="module")
def exported(command, tmp_path_factory) -> Path:
    """A folder with the tiny model's export beside its store."""
    cwd = tmp_path_factory.mktemp("exported")
    done = command(cwd, *GATED, "export.folder=spiking")
    assert done.code == 0, done.err
    return cwd


def test_the_folder_has_what_the_stages_measured_and_the_command(exported: Path) -> None:
    card = (exported / "spiking" / "README.md").read_text()
    (result,) = exported.glob("outputs/runs/*/0/result.json")
    row = json.loads(result.read_text())
    assert f"| ppl_wikipedia | {row['ppl_wikipedia']:.5g} |" in card
    assert "| replicates | 1 |" in card
    assert f"| energy_J | {row['energy_J']:.5g} |" in card
    assert "python -m pipeline" in card and "coding.timesteps=4" in card
    assert "export" in row["keys"] and not list((exported / "spiking").glob("*.bin"))


def test_the_folder_is_the_model_that_was_evaluated(exported: Path) -> None:
    from stages.evaluation import negative_log_likelihood

    (result,) = exported.glob("outputs/runs/*/0/result.json")
    measured = json.loads(result.read_text())["evaluation"]["wikipedia"]
    (tokens,) = [
        path
        for path in exported.glob("outputs/store/tokens/*/tokens.safetensors")
        if '"evaluation"' in (path.parent / "manifest.json").read_text()
    ]
    from safetensors.torch import load_file

    ids = load_file(tokens)["ids"][: measured["windows"] * measured["length"]]
    ids = ids.view(measured["windows"], measured["length"]).long()
    model = stages.load(exported / "spiking")
    with torch.no_grad():
        total = sum(negative_log_likelihood(model(row[None]).logits, row[None]) for row in ids)
    mean = float(total) / (ids.numel() - len(ids))
    assert mean == pytest.approx(measured["nll"], rel=1e-6)


def test_again_it_costs_nothing_and_another_export_does_not_overwrite_it(
    exported: Path, command
) -> None:
    again = command(exported, *GATED, "export.folder=spiking")
    assert again.code == 0 and "built" not in again.err
    other = command(exported, *GATED, "coding.grains=3", "export.folder=spiking")
    assert other.code == 1 and "spiking is not empty; give another folder" in other.err


def test_an_export_is_no_model_to_convert(exported: Path, command) -> None:
    done = command(exported, *GATED, "model.path=spiking")
    assert done.code == 1 and "model spiking is a spiking model already" in done.err
    assert "Traceback" not in done.err


def test_there_is_nothing_to_export_of_a_dense_model(exported: Path, command) -> None:
    done = command(exported, "experiment=null", "coding=dense", "export.enabled=true")
    assert done.code == 1 and "there is nothing to export" in done.err


def test_both_texts_and_what_they_cost(exported: Path, capsys) -> None:
    arguments = [f"model_path={exported}/spiking", "prompt=a=b, c", "max_new_tokens=5"]
    assert generate.main(arguments) == 0
    out = capsys.readouterr().out
    rows = table(out)
    assert [row[0] for row in rows.values()] == ["5", "5"]
    assert float(rows["dense"][2]) == 0 < float(rows["spiking"][2])
    assert 0 < float(rows["spiking"][3]) != float(rows["dense"][3])
    assert out.count("a=b, c") == 2


def test_a_tokenizer_of_segments_gives_the_same_text(exported: Path, tmp_path, capsys) -> None:
    from transformers import AutoTokenizer

    folder = Path(shutil.copytree(exported / "spiking", tmp_path / "spiking"))
    file = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_input_names": names}))
    assert "token_type_ids" in AutoTokenizer.from_pretrained(folder)("a spike")
    texts = []
    for path in (exported / "spiking", folder):
        assert generate.main([f"model_path={path}", "prompt=a spike", "max_new_tokens=5"]) == 0
        texts.append(capsys.readouterr().out.partition("45 nm")[2])
    assert texts[0] == texts[1] and texts[0].count("a spike") == 2


def table(out: str) -> dict[str, list[str]]:
    lines = [line.split() for line in out.splitlines() if re.match(r"dense |spiking ", line)]
    return {name: cells for name, *cells in lines}


def test_a_bound_has_no_spikes_and_no_energy(exported: Path, command, capsys) -> None:
    done = command(exported, *GATED, "coding=lloyd_max", "export.folder=bound")
    assert done.code == 0, done.err
    assert generate.main([f"model_path={exported}/bound", "prompt=x", "max_new_tokens=2"]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["spiking"][2:] == ["–", "–"]
    assert rows["dense"][2] == "0" and float(rows["dense"][3]) > 0


def stripped(folder: Path) -> None:
    """Lets the tokenizer drop the blanks around a text."""
    file = folder / "tokenizer.json"
    config = json.loads(file.read_text())
    config["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    file.write_text(json.dumps(config))


def with_a_word_more(folder: Path) -> None:
    """Gives the tokenizer a word that the model has no row for."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(folder)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        (lambda folder: None, "device=nope", "device: no nope here; choose among cpu"),
        (lambda folder: None, "device=cuda:99", "device: no cuda:99 here; choose among cpu"),
        (without_tokenizer, "seed=1", "has no tokenizer; it needs"),
        (
            lambda folder: (folder / "tokenizer.json").write_text("{"),
            "seed=1",
            "the tokenizer of ",
        ),
        (stripped, "prompt=  ", "prompt='  ' has no token; give another text"),
        (lambda folder: None, "max_new_tokens=257", "the model has 256 positions for them"),
        (with_a_word_more, "prompt=x zz", "the prompt has the token 258 ('zz')"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "seed=1",
            "config.json is damaged",
        ),
    ],
)
def test_what_cannot_be_generated_is_one_line(
    exported: Path,
    tmp_path: Path,
    capsys,
    change: Callable[[Path], object],
    more: str,
    message: str,
) -> None:
    folder = Path(shutil.copytree(exported / "spiking", tmp_path / "spiking"))
    change(folder)
    assert generate.main([f"model_path={folder}", "prompt=x", more]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_folder_to_export_to_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=r"export.folder: .*/file is a file; give a folder"):
            Export(True, str(place)).check_free("key")
    Export(True, str(tmp_path / "new" / "below")).check_free("key")


def test_the_card_says_whose_weights_these_are() -> None:
    row = {"model": "m", "label": "gated", "coding": "gated"}
    told = {
        name: card(row | {"transform": name}, 3, "run", {}, "none")
        for name in ("none", "fuse", "rotate")
    }
    assert "weights\nare those of the dense model. Coding" in told["none"]
    assert "with the scales of its norms in the weights behind them. Coding" in told["fuse"]
    assert "weights\nare those of the dense model after its transform, a part of" in told["rotate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prompt=x"], "give model_path=…"),
        (
            ["model_path=x", "prompt=x", "length=3"],
            "got 'length=3': give key=value with model_path",
        ),
        (["model_path=x", "prompt=x", "seed=one"], "seed='one': give a number"),
        (["model_path=x", "prompt="], "give a prompt"),
        (["model_path=absent", "prompt=x"], "absent holds no spiking model"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys) -> None:
    assert generate.main(arguments) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_values_are_taken_as_they_are() -> None:
    found = generate.parsed(["model_path=a", "prompt=x: [1, 2]=3", "temperature=0.5"])
    assert (found.prompt, found.temperature) == ("x: [1, 2]=3", 0.5)
    with pytest.raises(InputError, match="temperature"):
        generate.parsed(["model_path=a", "prompt=x", "temperature=-1"])
