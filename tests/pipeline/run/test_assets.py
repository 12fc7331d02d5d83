import hashlib
import subprocess
import zipfile

import pytest

from pipeline.run.assets import Asset, content, fetch_all
from pipeline.store.store import Store
from stages.errors import InputError
from stages.model.sources import PackageFile, SplitFile

FILES = {"tiny_asset/one.bin": b"one" * 1000, "tiny_asset/data-7.txt": b"seven"}


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A wheel index of one package, for the real pip; the list of calls that pip got."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_asset-1.0-py3-none-any.whl", "w") as wheel:
        info = "tiny_asset-1.0.dist-info/"
        tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        metadata = "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n"
        records = {info + "METADATA": metadata, info + "WHEEL": tags, info + "RECORD": ""}
        for name, data in {**FILES, **records}.items():
            wheel.writestr(name, data)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    calls, real = [], subprocess.run

    def run(command, **options):
        if "pip" in command:
            calls.append(command)
        return real(command, **options)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def file(member, version="1.0", sha256=None):
    found = [data for name, data in FILES.items() if name == member]
    digest = sha256 or hashlib.sha256(found[0] if found else b"").hexdigest()
    return PackageFile("tiny-asset", version, member, digest)


def test_a_file_is_downloaded_once_and_the_wheel_is_gone(downloads, store, caplog):
    with caplog.at_level("INFO"):
        first = Asset.of(file("tiny_asset/one.bin")).build(store, None)
        again = Asset.of(file("tiny_asset/one.bin")).build(store, None)
    assert caplog.messages == ["downloading tiny-asset 1.0 from the package index"]
    assert content(first).read_bytes() == FILES["tiny_asset/one.bin"]
    assert (first.hit, again.hit, first.key == again.key) == (False, True, True)
    assert len(downloads) == 1
    assert not list(store.root.rglob("*.whl"))


def split(sha256=None):
    """The two members of the wheel as the parts of one file."""
    parts = [("tiny-asset", member) for member in FILES]
    digest = sha256 or hashlib.sha256(b"".join(FILES.values())).hexdigest()
    return SplitFile("tiny-whole", "1.0", "whole.bin", digest, parts, "be kind")


def test_the_parts_of_a_file_are_joined_and_its_terms_told_once(downloads, store, caplog):
    for _ in range(2):
        found = content(Asset.of(split()).build(store, None))
    assert (found.name, found.read_bytes()) == ("whole.bin", b"".join(FILES.values()))
    assert [record.message for record in caplog.records] == ["tiny-whole 1.0: be kind"]


def test_parts_that_do_not_join_to_the_pinned_file_are_refused(downloads, store):
    with pytest.raises(InputError, match="sha256 got .* expected 000"):
        Asset.of(split("0" * 64)).build(store, None)
    assert not list(store.root.glob("asset/[!.]*"))


def test_two_files_of_a_wheel_need_one_download(downloads, store):
    artifacts = fetch_all([file(name) for name in FILES], store)
    assert [content(a).read_bytes() for a in artifacts] == list(FILES.values())
    assert len(downloads) == 1


def test_a_glob_finds_the_member(downloads, store):
    digest = hashlib.sha256(b"seven").hexdigest()
    artifact = Asset.of(file("tiny_asset/data-*.txt", sha256=digest)).build(store, None)
    assert content(artifact).name == "data-7.txt"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            file("tiny_asset/one.bin", sha256="a" * 64),
            f"got {hashlib.sha256(FILES['tiny_asset/one.bin']).hexdigest()}, expected {'a' * 64}",
        ),
        (file("tiny_asset/one.bin", version="2.0"), "tiny-asset==2.0.*model.path=FOLDER"),
        (file("tiny_asset/*", sha256="a" * 64), "2 files match"),
        (file("absent", sha256="a" * 64), "0 files match"),
    ],
)
def test_what_is_not_the_pinned_file_is_one_line_and_leaves_nothing(
    downloads, store, wrong, message
):
    with pytest.raises(InputError, match=message) as error:
        Asset.of(wrong).build(store, None)
    assert "\n" not in str(error.value)
    assert not list(store.root.glob("asset/*"))


@pytest.mark.parametrize(
    "fields",
    [("p", "1.0", "m", "abc"), ("p", ">=1.0", "m", "0" * 64), ("p q", "1.0", "m", "0" * 64)],
)
def test_a_package_file_is_pinned_exactly(fields):
    with pytest.raises(InputError, match="got"):
        PackageFile(*fields)
