"""ptft_dist: one recipe, one loop, from one CPU to many nodes.

    import ptft_dist
    result = ptft_dist.train("recipe.yaml", {"optim.lr": 1e-4})

See ptft_dist.api. Nothing heavy is imported before a function is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptft_dist.api import (
        chat,
        checkpoints,
        compare,
        evaluate,
        evaluate_model,
        evaluate_on_benchmarks,
        export,
        generate,
        load_recipe,
        merge,
        missing_offline,
        predict,
        prefetch,
        prepare,
        report,
        score,
        train,
        train_tokenizer,
    )
    from ptft_dist.run import Result

__version__ = "0.1.0"
__all__ = [
    "Result",
    "__version__",
    "chat",
    "checkpoints",
    "compare",
    "evaluate",
    "evaluate_model",
    "evaluate_on_benchmarks",
    "export",
    "generate",
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
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("ptft_dist.run" if name == "Result" else "ptft_dist.api"), name)
