"""Dense and spiking side by side: `python -m pipeline generate FOLDER 'Once upon'`.

FOLDER is an exported model (export.enabled=true). Both texts come from the same weights in memory, one
after the other; the dense model is the spiking one with its neurons taken off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.commands import exported
from stages.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONVENTION, PHASE = "causal", "decode"
PLACES = ("model_path", "prompt")  # arguments without a key


@dataclass(frozen=True)
class Request:
    """What to generate: greedily, or with `temperature` above 0 drawn with `seed`."""

    model_path: str
    prompt: str
    max_new_tokens: int = 32
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.prompt or self.max_new_tokens < 1 or self.temperature < 0:
            raise InputError(
                "give a prompt, max_new_tokens of 1 or more and a temperature of 0 or more; got "
                f"prompt={self.prompt!r} max_new_tokens={self.max_new_tokens} "
                f"temperature={self.temperature:g}"
            )
        exported.check_dtype(self.dtype)


@dataclass(frozen=True)
class Generated:
    """A continuation, its number of tokens and the seconds it took, its prompt's pass among them."""

    text: str
    tokens: int
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Prints the comparison; returns the exit status, 1 for bad input, which is one line."""
    from pipeline.run.errors import exit_status

    return exit_status(lambda: _report(parsed(arguments)))


def parsed(arguments: Sequence[str]) -> Request:
    """The request of a folder, a prompt and key=value arguments, or of the latter alone."""
    return exported.parsed(Request, PLACES, arguments)


def _report(request: Request) -> None:
    import pandas as pd

    from stages.model.sites import find_sites
    from stages.ports.attachment import attachment
    from stages.ports.counters import Counters
    from stages.ports.patched import patched

    model, tokenizer = exported.loaded(request.model_path, request.dtype, request.device)
    bound = attachment(model)
    assert bound is not None  # stages.load sees to it
    bound.close()
    dense, _ = _generated(model, tokenizer, request)
    counters = Counters(find_sites(model), model.device)
    with patched(model, bound.conversion, counters):
        spiking, passed = _generated(model, tokenizer, request, counters)
    coding = bound.conversion.coding
    coded = counters.of(bound.conversion)
    joules = _joules(model, coded, coding, passed)
    rows = {
        "dense": [dense.tokens, dense.tokens / dense.seconds, 0.0, joules[0]],
        "spiking": [
            spiking.tokens,
            spiking.tokens / spiking.seconds,
            coded["spikes"].sum() / passed if coding.neuron else None,  # a bound does not spike
            joules[1],
        ],
    }
    names = ["tokens", "tokens/s", "spikes/token", "J/token"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=names, dtype=object)
    formats = ("", ".0f", ".2f", ".4g", ".4g")
    print(table.to_markdown(tablefmt="simple", floatfmt=formats, missingval="–"))
    print(f"J/token: a token decoded at the end of {passed + 1}, {CONVENTION} convention, 45 nm\n")
    for name, result in (("dense", dense), ("spiking", spiking)):
        print(f"{name}:\n{request.prompt}{result.text}\n")


def _generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: Request,
    counters: Any = None,
) -> tuple[Generated, int]:
    """A continuation of the prompt, and the tokens that passed through the model."""
    import torch

    inputs: Any = tokenizer(
        request.prompt, return_tensors="pt", return_token_type_ids=False, return_attention_mask=True
    ).to(model.device)
    drawn = request.temperature > 0
    options: dict[str, Any] = {"do_sample": drawn, "pad_token_id": tokenizer.pad_token_id or 0}
    if drawn:
        options["temperature"] = request.temperature
    size = inputs["input_ids"].shape[1]
    if not size:
        raise InputError(f"prompt={request.prompt!r} has no token; give another text")
    _check_prompt(model, tokenizer, inputs["input_ids"][0], request)
    with torch.inference_mode():
        generate: Any = model.generate
        # Kernels are compiled before the clock runs.
        generate(**inputs, max_new_tokens=1, **options)
        if counters is not None:
            counters.sums.zero_()
        torch.manual_seed(request.seed)
        start = time.perf_counter()
        ids = generate(**inputs, max_new_tokens=request.max_new_tokens, **options)[0]
        seconds = time.perf_counter() - start
    text = tokenizer.decode(ids[size:], skip_special_tokens=True)
    return Generated(str(text), len(ids) - size, seconds), len(ids) - 1


def _check_prompt(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Any, request: Request
) -> None:
    """Raises InputError where the model lacks a token of the prompt, or positions for the text."""
    from stages.model.limits import check_tokens, positions
    from stages.model.prefix import prefix_length

    embedding: Any = model.get_input_embeddings()
    check_tokens(ids, embedding.num_embeddings, "the prompt", tokenizer)
    most, needed = (
        positions(model.config),
        len(ids) + request.max_new_tokens - 1,
    )  # the last is not read
    if most is not None and needed + prefix_length(model) > most:
        raise InputError(
            f"a prompt of {len(ids)} tokens and max_new_tokens={request.max_new_tokens}: the model has "
            f"{most - prefix_length(model)} positions for them; give fewer"
        )


def _joules(model: PreTrainedModel, counters: Any, coding: Any, passed: int) -> list[float | None]:
    """What one more token costs, dense and spiking with the spikes of this text; None of a bound."""
    from pipeline.run import hardware
    from stages.analysis.operations import operations, untransformed
    from stages.energy import account, summary
    from stages.model.sites import find_sites

    energy = hardware.energy(["45nm"])
    plan = operations(model, find_sites(model))
    context = passed + 1
    dense = summary(account(untransformed(plan), energy, context))
    spiking = summary(account(plan, energy, context, counters, coding))
    return [each[CONVENTION][PHASE]["energy_J"] for each in (dense, spiking)]


if __name__ == "__main__":
    raise SystemExit("nothing was done: the command is `python -m pipeline generate`")
