"""What each start does first, done once by the server that forks the tests' processes.

Libraries keep compiled patterns, looked up types and lines of source files, so that each start needs less time. Nothing
here starts a thread or draws a random number.
"""

from __future__ import annotations

import ctypes
import importlib
import linecache
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from support import make_recipe
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data.datapipes.datapipe import IterDataPipe, MapDataPipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ptft_dist.cli import VERBS, command
from ptft_dist.config.data_section import Source
from ptft_dist.config.load import read_recipe
from ptft_dist.config.named_models import named_models
from ptft_dist.config.tokenizer_section import TokenizerSection, TokenizerTraining
from ptft_dist.run import libraries_restored
from ptft_dist.tasks.protocol import Batch
from ptft_dist.tasks.registry import recipe_class
from ptft_dist.training.batches import UpdateDataset

LATE_IMPORTS = (
    "tensorboard.plugins.hparams.api_pb2",
    "tensorboard.plugins.hparams.metadata",
    "torch.utils.serialization.config",
)
IN_TRACES = (
    *("multiprocessing.process", "multiprocessing.spawn", "support"),
    *("torch._compile", "torch._dynamo.eval_frame", "torch.cuda.random", "torch.random"),
    *("torch.mtia", "torch.xpu", "torch.xpu.random"),
    *("ptft_dist.cli", "ptft_dist.cli.train", "ptft_dist.networks.load", "ptft_dist.session"),
    *("ptft_dist.session.trained_network", "typer._click.core", "typer.core", "typer.main"),
)
"""Modules whose lines torch.manual_seed reads, which keeps a trace of its caller."""


def rehearse() -> None:
    keep_memory()
    forget_levels_where_known()
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    for module in IN_TRACES:
        linecache.getlines(str(sys.modules[module].__file__))
    for section in (Source, TokenizerSection, TokenizerTraining):
        section.model_rebuild()
    read_command_lines()
    recipe = make_recipe(Path("text.txt"))
    loaded = read_recipe(recipe, ["train.seed=1"], recipe_class())
    named_models(loaded.recipe)
    assert loaded.resolved
    for kind in (type(None), bool, int, float, str, list, Batch):
        assert not issubclass(kind, Mapping)  # the answer is kept; it takes a look at each of a hundred mappings
    for kind in (IterDataPipe, MapDataPipe):
        assert not issubclass(UpdateDataset, kind)
    with tempfile.TemporaryDirectory() as folder, libraries_restored():
        read_tokenizer(Path(folder))
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**recipe["model"]["config"]))


def keep_memory() -> None:
    """Tell malloc to keep freed memory. Otherwise each large tensor gets new pages, which the kernel clears."""
    trim_threshold, mmap_threshold, much = -1, -3, 1 << 30  # mallopt(3)
    libc = ctypes.CDLL(None)
    libc.mallopt(trim_threshold, much)
    libc.mallopt(mmap_threshold, much)


def forget_levels_where_known() -> None:
    """Let Logger.setLevel clear what loggers know of levels where they know something. A thousand know nothing."""
    knowing: set[logging.Logger] = set()
    ask = logging.Logger.isEnabledFor

    def is_enabled_for(logger: logging.Logger, level: int) -> bool:
        knowing.add(logger)
        return ask(logger, level)

    def clear_cache(_: logging.Manager) -> None:
        for logger in knowing:
            logger._cache.clear()  # type: ignore[attr-defined]
        knowing.clear()

    logging.Logger.isEnabledFor = is_enabled_for  # type: ignore[method-assign]
    logging.Manager._clear_cache = clear_cache  # type: ignore[attr-defined]


def read_command_lines() -> None:
    for verb, *_ in VERBS:
        built = command(verb)
        with built.make_context("ptft", [verb], resilient_parsing=True) as context:
            own = built.get_command(context, verb)  # type: ignore[attr-defined]
            for parameter in (*built.params, *own.params):
                if hasattr(parameter, "get_runtime_param"):
                    parameter.get_runtime_param()


def read_tokenizer(folder: Path) -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0}, "[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
