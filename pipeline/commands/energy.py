"""Energy of a model from its configuration alone: `python -m pipeline energy model=llama3-8b`.

Takes the overrides of `python -m pipeline`. Nothing is loaded but the model's config: that of the folder
model.path, of model.hub, or the dimensions in its yaml. With rates=FOLDER of a run it is the energy of a
spiking model whose sites have the spikes and the decoding that the run has counted at sites of their role.
With shape=INPUTSxOUTPUTS it is the energy of one linear layer, see `pipeline.commands.layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from pipeline.run.shipped import CONF
from stages.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

RATES, SHAPE = "rates=", "shape="
COSTS = ("macs_G", "acs_G", "energy_J")


def main(overrides: Sequence[str], conf: Path = CONF) -> int:
    """Prints the tables; returns the exit status, 1 for bad input, which is one line."""
    from pipeline.run.errors import exit_status

    if any(each.startswith(SHAPE) for each in overrides):
        from pipeline.commands import layer

        return exit_status(lambda: layer.report(overrides, conf))
    rates = [each.removeprefix(RATES) for each in overrides if each.startswith(RATES)]
    rest = [each for each in overrides if not each.startswith(RATES)]
    return exit_status(lambda: _report(*_configured(rest, conf), rates[-1] if rates else None))


def _configured(overrides: list[str], conf: Path) -> tuple[Any, Any, Any]:
    """The energy stage, the transform and the model that a configuration names."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from pipeline.run import options, shipped
    from pipeline.run.overrides import spelled

    shipped.keyed("profile", conf)
    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        config = compose("config", spelled(overrides, conf))
    options.check(OmegaConf.to_container(config.energy, resolve=True), "energy")
    energy = instantiate(config.energy)
    if energy.tokens is None:
        raise InputError("energy.tokens=null: give the length of the prompt, energy.tokens=512")
    return energy, instantiate(config.transform), instantiate(config.model)


def _report(energy: Any, transform: Any, spec: Any, place: str | None) -> None:
    from pipeline.results.rates import Rates
    from stages.analysis.operations import ELEMENTWISE, ROTATION, operations, untransformed
    from stages.energy import account, by_kind, compared
    from stages.model.limits import check_positions
    from stages.model.loading import meta_model
    from stages.model.sites import find_sites

    config = spec.config()
    check_positions(config, {"energy.tokens": energy.tokens}, spec.name, spec.positions)
    model = meta_model(config)
    transform.declare(model)
    sites = find_sites(model)
    plan, rates = operations(model, sites), None if place is None else Rates.read(place)
    counted = () if rates is None else (rates.counters(sites), rates.coding)
    costs = account(plan, energy, energy.tokens, *counted)
    dense = compared(costs, account(untransformed(plan), energy, energy.tokens), energy)
    print(f"model {spec.name}{'' if rates is None else f', rates of {rates.label}'}\n")
    table = by_kind(costs)
    for (convention, phase), rows in table.groupby(["convention", "phase"], sort=False):
        queries = f"{energy.tokens} tokens" if phase == "prefill" else "1 token"
        context = f"context {energy.tokens}, {energy.main.name}"
        print(f"{convention} convention, {phase}: {queries}, {context}")
        _print_table(rows.drop(columns=["convention", "phase"]))
        _print_profiles(dense[str(convention)][str(phase)], energy, rates is not None)
    paper = table[(table["convention"] == "paper") & (table["phase"] == "prefill")]
    if paper.empty:
        return
    macs = paper.set_index("kind")["macs_G"]
    print("paper convention, prefill")
    print(f"linear_G {macs['linear']:.3f}")
    print(f"attention_G {macs['qk'] + macs['pv']:.3f}")
    print(f"elementwise_G {macs.reindex(ELEMENTWISE).sum():.3f}")
    if ROTATION[0] in macs:
        print(f"rotation_G {macs.reindex(ROTATION).sum():.3f}")
    for cost in COSTS:
        print(f"{cost} {paper[cost].sum():.2f}")


def _print_profiles(costs: Mapping[str, float | None], energy: Any, spiking: bool) -> None:
    """The energy under every hardware profile; of a spiking model against the dense one's."""
    heads = ["profile", "energy_J"] + (["of dense", "break-even"] if spiking else [])
    rows = []
    for name in energy.profiles:
        saved, even = costs[f"saving_{name}"], costs[f"breakeven_{name}"]
        share = _cell(None if saved is None else 1 - saved, "{:.4f}")
        cells = [name, _cell(costs[f"energy_J_{name}"], "{:.6g}"), share, _cell(even, "{:.3f}")]
        rows.append(cells[: len(heads)])
    align = ["left", *["right" for _ in heads[1:]]]
    print(tabulate(rows, heads, "simple", disable_numparse=True, colalign=align), "\n")


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _print_table(rows: pd.DataFrame) -> None:
    import pandas as pd

    total = rows.drop(columns="kind").sum().to_frame().T.assign(kind="total")
    table = pd.concat([rows, total]).astype({"count": int})
    cells = table.assign(**{cost: table[cost].map("{:.6f}".format) for cost in COSTS})
    align = ["left", "right", *["right" for _ in COSTS]]
    print(cells.to_markdown(index=False, tablefmt="simple", disable_numparse=True, colalign=align))
    print()


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline energy`")
