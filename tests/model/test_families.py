"""Families of decoders: each is dense as transformers has it, coded, counted, stepped, and comes back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerBase

import stages
from stages.analysis.operations import PRODUCTS, operations
from stages.checkpoint.folder import save
from stages.codings.gated import Gated
from stages.energy import Energy, account
from stages.errors import InputError
from stages.evaluation import perplexity
from stages.fitted import Conversion
from stages.model.families import TESTED, architecture, known
from stages.model.forward import TUPLES
from stages.model.loading import load_offloaded, meta_model
from stages.model.offload import Offload
from stages.model.sites import ROLES, find_sites
from stages.ports.counters import Counters
from stages.ports.hooks import attached
from stages.ports.patched import patched
from stages.ports.port import DensePort
from stages.transforms.transform import Untouched
from tests.model.families import FAMILIES, difference, made, settings
from tests.ports.products import real_products, watched
from tests.statistics.test_products import (
    test_the_multiplications_are_those_that_a_forward_pass_counts as multiplications_are_counted,
)
from tests.transforms.held import compare

GATED = Gated("gated", 5, 2)
ROOT = Path(__file__).parents[2]
LEARNED = {"gpt2", "gpt_bigcode", "gpt_neo", "opt"}  # positions are rows of a table
# MLPs without a product of two activations.
PLAIN = LEARNED | {"starcoder2", "phi", "nemotron", "gptj", "bloom", "mpt", "falcon"}
Draws = Callable[..., Tensor]


@dataclass(frozen=True)
class Family:
    """A random model of a row of FAMILIES and neurons fitted to it."""

    name: str
    model: Any
    conversion: Conversion

    @property
    def kind(self) -> str:
        return str(self.model.config.model_type)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, convert: Callable[..., Conversion]) -> Family:
    model = made(request.param)
    return Family(request.param, model, convert(model, GATED))


def test_all_roles_are_found_and_every_matrix_is_fed(family: Family) -> None:
    sites = find_sites(family.model)
    absent = {"mlp.act", "mlp.up"} if family.kind in PLAIN else set()
    assert {site.role for site in sites} == set(ROLES) - absent
    fed = {name for site in sites for name in site.consumers}
    assert fed == {
        name
        for name, module in family.model.named_modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
        and not isinstance(module, torch.nn.Embedding)
        and "norm" not in name
    }


def test_the_dense_model_behind_ports_is_that_of_transformers(
    family: Family, tokens: Draws
) -> None:
    assert difference(family.name, family.model, tokens(2, 20)) < 1e-5


def test_the_table_of_families_is_that_of_these_models() -> None:
    lines = (ROOT / "stages" / "README.md").read_text().splitlines()
    start = lines.index(
        "| `model_type` | settings that were tried | largest difference of logits |"
    )
    kinds = sorted({name.partition(" ")[0] for name in FAMILIES})
    for kind, line in zip(kinds, lines[start + 2 :], strict=False):
        row, _, number = line.removesuffix(" |").rpartition(" | ")
        assert row == f"| `{kind}` | {settings(kind)}"
        assert 0 <= float(number) < 1e-5
    assert not lines[start + 2 + len(kinds)].startswith("|")
    assert set(TESTED) == set(kinds) - set(known())


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_change_neither_logits_nor_counters(family: Family, tokens: Draws, side: str) -> None:
    ids, pads = tokens(1, 9), tokens(1, 4, seed=5)
    mask, none = torch.ones_like(ids), torch.zeros_like(pads)
    order = [(pads, none), (ids, mask)] if side == "left" else [(ids, mask), (pads, none)]
    padded, marked = (torch.cat(parts, 1) for parts in zip(*order, strict=True))
    plain, behind = counted(family, ids, mask), counted(family, padded, marked)
    real = slice(4, None) if side == "left" else slice(0, 9)
    assert torch.allclose(behind[0][:, real], plain[0], atol=1e-4)
    assert torch.equal(behind[1], plain[1])


def counted(family: Family, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    counters = Counters(find_sites(family.model), "cpu")
    with torch.no_grad(), patched(family.model, family.conversion, counters):
        logits = family.model(ids, attention_mask=mask).logits
    return logits, counters.sums[:, :4]


def test_every_role_is_seen_in_the_logits_and_no_future_token_is(
    family: Family, tokens: Draws, convert: Callable[..., Conversion]
) -> None:
    model, ids = family.model, tokens(1, 12)
    other = ids.clone()
    other[0, 8] = (other[0, 8] + 1) % 40
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, family.conversion):
            a, b = model(ids).logits, model(other).logits
        for role in {site.role for site in find_sites(model)}:
            with patched(model, convert(model, Gated("gated", 2, 1), (role,))):
                assert not torch.allclose(model(ids).logits, dense, atol=1e-3), role
    assert torch.allclose(a[:, :8], b[:, :8], atol=1e-5)
    assert not torch.allclose(a[:, 8:], b[:, 8:], atol=1e-3)
    assert (a - dense).norm() < 0.5 * dense.norm()


def test_generation_on_a_cache_is_that_without(family: Family, tokens: Draws) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad(), patched(family.model, family.conversion):
        cached = family.model.generate(tokens(2, 7), **options)
        whole = family.model.generate(tokens(2, 7), use_cache=False, **options)
    assert torch.equal(cached, whole)


def test_it_can_be_stepped(family: Family, tokens: Draws) -> None:
    found = compare(family.model, family.conversion, tokens(2, 9))
    assert max(found.far.values()) < 1e-5 and found.logits < 1e-5
    assert torch.equal(*found.counters)
    stepped = patched(family.model, family.conversion, execution="stepped")
    with watched(family.model) as seen, torch.no_grad(), stepped:
        family.model(tokens(2, 9), use_cache=False)
    assert not real_products(seen)


def test_it_comes_back_from_a_folder(family: Family, tokens: Draws, tmp_path: Path) -> None:
    save(family.model, family.conversion, Untouched(), (), tmp_path / "spiking")
    with torch.no_grad():
        with patched(family.model, family.conversion):
            expected = family.model(tokens(2, 11)).logits
        assert torch.equal(stages.load(tmp_path / "spiking")(tokens(2, 11)).logits, expected)


def test_products_are_those_that_pytorch_and_the_ports_count(
    family: Family, tokens: Draws, energy: Energy
) -> None:
    model = family.model
    model.config._experts_implementation = "eager"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(tokens(1, 11), use_cache=False)
    flops = counter.get_flop_counts()
    positions = sum(sum(c.values()) for name, c in flops.items() if name.endswith("rotary_emb"))
    plan = operations(model, find_sites(model))
    cost = account(plan, energy, 11)
    rows = cost[(cost["phase"] == "prefill") & cost["kind"].isin(PRODUCTS)]
    by_convention = rows.groupby("convention")["macs"].sum()
    unread = (
        0  # transformers runs all experts of Llama 4, on zeros where a token is not routed there
    )
    if family.kind == "llama4_text":
        more = model.config.num_local_experts / model.config.num_experts_per_tok - 1
        routed = (rows["convention"] == "paper") & rows["op"].str.contains(
            r"experts:(?:gate_up|down)$"
        )
        unread = more * rows.loc[routed, "macs"].sum()
    assert 2 * (by_convention["paper"] + unread) == sum(flops["Global"].values()) - positions
    sites = perplexity(model, tokens(2, 11), None, 2, "text").counters
    # Both operands of a product of attention count it; the plan has the pairs that a window allows.
    once = sites[~sites["role"].isin(("attn.k", "attn.v"))]
    assert once["macs"].sum() / 2 == pytest.approx(by_convention["causal"])


def test_sizes_of_products_are_those_that_a_pass_counts(family: Family, tokens: Draws) -> None:
    multiplications_are_counted(lambda _: family.model, tokens, family.name)


class Seen(DensePort):
    """Passes values and keeps them."""

    def __call__(self, x: Tensor, real: Tensor | None, fanout: Tensor | int) -> Tensor:
        self.seen = x
        return x


def test_the_dimensions_that_carry_positions_are_those_that_a_shift_moves(
    family: Family, tokens: Draws
) -> None:
    """All positions moved alike change nothing but what is rotated by them."""
    model, ids = family.model, tokens(1, 9)
    sites = find_sites(model)
    rope = {o.layer: o.work.per_token for o in operations(model, sites) if o.kind == "rope"}
    if family.kind in LEARNED:  # a shift moves all of their values
        assert not rope
        return
    ports = {site.name: Seen() for site in sites if site.role in ("attn.q", "attn.k")}
    seen = []
    for start in (0, 40):
        with torch.no_grad(), attached(model, sites, ports):
            model(ids, position_ids=torch.arange(start, start + 9)[None])
        seen.append({site.name: ports[site.name].seen for site in sites if site.name in ports})
    moved = dict.fromkeys(range(model.config.num_hidden_layers), 0)
    for site in sites:
        if site.name in ports:
            here, there = (each[site.name] for each in seen)  # [B, H, S, D]
            each = ((here - there).abs().amax((0, 2)) > 1e-4).sum(-1).tolist()  # [H]
            shared = site.port == "k" and hasattr(model.config, "kv_lora_rank")
            moved[site.layer] += each[0] if shared else sum(each)
    assert {layer: rope.get(layer, 0) for layer in moved} == moved


def test_a_layer_gives_what_runs_of_single_layers_expect(family: Family, tokens: Draws) -> None:
    layers = family.model.get_submodule(architecture(family.model).layers)
    kinds: list[type] = []
    handle = layers[1].register_forward_hook(lambda _, args, out: kinds.append(type(out)))
    with torch.no_grad():
        family.model(tokens(1, 3))
    handle.remove()
    assert kinds == [tuple if type(layers[1]).__name__ in TUPLES else Tensor]


def test_layers_from_disk_compute_what_the_model_in_memory_does(
    family: Family, tokens: Draws, tmp_path: Path, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    family.model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    where = {"dtype": "float32", "device": "cpu", "revision": None}
    if family.kind == "opt":
        with pytest.raises(InputError, match="projects its embeddings"):
            load_offloaded(str(tmp_path), offload=Offload("memory"), **where)
        return
    lazy, _ = load_offloaded(str(tmp_path), offload=Offload("memory"), **where)
    models, ids = (family.model, lazy), tokens(3, 14)
    whole, layered = (perplexity(m, ids, family.conversion, 2, "text") for m in models)
    assert whole.metrics == layered.metrics
    assert whole.counters.equals(layered.counters)


def test_operations_need_no_weights(family: Family) -> None:
    bare = meta_model(family.model.config.to_dict())
    plan = operations(family.model, find_sites(family.model))
    assert operations(bare, find_sites(bare)) == plan


@pytest.mark.parametrize("name", ["opt 2", "nemotron"])
def test_a_relu_leaves_half_of_the_values_and_fewer_spikes_in_front_of_down(
    name: str, tokens: Draws, convert: Callable[..., Conversion]
) -> None:
    """The same random weights with ReLU and with SiLU."""
    option = "activation_function" if name.startswith("opt") else "hidden_act"
    nonzero, spikes = {}, {}
    for activation in ("relu", "silu"):
        model = made(name, **{option: activation})
        coded, dense = (
            perplexity(model, tokens(4, 16), conversion, 4, "text").counters.query(
                "role == 'mlp.down'"
            )
            for conversion in (convert(model, Gated("gated", 6, 2)), None)
        )
        spikes[activation] = coded["spikes"].sum() / coded["values"].sum()
        nonzero[activation] = dense["nonzero"].sum() / dense["values"].sum()
    assert 0.35 < nonzero["relu"] < 0.65 and nonzero["silu"] > 0.99
    assert spikes["relu"] < 0.8 * spikes["silu"]
