"""Patches of the program for tests, applied in its processes: they delay, stop, break or observe it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def witness() -> None:
    """Write the engine's backend, as seen by this rank, to witness-RANK.json."""
    import torch.distributed as dist

    from ptft_dist.engine import Engine

    prepare = Engine.prepare

    def watched(self: Engine, *args: Any, **more: Any) -> None:
        prepare(self, *args, **more)
        optimizer = self.backend.optimizer
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.kind == "zero3":  # the optimizer of stage 3 shows whole parameters; what a rank holds is in ds_tensor
            parameters = [p.ds_tensor for p in self.model.parameters()]
        elif self.kind == "fsdp2":
            parameters = [p.to_local() for p in parameters]
        facts = {
            "module": type(self.module).__name__,
            "optimizer": type(optimizer).__name__,
            "world_size": dist.get_world_size() if dist.is_initialized() else 1,
            "own_elements": sum(p.numel() for p in parameters),
            "all_elements": self.parameter_count,
        }
        Path(f"witness-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(facts))

    Engine.prepare = watched  # type: ignore[method-assign]


def slow_updates(seconds: str) -> None:
    """Sleep after each update, so that a test can interrupt it."""
    from ptft_dist.training.trainer import Trainer

    update = Trainer.update

    def slow(self: Trainer, group: Any) -> Any:
        report = update(self, group)
        time.sleep(float(seconds))
        return report

    Trainer.update = slow  # type: ignore[method-assign]


def hang_in_save(step: str) -> None:
    """Block in the save of this step, after its files and before its manifest are written."""
    from ptft_dist.checkpoint import checkpoint

    write = checkpoint._write_manifest

    def hang(path: Path, manifest: dict[str, Any]) -> None:
        if f"step-{int(step):08d}" in str(path):
            time.sleep(600)
        write(path, manifest)

    checkpoint._write_manifest = hang


def record_rows() -> None:
    """Append the rows of each update on this rank to rows-RANK.jsonl."""
    from ptft_dist.data.store import TokenStore
    from ptft_dist.training import batches

    get, read = batches.UpdateDataset.__getitem__, TokenStore.row
    taken: list[int] = []

    def watched_read(self: Any, i: int) -> Any:
        taken.append(i)
        return read(self, i)

    def watched_get(self: Any, step: int) -> Any:
        taken.clear()
        group = get(self, step)
        with Path(f"rows-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps({"step": step + 1, "rows": taken}) + "\n")
        return group

    TokenStore.row = watched_read  # type: ignore[method-assign]
    batches.UpdateDataset.__getitem__ = watched_get  # type: ignore[method-assign]


def raise_in_rank(rank: str, step: str) -> None:
    """Raise an error on this rank in this update, before the weights change."""
    from ptft_dist.training.trainer import Trainer

    update = Trainer.update

    def failing(self: Trainer, group: Any) -> Any:
        if os.environ.get("RANK", "0") == rank and self.progress.step + 1 == int(step):
            raise RuntimeError("made to fail by a test")
        return update(self, group)

    Trainer.update = failing  # type: ignore[method-assign]


def begin_after_rank_0_failed() -> None:
    """Delay the other ranks until rank 0 has failed."""
    from ptft_dist.reporting.run_files import FailureReport

    log, write = Path("rank-0-failed"), FailureReport.write

    def noted(self: FailureReport, *args: Any, **kwargs: Any) -> None:
        write(self, *args, **kwargs)
        log.touch()

    if os.environ.get("RANK", "0") == "0":
        log.unlink(missing_ok=True)
        FailureReport.write = noted  # type: ignore[method-assign]
        return
    time.sleep(0.3)
    while not log.exists():
        time.sleep(0.01)
    time.sleep(0.3)


def watch_engine() -> None:
    """Write destroyed-RANK when the engine is destroyed; cycles are collected when the process ends as usual."""
    import gc
    import weakref
    from multiprocessing.util import Finalize

    from ptft_dist.engine import Engine

    prepare = Engine.prepare

    def watched(self: Engine, *args: Any, **more: Any) -> None:
        prepare(self, *args, **more)
        gone = Path(f"destroyed-{os.environ.get('RANK', '0')}").touch
        weakref.finalize(self.module, gone).atexit = False

    Finalize(None, gc.collect, exitpriority=0)
    Engine.prepare = watched  # type: ignore[method-assign]


def die_in_rank(rank: str, step: str) -> None:
    """Kill this rank in this update."""
    from ptft_dist.training.trainer import Trainer

    update = Trainer.update

    def dying(self: Trainer, group: Any) -> Any:
        if os.environ.get("RANK", "0") == rank and self.progress.step + 1 == int(step):
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, group)

    Trainer.update = dying  # type: ignore[method-assign]


def a_machine_for_each_rank() -> None:
    """Each rank is on a machine of its own, called rank-RANK."""
    import socket

    rank = os.environ["RANK"]
    os.environ["GROUP_RANK"] = rank
    socket.gethostname = lambda: f"rank-{rank}"  # type: ignore[assignment]


def short_grace(seconds: str) -> None:
    """End soon after another machine is gone."""
    from ptft_dist.engine import machines

    machines.GRACE_S = float(seconds)


def no_connection_between_machines() -> None:
    from ptft_dist.engine.machines import Machines

    def refused(*_: Any) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    Machines.join = refused  # type: ignore[method-assign]


def wait_in_rank(rank: str, step: str) -> None:
    """This rank waits in this update in C code, as in a collective that does not return."""
    import ctypes

    _before_update(rank, step, lambda: ctypes.CDLL(None).sleep(60))


def out_of_memory_in_rank(rank: str, step: str) -> None:
    """This rank allocates more than there is in this update."""
    import torch

    _before_update(rank, step, lambda: torch.empty(2**60, dtype=torch.uint8))


def faulty_gpu_in_rank(rank: str, step: str) -> None:
    """The GPU of this rank fails in this update."""

    def fail() -> None:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    _before_update(rank, step, fail)


def full_disk_in_rank(rank: str, step: str) -> None:
    """A write of this rank fails in this update."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    _before_update(rank, step, fail)


def end_late_in_rank(rank: str, seconds: str) -> None:
    """This rank takes a while after all others have ended."""
    from ptft_dist.engine import Engine

    barrier = Engine.barrier

    def late(self: Engine) -> None:
        barrier(self)
        if os.environ["RANK"] == rank and Path("run/result.json").exists():
            time.sleep(float(seconds))

    Engine.barrier = late  # type: ignore[method-assign]


def _before_update(rank: str, step: str, action: Callable[[], Any]) -> None:
    from ptft_dist.training.trainer import Trainer

    update = Trainer.update

    def acting(self: Trainer, group: Any) -> Any:
        if os.environ.get("RANK", "0") == rank and self.progress.step + 1 == int(step):
            action()
        return update(self, group)

    Trainer.update = acting  # type: ignore[method-assign]


def evaluations(*losses: str) -> None:
    """Replace the validation loss after update STEP by LOSS, for each "STEP=LOSS"."""
    from ptft_dist.training.trainer import Trainer
    from ptft_dist.training.validation import Validation

    made = {int(step): float(loss) for step, loss in (pair.split("=") for pair in losses)}
    fit, score = Trainer.fit, Validation.score
    running: list[Trainer] = []

    def watched(self: Trainer) -> Any:
        running.append(self)
        return fit(self)

    def scored(self: Validation, *args: Any) -> Any:
        found = score(self, *args)
        if found is None:
            return None
        metrics, samples = found
        loss = made.get(running[-1].progress.step, metrics["loss"]) if running else metrics["loss"]
        return {**metrics, "loss": loss}, samples

    Trainer.fit, Validation.score = watched, scored  # type: ignore[method-assign]


def record_inputs() -> None:
    """Write the inputs of the first micro-batch of the first update to inputs.pt."""
    import torch

    from ptft_dist.training.batches import UpdateDataset

    get = UpdateDataset.__getitem__

    def watched(self: Any, step: int) -> Any:
        group = get(self, step)
        if step == 0:
            torch.save(group[0].inputs, "inputs.pt")
        return group

    UpdateDataset.__getitem__ = watched  # type: ignore[method-assign]


def prompt_tensorboard() -> None:
    """Write each TensorBoard point to its file at once, so that it exists after a kill."""
    from ptft_dist.reporting.tensorboard import TensorBoard

    write = TensorBoard.write

    def flushed(self: TensorBoard, row: Any) -> None:
        write(self, row)
        self.flush()

    TensorBoard.write = flushed  # type: ignore[method-assign]


def slow_tensorboard(seconds: str) -> None:
    """Delay the writing of each TensorBoard event by this time."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    write = RecordWriter.write

    def slow(self: Any, data: bytes) -> None:
        time.sleep(float(seconds))
        write(self, data)

    RecordWriter.write = slow


def fill_disk_before_save(step: str, left_bytes: str) -> None:
    """Leave `left_bytes` free on the run's disk before the save of this step; free the disk before the next save."""
    from ptft_dist.checkpoint.checkpoint import Checkpoints

    commit = Checkpoints.commit

    def full(self: Checkpoints, at: int, *args: Any) -> Any:
        filler = self.folder.parent.parent / "filler"
        if os.environ.get("RANK", "0") == "0":
            filler.unlink(missing_ok=True)
            if at == int(step):
                _fill(filler, int(left_bytes))
        return commit(self, at, *args)

    Checkpoints.commit = full  # type: ignore[method-assign]


def no_estimate() -> None:
    """Let a save begin with any amount of free space."""
    from ptft_dist.engine import Engine

    Engine.state_bytes = lambda _: 0  # type: ignore[method-assign]


def _fill(filler: Path, left_bytes: int) -> None:
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(4096)) == 4096:
                pass
        file.truncate(max(0, file.tell() - left_bytes))


