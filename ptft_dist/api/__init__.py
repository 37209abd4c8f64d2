"""The Python API. The commands of `ptft` are thin wrappers of these functions.

    import ptft_dist
    result = ptft_dist.train("recipe.yaml", {"optim.lr": 1e-4})
    result.metrics["eval/loss"], result.model

The functions raise the errors of `ptft_dist.errors`. `train` and `evaluate` restore signal handlers, library verbosity,
PyTorch's random state and Accelerate's state. They also work in threads; there, only the stop file can stop a run.
"""

from __future__ import annotations

from ptft_dist.api.calls import Overrides, Source
from ptft_dist.api.data import (
    input_fingerprint,
    inspect_data,
    missing_offline,
    prefetch,
    prepare,
    train_tokenizer,
    verify_data,
)
from ptft_dist.api.judging import evaluate, evaluate_model, evaluate_on_benchmarks, predict
from ptft_dist.api.models import chat, generate, merge, score
from ptft_dist.api.recipes import convert, load_recipe, values_of_environment
from ptft_dist.api.runs import checkpoints, compare, export, report
from ptft_dist.api.training import train

__all__ = [
    "Overrides",
    "Source",
    "chat",
    "checkpoints",
    "compare",
    "convert",
    "evaluate",
    "evaluate_model",
    "evaluate_on_benchmarks",
    "export",
    "generate",
    "input_fingerprint",
    "inspect_data",
    "load_recipe",
    "merge",
    "missing_offline",
    "predict",
    "prefetch",
    "prepare",
    "report",
    "score",
    "train",
    "train_tokenizer",
    "values_of_environment",
    "verify_data",
]
