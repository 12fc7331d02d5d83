"""The command line: verbs and their help, what is passed on to Hydra, and one line for a wrong usage."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest
from hydra._internal.utils import get_args_parser

from pipeline.commands import generate, launch, plan, simulate, upkeep
from pipeline.commands.cli import main
from pipeline.commands.run import FLAGS
from tests.pipeline.conftest import REPOSITORY

VERBS = ["run", "plan", "table", "report", "store", "sync", "relocate"]
VERBS += ["import-paper", "generate", "simulate", "energy", "sites"]
STORE = ["ls", "show", "verify", "push", "gc"]
HEAVY = {"torch", "transformers", "hydra", "omegaconf", "mlflow", "pandas", "numpy"}


def verbs(text: str) -> dict[str, str]:
    """The verbs that a help lists, with their line each."""
    lines = text.partition("\nVerbs:\n")[2].partition("\n\n")[0].splitlines()
    return dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in lines)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What Hydra would be given, instead of a run."""
    given: list[list[str]] = []
    monkeypatch.setattr(launch, "main", lambda arguments: given.append(list(arguments)) or 0)
    return given


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    given: list[list[str]] = []
    monkeypatch.setattr(plan, "show", lambda overrides: given.append(list(overrides)))
    return given


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_every_verb_with_a_line_and_points_to_the_options(flag, capsys):
    assert main([flag]) == 0
    out = capsys.readouterr().out
    listed = verbs(out)
    assert list(listed) == VERBS
    assert all(line.endswith(".") and not line.endswith("...") for line in listed.values())
    assert "KEY=VALUE" in out and "README.md" in out and "--cfg job" in out
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("verb", [*VERBS, *(f"store {name}" for name in STORE)])
def test_every_verb_explains_its_options(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: ") and f" {verb} " in out.splitlines()[0]
    if not verb.startswith("store "):
        assert f"\n  python -m pipeline {verb} " in out or verb in ("run", "sync", "relocate")
        assert "\n  python -m pipeline" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_help_of_a_verb_has_all_that_it_takes(capsys):
    assert main(["store", "--help"]) == 0
    assert list(verbs(capsys.readouterr().out)) == STORE
    for verb, request in (("generate", generate.Request), ("simulate", simulate.Request)):
        main([verb, "--help"])
        out = capsys.readouterr().out
        assert all(f"{name}=" in out for name in request.__dataclass_fields__)
    main(["run", "--help"])
    out = capsys.readouterr().out
    assert all(name in out for flag in FLAGS for name in flag.opts)


def test_help_loads_only_the_parser():
    code = (
        "import json, sys; from pipeline.commands.cli import main\n"
        "for line in json.loads(sys.argv[1]): main([*line, '--help'])\n"
        "print(json.dumps([*sys.modules]))"
    )
    every = json.dumps([[], *([verb] for verb in VERBS), *(["store", name] for name in STORE)])
    done = subprocess.run(
        [sys.executable, "-c", code, every],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "click" in loaded and not HEAVY & loaded


def test_a_file_that_nobody_has_closed_is_whole(tmp_path):
    """Although the process does not look for garbage at its end."""
    code = (
        "import sys; from pipeline.commands.cli import main\n"
        "class Ring: pass\n"
        "ring = Ring(); ring.own, ring.file = ring, open(sys.argv[1], 'w'); ring.file.write('whole')\n"
        "del ring; main(['--help'])"
    )
    file = tmp_path / "left.txt"
    subprocess.run(
        [sys.executable, "-c", code, file], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL
    )
    assert file.read_text() == "whole"


@pytest.mark.slow
def test_a_plan_does_without_what_reads_a_model():
    code = "import sys, pipeline.commands.plan; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_the_script_is_the_same_command(capsys):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    ((name, place),) = project["scripts"].items()
    assert name == "spiking-llm" and EntryPoint(name, place, "console_scripts").load() is main
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "-h"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout.startswith("Usage: python -m pipeline [") and done.returncode == 0
    assert list(verbs(done.stdout)) == VERBS


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ([], []),
        (["coding=gated", "timesteps=6"], ["coding=gated", "timesteps=6"]),
        (["run", "coding=gated"], ["coding=gated"]),
        (["timesteps=4,5", "-m", "~sites"], ["--multirun", "timesteps=4,5", "~sites"]),
        (["+a.b=1", "++c=[x, y]"], ["+a.b=1", "++c=[x, y]"]),
        (["--cfg", "job", "coding=las"], ["--cfg", "job", "coding=las"]),
        (
            ["-c", "job", "--resolve", "-p", "energy"],
            ["--cfg", "job", "--resolve", *["-p", "energy"]],
        ),
        (["--info"], ["--info", "all"]),
        (["--info", "plugins"], ["--info", "plugins"]),
        (["x=1", "-i"], ["--info", "all", "x=1"]),
        (
            ["-cd", "mine", "hydra/launcher=joblib"],
            ["--config-dir", "mine", "hydra/launcher=joblib"],
        ),
        (["--cfg", "job", "runtime.plan=true"], ["--cfg", "job", "runtime.plan=true"]),
        (["--hydra-help"], ["--hydra-help"]),
        (["-cp", "conf"], ["--config-path", f"{REPOSITORY}/conf"]),  # Hydra: beside its module
    ],
)
def test_flags_and_overrides_are_passed_on_to_hydra(typed, given, launched, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert main(typed) == 0
    (got,) = launched
    parser = get_args_parser()
    assert vars(parser.parse_intermixed_args(got)) == vars(parser.parse_intermixed_args(given))


def test_every_flag_of_hydra_is_known():
    actions = get_args_parser()._actions
    flags = {name for action in actions for name in action.option_strings}
    assert flags == {name for flag in FLAGS for name in flag.opts} | {"-h", "--help"}


@pytest.mark.parametrize(
    "typed",
    [
        ["plan", "coding=las,gated", "timesteps=4"],
        ["plan", "-m", "coding=las,gated", "timesteps=4"],
        ["runtime.plan=true", "coding=las,gated", "timesteps=4"],
        ["-m", "coding=las,gated", "runtime.plan=True", "timesteps=4"],
        ["run", "coding=las,gated", "timesteps=4", "runtime.plan=on"],
    ],
)
def test_a_plan_has_one_name_and_one_key(typed, planned, launched):
    assert main(typed) == 0
    assert planned == [["coding=las,gated", "timesteps=4"]] and not launched


def test_a_refused_plan_is_one_line_with_status_1(capsys):
    assert main(["plan", "coding=gatedd"]) == 1
    error = capsys.readouterr().err
    assert "did you mean gated" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["tabel", "main"], "No such command 'tabel'. Did you mean 'table'?"),
        (["reprot"], "Did you mean 'report'?"),
        (["nothing"], "Choose among run, plan, table"),
        ([""], "Choose among run, plan, table"),
        (["store"], "Give one of ls, show, verify, push, gc"),
        (["store", "verfy"], "Did you mean 'verify'?"),
        (["store", "show"], "Missing argument 'KEY'"),
        (["store", "gc", "--older-then", "3"], "Did you mean '--older-than'?"),
        (["store", "gc", "--older-than", "long"], "'long' is not a valid float"),
        (["store", "gc", "coding=las"], "overrides belong to one --keep"),
        (["store", "gc", "--keep", "a", "--keep", "b", "x=1"], "--keep 'EXPERIMENT x=1'"),
        (["store", "gc", "--keep", ""], "--keep names no experiment"),
        (["store", "gc", "--keep", "a 'b"], "cannot be read: No closing quotation"),
        (["sync", "--runz", "x"], "Did you mean '--runs'?"),
        (["--cgf", "job"], "Did you mean '--cfg'?"),
        (["coding=gated", "--reslve"], "Did you mean '--resolve'?"),
        (["--cfg", "jobs"], "is not one of 'job', 'hydra', 'all'"),
        (["--cfg"], "requires an argument"),
        (["table", "main", "--fill"], "No such option '--fill'"),
        (["energy", "--model=x"], "No such option '--model'"),
        (["experiment=codings", "table"], "table is a verb: it comes first"),
    ],
)
def test_a_wrong_usage_is_one_line_with_status_2(typed, says, capsys, launched):
    assert main(typed) == 2
    out, error = capsys.readouterr()
    assert (out, error.count("\n"), launched) == ("", 1, [])
    assert error.startswith("error: ") and says in error


