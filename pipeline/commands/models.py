"""`generate`, `simulate`, `energy` and `sites`: one model, without a run."""

from __future__ import annotations

import click

from pipeline.commands import verbs


@click.command()
@click.argument(
    "arguments", nargs=-1, type=click.UNPROCESSED, metavar="FOLDER PROMPT [KEY=VALUE]..."
)
def generate(arguments: tuple[str, ...]) -> int:
    """Continue a prompt, spiking and dense side by side.

    FOLDER is an exported model (export.enabled=true). Both texts come from its weights; speed, spikes and
    energy of a token stand beside them.

    \b
    model_path=FOLDER  the same as FOLDER
    prompt=TEXT        the same as PROMPT, of a text that begins like an option
    max_new_tokens=32  how many tokens more
    temperature=0      above 0 tokens are drawn, with seed=0
    dtype=float32      of the weights
    device=cpu         or cuda, cuda:1, ...

    \b
    python -m pipeline generate outputs/spiking 'The first spike' max_new_tokens=64
    """
    from pipeline.commands import generate

    return generate.main(arguments)


@click.command()
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="FOLDER [KEY=VALUE]...")
def simulate(arguments: tuple[str, ...]) -> int:
    """Run one layer on a simulated chip.

    FOLDER is an exported model (export.enabled=true) in base 2: las, las_rounded, or gated and
    signed_digit with coding.grains=1. The spike trains of its first tokens and the layer's weights as
    8-bit integers go to SANA-FE (python -m pip install sanafe==2.2.9); energy by part, messages, hops and
    time come back. Exit status 1 unless every potential is the integer sum.

    \b
    model_path=FOLDER  the same as FOLDER
    site=NAME          whose values enter the layer, such as model.layers.0.mlp.down_proj:in
    consumer=NAME      which layer, where several read the site; the first
    tokens=4           how many, from the beginning of the text
    chip=loihi         or the FILE.yaml of an architecture of SANA-FE
    text=TEXT          instead of a sentence that is built in
    out=FILE.json      writes all of it as one line of json; out=- prints it
    dtype=float32      of the model while it runs
    device=cpu         or cuda, cuda:1, ...

    \b
    python -m pipeline simulate outputs/spiking site=model.layers.0.mlp.down_proj:in
    """
    from pipeline.commands import simulate

    return simulate.main(arguments)


@click.command()
@verbs.overrides
def energy(overrides: tuple[str, ...]) -> int:
    """Count a model's operations and energy from its dimensions.

    Takes the overrides of `run`, of which model, transform and energy count. Only the model's config is
    read: of the folder model.path, of model.hub, or the dimensions in its yaml. rates=FOLDER, that of a
    run's job, takes the spikes and the decoding that the run has counted, by role.

    \b
    python -m pipeline energy model=llama3-8b energy.tokens=512
    python -m pipeline energy model=llama3-8b energy.tokens=1024 rates=outputs/runs/FOLDER
    """
    from pipeline.commands import energy

    return energy.main(overrides)


@click.command()
@verbs.overrides
def sites(overrides: tuple[str, ...]) -> int:
    """Count a model's sites and the memory they take.

    Takes the overrides of `run`, of which model, sites, capture and coding count. Only the model's config
    is read, as by `energy`.

    \b
    python -m pipeline sites model=qwen3-30b-a3b
    """
    from pipeline.commands import sites

    return sites.main(overrides)
