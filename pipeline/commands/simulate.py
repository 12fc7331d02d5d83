"""One layer on a simulated chip: `python -m pipeline simulate model_path=FOLDER site=NAME`.

FOLDER is an exported model (export.enabled=true). It runs step by step on the first tokens of a text;
the spike trains at the site and the layer's weights, rounded to integers, are run once more by SANA-FE.
Printed are what the chip spends, part by part and step by step, beside the four counts of
`stages.profiles.loihi`, and whether the potentials are the integer sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.commands import exported
from stages.errors import InputError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from stages.analysis.chip import Simulated
    from stages.analysis.spiking_layer import SpikingLayer
    from stages.profiles.loihi import LoihiCounts

PLACES = ("model_path",)
TEXT = "Neurons exchange spikes, and a spike costs energy wherever it arrives."
UJ = 1e6  # microjoules of a joule
COSTS = {"chip_uJ": "chip [uJ]", "profile_uJ": "loihi profile [uJ]"}
PROFILE = {  # the parts of a chip: what each is here, and the counts of our profile that make it up
    "synapse": ("weights that are read and added", ("deliveries",)),
    "dendrite": ("sums of one step", ()),
    "soma": ("potentials", ("accesses", "updates")),
    "messages": ("spikes sent to a core (network)", ("messages",)),
    "hops": ("messages from tile to tile (network)", ()),
}


@dataclass(frozen=True)
class Request:
    """Which layer to simulate: that of `site`, or the `consumer` that is named of those reading it."""

    model_path: str
    site: str
    consumer: str = ""
    tokens: int = 4
    chip: str = "loihi"
    text: str = TEXT
    out: str = ""
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.tokens < 1 or not self.text:
            raise InputError(
                f"give tokens of 1 or more and a text; got tokens={self.tokens} text={self.text!r}"
            )
        if not Path(self.out).expanduser().parent.is_dir():
            raise InputError(f"out={self.out}: there is no folder {Path(self.out).parent}; make it")
        exported.check_dtype(self.dtype)


def main(arguments: Sequence[str]) -> int:
    """Prints the comparison; returns the exit status, 1 for bad input, which is one line, and where a
    potential is not the integer sum."""
    from pipeline.run.errors import exit_status

    equal: list[bool] = []
    status = exit_status(lambda: equal.append(_report(parsed(arguments))))
    return status or int(not all(equal))


def parsed(arguments: Sequence[str]) -> Request:
    """The request of a folder and key=value arguments."""
    return exported.parsed(Request, PLACES, arguments)


def _report(request: Request) -> bool:
    """Print what the chip says; whether all potentials are the integer sums."""
    from pipeline.run import hardware
    from stages.analysis.chip import chip_file, simulate
    from stages.profiles.loihi import Loihi, loihi_counts, loihi_energy

    chip_file(request.chip)  # refused before a model is loaded
    layer, head = _layer(request)
    chip, costs = simulate(layer, request.chip), hardware.profile("loihi")
    assert isinstance(costs, Loihi)
    shape = (layer.spikes, layer.outputs, layer.steps, layer.tokens)
    counts = loihi_counts(*shape, layer.updates(), costs.neurons_per_core)
    most = loihi_counts(*shape, neurons_per_core=costs.neurons_per_core)
    parts, steps = by_part(chip, counts, costs), by_step(chip)
    equal, values = int((chip.potentials == layer.sums()).sum()), chip.potentials.numel()
    energy = parts.astype(object).where(parts.notna(), None).set_index("part")
    record = asdict(request) | {
        **head,
        "simulator": f"SANA-FE {chip.version}",
        "cores": chip.cores,
        "counts": asdict(counts) | {"hops": sum(chip.hops)},
        "energy": energy[[*COSTS]].to_dict("index"),
        "profile_most_uJ": sum(loihi_energy(most, costs).values()) * UJ,
        "steps": steps.to_dict("records"),
        "potentials": values,
        "potentials_equal": equal,
    }
    _print(record, chip, parts, steps)
    print(
        f"potentials equal the integer sums: {equal} of {values} ({layer.tokens} x {layer.outputs})"
    )
    _write(request.out, record)
    return equal == values


def _layer(request: Request) -> tuple[SpikingLayer, dict[str, Any]]:
    """The layer that a request names, and what there is to say of it."""
    from stages.analysis.spiking_layer import ROUNDING, consumer_of, spiking_layer
    from stages.model.sites import find_sites
    from stages.ports.attachment import attachment

    model, tokenizer = exported.loaded(request.model_path, request.dtype, request.device)
    consumer, others = consumer_of(model, find_sites(model), request.site, request.consumer)
    bound = attachment(model)
    assert bound is not None  # stages.load sees to it
    ids = _ids(model, tokenizer, request).to(model.device)
    bound.close()
    layer = spiking_layer(model, bound.conversion, request.site, consumer, ids)
    values = layer.tokens * layer.inputs
    return layer, {
        "consumer": consumer,
        "other_consumers": others,
        "coding": bound.conversion.coding.name,
        "inputs": layer.inputs,
        "outputs": layer.outputs,
        "timesteps": layer.steps,
        "groups": len(layer.signs),
        "spikes": layer.spikes,
        "spikes_per_value": layer.spikes / values,
        "rounding": ROUNDING,
        "weight_step": layer.step,
        "rounding_error": layer.rounding_error(model.get_parameter(f"{consumer}.weight").cpu()),
    }


def _ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, request: Request) -> Tensor:
    """The first tokens of the text, [1, tokens]; raises InputError where it has too few."""
    from stages.model.limits import check_positions, check_tokens
    from stages.model.prefix import prefix_length

    ids: Any = tokenizer(request.text, return_tensors="pt", return_token_type_ids=False)[
        "input_ids"
    ]
    if ids.shape[1] < request.tokens:
        raise InputError(
            f"tokens={request.tokens}: text={request.text!r} has {ids.shape[1]} tokens; give a longer text"
        )
    first: Tensor = ids[:, : request.tokens]
    check_positions(
        model.config, {"tokens": request.tokens}, request.model_path, prefix=prefix_length(model)
    )
    embedding: Any = model.get_input_embeddings()
    check_tokens(first[0], embedding.num_embeddings, "the text", tokenizer)
    return first


def by_part(chip: Simulated, counts: LoihiCounts, costs: Any) -> pd.DataFrame:
    """Energy of every part of the chip: part, what it is, events, chip_uJ, profile_uJ (NaN where the four
    counts have none), the total last."""
    import pandas as pd

    from stages.profiles.loihi import loihi_energy

    ours = loihi_energy(counts, costs)
    events = {
        "synapse": f"{chip.deliveries} deliveries",
        "soma": f"{counts.accesses} accesses, {chip.updates} updates",
        "messages": f"{sum(chip.messages)} messages",
        "hops": f"{sum(chip.hops)} hops",
    }
    rows = [
        (
            part,
            what,
            events.get(part, ""),
            chip.joules[part] * UJ,
            sum(ours[name] for name in names) * UJ if names else math.nan,
        )
        for part, (what, names) in PROFILE.items()
    ]
    total = ("total", "", "", sum(chip.joules.values()) * UJ, sum(ours.values()) * UJ)
    return pd.DataFrame([*rows, total], columns=["part", "what", "events", "chip_uJ", "profile_uJ"])


def by_step(chip: Simulated) -> pd.DataFrame:
    """Messages, hops and time_us of every step, summed over the tokens."""
    import pandas as pd

    rows = zip(chip.messages, chip.hops, (s * 1e6 for s in chip.seconds), strict=True)
    table = pd.DataFrame(rows, columns=["messages", "hops", "time_us"])
    table.insert(0, "step", range(1, len(table) + 1))
    return table


def _print(head: dict[str, Any], chip: Simulated, parts: pd.DataFrame, steps: pd.DataFrame) -> None:
    others = ", ".join(name.rpartition(".")[2] for name in head["other_consumers"])
    also = f", and not {others} (consumer=)" if others else ""
    groups = "two groups of inputs, one a sign" if head["groups"] == 2 else "one group of inputs"
    print(
        f"{head['site']} -> {head['consumer']}{also}\n"
        f"{head['inputs']} x {head['outputs']}, {groups}\n"
        f"{head['coding']}, T={head['timesteps']}, {head['tokens']} tokens, "
        f"{head['spikes_per_value']:.3f} spikes a value\n"
        f"weights: {head['rounding']} ({head['weight_step']:.3g} each),\n"
        f"which moves the product by {head['rounding_error']:.2%}\n"
        f"chip: {head['chip']}, {head['simulator']}, {chip.cores} cores\n"
    )
    energy = parts.assign(
        **{name: [f"{x:.4f}" if math.isfinite(x) else "–" for x in parts[name]] for name in COSTS}
    )
    _table(energy.rename(columns=COSTS), ("left", "left", "right", "right", "right"))
    times = steps.assign(time_us=[f"{x:.2f}" for x in steps["time_us"]])
    _table(times.rename(columns={"time_us": "time [us]"}), ("right",) * 4)
    measured = parts["chip_uJ"].iloc[-1]
    totals = (parts["profile_uJ"].iloc[-1], head["profile_most_uJ"])
    counted, most = (f"{round(each / measured - 1, 5) + 0.0:+.3%}" for each in totals)
    seconds, tokens = sum(chip.seconds), head["tokens"]
    print(
        f"energy {measured:.4f} uJ, {measured / tokens:.4f} a token\n"
        f"the four counts of the loihi profile: {counted} with the updates that the trains cause,\n"
        f"{most} with T updates of every output and token, the most there can be\n"
        f"time {seconds * 1e3:.3f} ms, {seconds / tokens * 1e3:.3f} a token"
    )


def _table(frame: pd.DataFrame, align: tuple[str, ...]) -> None:
    print(
        frame.to_markdown(index=False, tablefmt="simple", disable_numparse=True, colalign=align)
        + "\n"
    )


def _write(place: str, record: dict[str, Any]) -> None:
    """Write the record as one line of json to a file, or print it where the place is `-`."""
    line = json.dumps(record, allow_nan=False)
    if place == "-":
        print(line)
    elif place:
        Path(place).expanduser().write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline simulate`")
