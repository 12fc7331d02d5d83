"""`import-paper`: from a file of the paper's format to a row of the bench."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.commands.cli import main
from tests.checkpoint.test_paper import entries
from tests.pipeline.conftest import Finished


def test_the_command_line_imports_and_evaluates(
    tmp_path: Path, command: Callable[..., Finished], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "retrain.pth"
    torch.save(entries(), file)
    folder = tmp_path / "neurons"
    assert main(["import-paper", str(file), str(folder)]) == 0
    out = capsys.readouterr().out
    assert "19 neurons of 2 layers, T=6, n=2" in out and f"fitting.neurons={folder}" in out
    (line,) = [line.strip() for line in out.splitlines() if "python -m pipeline" in line]
    overrides = line.removeprefix("python -m pipeline ").removesuffix(" model=...").split()
    overrides = [o for o in overrides if not o.startswith("transform=")]
    done = command(tmp_path, "experiment=null", "evaluation.tasks=[]", *overrides)
    assert done.code == 0, done.err
    (stored,) = (tmp_path / "outputs/store/fitting").glob("[!.]*")
    # another place, the same neurons; other neurons, another artifact
    moved = folder.rename(tmp_path / "moved")
    overrides[-1] = f"fitting.neurons={moved}"
    assert command(tmp_path, "experiment=null", "evaluation.tasks=[]", *overrides).code == 0
    assert [*(tmp_path / "outputs/store/fitting").glob("[!.]*")] == [stored]
    refused = command(tmp_path, "experiment=null", *overrides[:-1], f"fitting.neurons={tmp_path}")
    assert refused.code == 1 and "holds no imported neurons" in refused.out + refused.err
    assert main(["import-paper", str(file), str(moved)]) == 1
    assert "is not an empty folder" in capsys.readouterr().err
