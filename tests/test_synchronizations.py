"""A task's loss never waits for the device: an update has one wait, in which all ranks learn loss, norm and stop.

On a CPU nothing waits, so the operations that would are counted: those whose result a program must read before it can
go on.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import make_recipe, make_store, make_trainer, ragged
from task_support import make_task
from tiny import BERT, TINY, write_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from ptft_dist.api import load_recipe, prepare
from ptft_dist.data.tokenizer import load_tokenizer
from ptft_dist.networks.load import build_config, build_model
from ptft_dist.tasks.protocol import TaskSetup
from ptft_dist.tasks.registry import task_class

WAITING = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::is_nonzero",
    "aten::equal",
    "aten::unique_dim",
    "aten::_unique2",
}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
THEIRS = "transformers/masking_utils.py"
"""transformers asks in every forward pass whether a mask hides anything, or whether rows are packed."""


class Waits(TorchDispatchMode):
    """Where the program would wait: the innermost line of ours or of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        masks = [i for i in args[1] if i is not None and i.dtype == torch.bool] if name in INDEXING else []
        if name in WAITING or masks:
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()]
            known = [line for line in lines if "ptft_dist/" in line or "transformers/" in line]
            self.places.append(known[-1] if known else lines[0])
        return func(*args, **(kwargs or {}))


def test_the_count_sees_what_waits() -> None:
    x = torch.tensor([1.0, 2.0])
    with Waits() as waits:
        x[x > 1].sum().item()
        x.sum() * 2
    assert len(waits.places) == 2  # a boolean index, and a number that is read


@pytest.mark.parametrize("task", ["clm", "mlm", "mlm packed", *TINY])
def test_no_task_waits_in_its_loss(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    monkeypatch.setenv("PTFT_CACHE", str(cache))
    name, packed = task.partition(" ")[0], "packed" in task
    path = write_tiny(tmp_path, name if name in TINY else "mlm_nsp")
    changes: dict[str, Any] = {}
    if name not in TINY:  # they read the same documents as mlm_nsp
        changes = {"task": name, "mlm_nsp": {}, name: {"packing": packed}}
        if name == "clm":
            changes["model.config"] = {**BERT, "model_type": "llama"}
    recipe = load_recipe(str(path), changes).recipe
    prepared = prepare(str(path), changes)
    tokenizer = load_tokenizer(prepared.tokenizer_path)
    setup = TaskSetup.of(recipe, tokenizer, prepared.survey, tmp_path)
    cls = task_class(name)
    config = build_config(recipe.model, tokenizer, recipe.data.max_length, cls.config_settings(setup))
    cls.fit_config(setup, config)
    model = build_model(recipe.model, config, 0, cls.auto_class)
    made = make_task(recipe, tokenizer, prepared.survey, model=model, base=tmp_path)
    made.extend_network(model, recipe.model)
    made.on_cpu = False  # there, finding the positions of targets costs nothing
    rows = made.longest_rows([prepared.train.row(i) for i in range(3)])
    if (column := cls.start_column(setup, recipe.model)) is not None:
        zeros = {column.name: np.zeros(column.width, np.float32)}
        rows = [replace(row, columns={**row.columns, **zeros}) for row in rows]
    batch = made.collate(rows, [(0, i) for i in range(3)])
    with Waits() as waits:
        made.loss(model, batch.inputs).loss_sum.sum().backward()
    assert [place for place in waits.places if THEIRS not in place] == []


def test_an_update_waits_once_whatever_its_number_of_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tolist` of the numbers that all ranks agree on."""
    reads: list[int] = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(self.numel()) or tolist(self))
    store = make_store(tmp_path / "store", ragged(30))
    for micro_size in (6, 3, 1):
        reads.clear()
        recipe = make_recipe(batch={"global_size": 6, "micro_size": micro_size})
        with make_trainer(tmp_path / str(micro_size), store, recipe) as (trainer, _):
            trainer.task.on_cpu = False  # type: ignore[attr-defined]
            group = trainer.batches.dataset[0]  # type: ignore[attr-defined]
            assert len(group) == 6 // micro_size
            reads.clear()
            with Waits() as waits:
                trainer.update(group)
        assert len(reads) == 1
        assert [place for place in waits.places if THEIRS not in place] == []


def test_batches_can_be_pinned() -> None:
    """PyTorch's loader pins what has this method, and silently nothing else."""
    from torch.utils.data._utils.pin_memory import pin_memory

    from ptft_dist.tasks.protocol import Batch

    pinned: list[str] = []

    class Tensor(torch.Tensor):
        def pin_memory(self, *_: Any) -> Any:  # type: ignore[override]
            pinned.append("x")
            return self

    batch = Batch({"input_ids": torch.zeros(1).as_subclass(Tensor)}, 1, 1)
    assert pin_memory([batch])[0].inputs.keys() == {"input_ids"}
    assert pinned == ["x"]
