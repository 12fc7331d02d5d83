"""Which model a configuration means, what it is called, and whose config it has."""

from pathlib import Path

import pytest
import yaml

from stages.errors import InputError
from stages.model.sources import ModelOrigin, PackageFile
from stages.model.spec import ModelSpec, folder_name

CONF = Path(__file__).parents[2] / "conf" / "model"
FILE = PackageFile("p", "1", "m", "0" * 64)
DIMS = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
PACKAGED = ModelOrigin("packaged", FILE, None)
ON_HUB = ModelOrigin("published", None, "org/Published-7b-hf")


def spec(**fields):
    none = dict.fromkeys(("name", "path", "hub", "revision", "device_map"))
    return ModelSpec(**{**none, "dtype": "float32", "dims": DIMS, "origin": PACKAGED, **fields})


def sources(model):
    return {n: getattr(model, n) for n in ("path", "hub", "gguf") if getattr(model, n) is not None}


@pytest.mark.parametrize("origin", [PACKAGED, ON_HUB, None])
def test_a_given_source_wins_over_that_of_the_yaml(origin, tmp_path):
    folder = tmp_path / "Mine-1b"
    folder.mkdir()
    local, hub = spec(path=str(folder), origin=origin), spec(hub="org/Other-1b", origin=origin)
    assert sources(local) == {"path": str(folder)} and local.name == "Mine-1b"
    assert sources(hub) == {"hub": "org/Other-1b"} and hub.name == "Other-1b"
    assert local.dims == hub.dims == {}  # they are another model's
    assert spec(path=str(folder), origin=origin, name="mine").name == "mine"


def test_without_one_the_model_is_that_of_the_yaml():
    assert sources(spec()) == {"gguf": FILE} and spec().name == "packaged"
    for model in (spec(origin=ON_HUB), spec(origin=ON_HUB, hub=ON_HUB.hub, revision="v2")):
        assert sources(model) == {"hub": "org/Published-7b-hf"}
        assert model.name == "published" and model.dims == DIMS
    assert spec(origin=None).name == "llama" and not sources(spec(origin=None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "got 'int8', needs one of float32, bfloat16, float16"),
        ({"origin": None, "dims": {}}, "model.path=FOLDER"),
        ({"dims": {"hidden_size": 8}}, "model_type"),
        ({"path": "/no/such/folder"}, "/no/such/folder is not a folder"),
        ({"path": "/", "hub": "org/m"}, "model.path=/ and model.hub=org/m: give one of the two"),
        ({"path": ""}, "model.path='': give a text"),
        ({"hub": ""}, "model.hub='': give a text"),
        ({"name": 7.0}, "model.name=7.0: give a text, in quotes"),
        ({"path": "/", "revision": "v2"}, "model.revision=v2: / does not come from the hub"),
        ({"revision": "v2"}, "model.revision=v2: packaged does not come from the hub"),
        ({"begin": "<bos>"}, "model.begin='<bos>': give the id of a token, or null"),
        ({"positions": "many"}, "model.positions='many': give the number of tokens"),
        ({"positions": 1}, "model.positions=1: give the number of tokens"),
    ],
)
def test_a_model_spec_checks_itself(fields, message):
    with pytest.raises(InputError, match=message):
        spec(**fields)


def test_an_origin_has_one_place():
    with pytest.raises(InputError, match="give gguf or hub"):
        ModelOrigin("m", FILE, "org/m")


@pytest.mark.parametrize("fields", [{"hub": "org/m"}, {"origin": ModelOrigin("m", None, "org/m")}])
def test_an_id_that_is_a_folder_here_is_refused(fields, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert spec(**fields).hub == "org/m"
    (tmp_path / "org/m").mkdir(parents=True)
    with pytest.raises(InputError, match="model.hub=org/m is a folder here: give model.path=org/m"):
        spec(**fields)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/data/Llama-2-7b-hf", "Llama-2-7b-hf"),
        ("/data/mine/", "mine"),
        ("/data/mine/../other/.", "other"),
        ("mine", "mine"),
        ("~/mine", "mine"),
        (".", Path.cwd().name),
        ("/c/models--org--Some--Net-7b/snapshots/0123abcd", "Net-7b"),
        ("/c/snapshots/0123abcd", "0123abcd"),
    ],
)
def test_a_model_is_called_after_its_folder(path, name):
    assert folder_name(path) == name


def test_the_config_is_that_of_the_source(tmp_path, tiny_llama):
    assert spec().config().hidden_size == 16
    tiny_llama.config.save_pretrained(tmp_path)
    assert spec(path=str(tmp_path)).config().hidden_size == 32
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no config.json"):
        spec(path=str(tmp_path)).config()


def test_every_yaml_says_where_its_model_comes_from():
    for file in CONF.glob("*.yaml"):
        fields = yaml.safe_load(file.read_text())
        assert fields["origin"]["name"] == file.stem
        assert (fields["origin"]["gguf"] is None) != (fields["origin"]["hub"] is None)
        given = ("name", "path", "hub", "revision", "positions")
        assert {fields[name] for name in given} == {None}
