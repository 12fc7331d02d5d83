"""Neurons of the paper's released code: its `retrain.pth`, read, checked, and kept as a folder.

The file is a dict of `model.layers.I.SITE` and `model.norm.output` to tuples (number of grains, grain of
every step [T], output bases d [n], tau, reset bases h [n], threshold bases theta [n]), at softmax and SiLU
with a learned initial potential behind them. Step t of grain g weighs tau * base_g^-t, t = 1 ... T.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.codings.base import Coding
from stages.codings.multigrain import Multigrain
from stages.errors import InputError
from stages.fits.algorithm1 import Bases

ROLES = {
    "input_layernorm.output": "attn.in",
    "self_attn.q_Identity.input": "attn.q",
    "self_attn.k_Identity.input": "attn.k",
    "self_attn.v_Identity.input": "attn.v",
    "self_attn.softmax_Identity.input": "attn.probs",
    "self_attn.o_proj.input": "attn.out",
    "post_attention_layernorm.output": "mlp.in",
    "mlp.silu_Identity.input": "mlp.act",
    "mlp.down_proj.input": "mlp.down",
}
HEAD, UNUSED = (
    "model.norm.output",
    "mlp.up_proj.output",
)  # searched by the code, patched by none of it
LEARNED = ("attn.probs", "mlp.act")  # roles with an initial potential of their own
V0 = ("half_step", "learned")
KEY = re.compile(r"model\.layers\.(\d+)\.(.+)")
TENSORS, META = "neurons.safetensors", "paper.json"
AGAIN = "import-paper writes such a folder"


@dataclass(frozen=True)
class PaperNeurons:
    """Neurons by role and layer (-1: the head), their parameters those of `Multigrain`; `v0` is the
    `coding.v0` they run with."""

    roles: tuple[str, ...]
    layers: tuple[int, ...]
    timesteps: int
    grains: int
    v0: str
    params: dict[str, Tensor]

    def save(self, folder: Path) -> None:
        """Write the folder; InputError where it is not empty."""
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"import-paper: {folder} is not an empty folder; give another one")
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.params, folder / TENSORS)
        meta = {name: value for name, value in vars(self).items() if name != "params"}
        (folder / META).write_text(json.dumps(meta, indent=1))

    @classmethod
    def load(cls, folder: Path) -> PaperNeurons:
        """Read such a folder; InputError where it is none."""
        try:
            meta = json.loads((folder / META).read_text())
            params = load_file(folder / TENSORS)
            roles, layers = tuple(meta["roles"]), tuple(meta["layers"])
            settings = (meta["timesteps"], meta["grains"], meta["v0"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"fitting.neurons={folder} holds no imported neurons ({error}): {AGAIN}"
            ) from error
        return cls(roles, layers, *settings, params)

    def check(self, coding: Coding) -> None:
        """Raise InputError for a coding with other settings than these neurons have."""
        wanted = {"timesteps": self.timesteps, "grains": self.grains, "v0": self.v0, "tied": False}
        if type(coding) is not Multigrain:
            raise InputError(
                f"coding={coding.name} with fitting.neurons, which are neurons of multigrain: give "
                "coding=multigrain, or fitting.neurons=null"
            )
        if coding.channels or coding.centred or coding.quantile < 1:
            raise InputError(
                "coding.granularity, coding.quantile and coding.centre do not change neurons that are "
                "imported: give coding.granularity=site coding.quantile=1 coding.centre=none"
            )
        for name, value in wanted.items():
            if (got := getattr(coding, name)) != value:
                raise InputError(
                    f"coding.{name}={got} but the neurons of fitting.neurons have {value}: give "
                    f"{'timesteps' if name == 'timesteps' else f'coding.{name}'}={value}"
                )

    def rows(self, roles: tuple[str, ...], layers: tuple[int, ...]) -> Tensor:
        """The row of every site, [sites]; InputError where sites and neurons are not the same."""
        own = {place: row for row, place in enumerate(zip(self.roles, self.layers, strict=True))}
        asked = list(zip(roles, layers, strict=True))
        missing = [place for place in asked if place not in own]
        surplus = [place for place in own if place not in set(asked)]
        if missing or surplus:
            role, layer = (missing or surplus)[0]
            fault = "has no neuron" if missing else "is no site"
            raise InputError(
                f"fitting.neurons: {len(missing) + len(surplus)} sites differ, {role} of layer {layer} "
                f"{fault}: give sites=paper and the model of these {1 + max(self.layers)} layers"
            )
        return torch.tensor([own[place] for place in asked])


def read(file: Path, v0: str = "half_step") -> PaperNeurons:
    """Read a `retrain.pth`. `v0` half_step is tau 2^-(T+1) at every site, as its code evaluates; `learned`
    the file's at softmax and SiLU and zero elsewhere, as its code fits.

    Raises InputError for anything else than the format above. Executes nothing in the file.
    """
    if v0 not in V0:
        raise InputError(f"import-paper: v0={v0!r}: choose {' or '.join(V0)}")
    entries = _entries(file)
    places = {key: _place(key, file) for key in entries}
    layers = 1 + max((layer for _, layer in places.values()), default=-1)
    layers = min(layers, len(places))  # of more layers than entries some site is missing anyway
    expected = {(role, i) for i in range(layers) for role in ROLES.values()} | {("head.in", -1)}
    absent = sorted(expected - set(places.values()))
    if absent or layers == 0:
        role, layer = absent[0] if absent else ("attn.in", 0)
        raise InputError(
            f"{file}: {len(absent) or 1} of {len(expected)} sites are missing, {role} of layer {layer} "
            "the first: give the retrain.pth of a whole model"
        )
    order = sorted(
        entries, key=lambda key: (places[key][1] < 0, places[key][1], _rank(places[key]))
    )
    neurons = [_neuron(entries[key], f"{file}: {key}", places[key][0]) for key in order]
    for key, neuron in zip(order, neurons, strict=True):
        sizes = [(len(n["grain"]), len(n["d"])) for n in (neurons[0], neuron)]
        if sizes[0] != sizes[1]:
            raise InputError(
                f"{file}: {key} has T={sizes[1][0]} and n={sizes[1][1]}, {order[0]} T={sizes[0][0]} and "
                f"n={sizes[0][1]}: all sites must have the same"
            )
    roles, numbers = zip(*(places[key] for key in order), strict=True)
    table = {name: torch.stack([n[name] for n in neurons]) for name in neurons[0]}
    timesteps, grains = table["grain"].shape[1], table["d"].shape[1]
    name = "half_step" if v0 == "half_step" else "zero"
    return PaperNeurons(roles, numbers, timesteps, grains, name, _params(table, v0))


def _params(table: Mapping[str, Tensor], v0: str) -> dict[str, Tensor]:
    """Parameters of `Multigrain`, in units of tau."""
    bases = (table["d"], table["h"], table["theta"])
    d, h, theta, _ = Bases(*bases, True, table["grain"]).steps()
    half = torch.full_like(table["tau"], 2.0 ** -(d.shape[1] + 1))
    start = half if v0 == "half_step" else table["v0"] / table["tau"]
    params = {"scale": table["tau"], "v0": start, "d": d, "h": h, "theta": theta}
    names = ("base_d", "base_h", "base_theta")
    return params | dict(zip(names, bases, strict=True)) | {"grain": table["grain"].float()}


def _entries(file: Path) -> dict[str, Any]:
    """The tuples of a file by their keys, without those that the code does not use."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of how the file was pickled
            whole = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"import-paper: {file} does not exist") from None
    # What torch raises of other bytes is anything, and its text advises to load without care.
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            why = f"cannot be read: {error.strerror}"
            raise InputError(f"import-paper: {file} {why}") from error
        raise InputError(
            f"import-paper: {file} is damaged or no file of tensors and numbers alone: give the "
            "retrain.pth of the paper's repository"
        ) from error
    if not isinstance(whole, dict) or not whole or not all(isinstance(k, str) for k in whole):
        raise InputError(
            f"import-paper: {file} holds a {type(whole).__name__}, not neurons by the names of sites: "
            "give the retrain.pth of the paper's repository"
        )
    return {key: value for key, value in whole.items() if not key.endswith(UNUSED)}


