"""The engine on two ranks: gradients, frozen parameters and networks, foreign files, ranks that fail."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engine_ranks import on_ranks, start_ranks
from test_engine import cross_entropy, half_frozen, llama, rows, section
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import ptft_dist.engine as module
from ptft_dist.engine import Engine, Precision, announce_failure, complete_deepspeed_config, first_failure
from ptft_dist.engine.zero_files import read_module
from ptft_dist.errors import CheckpointError, Failure

KINDS = {"ddp": "cpu", "zero2": "cpu_zero2", "zero3": "cpu_zero3", "fsdp2": "fsdp2"}
LAYER = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16  # elements of one layer of the network
HALF = LAYER + 16  # trained elements of half_frozen(tied=True): one layer and the final norm


def make_engine(limit: float | None = 1.0, precision: Precision = "fp32", **zero: Any) -> Engine:
    """The engine for the environment of this rank, with changes of zero_optimization."""
    config = None
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        launch = json.loads(Path(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]).read_text())
        launch["zero_optimization"] |= zero
        config = complete_deepspeed_config(launch, precision, limit, 2, 1)
    return Engine(precision, config)


def update(engine: Engine, step: int, micro_batches: int = 1, scale: float = 1.0) -> float:
    for i in range(micro_batches):
        with engine.micro_batch(last=i == micro_batches - 1):
            (loss,) = engine.forward(cross_entropy, rows(100 * step + 10 * engine.rank + i))
            engine.backward(scale * loss)
    engine.clip_gradients()
    engine.step(0.01)
    return loss.item()


def digest(engine: Engine) -> str:
    """A hash of the whole network, on rank 0."""
    state = engine.backend.full_state_dict()
    if not engine.is_main:
        return ""
    raw = b"".join(name.encode() + state[name].cpu().numpy().tobytes() for name in sorted(state))
    return hashlib.sha256(raw).hexdigest()


# --- parameters without a gradient ------------------------------------------------------------------------------------


def with_unused() -> Any:
    """A network with a parameter that its loss does not depend on."""
    model = llama()
    model.unused = torch.nn.Parameter(torch.ones(3))  # type: ignore[assignment]
    return model


def train_with_unused() -> Any:
    """The network after a warm-up and two updates of two micro-batches, on rank 0."""
    engine = make_engine()
    engine.prepare(with_unused(), section(weight_decay=0.1, max_grad_norm=1.0))
    engine.warm_up(cross_entropy, rows(0))
    for step in range(2):
        update(engine, step, micro_batches=2)
    state = engine.full_state_dict()
    return {name: value.cpu().numpy() for name, value in state.items()} if engine.is_main else None


def test_ddp_leaves_parameters_without_a_gradient_alone(tmp_path: Path) -> None:
    """As one process does. DDP itself would fail in the second forward pass."""
    found, _ = on_ranks(train_with_unused, folder=tmp_path)
    assert found.pop("unused").tolist() == [1.0] * 3
    plain = llama()
    sides = [[p for p in plain.parameters() if (p.dim() > 1) == matrix] for matrix in (True, False)]
    groups = [{"params": sides[0], "weight_decay": 0.1}, {"params": sides[1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    for step in range(2):
        optimizer.zero_grad()
        sum(cross_entropy(plain, rows(100 * step + 10 * rank + i))[0] / 2 for rank in (0, 1) for i in (0, 1)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    expected = dict(plain.named_parameters())
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(torch.from_numpy(value), expected[name].detach(), rtol=1e-4, atol=1e-6)


# --- gradients --------------------------------------------------------------------------------------------------------


def count_exchanges(micro_batches: int) -> int:
    engine = make_engine()
    engine.prepare(llama(), section())
    rounds = 0

    def count(group: Any, bucket: Any) -> Any:
        nonlocal rounds
        rounds += bucket.is_last()
        return allreduce_hook(group, bucket)

    # A lambda, since DDP compares annotations with classes, and ours are strings.
    engine.module.register_comm_hook(dist.group.WORLD, lambda group, bucket: count(group, bucket))
    update(engine, 0, micro_batches)
    return rounds


def test_gradients_are_exchanged_once_an_update(tmp_path: Path) -> None:
    assert on_ranks(count_exchanges, 3, folder=tmp_path) == [1, 1]


def exchanged_under_fsdp2() -> list[bool]:
    """For each of three micro-batches: whether the sharded parameters have a gradient afterwards."""
    engine, seen = make_engine(), []
    engine.prepare(llama(), section())
    for i in range(3):
        with engine.micro_batch(last=i == 2):
            (loss,) = engine.forward(cross_entropy, rows(10 * engine.rank + i))
            engine.backward(loss)
        seen.append(any(p.grad is not None for p in engine.model.parameters()))
    return seen


def test_fsdp2_exchanges_gradients_once_an_update(tmp_path: Path) -> None:
    """Gradients are reduced after the last micro-batch only. Before that, no sharded parameter has a gradient."""
    assert on_ranks(exchanged_under_fsdp2, folder=tmp_path, kind="fsdp2") == [[False, False, True]] * 2


def move_by_sgd() -> Any:
    """Weights before and after one update without clipping."""
    engine = make_engine(limit=None)
    before = {name: p.detach().clone() for name, p in llama().named_parameters()}
    engine.prepare(llama(), section(name="sgd", weight_decay=0.0, max_grad_norm=None))
    update(engine, 0, scale=100)
    after = engine.backend.full_state_dict()
    return {name: (before[name] - after[name]).numpy() for name in before} if engine.is_main else None


def test_max_grad_norm_null_does_not_clip_under_zero(tmp_path: Path) -> None:
    moved, _ = on_ranks(move_by_sgd, folder=tmp_path, kind="cpu_zero2")
    reference = llama()
    for rank in range(2):
        (50 * cross_entropy(reference, rows(10 * rank))[0]).backward()
    assert torch.stack([p.grad.square().sum() for p in reference.parameters() if p.grad is not None]).sum() > 100
    for name, p in reference.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(torch.from_numpy(moved[name]), 0.01 * p.grad, rtol=1e-3, atol=1e-6)


class HalveNorm:
    """A rule that halves one parameter of 16 elements, and records what it is given."""

    names = ("model.norm.weight", "model.layers.0.mlp.up_proj.weight")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def after_step(
        self, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        numbers = [{name: tensor.numpy().copy() for name, tensor in each.items()} for each in (weights, gradients)]
        self.seen.append(numbers)
        return {self.names[0]: weights[self.names[0]] / 2}


def change_by_rule() -> Any:
    """What the rule was given in two updates that clip, and the network afterwards (on rank 0).

    The state is saved and loaded in between. SGD without momentum has none for its parameters.
    """
    engine, rule = make_engine(limit=0.1), HalveNorm()
    engine.prepare(llama(), section(name="sgd", weight_decay=0.0, max_grad_norm=0.1))
    engine.change_after_each_step(rule)
    for step in range(2):
        update(engine, step, scale=10 * (step + 1))
        folder = Path(f"saved-{step}")
        folder.mkdir(exist_ok=True)
        engine.save_state(folder)
        engine.barrier()
        engine.load_state(folder)
    after = engine.full_state_dict()
    return rule.seen, {name: after[name].numpy() for name in rule.names} if engine.is_main else {}


@pytest.mark.parametrize(("kind", "ranks"), [*((kind, 2) for kind in KINDS.values()), ("cpu_zero3", 3), ("fsdp2", 3)])
def test_a_rule_reads_and_changes_whole_weights_after_each_step(tmp_path: Path, kind: str, ranks: int) -> None:
    """As a plain loop in one process, also where the parts of the last rank are padded."""
    results = on_ranks(change_by_rule, folder=tmp_path, kind=kind, ranks=ranks)
    plain, expected = llama(), []
    parameters = {name: plain.get_parameter(name) for name in HalveNorm.names}
    for step in range(2):
        plain.zero_grad()
        for rank in range(ranks):
            (10 * (step + 1) * cross_entropy(plain, rows(100 * step + 10 * rank))[0] / ranks).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
        assert norm > 0.2, "nothing is clipped"
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter -= 0.01 * parameter.grad  # type: ignore[operator]
        weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        expected.append([weights, {name: parameter.grad.clone() for name, parameter in parameters.items()}])  # type: ignore[union-attr]
        parameters[HalveNorm.names[0]].data /= 2
    for seen, _ in results:
        for given, wanted in zip(seen, expected, strict=True):
            for tensors, theirs in zip(given, wanted, strict=True):
                assert tensors.keys() == theirs.keys()
                for name, tensor in tensors.items():
                    torch.testing.assert_close(torch.from_numpy(tensor), theirs[name], rtol=1e-4, atol=1e-7)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(torch.from_numpy(tensor), parameters[name].detach(), rtol=1e-5, atol=1e-7)


def buffers_of_each_rank() -> list[Any]:
    """The values of a buffer that differs between ranks before, in a trained and in a frozen network; whether it is
    still saved."""
    engine, seen = make_engine(), []
    trained, frozen = llama(), llama()
    for network in (trained, frozen):
        network.model.register_buffer("bias", torch.full((3,), 5.0 + engine.rank))
    engine.prepare(trained, section())
    placed = engine.prepare_frozen(frozen)
    update(engine, 0)
    placed.forward(cross_entropy, rows(0))
    for network in (trained, frozen):
        seen += [network.get_buffer("model.bias").tolist(), "model.bias" in network.state_dict()]
    return seen


@pytest.mark.parametrize("kind", ["fsdp2", "fsdp2_efficient"])
def test_buffers_are_those_of_rank_0_under_fsdp2(tmp_path: Path, kind: str) -> None:
    assert on_ranks(buffers_of_each_rank, folder=tmp_path, kind=kind) == [[[5.0] * 3, True] * 2] * 2


# --- trained and frozen parameters ------------------------------------------------------------------------------------


def train_half(first: int, last: int, load: bool) -> tuple[list[float], str]:
    """Updates of a network half of whose parameters are frozen; a save after update 2."""
    engine = make_engine()
    engine.prepare(half_frozen(tied=True), section())
    if load:
        engine.load_state(Path("saved"))
    losses = []
    for step in range(first, last):
        losses.append(update(engine, step))
        if step == 1:
            Path("saved").mkdir(exist_ok=True)
            engine.barrier()
            engine.save_state(Path("saved"))
            engine.barrier()
    assert (engine.trained_count, engine.parameter_count) == (HALF, HALF + LAYER + 50 * 16)
    state = engine.full_state_dict()
    if engine.is_main:  # otherwise an export has a copy of it
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    return losses, digest(engine)


@pytest.mark.parametrize("name", KINDS)
def test_frozen_parameters_are_not_stored_and_resume_is_exact(tmp_path: Path, name: str) -> None:
    whole = on_ranks(train_half, 0, 4, False, folder=tmp_path, kind=KINDS[name])
    resumed = on_ranks(train_half, 2, 4, True, folder=tmp_path, kind=KINDS[name])
    for (losses, state), (all_losses, all_state) in zip(resumed, whole, strict=True):
        assert losses == all_losses[2:]
        assert state == all_state
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    # 12 bytes for a weight and its two moments, and ZeRO-2's second copy of it; the frozen half would add 4 each.
    expected = (16 if name == "zero2" else 12) * HALF
    written = sum(path.stat().st_size for path in files if path.suffix != ".py")  # DeepSpeed adds programs
    headers = 24_000 if name.startswith("zero") else 8_000  # the frozen half has 13,600
    assert expected < written < expected + headers
    for path in files:
        if path.suffix == ".pt":
            assert_trained_only(torch.load(path, map_location="cpu", weights_only=False))


def assert_trained_only(state: dict[str, Any]) -> None:
    """No name of a frozen parameter, and no memory that was never set."""
    if state.get("module"):
        trained = [f"model.{name}" for name, p in half_frozen(tied=True).named_parameters() if p.requires_grad]
        assert sorted(state["module"]) == sorted(trained)
    stack = [state]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert torch.isfinite(value).all()
        elif isinstance(value, dict | list | tuple):
            stack.extend(value.values() if isinstance(value, dict) else value)


def save_trained_half() -> None:
    torch.use_deterministic_algorithms(True)  # memory that nobody has set is NaN then
    save_half()


def test_padding_of_shards_is_zero(tmp_path: Path) -> None:
    """Three ranks divide no parameter of the network evenly; two equal runs would differ in what pads them."""
    on_ranks(save_trained_half, folder=tmp_path, ranks=3, kind="cpu_zero3")
    shards = sorted((tmp_path / "saved").rglob("*optim_states.pt"))
    assert len(shards) == 3
    for shard in shards:
        assert_trained_only(torch.load(shard, map_location="cpu", weights_only=False))


def train_in_bf16(zero: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Two updates and a save; on rank 0 the weights of the network, of an adapter's export and of a model's export."""
    engine = make_engine(precision="bf16", **zero)
    engine.prepare(half_frozen(tied=True), section())
    for step in range(2):
        update(engine, step)
    Path("saved").mkdir(exist_ok=True)
    engine.barrier()
    engine.save_state(Path("saved"))
    exported = engine.trained_state_dict(), engine.full_state_dict()
    with engine.whole(list(engine.model.parameters())):
        network = {name: x.detach().float() for name, x in engine.model.named_parameters() if x.requires_grad}
        if engine.is_main:
            tied = (exported[1][name].data_ptr() for name in ("lm_head.weight", "model.embed_tokens.weight"))
            assert len(set(tied)) == 1
    if not engine.is_main:
        return []
    return [{name: x.float().numpy() for name, x in state.items()} for state in (network, *exported)]