def break_shard(rank: str, step: str) -> None:
    """A write error in one rank's shard of a checkpoint, while the other ranks wait in DeepSpeed's barrier."""
    import deepspeed
    import torch

    save = deepspeed.DeepSpeedEngine.save_checkpoint
    write = torch.save

    def broken(self: Any, folder: str, *args: Any, **kwargs: Any) -> Any:
        if os.environ.get("RANK") == rank and folder.endswith(f"{int(step):08d}"):

            def no_space(*_: Any, **__: Any) -> None:
                raise OSError(28, "No space left on device")

            torch.save = no_space
        try:
            return save(self, folder, *args, **kwargs)
        finally:
            torch.save = write

    deepspeed.DeepSpeedEngine.save_checkpoint = broken


def quote_environment(rank: str, step: str, name: str) -> None:
    """In this update, warn, log and fail with messages that quote an environment variable."""
    import logging
    import warnings

    from ptft_dist.training.trainer import Trainer

    update = Trainer.update

    def failing(self: Trainer, group: Any) -> Any:
        if self.progress.step + 1 == int(step) and os.environ.get("RANK", "0") == rank:
            value = os.environ[name]
            warnings.warn(f"a warning about {value}", stacklevel=1)
            logging.getLogger("library").error("a record about %s", value)
            raise OSError(13, "Permission denied", f"/data/{value}/file")
        return update(self, group)

    Trainer.update = failing  # type: ignore[method-assign]


