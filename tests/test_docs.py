"""Documentation: commands and lines run, tables are those of the code, links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import yaml
from nbclient import NotebookClient
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import stages
from pipeline.commands.cli import cli
from stages.model import families
from stages.model.sites import ROLES
from tests.pipeline.composing import COMPOSER, composing
from tests.pipeline.conftest import main_in

REPOSITORY = Path(__file__).parents[1]
CONF = REPOSITORY / "conf"
PAGES = ("README.md", *(f"{name}/README.md" for name in ("stages", "conf", "pipeline", "outputs")))
NOTEBOOK = REPOSITORY / "stages/tutorial.ipynb"
SHOWN = [role for role in ROLES if role not in ("attn.q", "attn.k", "attn.v", "attn.probs")]
# Words of an example that a reader replaces, by what composes.
EXAMPLES = {"FOLDER": "outputs", "FILE": "mine.txt", "OTHER": "other.txt", "…": ""}


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def blocks(name: str) -> Iterator[str]:
    """The indented commands of a page, continued lines as one."""
    text = page(name).replace("\\\n", " ")
    yield from re.findall(r"^    ((?:python -m pipeline|make)\b.*)$", text, re.MULTILINE)


def commands() -> list[list[str]]:
    """The words after `python -m pipeline` of every command of every page."""
    lines = [line for name in PAGES for line in blocks(name) if line.startswith("python")]
    return [shlex.split(line, comments=True)[3:] for line in lines]


# --- commands ------------------------------------------------------------------------------------


def test_the_command_line_reads_every_command() -> None:
    assert len(commands()) > 30
    for words in commands():
        verb, rest = (words[0], words[1:]) if words and words[0] in cli.commands else ("run", words)
        cli.commands[verb].make_context(verb, list(rest))  # raises UsageError


def composed(words: list[str]) -> list[str]:
    """The overrides of a run's first job for Hydra; without an experiment a conversion.

    Rows and launchers are of plug-ins.
    """
    given = [word for word in words if re.match(r"(?!rows=)[\w.]+=", word)]
    first = [re.sub(r"=([^\[{,]*),.*", r"=\1", word) for word in given]
    first = ["++" + word if word.startswith("corpus.") else word for word in first]
    named = any(word.startswith("experiment=") for word in given)
    return [*([] if named else ["experiment=none"]), *first]


def test_every_key_and_choice_of_a_run_exists() -> None:
    runs = [
        words for words in commands() if not words or words[0] not in set(cli.commands) - {"plan"}
    ]
    assert len(runs) > 20
    with composing():
        for words in runs:
            COMPOSER([word for word in composed(words) if not word.startswith("hydra")])


@pytest.mark.parametrize("name", PAGES)
def test_what_a_shell_would_expand_is_quoted(name: str) -> None:
    """zsh takes [..] for a pattern of files, and ends with an error where none fits."""
    for line in blocks(name):
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|#.*", "", line)
        assert not re.search(r"[\[{*?]", bare), line


def test_make_has_every_target() -> None:
    targets = re.findall(r"^([\w./-]+):", page("Makefile"), re.MULTILINE)
    for name in PAGES:
        for target in re.findall(r"`make ([\w./-]+)`|^    make (\S+)", page(name), re.MULTILINE):
            assert "".join(target) in targets
    for file in re.findall(r"`(conf/[^`*]+\.yaml)`", "".join(map(page, PAGES))):
        assert (REPOSITORY / file).exists() or "NAME" in file, file


# --- what a newcomer does --------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, tiny_llama: Any) -> Path:
    """An empty folder with a small random model and two texts."""
    tiny_llama.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    for name, word in (("mine.txt", "spikes"), ("other.txt", "phases")):
        words = [f"{word} {i * 7919 % 1009}" for i in range(900)]
        (tmp_path / name).write_text(" ".join(words))
    return tmp_path


def small(command: str, folder: Path) -> str:
    """A command of the README on the small model and texts, where it does not name its own."""
    words = {"FOLDER": folder / "model", "FILE": folder / "mine.txt", "OTHER": folder / "other.txt"}
    for word, path in words.items():
        command = re.sub(rf"\b{word}\b", str(path), command)
    given = {
        "model.path": folder / "model",
        "corpus.wikipedia.path": folder / "mine.txt",
        "corpus.wikipedia.calibration_path": folder / "other.txt",
        "evaluation.tasks": "[]",
    }
    more = [f"'{key}={value}'" for key, value in given.items() if f"{key}=" not in command]
    size = "calibration.windows=2 calibration.length=64 evaluation.windows=2 evaluation.length=64"
    fast = "patching.windows=1 runtime.compile=false runtime.figures=false tracking.enabled=false"
    return f"{command} {' '.join(more)} {size} {fast}"


def words_of(line: str, folder: Path) -> list[str]:
    """What a shell gives `python -m pipeline` of a line, in a folder."""
    script = f'python() {{ printf "%s\\0" "$@"; }}; {line}'
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, check=True)
    dash, module, *words = done.stdout.decode().split("\0")[:-1]
    assert (dash, module) == ("-m", "pipeline")
    return words


def test_the_commands_for_a_model_a_text_and_a_sweep_run_in_a_fresh_folder(checkout: Path) -> None:
    section = page("README.md").split("## Your model")[1].split("\n## ")[0]
    lines = re.findall(r"^    (python .*)$", section.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) == 3
    printed = ""
    for line in lines:
        done = main_in(checkout, words_of(small(line, checkout), checkout))
        assert done.code == 0, done.err
        printed += done.out
    assert "ppl mine" in printed
    shown = re.findall(
        r"^model +(dense|las_rounded|gated) +(\S) .* [\d.-]+ %$", printed, re.MULTILINE
    )
    assert shown == [  # of the first two commands and of the sweep
        *[("gated", "6"), ("gated", "6")],
        *[
            ("dense", "–"),
            ("las_rounded", "4"),
            ("las_rounded", "6"),
            ("gated", "4"),
            ("gated", "6"),
        ],
    ]


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def test_the_lines_of_python_run(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = page("README.md").split("## In Python\n")[1].split("\n## ")[0]
    (lines,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.chdir(checkout)
    scope: dict[str, Any] = {}
    exec(lines.replace("FOLDER", "model").replace("FILE", "mine.txt"), scope)
    shown = capsys.readouterr().out
    head, *rows = shown.splitlines()[: 1 + 21]  # on no line are columns or rows left out
    assert head.split() == ["site", "role", "layer", "nmse", "spikes", "bound_db", "scale"]
    assert [row.split()[0] for row in rows] == [str(i) for i in range(21)]
    assert "model.layers.0.mlp.down_proj:in" in shown and "The first spike" in shown
    dense, ids = AutoModelForCausalLM.from_pretrained("model"), torch.arange(40)[None]
    assert torch.equal(logits(scope["model"], ids), logits(dense, ids))
    assert stages.conversion(stages.load("spiking")).coding == stages.Gated()


@pytest.mark.slow
def test_the_notebook_runs_and_shows_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert NOTEBOOK.stat().st_size < 200_000
    notebook = nbformat.read(NOTEBOOK, 4)
    kept = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in kept) == 2
    for name, value in {"TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": str(REPOSITORY)}.items():
        monkeypatch.setenv(name, value)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": REPOSITORY}})
    client.execute()  # raises CellExecutionError
    # a kernel cuts what is printed into outputs where it likes
    printed = "".join(o.get("text", "") for o in notebook.cells[-1].outputs)
    assert "the loaded model has the same logits: True; dense again: " in printed
    (table,) = (
        o.data["text/html"]
        for c in notebook.cells
        for o in c.get("outputs", [])
        if "perplexity" in o.get("data", {}).get("text/html", "")
    )
    dense, las, gated = (float(x) for x in re.findall(r'col0" >([\d.]+)<', table))
    assert abs(gated - dense) < abs(las - dense)


# --- what the code says ----------------------------------------------------------------------------


def test_the_options_are_those_of_the_yamls() -> None:
    """`make conf/README.md` writes the page."""
    assert runpy.run_path(str(CONF / "document.py"))["document"]() == page("conf/README.md")


def flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if not key.startswith("_"):
            yield prefix + key
            yield from flat(value, f"{prefix}{key}.") if isinstance(value, dict) else ()


def test_every_option_has_a_comment() -> None:
    listed = set(re.findall(r"^\| `([\w./-]+)` \| (?:…|`)", page("conf/README.md"), re.MULTILINE))
    assert len(listed) > 100
    for file in CONF.rglob("*/*.yaml"):
        group = file.parent.relative_to(CONF).as_posix().replace("/", ".")
        text = file.read_text()
        if "@package _global_" in text or file.stem in ("published", "none"):
            continue
        if at := re.match(r"# @package ([\w.]+)\n", text):
            group = at[1]
        for key in flat(yaml.safe_load(text) or {}):
            parts = f"{group}.{key}".split(".")
            parents = {".".join(parts[:i]) for i in range(2, len(parts) + 1)}
            inner = any(name.startswith(f"{group}.{key}.") for name in listed)
            said = key.rpartition(".")[2] in UNCOMMENTED
            assert parents & listed or inner or said, f"{file}: {key}"


UNCOMMENTED = {"defaults", "name", "timesteps"}  # as everywhere


def rows(name: str, heading: str) -> list[list[str]]:
    """The codes of the first column of the table under a heading, row by row."""
    section = page(name).split(f"\n{heading}")[1].split("\n## ")[0]
    return [
        re.findall(r"`([^`]+)`", line.split("|")[1])
        for line in section.splitlines()
        if line[:3] == "| `"
    ]


def test_the_tables_of_codings_and_experiments_have_every_file() -> None:
    for group, name, heading in (
        ("coding", "stages/README.md", "## Codings"),
        ("transform", "stages/README.md", "## Transforms"),
        ("experiment", "pipeline/README.md", "## Experiments"),
    ):
        files = {file.stem for file in (CONF / group).glob("*.yaml")} - {"none"}
        listed = {code for row in rows(name, heading)[1:] for code in row}
        assert files <= listed, files - listed


def architectures() -> list[str]:
    """One row a family or families with the same rules: where each role lives, – where it does not."""
    table: dict[str, list[str]] = {}
    for name in families.known():
        family = importlib.import_module(f"{families.PACKAGE}.{name}").ARCHITECTURE
        kinds = [(family.rules, "")]
        kinds += [(family.rules | family.experts, ", experts")] * bool(family.experts)
        for roles, more in kinds:
            assert {f"attn.{port}" for port in ("q", "k", "v", "probs")} <= set(roles)
            every = roles | {"head.in": family.head}
            cells = [f"`{every[role].port}`" if role in every else "–" for role in SHOWN]
            table.setdefault(" | ".join(cells), []).append(f"`{name}`{more}")
    return [f"| {' '.join(names)} | {cells} |" for cells, names in table.items()]


def test_the_table_of_architectures_is_that_of_the_rules() -> None:
    lines = page("stages/README.md").splitlines()
    start = lines.index(f"| `model_type` | {' | '.join(SHOWN)} |")
    assert lines[start + 2 : start + 2 + len(architectures())] == architectures()
    assert not lines[start + 2 + len(architectures())].startswith("|")


# --- links -----------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*PAGES, "stages/tutorial.ipynb"])
def test_links_lead_to_files_and_headings(name: str) -> None:
    text = page(name)
    if name.endswith("ipynb"):
        text = "".join("".join(c["source"]) for c in json.loads(text)["cells"])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text(encoding="utf-8")), target


def test_the_readme_is_short() -> None:
    assert len(page("README.md").encode()) < 7000
