"""What smoothing learns on a model with planted outlier channels, and that it leaves no trace."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stages.capture import Capture
from stages.codings.gif import Gif
from stages.distribution import Distribution
from stages.errors import InputError
from stages.fits.statistics import Smoothing
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import find_sites
from stages.ports.attention import NAME
from stages.ports.patched import patched
from stages.statistics import measuring
from tests.conftest import FAMILIES
from tests.model.families import made

SMOOTHING = Smoothing(8, 4, 0.02, 0.75, 2, 16, 0.0)
PLANTED = (3, 17)
DRAWS = 16  # what learning adds to one of them depends on the last bits of sums


@pytest.fixture
def outliers(model):
    """The model with two channels of the first norm's output 40 times as large, and the weights that
    read them 40 times as small: the same function."""
    layer = model.model.layers[0]
    for channel in PLANTED:
        layer.input_layernorm.weight.data[channel] *= 40
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            linear.weight.data[:, channel] /= 40
    return model


@pytest.fixture
def ids(tokens) -> Tensor:
    return tokens(4, 16)


def coded(model, ids, smoothing: Smoothing | None) -> Callable[[], Tensor]:
    """Outputs of the first block with every operand coded, [W, S, C]."""
    gif = Gif("gif", 2, 16, 0.0, "unary", smoothing)
    sites = find_sites(model)
    densities = Distribution(atoms=64).run(Capture().run(model, ids, sites, 4))
    found = {s.name: measuring(s)(model, ids, sites, 2) for s in gif.statistics}
    conversion = Conversion(gif, Fitting("atoms", 1, 0).run(densities, gif, found))

    def run() -> Tensor:
        with torch.inference_mode(), patched(model, conversion):
            return model(ids, output_hidden_states=True, use_cache=False).hidden_states[1]

    return run


@pytest.mark.slow
def test_the_block_error_falls_below_the_unsmoothed_one(outliers) -> None:
    errors = []
    for seed in range(DRAWS):
        ids = torch.randint(0, 50, (4, 16), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            right = outliers(ids, output_hidden_states=True).hidden_states[1]
        errors.append(
            [
                float((coded(outliers, ids, s)() - right).square().mean())
                for s in (None, SMOOTHING, replace(SMOOTHING, epochs=1, lr=1e-9))
            ]
        )
    plain, smoothed, once = torch.tensor(errors).mean(0).tolist()
    assert smoothed < 0.5 * plain
    assert smoothed < once  # learning adds to the start


def test_the_loss_falls_and_the_model_is_as_before(outliers, ids) -> None:
    before = {name: value.clone() for name, value in outliers.state_dict().items()}
    sites = find_sites(outliers)
    found = measuring(SMOOTHING)(outliers, ids, sites, 2)
    for name, value in outliers.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in outliers.parameters())
    assert outliers.config._attn_implementation != NAME
    assert found["loss"].shape == (len(sites), 8) and found["loss"][-1].isnan().all()
    # The block behind it has no outliers, and most of its loss is the error that it is given.
    planted = torch.stack([r for s, r in zip(sites, found["loss"], strict=True) if s.layer == 0])
    assert bool((planted[:, -1] < 0.95 * planted[:, 0]).all())
    again = measuring(SMOOTHING)(outliers, ids, sites, 4)
    torch.testing.assert_close(again["scale"], found["scale"])


def test_the_first_loss_is_the_error_of_the_converted_block(outliers, ids) -> None:
    """With a learning rate that moves nothing, the loss of block 1 is measured independently."""
    still = replace(SMOOTHING, epochs=1, lr=1e-12)
    found = measuring(still)(outliers, ids, find_sites(outliers), 2)
    with torch.inference_mode():
        right = outliers(ids, output_hidden_states=True).hidden_states[1]
    error = (coded(outliers, ids, still)() - right).square().mean()
    assert float(found["loss"][0, 0]) == pytest.approx(float(error), rel=1e-3)


OTHERS = {kind: {} for kind in FAMILIES if kind not in ("llama", "mixtral", "qwen3_moe")}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *OTHERS.items(),
        ("opt", {"do_layer_norm_before": False}),
        ("gpt_neox", {"use_parallel_residual": False}),
    ],
)
def test_every_family_without_experts_is_smoothed(tiny, ids, kind, changes) -> None:
    model = tiny(kind, **changes)
    test_the_first_loss_is_the_error_of_the_converted_block(model, ids)
    sites = find_sites(model)
    rows = measuring(replace(SMOOTHING, epochs=1))(model, ids, sites, 2)["scale"]
    moved = {s.role for s, row in zip(sites, rows, strict=True) if bool((row != 1).any())}
    assert moved == {"attn.in", "attn.q", "attn.k", "attn.v", "attn.out", "mlp.in"}


@pytest.mark.parametrize(
    "name", ["gpt2", "gpt_bigcode", "falcon", "bloom 2", "gpt_neo", "stablelm 2"]
)
def test_families_of_other_layouts_are_smoothed(ids, name) -> None:
    """Matrices the other way round, key heads that a config does not name, layers that give tuples."""
    test_the_first_loss_is_the_error_of_the_converted_block(made(name), ids)


def test_scales_are_shared_as_the_products_need_them(outliers, ids) -> None:
    sites = find_sites(outliers)
    rows = measuring(SMOOTHING)(outliers, ids, sites, 2)["scale"]
    own = {s.role: row for s, row in zip(sites, rows, strict=True) if s.layer == 0}
    heads, groups, width = 4, 2, 10
    value, output = own["attn.v"][: groups * width], own["attn.out"][: heads * width]
    key, query = own["attn.k"][: groups * width], own["attn.q"][: heads * width]
    for head in range(heads):
        part, group = slice(head * width, (head + 1) * width), head * groups // heads
        shared = slice(group * width, (group + 1) * width)
        assert torch.equal(output[part], value[shared])
        torch.testing.assert_close(query[part] * key[shared], torch.ones(width))
    assert set(own["attn.in"].topk(2).indices.tolist()) == set(PLANTED)
    assert bool((rows > 0).all()) and bool((own["mlp.act"] == 1).all())
    assert bool((own["attn.k"][groups * width :] == 1).all())


def test_it_is_part_of_the_coding() -> None:
    gif = Gif("gif", 2, 16, 0.0, "unary", SMOOTHING)
    assert gif.statistics == (SMOOTHING,)
    with pytest.raises(InputError, match="coding.smoothing.levels=16 but coding.levels=8"):
        replace(gif, levels=8)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"windows": 0}, {"lr": 0.0}, {"alpha": 2.0}])
def test_settings_that_cannot_be_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(InputError, match="coding.smoothing"):
        replace(SMOOTHING, **change)


def test_too_few_windows_are_refused(model, ids) -> None:
    with pytest.raises(InputError, match="calibration has 2"):
        measuring(SMOOTHING)(model, ids[:2], find_sites(model), 2)
