"""Memory of a conversion from dimensions: against published sizes, and what is really allocated."""

import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from stages.analysis.footprint import _filled, parameter_bytes, resident, site_plan
from stages.capture import Capture, SketchPort
from stages.codings.gated import Gated
from stages.codings.lloyd_max import LloydMax
from stages.model.loading import meta_model
from stages.model.sites import Site, find_sites
from stages.ports.hooks import stream
from stages.sketch import Accumulator, Grid

CONF = Path(__file__).parents[2] / "conf"
LLAMA2_70B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}


def test_llama2_70b_is_planned_in_seconds_without_a_weight():
    start = time.monotonic()
    model = meta_model(LLAMA2_70B)
    sites = find_sites(model)
    frame = site_plan(model, sites, 7, torch.bfloat16, 8192)
    sizes = resident(model, torch.bfloat16)
    assert time.monotonic() - start < 30  # about 2 on an idle core
    assert sizes.weights == 2 * 68_976_648_192  # of the model card: 69 billion parameters
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672 + 2 * 8192
    assert (sizes.layer, sizes.outside) == (2 * layer, 2 * (2 * 32000 * 8192 + 8192))
    assert len(sites) == 80 * 10 + 1
    values = frame.groupby("role")["values"].sum()
    assert values["attn.q"] == values["mlp.in"] == 80 * 8192
    assert values["attn.k"] == 80 * 8 * 128 and values["head.in"] == 8192
    assert values["mlp.down"] == 80 * 28672
    assert frame.groupby("role")["pairs"].sum()["attn.probs"] == 80 * 64


@pytest.mark.parametrize("bits", [5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sketch_is_as_large_as_the_one_that_capture_makes(bits, dtype, model, tokens):
    model = model.to(dtype)
    sites = find_sites(model)
    exact = dtype == torch.bfloat16 and bits >= 7
    ports = {s.name: SketchPort(Grid(bits), exact, s) for s in sites}
    stream(model, tokens(2, 9), 2, ports, "capture")
    planned = site_plan(model, sites, bits, dtype, 18).set_index("site")["sketch"]
    for site in sites:
        made = vars(ports[site.name].accumulator).values()
        size = sum(t.nbytes for t in made if isinstance(t, torch.Tensor))
        assert planned[site.name] == size, site


def test_values_a_token_are_those_that_pass_the_site(model, tokens):
    sites = find_sites(model)
    frame = site_plan(model, sites, 7, torch.float32, 18).set_index("site")
    counted = Capture().run(model, tokens(2, 9), sites, 2)
    totals = counted.signed_moments()[:, 0]
    for site, total in zip(sites, totals.tolist(), strict=True):
        row = frame.loc[site.name]
        assert total == row["values"] * 2 * 9 + row["pairs"] * 2 * (9 * 10 // 2)


def test_the_sketches_of_thousands_of_experts_take_no_gigabyte():
    spec = OmegaConf.load(CONF / "model" / "qwen3-30b-a3b.yaml")
    model = meta_model(OmegaConf.to_container(spec.dims))
    sites = find_sites(model)
    frame = site_plan(model, sites, 7, torch.bfloat16, 8192)
    assert (
        resident(model, torch.bfloat16).weights == 2 * 30_532_122_624
    )  # of the model card: 30.5 B
    experts = frame[frame["site"].str.contains("experts")]
    assert len(experts) == 48 * 128 * 3 and len(frame) == len(experts) + 48 * 7 + 1
    assert experts["values"].sum() == 48 * 3 * 8 * 768
    assert frame["sketch"].sum() < 1e9


def test_an_experts_sketch_is_as_large_as_planned_for_normal_values():
    values = torch.randn(4 * 24_576, generator=torch.Generator().manual_seed(0)).bfloat16()
    site = Site("layer.experts:act[0]", "mlp.act", 0)
    port = SketchPort(Grid(7), True, site)
    for part in values.view(4, -1, 768):
        port(part, None, 0)
    made = port.accumulator
    size = made.count.nbytes + made.filled.nbytes
    assert size == pytest.approx(8 * _filled(Grid(7), values.numel()), rel=0.02)
    whole = Accumulator(Grid(7), 0, True, torch.device("cpu"))
    whole.add(values)
    assert all(torch.equal(a, b) for a, b in zip(made.bins(), whole.bins(), strict=True))
    made.finish()
    assert all(torch.equal(a, b) for a, b in zip(made.bins(), whole.bins(), strict=True))


def test_tied_weights_are_counted_once(tiny):
    model = tiny()
    loose = resident(model, torch.float32)
    assert loose.weights == 4 * sum(p.numel() for p in model.parameters())
    model.lm_head.weight = model.model.embed_tokens.weight
    tied = resident(model, torch.float32)
    assert loose.weights - tied.weights == loose.outside - tied.outside == 4 * 50 * 24
    assert tied.layer == loose.layer


@pytest.mark.parametrize("coding", [Gated("gated", 6, 3), LloydMax("lloyd_max", 3)])
def test_neurons_take_what_a_fit_of_the_model_takes_a_site(coding, model, convert):
    fitted = convert(model, coding).neurons
    real = sum(t.nbytes for t in fitted.fit.params.values())
    assert parameter_bytes(coding) * len(fitted.sites) == real


def test_neurons_that_need_statistics_are_not_guessed():
    from stages.fits.sensitivity import Sensitivity

    assert parameter_bytes(Gated("gated", 6, 2, sensitivity=Sensitivity("s", 1, 0))) is None