def sigterm_in_update(step: str) -> None:
    """Send SIGTERM to this process at the beginning of this update."""
    from ptft_dist.training.trainer import Trainer

    update = Trainer.update

    def signalled(self: Trainer, group: Any) -> Any:
        if self.progress.step + 1 == int(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, group)

    Trainer.update = signalled  # type: ignore[method-assign]


def sigterm_after_updates() -> None:
    """Send SIGTERM to this process once its updates have ended, by whatever cause, and wait a moment."""
    from ptft_dist.training.stopping import StopRequest

    listening = StopRequest.listening

    @contextlib.contextmanager
    def signalled(self: StopRequest) -> Any:
        try:
            with listening(self):
                yield
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)

    StopRequest.listening = signalled  # type: ignore[method-assign]


def fail_evaluation(step: str) -> None:
    """The evaluation after this update fails, but not the one before training."""
    from ptft_dist.training.trainer import Trainer

    evaluate = Trainer.evaluate

    def failing(self: Trainer) -> None:
        if self.progress.step == int(step):
            raise RuntimeError("this evaluation was made to fail by a test")
        evaluate(self)

    Trainer.evaluate = failing  # type: ignore[method-assign]


def fail_save(step: str) -> None:
    """The save of this update fails as on a full disk, and leaves no files."""
    from ptft_dist.checkpoint.checkpoint import Checkpoints, SaveError

    commit = Checkpoints.commit

    def failing(self: Checkpoints, at: int, *args: Any) -> Any:
        if at == int(step):
            raise SaveError("this save was made to fail by a test")
        return commit(self, at, *args)

    Checkpoints.commit = failing  # type: ignore[method-assign]


def slow_micro_batches_of_evaluations(seconds: str) -> None:
    """Sleep before each micro-batch of an evaluation, and touch the file `evaluating`."""
    from ptft_dist.training.trainer import Trainer
    from ptft_dist.training.validation import Validation

    batches, evaluate = Validation.batches, Trainer.evaluate
    running: list[Trainer] = []

    def slow(self: Validation, *args: Any) -> Any:
        for batch in batches(self, *args):
            if running:
                Path("evaluating").touch()
                time.sleep(float(seconds))
            yield batch

    def watched(self: Trainer) -> None:
        running.append(self)
        evaluate(self)
        running.clear()

    Validation.batches, Trainer.evaluate = slow, watched  # type: ignore[method-assign]


