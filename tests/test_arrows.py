"""The layout holds: who imports whom, no circle, short files, and folders that hold what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.arrows import (
    MOST_LINES,
    PACKAGES,
    Imports,
    circle,
    foreign,
    imports,
    long_files,
    no_codings,
    wrong_arrows,
)

ROOT = Path(__file__).parents[1]
# What each package still has to lose before it stands as the table says.
REASONS = {"pipeline": "run imports tables and tracking"}
packages = [
    "stages",
    *(
        pytest.param(package, marks=pytest.mark.xfail(reason=reason, strict=False))
        for package, reason in REASONS.items()
    ),
]


@pytest.fixture(scope="module")
def graph() -> Imports:
    return imports(ROOT)


@pytest.mark.parametrize("package", packages)
def test_nothing_imports_what_stands_above_it(graph: Imports, package: str) -> None:
    assert wrong_arrows(graph, package) == []


@pytest.mark.parametrize("package", packages)
def test_no_circle(graph: Imports, package: str) -> None:
    inside = {n: o for n, o in graph.items() if n.partition(".")[0] == package}
    assert circle(inside) == []


def test_stages_do_not_know_the_pipeline(graph: Imports) -> None:
    wrong = wrong_arrows(graph, "stages")
    assert [each for each in wrong if "imports pipeline" in each] == []
    assert foreign(ROOT) == []


@pytest.mark.parametrize(
    "folder",
    [
        "stages",
        "pipeline",
        pytest.param("tests", marks=pytest.mark.xfail(reason="three are longer", strict=False)),
    ],
)
def test_no_file_is_long(folder: str) -> None:
    assert long_files(ROOT / folder) == []


def test_a_folder_of_codings_holds_codings() -> None:
    assert no_codings(ROOT) == []


# --- the checks see what they are for --------------------------------------------------------------

HOUSE = {
    "stages/__init__.py": "",
    "stages/errors.py": "",
    "stages/api.py": "from stages import capture\n",
    "stages/capture.py": "def run():\n    from stages.ports.hooks import attached\n",
    "stages/ports/__init__.py": "",
    "stages/ports/hooks.py": "from ..errors import InputError\nimport stages.codings.one\n",
    "stages/codings/__init__.py": "",
    "stages/codings/base.py": "import stages.errors\n",
    "stages/codings/one.py": "import stages.codings.base\n\n@register('coding/one')\nclass One: ...\n",
    "stages/model/__init__.py": "",
    "stages/model/sites.py": "",
    "pipeline/__init__.py": "",
    "pipeline/run/__init__.py": "",
    "pipeline/run/runner.py": "import stages.api\nimport hydra\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    for name, text in HOUSE.items():
        plant(tmp_path, name, text)
    return tmp_path


def plant(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_a_house_in_order_is_seen_as_one(house: Path) -> None:
    graph = imports(house)
    assert graph["stages.ports.hooks"] == {"stages.errors", "stages.codings.one"}
    assert graph["stages.capture"] == {"stages.ports.hooks"}
    assert [wrong_arrows(graph, package) for package in PACKAGES] == [[], []]
    assert circle(graph) == []
    assert foreign(house) == no_codings(house) == long_files(house) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("stages/errors.py", "import stages.capture\n", "errors (ground) imports stages.capture"),
        (
            "stages/model/sites.py",
            "def find():\n    from stages.codings.one import One\n",
            "sites (model) imports stages.codings.one (codings)",
        ),
        (
            "stages/codings/base.py",
            "if TYPE_CHECKING:\n    from stages.ports import hooks\n",
            "base (codings) imports stages.ports.hooks (ports)",
        ),
        (
            "stages/codings/base.py",
            "if __name__ == '__main__':\n    import stages.api\n",
            "base (codings) imports stages.api (door)",
        ),
        (
            "stages/ports/hooks.py",
            "from .. import api\n",
            "hooks (ports) imports stages.api (door)",
        ),
        (
            "stages/ports/hooks.py",
            "module = importlib.import_module('stages.capture')\n",
            "hooks (ports) imports stages.capture (stage)",
        ),
        ("stages/api.py", "import pipeline.run.runner\n", "api (door) imports pipeline.run.runner"),
        ("stages/helpers.py", "", "stages.helpers stands on no floor"),
        ("stages/fits/search.py", "import stages.model.sites\n", "search (fits) imports"),
    ],
)
def test_an_arrow_upwards_is_seen(house: Path, name: str, text: str, message: str) -> None:
    plant(house, name, text)
    (wrong,) = wrong_arrows(imports(house), "stages")
    assert message in wrong


@pytest.mark.parametrize(
    "text",
    [
        "import stages.ports.hooks\n",
        "def late():\n    import stages.ports.hooks\n",
        "if TYPE_CHECKING:\n    from stages.ports.hooks import Hook\n",
    ],
)
def test_a_circle_is_seen(house: Path, text: str) -> None:
    plant(house, "stages/ports/port.py", text)
    plant(house, "stages/ports/hooks.py", "from stages.ports.port import Port\n")
    assert set(circle(imports(house))) == {"stages.ports.port", "stages.ports.hooks"}


def test_a_circle_of_folders_is_seen(house: Path) -> None:
    plant(house, "stages/fits/search.py", "import stages.neurons.phase\n")
    plant(house, "stages/neurons/phase.py", "")
    plant(house, "stages/neurons/ranges.py", "import stages.fits.bounds\n")
    plant(house, "stages/fits/bounds.py", "")
    assert set(circle(imports(house))) == {"stages.fits", "stages.neurons"}


def test_a_library_of_the_pipeline_a_helper_and_a_long_file_are_seen(house: Path) -> None:
    plant(house, "stages/capture.py", "def run():\n    from omegaconf import OmegaConf\n")
    assert foreign(house) == ["stages.capture imports omegaconf.OmegaConf"]
    plant(house, "stages/codings/helper.py", "@register('statistic/one')\nclass Helper: ...\n")
    assert no_codings(house) == ["helper.py"]
    plant(house, "pipeline/run/runner.py", "\n" * (MOST_LINES + 1))
    assert len(long_files(house / "pipeline")) == 1 and long_files(house / "stages") == []
