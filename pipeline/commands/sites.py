"""Sites of a model and the memory they take: `python -m pipeline sites model=llama2-70b`.

Takes the overrides of `python -m pipeline`, of which model, sites, capture and coding count.
Nothing is loaded but the model's config: that of the folder model.path, of model.hub, or the dimensions in
its yaml. `python -m pipeline energy` gives the joules.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run.shipped import CONF

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from stages.model.spec import ModelSpec


def main(overrides: Sequence[str], conf: Path = CONF) -> int:
    """Prints the table; returns the exit status, 1 for bad input, which is one line."""
    from pipeline.run.errors import exit_status

    model = [override for override in overrides if re.match(r"model[.=]", override)]
    return exit_status(lambda: _report(model, *_configured(list(overrides), conf)))


def _configured(overrides: list[str], conf: Path) -> tuple[Any, ...]:
    """The model, the roles, the capture stage, the tokens it sees and the coding that a
    configuration names."""
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from pipeline.run import options
    from pipeline.run.overrides import spelled

    with initialize_config_dir(str(conf.resolve()), version_base="1.3"):
        config = compose("config", ["experiment=none", *spelled(overrides, conf)])
    options.check(OmegaConf.to_container(config.calibration, resolve=True), "calibration")
    capture, coding = instantiate(config.capture), instantiate(config.coding)
    tokens = config.calibration.windows * config.calibration.length
    return instantiate(config.model), instantiate(config.sites), capture, tokens, coding


def _report(
    overrides: list[str], spec: ModelSpec, selection: Any, capture: Any, tokens: int, coding: Any
) -> None:
    import torch

    from stages.analysis.footprint import parameter_bytes, resident, site_plan
    from stages.model.limits import positions
    from stages.model.loading import meta_model
    from stages.model.sites import find_sites, select

    config = spec.config()
    model = meta_model(config)
    sites = select(find_sites(model), selection)
    dtype = getattr(torch, spec.dtype)
    frame = site_plan(model, sites, capture.mantissa_bits, dtype, tokens)
    print(f"model {spec.name}\n")
    _print_rules(model, selection.roles)
    _print_roles(frame)
    weights, sketch = resident(model, dtype), frame["sketch"]
    memory = {
        f"weights in {spec.dtype}": weights.weights,
        "the largest decoder layer, which runtime=offload keeps alone": weights.layer,
        "embedding, final norm and head": weights.outside,
        "sketches of all sites while they are captured": sketch.sum(),
        "those of one layer, with runtime=offload": sketch.groupby(frame["layer"]).sum().max(),
    }
    if coding.converts:
        one = parameter_bytes(coding)
        if one is None:
            print(f"neurons of {coding.name}: known once its statistics are measured\n")
        else:
            memory[f"neurons of {coding.name}, n={coding.grains}, at every site"] = one * len(sites)
    for name, size in memory.items():
        print(f"{size / 1e9:11.6f} GB  {name}")
    length = min(512, spec.positions or positions(config) or 512)
    energy = ["python", "-m", "pipeline", "energy", *overrides, f"energy.tokens={length}"]
    print(f"\nenergy: {shlex.join(energy)}")


def _print_rules(model: PreTrainedModel, roles: Sequence[str]) -> None:
    """Where the chosen roles live in a decoder layer, and which modules read them."""
    import pandas as pd

    from stages.model.families import architecture, module_name

    rules = architecture(model)
    written = module_name(model.config.model_type)
    source = f"of {written}" if written else "inferred from the names of modules"
    print(f"roles in {rules.layers}.*, {source}\n")
    kinds = [("", rules.rules), ("experts", rules.experts), ("shared expert", rules.shared)]
    lines = [(kind, role, rule) for kind, each in kinds for role, rule in each.items()]
    lines += [("outside", "head.in", rule) for rule in (*rules.outside, rules.head)]
    rows = [
        (role, kind, rule.port, " ".join(name.partition(".")[2] or name for name in rule.consumers))
        for kind, role, rule in lines
        if role in roles
    ]
    shown = pd.DataFrame(rows, columns=["role", "layers with", "operand", "read by"])
    widths = [None, None, None, 60]
    print(shown.to_markdown(index=False, tablefmt="simple", maxcolwidths=widths), end="\n\n")


def _print_roles(frame: pd.DataFrame) -> None:
    table = frame.groupby("role", sort=False).agg(
        sites=("site", "count"),
        values_a_token=("values", "sum"),
        values_a_pair=("pairs", "sum"),
        sketch_MB=("sketch", "sum"),
    )
    table.loc["total"] = table.sum()
    counts = table.drop(columns="sketch_MB").astype(int).astype(str)
    cells = counts.assign(sketch_MB=(table["sketch_MB"] / 1e6).map("{:.1f}".format)).reset_index()
    align = ["left", *["right"] * (len(cells.columns) - 1)]
    print(cells.to_markdown(index=False, tablefmt="simple", disable_numparse=True, colalign=align))
    print()


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline sites`")