def slow_score(seconds: str) -> None:
    """Touch the file `evaluating`, and sleep before the validation rows are scored."""
    from ptft_dist.training.validation import Validation

    score = Validation.score

    def slow(self: Validation, *args: Any, **options: Any) -> Any:
        Path("evaluating").touch()
        time.sleep(float(seconds))
        return score(self, *args, **options)

    Validation.score = slow  # type: ignore[method-assign]


def slow_prepare(seconds: str) -> None:
    """Touch the file `preparing`, and sleep in C code before data are prepared."""
    from ptft_dist.data import stream

    write = stream.write

    def slow(*args: Any, **kwargs: Any) -> Any:
        Path("preparing").touch()
        time.sleep(float(seconds))
        return write(*args, **kwargs)

    stream.write = slow


def break_metrics() -> None:
    """The task's computation of metrics fails."""
    from ptft_dist.tasks.clm.task import CausalLM

    def broken(_self: Any, _totals: Any) -> Any:
        raise RuntimeError("this metric was broken by a test")

    CausalLM.eval_metrics = broken  # type: ignore[method-assign]


def full_disk_at_flush() -> None:
    """fsync of metrics.jsonl fails."""
    from ptft_dist.reporting import metrics

    fsync = os.fsync

    def failing(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().name == "metrics.jsonl":
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    metrics.os.fsync = failing  # type: ignore[attr-defined]


def a_folder_for_each_rank(*folders: str) -> None:
    """Each rank works in a separate directory with a separate cache, as on machines without a shared disk."""
    folder = folders[int(os.environ["RANK"])]
    os.chdir(folder)
    os.environ["PTFT_CACHE"] = str(Path("cache").absolute())


if __name__ == "__main__":  # python patches.py PATCH PTFT_ARGUMENTS...: for ranks that a real launcher starts
    import sys

    from support import apply

    from ptft_dist.cli import main

    apply(sys.argv.pop(1))
    main()


def fork_local_runs() -> None:
    """Each `ptft train` process of a list of runs is forked from this one, which has imported everything."""
    import multiprocessing
    from concurrent.futures import thread

    from ptft_dist.cli import main
    from ptft_dist.runs import local

    class Forked:
        def __init__(
            self, words: list[str], start_new_session: bool, env: dict[str, str], stdout: Any, stderr: Any
        ) -> None:
            assert stdout is stderr
            arguments = (words, start_new_session, env, stdout)
            self.process = multiprocessing.get_context("fork").Process(target=self.run, args=arguments)
            self.process.start()

        @staticmethod
        def run(words: list[str], start_new_session: bool, env: dict[str, str], output: Any) -> None:
            os.environ.update(env)
            for number in (1, 2) if output is not None else ():
                os.dup2(output.fileno(), number)
            thread._threads_queues.clear()  # at its end it would wait for the threads of a pool that it came from
            if start_new_session:
                os.setsid()
            for number in local.SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            assert words[1:3] == ["-m", "ptft_dist"]
            sys.argv = ["ptft", *words[3:]]
            main()

        def wait(self, timeout: float | None = None) -> int:
            self.process.join(timeout)
            if self.process.is_alive():
                raise subprocess.TimeoutExpired("ptft", timeout or 0.0)
            assert self.process.exitcode is not None
            return self.process.exitcode

    local.subprocess = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment]


def fork_launched_ranks() -> None:
    """The ranks that `accelerate launch` would start are forked from this process, which has imported everything."""
    import multiprocessing

    from support import free_port, rank_variables

    from ptft_dist.cli import main
    from ptft_dist.launch import local

    def run(words: list[str], variables: dict[str, str]) -> None:
        os.environ.update(variables)
        sys.argv = ["ptft", *words]
        main()

    class Forked:
        def __init__(self, words: list[str], env: dict[str, str], **_: Any) -> None:
            ranks, port = int(words[words.index("--num_processes") + 1]), free_port()
            arguments = [word.replace("$$", "$") for word in words[words.index("ptft_dist") + 1 :]]
            variables = [env | rank_variables(rank, ranks, port, "cpu") for rank in range(ranks)]
            context = multiprocessing.get_context("fork")
            self.processes = [context.Process(target=run, args=(arguments, each)) for each in variables]
            for process in self.processes:
                process.start()

        def wait(self) -> int:
            for process in self.processes:
                process.join()
            return max(process.exitcode or 0 for process in self.processes)

    local.subprocess = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore[assignment]


def hub_of_environment() -> None:
    """Read the Hub's address and caches from this process's environment, as libraries do when they are imported."""
    import importlib

    import datasets
    import huggingface_hub

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
