"""Models in the pipeline: each under its name, and refused before capture for what it cannot read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pipeline.commands import energy, sites
from pipeline.results.rows import apart, distinct, result_frame
from pipeline.run import models, runner
from pipeline.run.settings import Settings
from pipeline.store import provenance
from pipeline.store.code import code_hash
from pipeline.store.store import Store
from stages.errors import InputError

Make = Callable[..., Settings]
UNNAMED = "model.name=null"


@pytest.fixture
def two(tiny_run, tmp_path: Path) -> list[Path]:
    """Two folders of one name, with other weights."""
    folders = [Path(shutil.copytree(tiny_run.model, tmp_path / n / "net")) for n in ("a", "b")]
    weights = load_file(folders[1] / "model.safetensors")
    weights["lm_head.weight"] *= 2
    save_file(weights, folders[1] / "model.safetensors", {"format": "pt"})
    return folders


def test_a_folder_gives_a_run_its_name_and_two_of_one_name_stay_apart(command, two, tmp_path):
    both = ",".join(map(str, two))
    done = command(tmp_path, "-m", "experiment=null", "coding=dense", UNNAMED, f"model.path={both}")
    assert done.code == 0, done.err
    assert [result["model"] for result in done.results] == ["net", "net"]
    assert [result["axes"]["model"] for result in done.results] == ["net", "net"]
    frame = pd.read_csv(done.table)
    prints = [result["fingerprint"] for result in done.results]
    assert list(frame["model"]) == [f"net {each}" for each in prints] and len(set(prints)) == 2
    assert "setting" not in frame  # the name tells it already
    latex = done.table.with_suffix(".tex").read_text()
    assert "net" in latex and "smollm2" not in latex + done.out
    perplexities = [result["ppl_wikipedia"] for result in done.results]
    assert list(frame["ppl_wikipedia"]) == perplexities and len(set(perplexities)) == 2


def test_one_model_keeps_its_name_in_every_row():
    rows = [
        {"model": name, "fingerprint": kind, "axes": {"model": name, "seed": 0}, "coding": coding}
        for name, kind in (("net", "0a"), ("net", "0b"), ("other", "0c"))
        for coding in ("dense", "las")
    ]
    named = apart(rows)
    shown = ["net 0a", "net 0a", "net 0b", "net 0b", "other", "other"]
    assert [row["model"] for row in named] == [row["axes"]["model"] for row in named] == shown
    assert all(row["axes"]["seed"] == 0 for row in named)
    assert [row["model"] for row in rows] == ["net"] * 4 + ["other"] * 2  # as they were
    assert apart(rows[4:]) == rows[4:]


def test_the_same_weights_under_two_names_are_two_rows():
    rows = [{"model": n, "coding": "las", "label": "las T=6", "keys": {"a": "1"}} for n in "xxy"]
    assert [row["model"] for row in distinct(rows)] == ["x", "y"]
    given = [{**row, "run": {"overrides": [f"model.path=/{row['model']}"]}} for row in rows]
    assert "setting" not in result_frame(given)


def test_the_name_is_on_the_card_and_so_in_the_key_of_an_export(settings: Make, tmp_path, tiny_run):
    def keys(*overrides: str) -> dict[str, str]:
        chosen = settings(tmp_path, "export.enabled=true", *overrides)
        return {n: step.key() for n, step in runner.stored(chosen)[0].chain.steps.items()}

    plain, named, labelled = keys(), keys("model.name=other"), keys("row=other")
    for other in (named, labelled):
        assert {n for n in plain if plain[n] != other[n]} == {"export"}
    assert named["export"] != labelled["export"]
    assert keys(UNNAMED)["export"] == keys(f"model.name={tiny_run.model.name}")["export"]


def test_a_changed_tokenizer_is_another_model(settings: Make, two, tmp_path):
    chosen = settings(tmp_path / "store", f"model.path={two[0]}")
    before = runner.stored(chosen)[0].model
    (two[0] / "merges.txt").write_text("#version: 0.2\na b\n")
    after = runner.stored(chosen)[0].model
    assert before.key() != after.key() and before.fingerprint != after.fingerprint


def test_precision_is_in_the_key_and_not_in_the_fingerprint(settings: Make, tmp_path):
    one, half = (
        runner.stored(settings(tmp_path, f"model.dtype={dtype}"))[0].model
        for dtype in ("float32", "bfloat16")
    )
    assert one.key() != half.key() and one.fingerprint == half.fingerprint


def test_an_id_that_is_given_wins_over_the_packaged_file(settings: Make, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "commit", lambda kind, name, revision: f"{kind} {name} {revision}")
    monkeypatch.setattr(models, "configuration", lambda *_: SimpleNamespace(model_type="opt"))
    chosen = settings(tmp_path, "model.path=null", UNNAMED, "model.hub=org/Net-1b")
    assert chosen.model.name == "Net-1b" and chosen.axes["model"] == "Net-1b"
    source = models.model_source(chosen.model, Store(tmp_path), "cpu")
    assert source.source == "org/Net-1b" and source.spec.revision == "model org/Net-1b None"
    assert models._rules(chosen.model) == code_hash(("stages.model.architectures.opt",))
    packaged = settings(tmp_path, "model.path=null", UNNAMED)
    assert packaged.model.name == "smollm2-135m"
    assert models.model_source(packaged.model, Store(tmp_path), "cpu").key() != source.key()
    assert "asset model" in runner.stored(packaged)[0].chain.sources
    assert "asset model" not in runner.stored(chosen)[0].chain.sources


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.length=257"], "evaluation.length=257: tiny has 256 positions"),
        (["calibration.length=300"], "calibration.length=300: tiny has 256 positions"),
        (["energy.tokens=512"], "energy.tokens=512: tiny has 256 positions"),
        (["model.begin=258"], "model.begin=258: tiny has the tokens 0 to 257"),
    ],
)
def test_what_a_model_cannot_read_is_refused_before_it_is_loaded(
    settings: Make, tmp_path, overrides, message, monkeypatch
):
    monkeypatch.setattr(models, "load", None)
    with pytest.raises(InputError, match=message):
        runner.execute(settings(tmp_path, *overrides))
    assert not list(tmp_path.glob("*/*/manifest.json"))


def test_positions_can_be_allowed_and_a_dense_run_needs_none_for_calibration(settings, tmp_path):
    allowed = ("coding=dense", "calibration.length=300", "evaluation.windows=1")
    result, *_ = runner.execute(
        settings(tmp_path, *allowed, "evaluation.length=300", "model.positions=300")
    )
    assert result["evaluation"]["wikipedia"]["length"] == 300


def test_the_tokens_of_a_prefix_take_positions_too(settings: Make, tmp_path):
    behind = ("coding=dense", "transform=rotate_prefix", "evaluation.windows=1")
    with pytest.raises(InputError, match="evaluation.length=256 behind a prefix of 1: tiny has"):
        runner.execute(settings(tmp_path, *behind, "evaluation.length=256"))
    assert list(tmp_path.glob("prefix/*")) and not list(tmp_path.glob("evaluation/*"))


def test_a_word_that_the_embedding_lacks_is_refused_before_capture(settings: Make, two, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(two[0])
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(two[0])
    chosen = (f"model.path={two[0]}", "evaluation.windows=2")
    text = Path(settings(tmp_path).corpus["wikipedia"].path).read_text()
    late, early = tmp_path / "late.jsonl", tmp_path / "early.jsonl"
    late.write_text(text[:-3] + " zz" + text[-3:])  # behind the windows that are read
    early.write_text(re.sub(r'": "', '": "zz ', text, count=1))
    runner.execute(settings(tmp_path / "late", *chosen, f"corpus.wikipedia.path={late}"))
    with pytest.raises(InputError, match=r"evaluation text wikipedia has the token 258 \('zz'\)"):
        runner.execute(settings(tmp_path / "early", *chosen, f"corpus.wikipedia.path={early}"))
    assert not list((tmp_path / "early").glob("capture/*"))


def linears(folder: Path) -> int:
    """The weights of all matrices that a token is multiplied by."""
    tensors = load_file(folder / "model.safetensors")
    return sum(t.numel() for n, t in tensors.items() if t.dim() == 2 and "embed" not in n)


def test_sites_and_energy_are_those_of_the_folder(tiny_run, tmp_path, capsys):
    total = sum(t.numel() for t in load_file(tiny_run.model / "model.safetensors").values())
    place = tmp_path / "shape only"
    place.mkdir()
    shutil.copy(tiny_run.model / "config.json", place)
    assert sites.main([f"model.path='{place}'"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("model shape only\n")
    assert re.search(r"^total +21 ", told, re.MULTILINE)  # 10 in each of 2 layers, and the head
    assert f"{4 * total / 1e9:.6f} GB  weights in float32" in told
    assert "energy.tokens=256" in told  # as many as it has positions
    assert energy.main([f"model.path='{place}'", "energy.tokens=256"]) == 0
    told = capsys.readouterr().out
    row = re.search(r"^linear +\d+ +(\S+)", told, re.MULTILINE)
    assert row is not None
    assert float(row[1]) == pytest.approx(256 * linears(tiny_run.model) / 1e9, abs=1e-6)


@pytest.mark.parametrize("command", [sites.main, energy.main])
def test_a_folder_without_a_config_is_one_line(command, tmp_path, capsys):
    assert command([f"model.path={tmp_path}", "energy.tokens=8"]) == 1
    assert "has no config.json" in capsys.readouterr().err


def test_energy_beyond_the_positions_of_a_model_is_refused(tiny_run, capsys):
    chosen = [f"model.path={tiny_run.model}", "energy.tokens=257"]
    assert energy.main(chosen) == 1
    told = capsys.readouterr()
    assert "energy.tokens=257: model has 256 positions" in told.err and told.out == ""
    assert energy.main([*chosen, "model.positions=257"]) == 0


def test_another_release_of_a_library_is_another_key(settings: Make, tmp_path, monkeypatch):
    def keys(**versions: str) -> dict[str, str]:
        known = provenance.versions() | versions
        with monkeypatch.context() as patch:
            patch.setattr(provenance, "versions", lambda: known)
            run = runner.start(settings(tmp_path))
            return {label: step.key() for label, step in run.chain.steps.items()}

    here = keys(torch="2.13.0+cpu", transformers="5.24.0")
    assert keys(torch="2.13.1", transformers="5.24.3", pandas="9.0") == here
    for other in ({"torch": "2.14.0"}, {"transformers": "5.25.0"}):
        changed = keys(**{"torch": "2.13.0", "transformers": "5.24.0"} | other)
        assert {label for label in here if changed[label] != here[label]} == set(here)
