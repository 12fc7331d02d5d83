"""An export as a user makes it, and `python -m pipeline.generate` on it."""

import json
import re
from pathlib import Path

import pytest
import torch

import stages
from pipeline import generate
from stages.errors import InputError

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
    ids = ids.view(measured["windows"], measured["length"])
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


def test_there_is_nothing_to_export_of_a_dense_model(exported: Path, command) -> None:
    done = command(exported, "experiment=null", "coding=dense", "export.enabled=true")
    assert done.code == 1 and "there is nothing to export" in done.err


def test_both_texts_and_what_they_cost(exported: Path, capsys) -> None:
    arguments = [f"model_path={exported}/spiking", "prompt=a=b, c", "max_new_tokens=5"]
    assert generate.main(arguments) == 0
    out = capsys.readouterr().out
    rows = {
        line.split()[0]: line.split()[1:]
        for line in out.splitlines()
        if re.match(r"dense |spiking ", line)
    }
    assert [row[0] for row in rows.values()] == ["5", "5"]
    assert float(rows["dense"][2]) == 0 < float(rows["spiking"][2])
    assert 0 < float(rows["spiking"][3]) != float(rows["dense"][3])
    assert out.count("a=b, c") == 2


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
