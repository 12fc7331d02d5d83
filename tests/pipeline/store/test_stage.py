"""Keys: equal for equal meaning, different for anything that can change a result."""

import enum
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import stages
from pipeline.store.code import Outline, code_hash
from pipeline.store.step import Step, canonical, plain

PACKAGE = {
    "stages/__init__.py": "",
    "stages/first.py": '"""Doc."""\nfrom .codings import gated\ndef f(x): return gated.f(x)\n',
    "stages/codings/__init__.py": "",
    "stages/codings/gated.py": (
        "import math\n\ndef f(x):\n    from stages.levels import STEP\n    return x * STEP\n"
    ),
    "stages/levels.py": "import stages.deep\nSTEP = 2\n",
    "stages/deep.py": "DEEP = 1\n",
    "stages/other.py": "OTHER = 1\n",
}


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1


@dataclass(frozen=True)
class Spec:
    name: str
    inner: Inner
    steps: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Twin:
    rate: float = 0.1


class Colour(enum.StrEnum):
    RED = "red"


def hash_of(root: Path, changes: Mapping[str, str], module: str = "stages.first") -> str:
    for name, text in {**PACKAGE, **changes}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return code_hash((module,), root=root)


def step(**changes: Any) -> Step:
    fields = {"stage": "a", "spec": {"x": 1}, "inputs": {}, "modules": ("stages.errors",)}
    return Step(**{**fields, **changes})


def test_canonical_text_of_nested_dataclasses() -> None:
    here = f"{__name__}."
    assert canonical(Spec("s", Inner())) == (
        f'{{"class":"{here}Spec","inner":{{"class":"{here}Inner","rate":0.1}},'
        '"name":"s","steps":[1,2]}'
    )


def test_canonical_sorts_keys_and_keeps_floats_exact() -> None:
    assert canonical({"b": 1, "a": 0.1 + 0.2}) == '{"a":0.30000000000000004,"b":1}'
    assert canonical(1) != canonical(1.0) != canonical(True)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Path("x"), "pathlib"),
        (Colour.RED, "Colour"),
        (torch.float32, "torch.dtype"),
        (torch.zeros(1), "torch.Tensor"),
        ({1}, "builtins.set"),
        (Inner, "builtins.type"),
    ],
)
def test_what_has_no_lasting_text_is_refused_by_name(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=rf"value\.deep\[1\] is a .*{named}"):
        plain({"deep": [0, value]})


def test_odd_keys_and_nan_are_refused() -> None:
    with pytest.raises(TypeError, match="the key 1"):
        plain({1: 2})
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical(math.nan)


def test_key_is_32_digits_and_depends_on_every_part() -> None:
    assert len(step().key()) == 32
    int(step().key(), 16)
    assert step().key() == step(spec={"x": 1}).key()
    changed = [
        step(stage="b"),
        step(spec={"x": 2}),
        step(spec=Inner()),
        step(spec=Twin()),
        step(inputs={"a": "0" * 32}),
        step(modules=("stages.codings",)),
    ]
    assert len({s.key() for s in (step(), *changed)}) == 7


def test_classes_of_the_spec_bring_their_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inner, "__module__", "stages.energy")
    outer = step(spec={"list": [Spec("s", Inner())]})
    assert outer.code() == code_hash(("stages.errors", "stages.energy"))
    assert outer.code() != step().code()
    pinned = step(spec=Inner(), modules=())
    assert pinned.code() == code_hash(()), "what a digest pins does not depend on code"


