"""Every family of decoders: its sites, its exact dense model, a conversion of it, and what that costs."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.analysis.operations import PRODUCTS, operations
from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.energy import Energy, account
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.model import families
from stages.model.loading import load_offloaded, meta_model
from stages.model.offload import Offload
from stages.model.sites import ROLES, find_sites
from stages.ports.counters import Counters
from stages.ports.hooks import attached, stream
from stages.ports.patched import patched
from stages.ports.port import DensePort, SpikingPort
from tests.conftest import FAMILIES

GATED = Gated("gated", 6, 2)
UNGATED = {"opt", "gpt_neox"}  # MLPs without a product of two activations
ROUTED = {"mixtral", "qwen3_moe"}
Converts = Callable[..., Conversion]
Draws = Callable[..., Tensor]


def kind(model: PreTrainedModel) -> str:
    return str(model.config.model_type)


def test_every_family_with_rules_is_tested_here() -> None:
    assert set(families.known()) == set(FAMILIES)


def test_all_roles_of_a_layer_are_found_and_every_matrix_is_fed(any_model: PreTrainedModel) -> None:
    sites = find_sites(any_model)
    absent = {"mlp.act", "mlp.up"} if kind(any_model) in UNGATED else set()
    assert {site.role for site in sites} == set(ROLES) - absent
    fed = {name for site in sites for name in site.consumers}
    matrices = [n for n, p in any_model.named_parameters() if p.dim() > 1 and "emb" not in n]
    assert {name.rpartition(".weight")[0] or name.rpartition(".")[0] for name in matrices} <= fed
    assert len(fed) == len([n for n in matrices if not n.endswith("experts.down_proj")])


def test_the_dense_model_behind_ports_is_the_eager_one(
    any_model: PreTrainedModel, tokens: Draws
) -> None:
    ids = tokens(2, 20)
    sites = find_sites(any_model)
    with torch.no_grad():
        expected = any_model(ids).logits
        with attached(any_model, sites, {site.name: DensePort() for site in sites}):
            found = any_model(ids).logits
        again = any_model(ids).logits
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_neither_logits_nor_counters(
    any_model: PreTrainedModel, tokens: Draws, convert: Converts, side: str
) -> None:
    conversion = convert(any_model, GATED)
    ids, pads = tokens(1, 9), tokens(1, 4, seed=5)
    mask = torch.ones_like(ids)
    none = torch.zeros_like(pads)
    order = [(pads, none), (ids, mask)] if side == "left" else [(ids, mask), (pads, none)]
    padded, marked = (torch.cat(parts, 1) for parts in zip(*order, strict=True))
    plain = counted(any_model, conversion, ids, mask)
    behind = counted(any_model, conversion, padded, marked)
    real = slice(4, None) if side == "left" else slice(0, 9)
    assert torch.allclose(behind[0][:, real], plain[0], atol=1e-4)
    assert torch.equal(behind[1], plain[1])


def counted(
    model: PreTrainedModel, conversion: Conversion, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    counters = Counters(find_sites(model), "cpu")
    places = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}  # as `generate` gives them
    options = {} if kind(model) == "opt" else places  # OPT takes them from the mask
    with torch.no_grad(), patched(model, conversion, counters):
        logits = model(ids, attention_mask=mask, **options).logits
    return logits, counters.sums[:, :4]


def test_a_future_token_changes_no_earlier_logit(
    any_model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    ids = tokens(1, 12)
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % 40
    with torch.no_grad(), patched(any_model, convert(any_model, GATED)):
        a, b = any_model(ids).logits, any_model(other).logits
    assert torch.allclose(a[:, :8], b[:, :8], atol=1e-5)
    assert not torch.allclose(a[:, 8:], b[:, 8:], atol=1e-3)


def test_generation_on_a_cache_is_that_without(
    any_model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tokens(2, 7)
    with torch.no_grad(), patched(any_model, convert(any_model, GATED)):
        cached = any_model.generate(ids, **options)
        whole = any_model.generate(ids, use_cache=False, **options)
    assert torch.equal(cached, whole)


def test_a_conversion_from_capture_to_energy(
    any_model: PreTrainedModel, tokens: Draws, convert: Converts, energy: Energy
) -> None:
    ids = tokens(3, 16, seed=2)
    conversion = convert(any_model, GATED)
    sites = find_sites(any_model)
    assert list(conversion.neurons.sites) == [site.name for site in sites]
    dense, spiking = (perplexity(any_model, ids, c, 2, "text") for c in (None, conversion))
    assert spiking.metrics["nll"] == pytest.approx(dense.metrics["nll"], rel=0.03)
    assert spiking.metrics["nll"] != dense.metrics["nll"]
    plan = operations(any_model, sites)
    cost = account(plan, energy, 16, spiking.counters, conversion.coding)
    rows = cost[(cost["convention"] == "causal") & (cost["phase"] == "prefill")]
    products = rows[rows["kind"].isin(PRODUCTS)].set_index("op")
    assert (products["macs"] == 0).all() and (products["acs"] > 0).all()
    # Every spike that was counted is an addition of the plan: 3 windows against one of it.
    linear = [site.name for site in sites if site.consumers]
    counts = spiking.counters.set_index("site").loc[linear, "acs"]
    assert products.loc[products["kind"] == "linear", "acs"].sum() == pytest.approx(
        counts.sum() / 3
    )


def test_a_coarse_code_in_one_role_only_is_seen_in_the_logits(
    any_model: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    ids = tokens(1, 12)
    with torch.no_grad():
        dense = any_model(ids).logits
        for role in {site.role for site in find_sites(any_model)}:
            with patched(any_model, convert(any_model, Gated("gated", 2, 1), (role,))):
                assert not torch.allclose(any_model(ids).logits, dense, atol=1e-3), role


def test_products_are_those_that_pytorch_counts(
    any_model: PreTrainedModel, tokens: Draws, energy: Energy
) -> None:
    any_model.config._experts_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        any_model(tokens(1, 11), use_cache=False)
    flops = counter.get_flop_counts()
    positions = sum(sum(c.values()) for name, c in flops.items() if name.endswith("rotary_emb"))
    cost = account(operations(any_model, find_sites(any_model)), energy, 11)
    rows = cost[(cost["convention"] == "paper") & (cost["phase"] == "prefill")]
    products = rows[rows["kind"].isin(PRODUCTS)]["macs"].sum()
    assert 2 * products == sum(flops["Global"].values()) - positions


class Watcher(SpikingPort):
    """Tells who is alive when a value comes, and keeps weak references to its code."""

    def __init__(self, coding, params, layer: int, made: list[tuple[int, StorageWeakRef]]) -> None:
        super().__init__(coding, params)
        self.layer, self.made, self.calls = layer, made, 0

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self.calls += 1
        alive = {layer for layer, each in self.made if not each.expired()}
        assert not self.layer or alive <= {self.layer}, "an earlier layer's values are kept"
        value = super().__call__(x, real, fanout)
        self.made += [(self.layer, StorageWeakRef(value.untyped_storage()))]
        return value


@pytest.mark.parametrize("offloaded", [False, True], ids=["in memory", "from disk"])
def test_codes_of_shared_inputs_are_made_once_and_let_go(
    any_model: PreTrainedModel,
    tokens: Draws,
    convert: Converts,
    tmp_path: Path,
    byte_tokenizer: PreTrainedTokenizerBase,
    offloaded: bool,
) -> None:
    model, conversion = any_model, convert(any_model, GATED)
    if offloaded:
        any_model.save_pretrained(tmp_path)
        byte_tokenizer.save_pretrained(tmp_path)
        where = {"dtype": "float32", "device": "cpu", "revision": None}
        model, _ = load_offloaded(str(tmp_path), offload=Offload("memory"), **where)
    neurons = conversion.neurons
    made: list[tuple[int, StorageWeakRef]] = []
    sites = [site for site in find_sites(model) if site.port == "in"]
    ports = {
        site.name: Watcher(
            GATED, site_params(neurons.fit.params, neurons.sites.index(site.name)), site.layer, made
        )
        for site in sites
    }
    gc.disable()  # nothing may wait for it
    try:
        stream(model, tokens(3, 9), 2, ports, "test")
    finally:
        gc.enable()
    assert {port.calls for port in ports.values()} == {2}  # batches
    assert len(made) == 2 * len(sites) and all(each.expired() for _, each in made)


def test_operations_need_no_weights(any_model: PreTrainedModel) -> None:
    config = any_model.config.to_dict()
    made = meta_model(config)
    assert operations(made, find_sites(made)) == operations(any_model, find_sites(any_model))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"do_layer_norm_before": False}, "opt"), ({"use_parallel_residual": False}, "gpt_neox")],
)
def test_norms_behind_and_residuals_in_turn(
    tiny: Callable[..., PreTrainedModel], tokens: Draws, convert: Converts, changes, expected
) -> None:
    model = tiny(expected, **changes)
    test_the_dense_model_behind_ports_is_the_eager_one(model, tokens)
    conversion = convert(model, Gated("gated", 10, 3))
    with torch.no_grad():
        dense = model(tokens(2, 9)).logits
        with patched(model, conversion):
            assert torch.allclose(model(tokens(2, 9)).logits, dense, atol=0.05 * dense.abs().max())
