"""5: another number of processes or another batch size silently changes the order of samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import make_dataset, make_recipe, make_store, make_task, ragged

from ptft_dist.api import load_recipe
from ptft_dist.checkpoint.identity import differences, run_identity

SPLITS: list[tuple[int, dict[str, Any]]] = [
    (1, {"micro_size": 12}),
    (1, {"micro_size": 1}),
    (2, {"micro_size": 3}),
    (3, {"micro_size": 2, "group_by_length": False}),
    (4, {"micro_size": 3}),
    (2, {"micro_size": None, "micro_tokens": 64}),
]


def test_the_rows_of_an_update_do_not_depend_on_who_takes_them(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", ragged(40))
    tables = []
    for ranks, batch in SPLITS:
        recipe = make_recipe(batch={"global_size": 12} | batch, train={"max_steps": 7})
        updates: list[list[int]] = [[] for _ in range(7)]
        for rank in range(ranks):
            dataset, _ = make_dataset(recipe, store, make_task(recipe), rank, ranks)
            for step in range(7):
                for micro_batch in dataset[step]:
                    if micro_batch.count:
                        updates[step] += micro_batch.inputs["input_ids"][:, 0].tolist()
        tables.append([sorted(rows) for rows in updates])
    assert all(len(rows) == 12 for rows in tables[0])
    assert all(table == tables[0] for table in tables)


RECIPE = """\
task: clm
model: {config: {model_type: llama}}
tokenizer: {train: {vocab_size: 300}}
data: {train: [{source: python-stdlib}], max_length: 64}
batch: {global_size: 12, micro_size: 3}
train: {max_steps: 5}
run_dir: run
"""


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("batch.global_size=24", "batch.global_size"),
        ("data.max_length=128", "data.max_length"),
        ("train.seed=1", "train.seed"),
        ("clm.packing=false", "clm.packing"),
        ("train.max_steps=6", "train.max_steps"),  # the learning rate's schedule runs over all updates
    ],
)
def test_what_changes_the_order_is_noticed_and_the_split_is_free(tmp_path: Path, override: str, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    saved = run_identity(load_recipe(str(path)), "data", {})
    assert set(differences(saved, run_identity(load_recipe(str(path), [override]), "data", {}))) == {key}
    assert (
        differences(
            saved, run_identity(load_recipe(str(path), ["batch.micro_size=4", "eval.at_start=false"]), "data", {})
        )
        == {}
    )
    assert set(differences(saved, run_identity(load_recipe(str(path)), "other data", {}))) == {"prepared data"}