@pytest.mark.parametrize(
    ("stage", "ranks", "zero"),
    [
        (1, 2, {}),
        (2, 3, {"round_robin_gradients": True}),
        (2, 2, {"parameter_alignment": True}),
        (3, 3, {}),
    ],
)
def test_weights_in_bf16_are_exported_as_the_optimizer_has_them(
    tmp_path: Path, stage: int, ranks: int, zero: dict[str, Any]
) -> None:
    """In a run and from its checkpoint. DeepSpeed's own program reads the expected weights from the checkpoint."""
    arguments: dict[str, Any] = {"folder": tmp_path, "ranks": ranks, "kind": f"cpu_zero{stage}"}
    network, trained, whole = on_ranks(train_in_bf16, zero, **arguments)[0]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    read = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "saved"), tag="deepspeed")
    expected = {name.removeprefix("model."): value.detach().numpy() for name, value in read.items()}
    saved = {name: value.detach().numpy() for name, value in read_module(tmp_path / "saved/deepspeed").items()}
    plain = half_frozen(tied=True)
    assert whole.keys() == plain.state_dict().keys()
    frozen = {name: x.bfloat16().float() for name, x in plain.state_dict().items() if name not in network}
    assert network.keys() == trained.keys() == saved.keys()
    for name, value in network.items():
        rounded = torch.from_numpy(expected[name]).bfloat16().float().numpy()
        assert not np.array_equal(expected[name], rounded)
        np.testing.assert_array_equal(value, rounded)
        for other in (trained, whole, saved):
            np.testing.assert_array_equal(other[name], expected[name])
    for name, start_value in frozen.items():
        np.testing.assert_array_equal(whole[name], start_value.numpy())