def _place(key: str, file: Path) -> tuple[str, int]:
    """Role and layer of a key."""
    if key == HEAD:
        return "head.in", -1
    match = KEY.fullmatch(key)
    if match is None or match[2] not in ROLES:
        raise InputError(
            f"{file}: {key!r} is no site of the paper's code, as model.layers.0.{next(iter(ROLES))}"
        )
    return ROLES[match[2]], int(match[1])


def _rank(place: tuple[str, int]) -> int:
    return [*ROLES.values(), "head.in"].index(place[0])


def _neuron(entry: Any, where: str, role: str) -> dict[str, Tensor]:
    """The numbers of one tuple: grain [T], d, h, theta [n], tau [], v0 [] (zero where none is learned)."""
    size = 7 if role in LEARNED else 6
    if not isinstance(entry, tuple | list) or len(entry) != size:
        got = len(entry) if isinstance(entry, tuple | list) else type(entry).__name__
        raise InputError(f"{where}: got {got}, and a tuple of {size} is wanted")
    number, genotype, d, tau, h, theta = entry[:6]
    v0 = entry[6] if size == 7 else 0.0
    try:
        bases = {
            n: torch.as_tensor(b).float().flatten()
            for n, b in zip("dht", (d, h, theta), strict=True)
        }
        grain = torch.as_tensor(genotype, dtype=torch.long).flatten()
        count = int(torch.as_tensor(number))
        scale, start = (torch.as_tensor(x).float().reshape(()) for x in (tau, v0))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: no numbers where they are wanted ({error})") from error
    steps = grain.tolist()
    own = sorted(set(steps))
    if not steps or len(own) != count or own != list(range(len(own))) or sorted(steps) != steps:
        raise InputError(
            f"{where}: the grains {steps} of its steps do not count up from 0 to {count - 1}"
        )
    for name, base in bases.items():
        if len(base) != count or not bool((base > 1).all()) or not bool(base.isfinite().all()):
            raise InputError(
                f"{where}: the bases {name} are {base.tolist()}, and {count} above 1 are wanted"
            )
    if not float(scale) > 0 or not math.isfinite(float(scale)) or not math.isfinite(float(start)):
        raise InputError(
            f"{where}: tau={float(scale)} and v0={float(start)}, and a positive and a finite number are "
            "wanted"
        )
    return {
        "grain": grain,
        "d": bases["d"],
        "h": bases["h"],
        "theta": bases["t"],
        "tau": scale,
        "v0": start,
    }
