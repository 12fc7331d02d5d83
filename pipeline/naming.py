"""File names of tables, figures and reports: no two configurations share one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

# Overrides of these say where and how results are made, not what they are; a name has its experiment.
CIRCUMSTANCES = re.compile(
    r"[+~]*((store|runtime|tracking|export|hydra)\b|experiment=|(table|study)\.(fill|folder)=)"
)
LONGEST = 48  # characters of overrides that stay readable in a name; of others their hash is taken


def stem(base: str, overrides: Iterable[str], model: str) -> str:
    """`base`, behind it the model and the overrides that a command line gave beside those of `base`.

    Overrides that a file name has no room or no letters for become a hash: `quickstart`,
    `quickstart_gemma3-270m`, `quickstart_timesteps=8`, `quickstart_<model>_3f2a9c01`.
    """
    told = sorted({each for each in overrides if not CIRCUMSTANCES.match(each)})
    chosen = [each.removeprefix("model=") for each in told if each.startswith("model=")]
    rest = [each for each in told if not each.startswith("model=")]
    if not chosen and any(re.match(r"[+~]*model\.", each) for each in rest):
        chosen = [model]
    parts = [base, *(_letters(name) for name in chosen)]
    text = "_".join(rest)
    if len(text) <= LONGEST and re.fullmatch(r"[\w.=,-]*", text):
        parts += [text.replace(",", "+")] * bool(text)
    else:
        parts.append(hashlib.sha256("\n".join(rest).encode()).hexdigest()[:8])
    return "_".join(parts)


def _letters(name: str) -> str:
    return re.sub(r"[^\w.-]+", "+" if "," in name else "-", name).strip("-+")