@pytest.mark.parametrize(
    "changes",
    [
        {"stages/first.py": "from .codings import gated\ndef f( x ):  # why\n  return gated.f(x)"},
        {"stages/levels.py": '"""New."""\nimport stages.deep\nSTEP = (2)\n'},
        {"stages/other.py": "OTHER = 2\n"},
        {"unrelated.py": "1\n"},
    ],
)
def test_code_hash_ignores_form_and_what_is_not_imported(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    assert hash_of(tmp_path / "a", {}) == hash_of(tmp_path / "b", changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"stages/first.py": PACKAGE["stages/first.py"].replace(".f(x)", ".f(-x)")},
        {"stages/codings/gated.py": PACKAGE["stages/codings/gated.py"].replace("*", "/")},
        {"stages/levels.py": "import stages.deep\nSTEP = 3\n"},
        {"stages/levels.py": "import stages.deep\nSTEP = 2.0\n"},
        {"stages/deep.py": "DEEP = 2\n"},
        {"stages/codings/__init__.py": "import stages.other\n"},
        {"stages/__init__.py": "X = 1\n"},
    ],
)
def test_code_hash_sees_every_change_in_the_import_closure(
    tmp_path: Path, changes: dict[str, str]
) -> None:
    assert hash_of(tmp_path / "a", {}) != hash_of(tmp_path / "b", changes)


@pytest.mark.parametrize(
    "statement",
    [
        "import stages.other",
        "import stages.other as o",
        "from stages import other",
        "from stages.other import OTHER",
        "from . import other",
        "from .other import OTHER as o",
        "def f():\n    from stages import other",
        "if True:\n    from stages.codings import gated, late",
    ],
)
def test_every_form_of_import_is_followed(tmp_path: Path, statement: str) -> None:
    changes = {"stages/first.py": statement, "stages/codings/late.py": "from ..other import OTHER"}
    before = hash_of(tmp_path / "a", changes)
    assert before != hash_of(tmp_path / "b", {**changes, "stages/other.py": "OTHER = 2\n"})


def test_relative_import_in_a_package_starts_at_the_package(tmp_path: Path) -> None:
    changes = {"stages/codings/__init__.py": "from .gated import f"}
    before = hash_of(tmp_path / "a", changes, "stages.codings")
    changes["stages/deep.py"] = "DEEP = 2\n"
    assert before != hash_of(tmp_path / "b", changes, "stages.codings")


@pytest.mark.parametrize("test", ["TYPE_CHECKING", "typing.TYPE_CHECKING"])
def test_imports_for_type_checkers_do_not_count(tmp_path: Path, test: str) -> None:
    block = f"if {test}:\n    import stages.other\nelse:\n    import stages.deep\n"
    before = hash_of(tmp_path / "a", {"stages/first.py": block})
    other = {"stages/first.py": block, "stages/other.py": "OTHER = 2\n"}
    assert before == hash_of(tmp_path / "b", other)
    deep = {"stages/first.py": block, "stages/deep.py": "DEEP = 2\n"}
    assert before != hash_of(tmp_path / "c", deep)


@pytest.mark.parametrize("statement", ["import stages.gone", "from .gone import x"])
def test_missing_module_is_an_error(tmp_path: Path, statement: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=r"stages\.gone"):
        hash_of(tmp_path, {"stages/levels.py": statement})


def test_every_shipped_module_of_the_stages_can_be_hashed() -> None:
    folder = Path(stages.__file__).parent
    files = [f.relative_to(folder.parent).with_suffix("") for f in folder.rglob("*.py")]
    names = {".".join(f.parts).removesuffix(".__init__") for f in files}
    assert "stages.errors" in names
    assert all(len(code_hash((name,))) == 64 for name in names)


def test_an_outline_is_kept_by_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "first.py"
    file.write_text("from . import other\nX = 1\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    first = Outline.kept(file, "stages")
    assert first.members == ("stages.other",)
    kept = file.parent.joinpath("__pycache__").glob("first.*.outline.json")
    assert len([*kept]) == 1
    assert Outline.kept(file, "stages") == Outline.of(file.read_bytes(), file, "stages") == first
    same = file.stat().st_mtime_ns
    file.write_text("from . import other\nX = 2\n")
    os.utime(file, ns=(same, same))
    assert Outline.kept(file, "stages").tree != first.tree, "the time and the size are the same"


def test_a_damaged_outline_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "first.py"
    file.write_text("X = 1\n")
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    want = Outline.kept(file, "stages")
    (kept,) = file.parent.joinpath("__pycache__").glob("first.*.outline.json")
    for text in ("", "[]", "{}", '{"source": 1}'):
        kept.write_text(text)
        assert Outline.kept(file, "stages") == want
