"""What a hub publishes for the tests: a sharded model, and texts as the data sets of conf/corpus are
laid out, by ids, configs, splits and layouts of files."""

from __future__ import annotations

import gzip
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from tests.hub import Hub, Repository

LLAMA, WIKITEXT, C4 = "meta-llama/Llama-2-7b-hf", "Salesforce/wikitext", "allenai/c4"
PIQA = "baber/piqa"  # that lm-eval's task reads
PTB, PILE = "ptb-text-only/ptb_text_only", "NeelNanda/pile-10k"
READER = {"HF_TOKEN": "reader"}  # has access to what is gated
SHARD = "model-00002-of-00004.safetensors"
C4_SHARD = "c4-validation.00001-of-00008.json.gz"


def sharded(folder: Path, out: Path) -> dict[str, bytes]:
    """The files of a saved model, its weights in four shards."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, max_shard_size="40KB")
    files = {path.name: path.read_bytes() for path in [*folder.iterdir(), *out.iterdir()]}
    assert len([name for name in files if name.startswith("model-")]) == 4
    del files["model.safetensors"]
    return files


def publish_texts(hub: Hub) -> None:
    """WikiText-2, C4, PTB and the Pile, small, with documents that no two share."""
    hub.repository("datasets", WIKITEXT).commit(wikitext(1))
    rows = documents(3, 1300, 40)  # 1100 of which are read, the last from another shard
    shards = {"train.00000-of-01024": documents(4, 1300, 40), "train.00001-of-01024": ["more"]}
    shards |= {"validation.00000-of-00008": rows[:1000], "validation.00001-of-00008": rows[1000:]}
    card = _card({"en": {"train": "en/c4-train.*", "validation": "en/c4-validation.*"}})
    hub.repository("datasets", C4).commit(
        card | {f"en/c4-{name}.json.gz": _lines(text) for name, text in shards.items()}
    )
    ptb = hub.repository("datasets", PTB)
    ptb.commit({"README.md": b"# Penn Treebank", "ptb_text_only.py": b"import datasets"})
    splits = {"test": documents(5), "train": documents(6), "validation": documents(7)}
    tables = {f"penn_treebank/{s}/0000.parquet": _table(t, "sentence") for s, t in splits.items()}
    ptb.commit(tables, "refs/convert/parquet")
    hub.repository("datasets", PILE).commit(
        {
            "README.md": b"---\nlicense: other\n---\n# Pile 10k",
            "data/train-00000-of-00001-4746b8785c874cc7.parquet": _table(documents(8, 4100)),
        }
    )


def wikitext(seed: int) -> dict[str, bytes]:
    """The files of a commit of WikiText: two configs, of which one is read."""
    long, short = "wikitext-103-raw-v1", "wikitext-2-raw-v1"
    splits = {"test": [f"{row}\n" for row in documents(seed)], "train": documents(seed + 100)}
    files = {f"{short}/{s}-00000-of-00001.parquet": _table(rows) for s, rows in splits.items()}
    other = {f"{long}/test-00000-of-00001.parquet": _table(["of the other config"])}
    configs = {name: {s: f"{name}/{s}-*" for s in splits} for name in (short,)}
    return _card({long: {"test": f"{long}/test-*"}} | configs) | files | other


def documents(seed: int, number: int = 60, letters: int = 240) -> list[str]:
    """Rows of text; those of 200 characters or more may not be in two texts of a run."""
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefghij ", k=letters)) for _ in range(number)]


def gated_text(hub: Hub) -> Repository:
    """A data set that only a reader may read."""
    made = hub.repository("datasets", "org/gated-text", gated=True, readers={"reader"})
    tables = {f"data/{name}-0.parquet": _table(documents(9)) for name in ("train", "test")}
    made.commit({"README.md": b"# Gated"} | tables)
    return made


def questions(number: int) -> dict[str, bytes]:
    """The files of a commit of PIQA: other questions for another number."""
    draw = random.Random(number)
    words = ["".join(draw.choices("abcdefghij", k=6)) for _ in range(24)]
    rows = [{"goal": w, "sol1": w[:3], "sol2": w[3:], "label": ord(w[0]) % 2} for w in words]
    files = {}
    for split in ("train", "validation"):
        stream = io.BytesIO()
        parquet.write_table(pa.Table.from_pylist(rows), stream)
        files[f"data/{split}-00000-of-00001.parquet"] = stream.getvalue()
    return {"README.md": b"# PIQA"} | files


def _table(rows: Sequence[str], field: str = "text") -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pa.table({field: list(rows)}), stream)
    return stream.getvalue()


def _lines(rows: Sequence[str]) -> bytes:
    text = "".join(json.dumps({"text": row, "url": "https://example.org"}) + "\n" for row in rows)
    return gzip.compress(text.encode())


def _card(configs: dict[str, dict[str, str]]) -> dict[str, bytes]:
    """A README.md whose head says which files are the splits of a config."""
    lines = ["---", "configs:"]
    for name, splits in configs.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        for split, path in splits.items():
            lines += [f"  - split: {split}", f"    path: {path}"]
    return {"README.md": "\n".join([*lines, "---", "# Card", ""]).encode()}
