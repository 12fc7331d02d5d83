"""`python -m pipeline sites`: sites and memory from a configuration alone; one line for bad input."""

import re

import pytest

from pipeline.commands.sites import main
from stages.model import loading
from tests.model.families import made

LARGE = ["model=llama2-70b"]


def sizes(text: str) -> dict[str, float]:
    found = re.findall(r"^ *([\d.]+) GB  (.+)$", text, re.MULTILINE)
    return {name: float(size) for size, name in found}


def test_a_model_of_70_billion_weights_is_counted_without_one_of_them(capsys, monkeypatch):
    made, meta_model = [], loading.meta_model
    monkeypatch.setattr(loading, "meta_model", lambda c: made.append(meta_model(c)) or made[-1])
    assert main(LARGE) == 0
    assert all(weight.is_meta for weight in made[0].state_dict().values())
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()}
    assert rows["mlp.down"][:3] == ["80", str(80 * 28672), "0"]
    assert rows["attn.probs"][:3] == ["80", "0", str(80 * 64)]
    assert rows["total"][0] == "801"
    found = sizes(output)
    assert found["weights in bfloat16"] == pytest.approx(2 * 68.976648192, abs=1e-5)
    sketches = found["sketches of all sites while they are captured"]
    assert sketches == pytest.approx(float(rows["total"][3]) / 1000, abs=1e-4)
    assert found["those of one layer, with runtime=offload"] < sketches / 50
    assert found["neurons of gated, n=2, at every site"] == pytest.approx(801 * 8 / 1e9, abs=1e-6)
    assert "python -m pipeline energy model=llama2-70b" in output


def test_no_experiment_and_a_text_of_ones_own_are_those_of_a_run(capsys):
    small = ["model=smollm2-135m", "model.dims.num_hidden_layers=2"]
    assert main([*small, "experiment=null"]) == 0
    alone = capsys.readouterr().out
    assert main([*small, "corpus.mine.path=x.txt", "evaluation.corpora=[mine]"]) == 0
    assert sizes(capsys.readouterr().out) == sizes(alone)


def test_roles_precision_and_coding_are_those_of_the_configuration(capsys):
    small = ["model=smollm2-135m", "model.dims.num_hidden_layers=2"]
    assert main([*small, "sites=paper", "coding=dense"]) == 0
    paper = capsys.readouterr().out
    assert "mlp.up" not in paper and "neurons" not in paper
    assert main([*small, "capture.mantissa_bits=4", "coding=gated_budget"]) == 0
    coarse = capsys.readouterr().out
    assert "neurons of gated_budget: known once its statistics are measured" in coarse
    name = "sketches of all sites while they are captured"
    assert sizes(coarse)[name] < sizes(paper)[name] / 4


def test_inferred_roles_are_shown(capsys, tmp_path):
    made("qwen2_moe").config.save_pretrained(tmp_path)
    assert main([f"model.path={tmp_path}"]) == 0
    output = capsys.readouterr().out
    assert "roles in model.layers.*, inferred from the names of modules" in output
    for line in (
        r"attn.in +self_attn.q_proj:in +q_proj k_proj v_proj",
        r"mlp.in +experts +mlp:in +gate experts shared_expert.gate_proj",
        r"mlp.down +shared expert +mlp.shared_expert.down_proj:in",
        r"head.in +outside +lm_head:in +lm_head",
    ):
        assert re.search(f"^{line}", output, re.MULTILINE), line
    assert max(map(len, output.partition("values_a_token")[0].splitlines())) <= 120
    assert main(LARGE) == 0
    assert "of stages.model.architectures.llama" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model=nix", "llama2-7b"),
        ("model.dims=null", "model.dims"),
        ("sites.roles=[nix]", "attn.in"),
        ("capture.mantissa_bits=0", "capture.mantissa_bits=0"),
        ("coding.timestep=3", "coding.timestep"),
        ("calibration.windows=many", "calibration.windows=many: give a whole number"),
    ],
)
def test_bad_input_is_one_line(capsys, override, says):
    assert main([override]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and says in captured.err
