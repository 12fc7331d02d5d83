"""`python -m pipeline energy`: totals from a configuration alone, and one line for bad input."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from pipeline.commands import cli
from pipeline.commands.energy import main

ROOT = Path(__file__).parents[3]
CONFIG = (
    "defaults: [_self_, {model: smollm2-135m}, {transform: none}, {energy: default}, "
    "{profile: [45nm, lemaire2022]}]\n"
)


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    for group in ("model", "transform", "energy", "profile"):
        shutil.copytree(ROOT / "conf" / group, tmp_path / group)
    (tmp_path / "config.yaml").write_text(CONFIG)
    return tmp_path


def totals(text: str) -> dict[str, float]:
    words = [line.split() for line in text.splitlines()]
    return {w[0]: float(w[1]) for w in words if len(w) == 2 and w[0].endswith(("_G", "_J"))}


def test_prints_the_published_totals_of_llama3_8b(conf, capsys):
    assert main(["model=llama3-8b", "energy.tokens=512"], conf) == 0
    output = capsys.readouterr().out
    assert {"macs_G 3912.08", "acs_G 0.17", "energy_J 18.00"} <= set(output.splitlines())
    found = totals(output)
    assert found["linear_G"] == 3842.385
    assert found["attention_G"] == 68.719
    assert found["elementwise_G"] == pytest.approx(0.975, abs=0.01)


def test_prints_every_kind_in_both_conventions_and_phases(conf, capsys):
    assert main(["energy.tokens=64"], conf) == 0
    output = capsys.readouterr().out
    tables = output.split(" convention, ")[1:5]
    starts = ["prefill: 64 tokens", "decode: 1 token"] * 2
    for table, start in zip(tables, starts, strict=True):
        assert table.startswith(start)
        rows = [line.split() for line in table.splitlines() if len(line.split()) == 5]
        costs = {row[0]: [float(cell) for cell in row[2:]] for row in rows if row[1].isdigit()}
        total = costs.pop("total")
        assert {"linear", "qk", "pv", "norm", "rope", "softmax", "residual"} <= set(costs)
        assert [sum(column) for column in zip(*costs.values(), strict=True)] == pytest.approx(
            total, abs=1e-5
        )


def test_a_rotation_adds_its_operations(conf, capsys):
    options = ["model=llama3-8b", "energy.tokens=512"]
    main(options, conf)
    before = totals(capsys.readouterr().out)
    assert main([*options, "transform=rotate"], conf) == 0
    after = totals(capsys.readouterr().out)
    # 14336 = 2048 x 7 in 32 layers: 7 products a value, and log2(2048) = 11 additions.
    assert after["rotation_G"] == pytest.approx(512 * 32 * 14336 * 7 / 1e9, abs=1e-3)
    assert after["macs_G"] - before["macs_G"] == pytest.approx(after["rotation_G"], abs=0.01)
    added = 512 * 32 * 14336 * 11 / 1e9
    assert after["acs_G"] - before["acs_G"] == pytest.approx(added, abs=0.01)


@pytest.mark.parametrize("kind", ["opt", "gpt_neox"])  # one without RoPE, both without gates
@pytest.mark.parametrize("group", ["experiment=null", "experiment=codings", "rows=gated2"])
def test_families_without_gates_and_choices_of_rows(kind, group, tmp_path, capsys):
    shape = {"hidden_size": 640, "num_hidden_layers": 3, "vocab_size": 5000}
    shape |= {"num_attention_heads": 10, "ffn_dim" if kind == "opt" else "intermediate_size": 1280}
    shape |= {"word_embed_proj_dim": 640} if kind == "opt" else {}
    AutoConfig.for_model(kind, **shape).save_pretrained(tmp_path)
    assert main([f"model.path={tmp_path}", "energy.tokens=512", group]) == 0
    found = totals(capsys.readouterr().out)
    weights = 3 * (4 * 640 * 640 + 2 * 640 * 1280) + 5000 * 640
    assert found["linear_G"] == pytest.approx(512 * weights / 1e9, abs=1e-3)
    assert found["attention_G"] == pytest.approx(3 * 2 * 512 * 512 * 640 / 1e9, abs=1e-3)
    assert 0 < found["elementwise_G"] < found["attention_G"]


def test_another_hardware_profile_changes_only_the_energy(conf, capsys):
    main(["energy.tokens=64"], conf)
    before = totals(capsys.readouterr().out)
    main(["energy.tokens=64", "energy.profile.nm45.mac=46"], conf)
    after = totals(capsys.readouterr().out)
    assert after["macs_G"] == before["macs_G"]
    assert after["energy_J"] == pytest.approx(10 * before["energy_J"], abs=0.06)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("energy.token=512", "energy.token"),
        ("+energy.foo=1", "foo"),
        ("model=nix", "llama3-8b"),
        ("energy.tokens=0", "energy.tokens=0"),
        ("energy.tokens=null", "energy.tokens=512"),
        ("energy.conventions.paper.attention=half", "full or causal"),
        ("model.dims=null", "model.dims"),
        ("transform=rotate_prefix", "transform=rotate differs"),
        ("energy.tokens=[", "energy.tokens=["),
    ],
)
def test_bad_input_is_one_line(conf, capsys, override, says):
    assert main(["energy.tokens=8", override], conf) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert says in captured.err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("mine:", "nm45:", "conf/profile/mine.yaml: nm45 is the key of 45nm.yaml too"),
        ("mine:", "other: {}\nmine:", "conf/profile/mine.yaml: give one key"),
        ("# @package energy.profile", "", "give the line # @package energy.profile"),
        ("mac: 4.6", "mac: [4.6]: 3", "conf/profile/mine.yaml cannot be read: mapping values"),
        ("  ac: 0.9", "", "mine.ac is not given"),
        (
            "Operations",
            "Operation",
            "mine._target_=stages.profiles.operations.Operation: there is no",
        ),
        ("unit: pJ", "unit: J", "profile mine: unit='J': choose fJ, pJ, nJ"),
    ],
)
def test_a_bad_profile_is_one_line(conf, capsys, old, new, says):
    text = (conf / "profile" / "45nm.yaml").read_text()
    text = text.replace("nm45:", "mine:").replace("name: 45nm", "name: mine")
    assert old in text
    (conf / "profile" / "mine.yaml").write_text(text.replace(old, new, 1))
    layer = ["shape=8x8", "profile=mine"]
    for arguments in (layer, ["energy.tokens=8", "profile=[45nm,mine]"]):
        assert main(arguments, conf) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert captured.err.startswith("error: ") and says in captured.err


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "conf/config.yaml").exists(), reason="conf/config.yaml is absent")
def test_command_line_needs_no_hub(tmp_path, capsys):
    command = [sys.executable, "-m", "pipeline", "energy", "model=llama3-8b", "energy.tokens=512"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    options = {"cwd": ROOT, "env": offline, "capture_output": True, "text": True}
    run = subprocess.run(command, check=True, **options)
    assert "energy_J 18.00" in run.stdout.splitlines()
    assert cli.main([*command[3:-1], "energy.tokenz=1"]) == 1
    told = capsys.readouterr()
    assert (told.out, told.err.count("\n")) == ("", 1)