def change_by_hand(zero: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """Gradients, weights after they were set and before the update, and the network after it, on rank 0."""
    engine = make_engine(**zero)
    engine.prepare(half_frozen(tied=True), section(name="sgd", momentum=0.0))
    backend, parameters = engine.backend, {n: p for n, p in engine.model.named_parameters() if p.requires_grad}
    with engine.micro_batch(last=True):
        (loss,) = engine.forward(cross_entropy, rows(engine.rank))
        engine.backward(loss)
    gradients = {name: backend.whole_gradient(each).clone() for name, each in parameters.items()}
    for number, each in enumerate(parameters.values()):
        backend.set_weight(each, backend.whole_weight(each) + number)
        backend.add_gradient(each, torch.full(each.shape, 0.1 * number))
    weights = {name: backend.whole_weight(each).clone() for name, each in parameters.items()}
    engine.step(0.01)
    state = engine.full_state_dict()
    return [{name: x.numpy() for name, x in each.items()} for each in (gradients, weights, state)]


def test_round_robin_gradients_change_no_weight_or_gradient(tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 reads and sets those of other parameters with them."""
    (plain, _), (other, _) = (
        on_ranks(change_by_hand, zero, folder=tmp_path, kind="cpu_zero2")
        for zero in ({}, {"round_robin_gradients": True})
    )
    for expected, found in zip(plain, other, strict=True):
        assert expected.keys() == found.keys()
        for name, value in found.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


def load_into_another() -> str:
    """The message if all parameters are trained, but only half of them were stored."""
    engine = make_engine()
    engine.prepare(llama(tied=True), section())
    try:
        engine.load_state(Path("saved"))
    except CheckpointError as error:
        return str(error)
    return "loaded"


def save_half() -> None:
    engine = make_engine()
    engine.prepare(half_frozen(tied=True), section())
    Path("saved").mkdir(exist_ok=True)
    engine.barrier()
    engine.save_state(Path("saved"))
    engine.barrier()


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp2"])
def test_state_of_other_parameters_is_refused_by_shards_too(tmp_path: Path, name: str) -> None:
    on_ranks(save_half, folder=tmp_path, kind=KINDS[name])
    for said in on_ranks(load_into_another, folder=tmp_path, kind=KINDS[name]):
        assert "does not contain the parameters that this run trains" in said
        assert "missing: model.embed_tokens.weight" in said


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def load_foreign() -> list[str]:
    engine = make_engine()
    engine.prepare(half_frozen(tied=True), section())
    said = []
    for path in sorted(Path("saved").rglob("*.pt")):
        raw = path.read_bytes()
        engine.barrier()
        path.write_bytes(pickle.dumps(Bomb()))
        engine.barrier()
        try:
            engine.load_state(Path("saved"))
        except CheckpointError as error:
            said.append(str(error))
        engine.barrier()
        path.write_bytes(raw)
    return said


def test_foreign_files_of_deepspeed_run_no_code(tmp_path: Path) -> None:
    """A checkpoint from another source with valid hashes, as for --resume PATH."""
    on_ranks(save_half, folder=tmp_path, kind="cpu_zero2")
    for said in on_ranks(load_foreign, folder=tmp_path, kind="cpu_zero2"):
        assert said
        assert all("could run code" in text for text in said)
    assert not (tmp_path / "exploded").exists()


# --- frozen networks --------------------------------------------------------------------------------------------------


def read_frozen(trained_first: bool, offload: bool) -> dict[str, Any]:
    """Logits of a frozen network beside a trained one, before and after an update, and how much of it is here."""
    engine = make_engine()
    if trained_first:
        engine.prepare(llama(), section())
    with engine.building(pretrained=False):
        other = llama(seed=1, tied=True)
    frozen = engine.prepare_frozen(other, offload=offload)
    if not trained_first:
        engine.prepare(llama(), section())
    logits = [frozen.forward(read_logits, rows(7 + engine.rank))[0]]
    update(engine, 0)
    logits.append(frozen.forward(read_logits, rows(7 + engine.rank))[0])
    local = [getattr(p, "ds_tensor", p) for p in other.parameters()]
    here = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in local)
    home = [p.data_ptr() for p in other.parameters()]
    away = frozen.forward(lambda network, _: [p.data_ptr() for p in network.parameters()], rows(1))
    return {
        "logits": [x.float().numpy() for x in logits],
        "elements": here,
        "training": other.training,
        "copied": away != home,
        "returned": [p.data_ptr() for p in other.parameters()] == home,
        "learns": any(p.requires_grad for p in other.parameters()),
        "gradient": logits[0].requires_grad,
    }


def read_logits(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
    return (model(input_ids=inputs["ids"]).logits,)


@pytest.mark.parametrize(
    ("kind", "trained_first", "offload"),
    [
        ("cpu", True, False),
        ("cpu", True, True),
        ("cpu_zero2", True, False),
        ("cpu_zero2", True, True),
        ("cpu_zero3", True, False),
        ("cpu_zero3", False, False),
        ("fsdp2_efficient", True, False),
    ],
)
def test_a_frozen_network_gives_its_logits_from_shards(
    tmp_path: Path, kind: str, trained_first: bool, offload: bool
) -> None:
    """An offloaded one runs on a copy of its parameters."""
    whole = llama(seed=1, tied=True).eval()
    elements = sum(p.numel() for p in whole.parameters())
    for rank, seen in enumerate(on_ranks(read_frozen, trained_first, offload, folder=tmp_path, kind=kind)):
        expected = whole(input_ids=rows(7 + rank)["ids"]).logits.detach()
        for logits in seen["logits"]:
            torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-5, atol=1e-5)
        assert not any(seen[what] for what in ("training", "learns", "gradient"))
        share = seen["elements"] / elements
        assert share == 1 if kind in ("cpu", "cpu_zero2") else 0.48 < share < 0.55
        if kind in ("cpu", "cpu_zero2"):
            assert (seen["copied"], seen["returned"]) == (offload, True)


# --- ranks that fail --------------------------------------------------------------------------------------------------


MADE_TO_FAIL = Failure(1, "h2", 1, "RuntimeError: made to fail")


def wait_for_a_rank(how: str) -> tuple[float, Failure | None, str]:
    """Rank 1 hangs or fails in the second update; how long rank 0 waits, and what it learns."""
    module.UPDATE_TIMEOUT = timedelta(seconds=2)
    engine = make_engine()
    with engine.updating():
        engine.all_sum(1.0)
    if engine.rank == 1 and how == "fails":
        announce_failure(MADE_TO_FAIL)
        announce_failure(MADE_TO_FAIL._replace(text="another one, later"))
        os._exit(3)
    started = time.monotonic()
    try:
        with engine.updating():
            if engine.rank == 1 and how == "hangs":
                time.sleep(8)
                os._exit(0)
            engine.all_sum(1.0)
    except RuntimeError as error:
        return time.monotonic() - started, first_failure(), str(error)
    return 0.0, first_failure(), ""


def result(folder: Path, rank: int) -> Any:
    return pickle.loads((folder / f"result-{rank}").read_bytes())


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_a_dead_rank_is_noticed_soon(tmp_path: Path, how: str) -> None:
    run = start_ranks(wait_for_a_rank, how, folder=tmp_path)
    run.processes[0].join(60)
    waited, who, error = result(tmp_path, 0)
    assert error
    assert waited < 6
    assert who == (MADE_TO_FAIL if how == "fails" else None)


def late_outside_of_an_update() -> bool:
    """A rank that evaluates or saves for longer than an update may take."""
    module.UPDATE_TIMEOUT = timedelta(seconds=1)
    engine = make_engine()
    for _ in range(2):
        with engine.updating():
            engine.all_sum(1.0)
    if engine.rank == 1:
        time.sleep(3)
    engine.barrier()
    return True


def test_a_long_evaluation_is_waited_for(tmp_path: Path) -> None:
    assert on_ranks(late_outside_of_an_update, folder=tmp_path) == [True, True]


def nobody_failed() -> Failure | None:
    engine = make_engine()
    engine.barrier()
    failure = first_failure()
    engine.barrier()  # rank 0 has the store, and must not end before the other has asked
    return failure


def test_without_a_failure_nobody_is_named(tmp_path: Path) -> None:
    assert on_ranks(nobody_failed, folder=tmp_path) == [None, None]
    assert first_failure() is None
    announce_failure(MADE_TO_FAIL)  # there is no process group to tell