def test_a_key_that_is_no_verb_is_an_override_of_a_run(launched):
    assert main(["tabel=1"]) == 0
    assert launched == [["tabel=1"]]


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["table", "mian"], "got table=mian; did you mean main? Choose among"),
        (["report", "quikstart"], "got study=quikstart; did you mean quickstart?"),
        (["table", "main", "experiment=codigns"], "did you mean codings"),
        (["energy", "model=llama3-8"], "did you mean llama3-8b"),
        (["sites", "coding.timestep=3"], "did you mean coding.timesteps"),
        (["generate", "F", "text", "tempreature=1"], "did you mean temperature? give key=value"),
        (["generate", "modelpath=F", "text"], "did you mean model_path?"),
    ],
)
def test_names_and_keys_that_are_not_known_suggest_the_nearest(typed, says, capsys):
    assert main(typed) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and says in error


@pytest.mark.parametrize("status", [0, 1, 130])
def test_the_exit_status_is_that_of_the_verb(status, monkeypatch):
    monkeypatch.setattr(launch, "main", lambda arguments: status)
    assert main(["coding=gated"]) == status
    monkeypatch.setattr(upkeep, "verify", lambda store: status)
    assert main(["store", "verify", "--store", str(REPOSITORY)]) == status


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(overrides: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "show", interrupted)
    assert main(["plan"]) == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_each_experiment_that_gc_keeps_has_its_overrides(tmp_path, monkeypatch):
    kept: list[list[list[str]]] = []

    def gc(store: object, experiments: list[list[str]], **others: object) -> int:
        kept.append(experiments)
        return 0

    monkeypatch.setattr(upkeep, "gc", gc)
    place = ["store", "gc", "--store", str(tmp_path)]
    main([*place, "--keep", "codings", "timesteps=4", "model.path=a b"])
    main([*place, "--keep", "codings 'model.path=a b'", "--keep", "frontier"])
    assert kept[0] == [["codings", "timesteps=4", "model.path=a b"]]
    assert kept[1] == [["codings", "model.path=a b"], ["frontier"]]


