"""Stages: what is not in a stage's key is out of its reach, and everything in it counts."""

import ast
import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.run import evaluations, stages
from pipeline.run.chain import chain
from pipeline.run.settings import Settings
from pipeline.run.stage import Running, Stage
from pipeline.store.store import Store

RUNTIME = Running("cpu", 1, 1, 1, "fast", "none")
FUNCTIONS = ("make", "units", "share", "merge")
Make = Callable[..., Settings]


class Doubled(Stage):
    name = "doubled"
    code = ("stages.errors",)

    @staticmethod
    def make(out: Path, spec: Any, inputs: Any, runtime: Any) -> None:
        (out / "number").write_text(str(2 * spec["number"]))


class Curious(Stage):
    """Asks for a field and an input that it did not declare."""

    name = "curious"

    @staticmethod
    def make(out: Path, spec: Any, inputs: Any, runtime: Any) -> None:
        with pytest.raises(KeyError):
            spec["seed"]
        with pytest.raises(KeyError):
            inputs["model"]
        (out / "number").write_text((inputs["doubled"].path / "number").read_text())


def test_a_stage_reaches_its_spec_and_inputs_and_nothing_else(tmp_path):
    doubled = Doubled({"number": 21})
    artifact = Curious({}, {"doubled": doubled}).build(Store(tmp_path), RUNTIME)
    assert (artifact.path / "number").read_text() == "42"  # the input was made for it
    assert artifact.manifest["inputs"] == {"doubled": doubled.key()}


def test_what_a_stage_could_see_beside_its_arguments_is_refused():
    secret = {"seed": 7}
    with pytest.raises(TypeError, match="static method without a closure"):

        class Closed(Stage):
            @staticmethod
            def make(out: Path, spec: Any, inputs: Any, runtime: Any) -> None:
                (out / "seed").write_text(str(secret["seed"]))

    with pytest.raises(TypeError, match="static method"):

        class Bound(Stage):
            def make(self, out: Path, spec: Any, inputs: Any, runtime: Any) -> None:  # type: ignore
                (out / "part").write_text(self.part)


def test_no_shipped_stage_reads_settings_or_anything_that_changes():
    """The names in a `make`, or where its work is cut, are its arguments, its locals, and functions and
    classes of modules."""
    named = {**vars(stages), **vars(evaluations)}
    kinds = [each for each in named.values() if inspect.isclass(each)]
    declared = [k for k in kinds if issubclass(k, Stage) and {*FUNCTIONS} & {*vars(k)}]
    assert len(declared) >= 9
    for kind in declared:
        functions = [vars(kind)[name] for name in FUNCTIONS if name in vars(kind)]
        source = "".join(textwrap.dedent(inspect.getsource(each)) for each in functions)
        tree = ast.parse(source)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        seen = {name: vars(stages)[name] for name in names & set(vars(stages))}
        odd = [n for n, v in seen.items() if not callable(v) and not inspect.ismodule(v)]
        assert set(odd) <= {"ANYTIME", "PREFIX", "log"}, (kind, odd)
        assert "settings" not in names and "s" not in names


def test_keys_follow_the_spec_the_inputs_and_the_code_that_makes_it():
    class Tripled(Doubled):
        @staticmethod
        def make(out: Path, spec: Any, inputs: Any, runtime: Any) -> None:
            (out / "number").write_text(str(3 * spec["number"]))

    one = Doubled({"number": 1})
    others = [
        Doubled({"number": 2}),
        Doubled({"number": 1}, {"more": one}),
        Tripled({"number": 1}),
    ]
    assert len({each.key() for each in (one, *others)}) == 4
    assert Doubled({"number": 1}, part="other").key() == one.key()  # a part is only a name


def test_stages_are_listed_behind_what_they_are_made_from(settings: Make, tmp_path):
    chosen = settings(tmp_path, "coding=gated_budget", "timesteps=4", "evaluation.tasks=[piqa]")
    steps = chain(chosen, Store(tmp_path))
    order = [*steps.sources.values(), *steps.steps.values()]
    place = {stage.key(): index for index, stage in enumerate(order)}
    for stage in order:
        for source in stage.inputs.values():
            if isinstance(source, Stage):
                assert place[source.key()] < place[stage.key()]
    assert [*steps.steps] == [
        "statistics sensitivity",
        *("capture", "distribution", "fitting", "patching"),
        *("evaluation ppl_wikipedia", "evaluation acc_piqa", "energy"),
        *("evaluation dense ppl_wikipedia", "evaluation dense acc_piqa"),
    ]
    assert [*steps.sources] == ["tokens wikipedia calibration", "tokens wikipedia evaluation"]
