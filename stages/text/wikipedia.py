"""Plain text from a dump of Wikipedia."""

from __future__ import annotations

import bz2
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from stages.errors import InputError

if TYPE_CHECKING:
    from mwparserfromhell.nodes import Node

SPLITS = ("calibration", "evaluation")
_APPENDICES = re.compile(
    r"^==\s*(see also|references|notes|footnotes|citations|sources|bibliography|further reading"
    r"|external links)\s*==",
    re.MULTILINE | re.IGNORECASE,
)
_NOT_PROSE_TAGS = {"ref", "table", "gallery", "math", "timeline", "imagemap"}
# Pictures, categories and links to other languages; "CSI: Miami" is none of them.
_NOT_PROSE_LINK = re.compile(r"\s*:?((?i:file|image|category):|[a-z]{2,3}(-[a-z]+)*:\S)")


def extract_wikipedia(dump: Path, out: Path) -> None:
    """Write the articles of a dump to calibration.jsonl and evaluation.jsonl in the folder `out`.

    A line is {"title", "text"}. Which file an article goes to depends on its title alone, so
    no article is in both, and another dump splits its articles in the same way.
    """
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((out / f"{name}.jsonl").open("w", encoding="utf-8"))
            for name in SPLITS
        }
        for title, markup in _articles(dump):
            text = clean(markup)
            if text:
                files[split_of(title)].write(
                    json.dumps({"title": title, "text": text}, ensure_ascii=False) + "\n"
                )


def split_of(title: str) -> str:
    """Return the half an article belongs to, by the first byte of the SHA-256 of its title."""
    return SPLITS[hashlib.sha256(title.encode()).digest()[0] % 2]


def clean(markup: str) -> str:
    """Extract the prose of one article, paragraphs separated by an empty line.

    Templates, tables, references, formulas, pictures and the lists of literature and links at
    the end are dropped; headings stay.
    """
    import mwparserfromhell

    code = mwparserfromhell.parse(_APPENDICES.split(markup, maxsplit=1)[0])
    for node in code.filter(matches=_is_not_prose):
        with suppress(ValueError):  # it went with a node around it
            code.remove(node)
    lines = (" ".join(line.split()) for line in code.strip_code().splitlines())
    return "\n\n".join(line for line in lines if line)


def _is_not_prose(node: Node) -> bool:
    from mwparserfromhell.nodes import Tag, Wikilink

    if isinstance(node, Tag):
        return str(node.tag).strip().lower() in _NOT_PROSE_TAGS
    return isinstance(node, Wikilink) and _NOT_PROSE_LINK.match(str(node.title)) is not None


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of every page that is an article, in the order of the dump."""
    try:
        with bz2.open(dump) as stream:
            for _, element in ElementTree.iterparse(stream):
                if not element.tag.endswith("}page"):
                    continue
                if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                    yield (
                        element.findtext("{*}title", ""),
                        element.findtext("{*}revision/{*}text", ""),
                    )
                element.clear()  # or the whole dump stays in memory
    except (OSError, EOFError, ElementTree.ParseError) as error:
        raise InputError(
            f"{dump.name} is not a complete bz2 dump of MediaWiki pages: {error}"
        ) from error
