"""Models small enough to compute by hand with, a tokenizer, and neurons fitted to them.

Kernels run eagerly: compiling takes longer than everything that the tests compute.
"""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from xdist.scheduler import LoadFileScheduling

from pipeline.run import hardware
from stages.capture import Capture
from stages.codings.base import Coding
from stages.compiler import use_compiler
from stages.distribution import Distribution
from stages.energy import Energy
from stages.fits.algorithm1 import Algorithm1
from stages.fitted import Conversion
from stages.fitting import Fitting
from stages.model.sites import ROLES, SiteSelection, find_sites, select
from stages.statistics import measuring

TINY = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 49,
}
SLIDING_WINDOW = 5
TESTS = Path(__file__).parent
CONF = TESTS.parent / "conf"
LONGEST = (
    "test_real.py",
    "pipeline/run/test_experiments.py",
    "ports/test_compiled.py",
    "pipeline/run/test_hub_runs.py",
    "pipeline/run/test_parallel.py",
    "pipeline/commands/test_main.py",
    "pipeline/tracking/test_tracking_server.py",
    "pipeline/tables/test_paper_files.py",
    "pipeline/run/test_config.py",
    "pipeline/run/test_faults.py",
    "test_docs.py",
    "pipeline/commands/test_report.py",
    "pipeline/run/test_jobs.py",
    "pipeline/run/test_overrides.py",
    "pipeline/run/test_runner.py",
    "pipeline/run/test_failures.py",
    "ports/test_stepped.py",
)


# Folders whose files share what takes long to make.
TOGETHER = ("pipeline/tables", "pipeline/tracking")


class _Scheduling(LoadFileScheduling):
    """Gives a worker a whole file, or a whole folder of those that are TOGETHER."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return next((name for name in TOGETHER if f"/{name}/" in file), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling | None:
    return _Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: short ones fill the other worker, and none is left with a long one."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.relative_to(TESTS).as_posix(), len(ranks)))


@pytest.fixture(scope="module", autouse=True)
def no_garbage() -> None:
    """What is imported by now is none: collections look at what the tests of a file make."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def eager_fixtures() -> None:
    """What modules and sessions share is made before `eager_kernels` of a test."""
    use_compiler(False)


@pytest.fixture(autouse=True)
def eager_kernels() -> Iterator[None]:
    use_compiler(False)
    yield
    use_compiler(False)


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, 0 to 255, and <s> 256, </s> 257; it adds neither by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """Two layers of grouped-query attention with random weights, head and embedding tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.5,
        bos_token_id=256,
        eos_token_id=257,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


UNGROUPED = {"head_dim": None, "num_key_value_heads": None}  # their configurations have neither
# What the real classes of each family need beside TINY.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": SLIDING_WINDOW},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": SLIDING_WINDOW, "query_pre_attn_scalar": 10}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"head_dim": 6, "sliding_window": SLIDING_WINDOW}
    | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.7}
    },
    "opt": {"ffn_dim": 40, "word_embed_proj_dim": 24} | UNGROUPED,
    "gpt_neox": UNGROUPED,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"mlp_only_layers": [0]},
}


def _tiny(kind: str = "llama", seed: int = 0, attention: str = "eager", **more: Any) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(TINY | FAMILIES[kind] | more))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases start as ones and zeros, which hides mistakes
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """Makes a random model of one of the FAMILIES: grouped heads, biases, sliding windows."""
    return _tiny


@pytest.fixture(params=FAMILIES)
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model of every family in turn."""
    made: PreTrainedModel = _tiny(request.param)
    return made


@pytest.fixture
def model() -> PreTrainedModel:
    return _tiny()


@pytest.fixture(scope="session")
def tokens() -> Callable[..., Tensor]:
    """Makes random ids [rows, length] without special tokens."""

    def draw(rows: int, length: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 48, (rows, length), generator=generator)

    return draw


@pytest.fixture(scope="session")
def energy() -> Energy:
    """The costs of an operation in 45 nm."""
    return hardware.energy()


@pytest.fixture(scope="session")
def convert(tokens: Callable[..., Tensor]) -> Callable[..., Conversion]:
    """Fits a coding to a tiny model on 4 windows of 16 random tokens, as the pipeline does."""

    def fit(model: PreTrainedModel, coding: Coding, roles: tuple[str, ...] = ROLES) -> Conversion:
        sites = select(find_sites(model), SiteSelection(roles))
        ids = tokens(4, 16, seed=1)
        sketches = Capture().run(model, ids, sites, batch=4)
        quick: Any = coding
        if coding.trained:
            few = Algorithm1(rounds=1, neuron_steps=3, base_steps=3)
            quick = replace(quick, algorithm1=few)
        densities = Distribution(atoms=64).run(sketches)
        statistics = {s.name: measuring(s)(model, ids, sites, 4) for s in quick.statistics}
        return Conversion(quick, Fitting("atoms", 1, 0).run(densities, quick, statistics))

    return fit
