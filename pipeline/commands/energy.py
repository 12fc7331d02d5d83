"""Energy of a model from its configuration alone: `python -m pipeline energy model=llama3-8b`.

Takes the overrides of `python -m pipeline`. Nothing is loaded but the model's config: that of the folder
model.path, of model.hub, or the dimensions in its yaml. With rates=FOLDER of a run it is the energy of a
spiking model whose sites have the spikes and the decoding that the run has counted at sites of their role.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.shipped import CONF
from stages.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

RATES = "rates="
COSTS = ("macs_G", "acs_G", "energy_J")


def main(overrides: Sequence[str], conf: Path = CONF) -> int:
    """Prints the tables; returns the exit status, 1 for bad input, which is one line."""
    from pipeline.run.errors import exit_status

    rates = [each.removeprefix(RATES) for each in overrides if each.startswith(RATES)]
    rest = [each for each in overrides if not each.startswith(RATES)]
    return exit_status(lambda: _report(*_configured(rest, conf), rates[-1] if rates else None))


def _configured(overrides: list[str], conf: Path) -> tuple[Any, Any, Any]:
    """The energy stage, the transform and the model that a configuration names."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    from pipeline.run.overrides import spelled

    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        config = compose("config", spelled(overrides, conf))
    energy = instantiate(config.energy)
    if energy.tokens is None:
        raise InputError("energy.tokens=null: give the length of the prompt, energy.tokens=512")
    return energy, instantiate(config.transform), instantiate(config.model)


def _report(energy: Any, transform: Any, spec: Any, place: str | None) -> None:
    from pipeline.results.rates import Rates
    from stages.analysis.operations import ELEMENTWISE, ROTATION, operations, untransformed
    from stages.energy import account, by_kind, saving
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
    saved = saving(costs, account(untransformed(plan), energy, energy.tokens))
    print(f"model {spec.name}{'' if rates is None else f', rates of {rates.label}'}\n")
    table = by_kind(costs)
    for (convention, phase), rows in table.groupby(["convention", "phase"], sort=False):
        queries = f"{energy.tokens} tokens" if phase == "prefill" else "1 token"
        context = f"context {energy.tokens}, {energy.profile.name}"
        print(f"{convention} convention, {phase}: {queries}, {context}")
        _print_table(rows.drop(columns=["convention", "phase"]))
        part = saved[str(convention)][str(phase)]
        if rates is not None and part is not None:
            print(f"of the dense model's energy: {1 - part:.4f}\n")
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
