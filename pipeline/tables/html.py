"""Tables in HTML: pandas' Styler sets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pipeline.tables.sheet import Sheet

RULE = "border-top: 1px solid #d6dbe0"


def styled(sheet: Sheet, name: str) -> str:
    """A sheet as a page shows it: the best in bold, words left, a rule where a section begins.

    `name` is in the ids of its cells, which no other table of the page has.
    """
    # numbers, which are not shown, tell columns of one head apart
    heads = [(column.group, place, column.head) for place, column in enumerate(sheet.columns)]
    frame = pd.DataFrame(sheet.texts(), columns=pd.MultiIndex.from_tuples(heads), dtype=object)
    grouped = any(column.group for column in sheet.columns)
    styler = frame.style.hide(axis="index").hide(axis="columns", level=[1] if grouped else [0, 1])
    bold = np.where(np.array(sheet.bold(), bool).reshape(frame.shape), "font-weight: bold", "")
    looks: list[Any] = [
        {"selector": f".col{place}", "props": "text-align: left"}
        for place, column in enumerate(sheet.columns)
        if column.words
    ]
    looks += [
        {"selector": f"td.row{place}", "props": RULE}
        for place, start in enumerate(sheet.starts())
        if start
    ]
    text: str = (
        styler.format(escape="html")
        .format_index(escape="html", axis="columns")
        .apply(lambda _: bold, axis=None)
        .set_table_styles(looks)
        .set_uuid(name)
        .to_html()
    )
    return text


def plain(frame: pd.DataFrame) -> str:
    """A frame of texts."""
    styler = frame.style.hide(axis="index").format(escape="html")
    return str(styler.to_html(exclude_styles=True))
