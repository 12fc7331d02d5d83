"""Experts: their function against transformers' own, sums over tokens made by hand, what is refused."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.analysis.operations import operations
from stages.capture import Capture
from stages.codings.base import site_params
from stages.codings.gated import Gated
from stages.codings.gif import Gif
from stages.distribution import Distribution
from stages.energy import Energy, account
from stages.errors import InputError
from stages.evaluation import perplexity
from stages.fits.sensitivity import Sensitivity
from stages.fits.statistics import RunningMaximum, Saliency, Smoothing
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import find_sites
from stages.neurons.spikes import decode
from stages.ports import experts as functions
from stages.ports.counters import Counters
from stages.ports.hooks import attached
from stages.ports.patched import patched
from stages.ports.port import DensePort
from stages.statistics import measuring
from stages.transforms.rotation import rotate
from stages.transforms.search import PrefixSearch

GATED = Gated("gated", 5, 2)
HIDDEN = 24
Makes = Callable[..., PreTrainedModel]
Draws = Callable[..., Tensor]
Converts = Callable[..., Conversion]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(params=["mixtral", "qwen3_moe"])
def mixture(request: pytest.FixtureRequest, tiny: Makes) -> PreTrainedModel:
    return tiny(request.param)


class Scalar:
    """The coded experts of one layer as a loop over tokens, with what each site counts."""

    def __init__(self, path: str, module: nn.Module, conversion: Conversion) -> None:
        self.path, self.module, self.coding = path, module, conversion.coding
        neurons = conversion.neurons
        self.params = {
            site: site_params(neurons.fit.params, index) for index, site in enumerate(neurons.sites)
        }
        self.sums: dict[str, list[float]] = {}

    def code(self, x: Tensor, port: str, expert: int, real: bool) -> Tensor:
        site = f"{self.path}:{port}[{expert}]"
        p = self.params[site]
        spikes = self.coding.encode(x, p)
        sums = self.sums.setdefault(site, [0, 0])
        if real:
            sums[0] += x.numel()
            sums[1] += float(spikes.count.sum())
        return decode(spikes, self.coding.table(p))

    def output(self, hidden: Tensor, index: Tensor, weights: Tensor, real: Tensor) -> Tensor:
        rows = []
        for x, chosen, weight, own in zip(hidden, index.tolist(), weights, real, strict=True):
            total = torch.zeros_like(x)
            for expert, share in zip(chosen, weight, strict=True):
                gate, up = (self.module.gate_up_proj[expert] @ x).chunk(2)
                act = self.code(self.module.act_fn(gate), "act", expert, bool(own))
                product = act * self.code(up, "up", expert, bool(own))
                inner = self.code(product, "down", expert, bool(own))
                total += share * (self.module.down_proj[expert] @ inner)
            rows.append(total)
        return torch.stack(rows)


def recounted(
    model: PreTrainedModel, conversion: Conversion, ids: Tensor, mask: Tensor
) -> tuple[list[float], dict[str, list[float]], Counters]:
    """Largest differences to the scalar experts in each layer, their counts, and the counters."""
    seen: list[tuple[str, nn.Module, tuple[Tensor, ...], Tensor]] = []
    hooks = [
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.append((name, m, args, out))
        )
        for name, module in model.named_modules()
        if name.endswith("mlp.experts")
    ]
    counters = Counters(find_sites(model), "cpu")
    with torch.no_grad():
        with patched(model, conversion, counters):
            model(ids, attention_mask=mask)
        for hook in hooks:
            hook.remove()
        off, sums = [], {}
        for name, module, args, found in seen:
            scalar = Scalar(name, module, conversion)
            expected = scalar.output(*args, mask.flatten().bool())
            off.append(float((found - expected).abs().max() / expected.abs().max()))
            sums |= scalar.sums
    return off, sums, counters


@pytest.mark.parametrize("pads", [0, 4])
def test_experts_are_those_of_a_loop_over_tokens(
    mixture: PreTrainedModel, tokens: Draws, convert: Converts, pads: int
) -> None:
    ids = tokens(3, 9, seed=7)
    mask = torch.ones_like(ids)
    mask[1, 9 - pads :] = 0
    off, sums, counters = recounted(mixture, convert(mixture, GATED), ids, mask)
    assert off and max(off) < 1e-5
    frame = counters.frame(set(sums)).set_index("site")
    for site, (values, spikes) in sums.items():
        fanout = HIDDEN if ":down" in site else 0
        expected = [values, spikes, values * fanout, spikes * fanout]
        assert frame.loc[site, ["values", "spikes", "macs", "acs"]].tolist() == expected, site
    experts = frame[frame.index.str.contains("experts")]
    assert set(experts[experts["values"] > 0].index) == {s for s, n in sums.items() if n[0]}


@pytest.mark.parametrize("mutant", ["other_expert", "dense", "pads"])
def test_the_loop_tells_wrong_experts_apart(
    tiny: Makes, tokens: Draws, convert: Converts, monkeypatch, mutant: str
) -> None:
    model, ids = tiny("mixtral"), tokens(2, 9, seed=7)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    conversion = convert(model, GATED)
    build = functions.ExpertPorts
    if mutant == "other_expert":

        def swapped(act, up, down, state):
            return build([act[1], act[0], *act[2:]], up, down, state)

        monkeypatch.setattr("stages.ports.hooks.ExpertPorts", swapped)
    elif mutant == "dense":

        def uncoded(act, up, down, state):
            return build(*([DensePort()] * len(act) for _ in range(3)), state)

        monkeypatch.setattr("stages.ports.hooks.ExpertPorts", uncoded)
    else:
        ported = functions.ported_experts

        def unmasked(module, *args):
            module.__dict__["expert_ports"].state.now.real = None
            return ported(module, *args)

        functions.ALL_EXPERTS_FUNCTIONS.register(functions.NAME, unmasked)
    try:
        off, sums, counters = recounted(model, conversion, ids, mask)
    finally:
        functions.ALL_EXPERTS_FUNCTIONS.register(functions.NAME, functions.ported_experts)
    values = counters.frame(set(sums)).set_index("site")["values"]
    counts = {site: own for site, (own, _) in sums.items()}
    assert max(off) > 1e-3 or values[list(counts)].to_dict() != counts


def test_the_experts_function_of_the_model_comes_back(
    mixture: PreTrainedModel, tokens: Draws
) -> None:
    mixture.set_experts_implementation("eager")
    modules = dict(mixture.named_modules())
    before = {name: dict(module.__dict__) for name, module in modules.items()}
    with pytest.raises(ZeroDivisionError), attached(mixture, find_sites(mixture), {}):
        assert mixture.config._experts_implementation == functions.NAME
        raise ZeroDivisionError
    assert mixture.config._experts_implementation == "eager"
    assert all(set(modules[name].__dict__) == set(own) for name, own in before.items())


def test_half_precision_experts_agree_with_transformers(tiny: Makes, tokens: Draws) -> None:
    model, ids = tiny("mixtral").bfloat16(), tokens(2, 16)
    sites = find_sites(model)
    with torch.no_grad():
        expected = model(ids).logits.float()
        with attached(model, sites, {site.name: DensePort() for site in sites}):
            found = model(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_codings_of_whole_tokens_run_on_experts(
    mixture: PreTrainedModel, tokens: Draws, convert: Converts
) -> None:
    """A row of an expert is one token, whatever rows are beside it: gif has ranges of each.

    In float64, where no last bit turns one rounding over.
    """
    conversion = convert(mixture, Gif("gif", 6, 16, 0.0, "unary", None))
    mixture.double()
    with torch.no_grad(), patched(mixture, conversion):
        together = mixture(tokens(3, 9)).logits
        alone = torch.cat([mixture(row[None]).logits for row in tokens(3, 9)])
    assert torch.allclose(together, alone, atol=1e-8)


def partly_dense(model: PreTrainedModel, ids: Tensor) -> Conversion:
    """Neurons for all experts but the first of each layer."""
    sites = [s for s in find_sites(model) if s.expert is None or s.expert[1]]
    densities = Distribution(atoms=64).run(Capture().run(model, ids, sites, 4))
    return Conversion(GATED, Fitting("atoms", 1, 0).run(densities, GATED))


def test_experts_left_dense_have_no_gates_and_no_decoding(
    mixture: PreTrainedModel, tokens: Draws, energy: Energy
) -> None:
    conversion = partly_dense(mixture, tokens(6, 16, seed=1))
    counted = perplexity(mixture, tokens(1, 16, seed=2), conversion, 1, "text").counters
    plan = operations(mixture, find_sites(mixture))
    cost = account(plan, energy, 16, counted, GATED)
    rows = cost[(cost["convention"] == "causal") & (cost["phase"] == "prefill")]
    path = "model.layers.1.mlp.experts"
    own = counted[counted["site"].str.startswith(f"{path}:")]
    dense = own["spikes"].isna()
    assert own.loc[dense, "values"].sum() > 0
    for port in ("act", "up", "down"):
        here = own["site"].str.startswith(f"{path}:{port}[") & ~dense
        gate = next(o.name for o in plan if o.kind == "gate" and f"{path}:{port}" in o.name)
        found = rows.loc[rows["op"].eq(gate) & rows["kind"].eq("gate"), "acs"].sum()
        assert found == pytest.approx(own.loc[here, "values"].sum())  # one comparison for 2 grains
    down = rows[rows["op"].eq(f"{path}:down")].set_index("kind")
    coded = own["site"].str.startswith(f"{path}:down[") & ~dense
    routed = own.loc[coded, "values"].sum() / own_inner(mixture)
    assert down.loc["decode_scaling", "macs"] == pytest.approx(routed * HIDDEN * GATED.grains)
    stays = own.loc[own["site"].str.startswith(f"{path}:down[") & dense, "macs"].sum()
    assert down.loc["linear", "macs"] == pytest.approx(stays)


def own_inner(model: PreTrainedModel) -> int:
    return model.model.layers[1].mlp.experts.down_proj.shape[-1]


def test_statistics_that_experts_lack_are_refused_in_one_line(
    mixture: PreTrainedModel, tokens: Draws
) -> None:
    ids, sites = tokens(4, 16), find_sites(mixture)
    with pytest.raises(InputError, match="running maximum is not defined on experts"):
        measuring(RunningMaximum())(mixture, ids, sites, 2)
    with pytest.raises(InputError, match="saliency is defined on linear modules, .*layernorm:out"):
        measuring(Saliency())(mixture, ids, sites, 2)
    with pytest.raises(InputError, match="smoothing is not defined on experts"):
        measuring(Smoothing(1, 1, 0.01, 0.5, 2, 16, 0.0))(mixture, ids, sites, 2)
    with pytest.raises(InputError, match="prefix is not defined on experts"):
        PrefixSearch(outlier=64.0).run(mixture, None, ids, 2)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="rotation is not defined on experts"):
        rotate(mixture, 0)


def test_an_expert_without_sensitivity_is_an_error_not_a_zero(
    mixture: PreTrainedModel, tokens: Draws
) -> None:
    sites, few, many = find_sites(mixture), tokens(1, 1), tokens(6, 16)
    assert measuring(Sensitivity("s", 6, 0))(mixture, many, sites, 1)["count"].sum(-1).min() > 0
    with pytest.raises(InputError, match=r"sensitivity: \d+ sites passed no value in 1 windows"):
        measuring(Sensitivity("s", 1, 0))(mixture, few, sites, 1)


def test_statistics_of_experts_without_values_are_an_error_in_the_fit(
    mixture: PreTrainedModel, tokens: Draws
) -> None:
    ids = tokens(6, 16, seed=1)
    coding = Gated("gated", 5, 2, sensitivity=Sensitivity("s", 6, 0))
    sites = find_sites(mixture)
    statistic = {"s": measuring(Sensitivity("s", 6, 0))(mixture, ids, sites, 1)}
    fitting = Fitting("atoms", 1, 0)
    whole = Distribution(atoms=64).run(Capture().run(mixture, ids, sites, 4))
    assert len(fitting.run(whole, coding, statistic).sites) == len(sites)
    part = [s for s in sites if s.expert is None or s.expert[1]]
    missed = Distribution(atoms=64).run(Capture().run(mixture, ids, part, 4))
    with pytest.raises(InputError, match="calibration missed some experts"):
        fitting.run(missed, coding, statistic)


def test_a_layer_of_experts_adds_a_router_and_a_weighted_sum(tiny: Makes) -> None:
    """Elements a token beside those of a dense MLP: 4 experts, 2 of them chosen, of 40 features."""
    model = tiny("mixtral")
    plan = operations(model, find_sites(model))
    own = [o for o in plan if o.layer == 0 and not o.operands and ".mlp" in o.name]
    assert {o.name.rpartition("mlp")[2]: (o.kind, o.work.per_token) for o in own} == {
        ".experts.act_fn": ("activation", 2 * 40),
        ":product": ("product", 2 * 40),
        ":routing": ("softmax", 4),
        ":weighting": ("product", 2 * HIDDEN),
        ":sum": ("residual", HIDDEN),
        ":residual": ("residual", HIDDEN),
    }