def test_a_folder_and_a_prompt_need_no_keys():
    keyed = generate.parsed(["model_path=a", "prompt=x: [1, 2]=3", "seed=2"])
    assert generate.parsed(["a", "x: [1, 2]=3", "seed=2"]) == keyed
    assert generate.parsed(["seed=2", "a", "x: [1, 2]=3"]) == keyed
    assert generate.parsed(["prompt=x: [1, 2]=3", "a", "seed=2"]) == keyed
    assert generate.parsed(["a", "prompt=- a list"]).prompt == "- a list"
    assert generate.parsed(["out/gated_T=6", "a=b"]).model_path == "out/gated_T=6"


def written() -> Iterator[str]:
    """Every command of documentation, comments and messages, up to the end of its line or quotes."""
    for pattern in (
        "*.md",
        "*/README.md",
        "Makefile",
        "conf/**/*.*",
        "pipeline/**/*.py",
        "stages/**/*.py",
    ):
        for path in REPOSITORY.glob(pattern):
            if path.suffix != ".png":
                text = path.read_text(encoding="utf-8").replace('", "', " ")  # lists of arguments
                yield from re.findall(r"-m\s+pipeline\b([^\n`#]*)", text)


def test_every_command_that_is_written_down_is_one_that_works():
    commands = list(written())
    assert len(commands) > 40
    for command in commands:
        assert not command.startswith("."), f"python -m pipeline{command}: no module is a command"
        (first, *_) = re.split(r"[^\w=./\[{-]+", f"{command.strip()} ", maxsplit=1)
        assert not re.fullmatch("[a-z]+", first) or first in VERBS, command


@pytest.mark.parametrize(
    "module",
    ["commands.report", "store.store", "commands.generate", "commands.energy", "commands.sites"],
)
def test_a_module_that_is_no_command_says_so(module: str, recwarn: object) -> None:
    """`python -m pipeline.commands.report` would import it, do nothing and end with status 0."""
    with pytest.raises(SystemExit, match="nothing was done: the command is `python -m pipeline "):
        runpy.run_module(f"pipeline.{module}", run_name="__main__")
