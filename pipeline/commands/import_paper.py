"""Neurons of the paper's repository for this pipeline: `python -m pipeline import-paper FILE`."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = Path("outputs/neurons")


@click.command(name="import-paper")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("folder", required=False, type=click.Path(path_type=Path))
@click.option(
    "--v0",
    default="half_step",
    show_default=True,
    help="Initial potential: half_step as the paper's code evaluates, learned as it fits.",
)
def import_paper(file: Path, folder: Path | None, v0: str) -> int:
    """Import neurons of the paper's repository.

    FILE is a retrain.pth of it.

    Writes FOLDER (outputs/neurons/NAME, after the file's folder, if it is not given) and prints the
    command that evaluates the neurons. Nothing in the file is executed.

    \b
    python -m pipeline import-paper retrain_dir/Llama-2-7B-hf-T-8-grains-2/retrain.pth
    """
    from pipeline.run.errors import exit_status

    return exit_status(lambda: _imported(file, folder, v0))


def _imported(file: Path, folder: Path | None, v0: str) -> None:
    from stages.checkpoint import paper

    neurons = paper.read(file.expanduser(), v0)
    place = (folder or FOLDER / file.expanduser().absolute().parent.name).expanduser()
    neurons.save(place)
    layers = 1 + max(neurons.layers)
    print(
        f"{place}: {len(neurons.roles)} neurons of {layers} layers, T={neurons.timesteps}, "
        f"n={neurons.grains}, v0 {v0}\n\n"
        "evaluate them on the model they were fitted to (model=llama2-7b or model=llama3-8b):\n"
        f"  python -m pipeline coding=multigrain timesteps={neurons.timesteps} "
        f"coding.grains={neurons.grains} coding.v0={neurons.v0} sites=paper "
        f"transform=rotate_prefix fitting.neurons={place} model=..."
    )
