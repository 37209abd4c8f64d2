"""What tests of whole runs share: commands in processes of their own, tiny recipes, and digests of what came out.

`ptft` is the real command line. It costs seconds, nearly all of them imports, so most tests use `start`: the same
`ptft` with the same arguments in one or several real processes, forked from a server that has imported everything.
They get the environment that `accelerate launch` would give them, and can be killed like any process.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from ptft_dist.tasks.registry import TASKS, encoder_class

ROOT = Path(__file__).parent.parent

# One thread a process: how many there are decides the order of additions, and ranks share few cores here.
QUIET_MACHINE = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "DS_ACCELERATOR": "cpu",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}
COMMAND = [sys.executable, "-m", "ptft_dist"]
NOT_OF_A_USER = ("PYTHONDONTWRITEBYTECODE",)  # each interpreter would compile the whole package
FORK_SERVER = "PTFT_TEST_FORK_SERVER"
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# Imported once by the server. What a forked process finds here it does not import again.
PRELOADED = [
    "versions_once",  # before those that ask for versions
    "support",  # this module and what it imports: each forked process unpickles functions of it
    "ptft_dist.cli.train",
    "ptft_dist.run",
    "ptft_dist.runs.folds",
    "ptft_dist.api",
    "ptft_dist.launch.launch_file",
    "ptft_dist.launch.local",
    *(f"ptft_dist.engine.{backend}" for backend in ("whole", "zero", "fsdp2")),
    "ptft_dist.tasks.common.documents",
    *(f"ptft_dist.tasks.{task}.task" for task in TASKS),
    *(encoder_class(task).__module__ for task in TASKS),
    "ptft_dist.networks.adapt.merging",
    "ptft_dist.networks.adapt.quantized",
    *(f"ptft_dist.tasks.common.scores.{kind}" for kind in ("entities", "labels", "spans", "text")),
    "ptft_dist.networks.adapt.adapters",
    "ptft_dist.session.old_network",
    "accelerate.commands.launch",
    "bitsandbytes",
    "peft.tuners.lora",
    "peft.tuners.lora.bnb",
    "peft.utils.transformers_weight_conversion",
    "peft.tuners.adalora",
    "transformers.integrations.bitsandbytes",
    "deepspeed.comm.mori",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "encodings.utf_8_sig",
    "platformdirs.unix",
    "rouge_score.rouge_scorer",
    "sacrebleu",
    "scipy.stats",
    "sklearn.metrics",
    "tokenizers.trainers",
    "torch._subclasses.schema_check_mode",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
    "torch.distributed.run",
    "torch.profiler._cupti_monitor",
    "torch.utils.tensorboard",
    "trl.chat_template_utils",
    "trl.trainer.utils",
    "transformers.convert_slow_tokenizer",
    "transformers.integrations.deepspeed",
    "transformers.integrations.mistral",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "encoder_decoder", "llama", "t5", "xlnet")),
    "preloaded",
]


# --- recipes ----------------------------------------------------------------------------------------------------------


def write_documents(path: Path, count: int = 160, seed: int = 0) -> Path:
    """Generated documents of 3 to 90 words, one per line."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abcdefghijklmnop", k=chance.randint(2, 7))) for _ in range(60)]
    path.write_text("\n".join(" ".join(chance.choices(words, k=chance.randint(3, 90))) for _ in range(count)) + "\n")
    return path


MICRO_SIZE = 6
"""Rows of a micro-batch in recipes of 12 rows: two per update. Fewer rows would take nearly as long each."""


def make_recipe(documents: Path, **changes: Any) -> dict[str, Any]:
    """A tiny fp32 Llama of one layer on rows of different lengths; `changes` are merged into its sections."""
    llama = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    recipe: dict[str, Any] = {
        "task": "clm",
        "model": {"config": llama},
        "tokenizer": {"train": {"vocab_size": 320}},
        "data": {"train": [{"path": str(documents), "document": "line"}], "validation": 0.1, "max_length": 64},
        "clm": {"packing": False},
        "batch": {"global_size": 12, "micro_size": MICRO_SIZE},
        "optim": {"lr": 0.01, "warmup": 3, "max_grad_norm": 0.4},
        "train": {"max_steps": 8, "precision": "fp32"},
        "eval": {"every": 4},
        "save": {"every": 4, "keep": None},
        "run_dir": "run",
        "log": {"report": False},  # 5 MB
    }
    return evaluated_quickly(merge(recipe, changes))


def evaluated_quickly(recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with large micro-batches for evaluations, unless it says something about them or has none."""
    if recipe["data"]["validation"] is None or "micro_size" in recipe["eval"]:
        return recipe
    return merge(recipe, {"eval": {"micro_size": 12}})


def merge(old: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`old` with `changes`, section by section."""
    merged = dict(old)
    for key, value in changes.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(value, dict) and isinstance(inner, dict) else value
    return merged


def write_recipe(folder: Path, documents: Path, **changes: Any) -> Path:
    """recipe.yaml in `folder` (JSON is YAML too)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(make_recipe(documents, **changes), indent=1))
    return path


class Vocabulary:
    """The part of a tokenizer that a causal task uses."""

    def __init__(self, size: int, pad_token_id: int) -> None:
        self.size, self.pad_token_id = size, pad_token_id

    def __len__(self) -> int:
        return self.size

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self.size)}


# --- processes --------------------------------------------------------------------------------------------------------


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a user on a machine without accelerators."""
    plain = {
        key: value for key, value in os.environ.items() if key not in (*LAUNCHER_VARIABLES, *NOT_OF_A_USER, FORK_SERVER)
    }
    return plain | QUIET_MACHINE | dict(extra or {})


UNPRIVILEGED = [] if os.geteuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
"""The words before a command for which the modes of files count, also if the tests run as root."""


def ptft(
    *args: str,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 180,
    command: Sequence[str] = COMMAND,
) -> subprocess.CompletedProcess[str]:
    """Run the real command line and wait for its end."""
    words = [*command, *args]
    return subprocess.run(
        words, cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=timeout_s, check=False
    )


@functools.cache
def fork_server() -> ForkServerContext:
    """A server that forks processes: that of `share_fork_server`, or one of this process's own."""
    context = multiprocessing.get_context("forkserver")
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if address := os.environ.get(FORK_SERVER):
        server._forkserver_address = address
        server._forkserver_alive_fd = os.open(os.devnull, os.O_RDONLY)  # the one that started the server keeps it alive
        server.ensure_running = resource_tracker.ensure_running
        return context
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        # The server does not take sys.path, but `preloaded` is there, and this package rather than an installed one.
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        forkserver.ensure_running()
    return context


def share_fork_server() -> None:
    """Start the server that pytest's processes have in common, since each would need many seconds for its own."""
    if hasattr(forkserver._forkserver, "_forkserver_authkey"):  # type: ignore[attr-defined]
        return  # Python 3.14 forks only for the process that has started the server
    fork_server()
    os.environ[FORK_SERVER] = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]


def as_started_by_a_user() -> None:
    """Undo what a process inherits from the fork server and the tests.

    With the start method of the server's processes, a reader of data would start a server of its own, and import
    everything.
    """
    gc.freeze()  # what the server imported is never garbage
    multiprocessing.set_start_method(None, force=True)


def forked_rank(args: list[str], env: dict[str, str], cwd: str, output: str, patches: Sequence[str]) -> None:
    """The body of a forked process: `ptft *args`, after `apply` of each of `patches`."""
    as_started_by_a_user()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for stream, number in ((output + ".out", 1), (output + ".err", 2)):
        descriptor = os.open(stream, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    faulthandler.register(signal.SIGQUIT)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for patch in patches:
        apply(patch)
    import torch

    from ptft_dist.cli import main

    torch.set_num_threads(1)
    sys.argv = ["ptft", *args]
    main()


def apply(patch: str) -> None:
    """Call "name:argument:argument" of patches.py."""
    name, *arguments = patch.split(":")
    getattr(importlib.import_module("patches"), name)(*arguments)


@dataclass
class Start:
    """The processes of one start of a run. processes: by rank."""

    processes: list[ForkServerProcess]
    output: Path

    def wait(self, timeout_s: float = 120) -> int:
        """The exit code of the first rank that failed, else 0; negative after a signal."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.running:
            for process in self.processes:
                if process.is_alive():
                    os.kill(process.pid or 0, signal.SIGQUIT)  # each thread's place goes to stderr
            time.sleep(1)
            self.kill()
            raise AssertionError(f"still running after {timeout_s} s\n{self.stderr}")
        return next((code for code in self.exit_codes if code), 0)

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        """Wait for a condition while all ranks run."""
        wait_until(lambda: condition() or not all(p.is_alive() for p in self.processes), what, timeout_s)
        assert condition(), f"a rank ended before {what}:\n{self.stderr}"

    def kill(self) -> None:
        """Send SIGKILL to all processes at once."""
        for process in self.processes:
            if process.is_alive():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)
        for process in self.processes:
            process.join()

    @property
    def exit_codes(self) -> list[int]:
        return [process.exitcode or 0 for process in self.processes]

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    @property
    def stdout(self) -> str:
        return "".join(self._read(".out"))

    @property
    def stderr(self) -> str:
        return "".join(self._read(".err"))

    def _read(self, ending: str) -> Iterator[str]:
        for rank in range(len(self.processes)):
            yield Path(f"{self.output}-{rank}{ending}").read_text()


STARTED: list[Start] = []


def kill_leftovers() -> None:
    """End what a failed test left running."""
    for run in STARTED:
        if run.running:
            run.kill()
    STARTED.clear()


def start(
    *args: str,
    cwd: Path,
    cache: Path,
    ranks: int = 1,
    kind: str = "cpu",
    patches: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
) -> Start:
    """Start `ptft *args` on `ranks` processes, as the shipped launch config `kind` would. One rank: no launcher.

    patches: changes made to the program in each process first; see patches.py.
    """
    output = cwd / f"output-{time.monotonic_ns()}"
    processes = []
    port = free_port()
    for rank in range(ranks):
        variables = environment({"PTFT_CACHE": str(cache), **(env or {})})
        if ranks > 1 or kind != "cpu":
            variables |= rank_variables(rank, ranks, port, kind)
        process = fork_server().Process(
            target=forked_rank, args=(list(args), variables, str(cwd), f"{output}-{rank}", patches)
        )
        process.start()
        processes.append(process)
    STARTED.append(Start(processes, output))
    return STARTED[-1]


def rank_variables(rank: int, ranks: int, port: int, kind: str) -> dict[str, str]:
    """The environment variables that torchrun and `accelerate launch` set for a process."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    variables = {"MASTER_ADDR": "127.0.0.1"} | {key: str(value) for key, value in place.items()}
    if kind.startswith("cpu_zero"):
        stage = kind.removeprefix("cpu_zero")
        variables["ACCELERATE_USE_DEEPSPEED"] = "true"
        # "auto" is the square of the hidden size: in a tiny network each gradient would be exchanged on its own.
        config = "tests/zero3.json" if stage == "3" else f"ds_configs/zero{stage}.json"
        variables["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ROOT / config)
        variables["ACCELERATE_DEEPSPEED_ZERO3_INIT"] = str(stage == "3").lower()
    elif kind in ("fsdp2", "fsdp2_efficient"):
        variables |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            # What `accelerate config` writes: rank 0 alone holds the weights until they are sharded.
            "FSDP_CPU_RAM_EFFICIENT_LOADING": str(kind == "fsdp2_efficient").lower(),
            "FSDP_OFFLOAD_PARAMS": "false",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        }
    return variables


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait for a condition; checks it every five milliseconds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)


def lives(process: psutil.Process) -> bool:
    """Whether a process is running. A finished orphan may remain as a zombie."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- what came out ----------------------------------------------------------------------------------------------------


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without values that depend on time or machine."""
    from ptft_dist.reporting.metrics import TIMING_KEYS

    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING_KEYS} for line in lines]


def train_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run_dir) if "loss" in row]


def eval_rows(run_dir: Path) -> list[dict[str, Any]]:
    return [row for row in rows(run_dir) if "loss" not in row]


def last_step(run_dir: Path) -> int:
    """The last update in metrics.jsonl, whose last line may be incomplete; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(whole[-1])["step"]) if whole else 0


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state_digest(checkpoint: Path) -> str:
    """SHA-256 over every tensor and number of weights and optimizer state, by name."""
    import torch
    from safetensors.torch import load_file

    manifest = json.loads((checkpoint / "manifest.json").read_text())
    state: dict[str, Any] = {}
    for name, facts in manifest["files"].items():
        path = checkpoint / name
        assert file_digest(path) == facts["sha256"], path  # before anything is unpickled
        if path.suffix == ".safetensors":
            state[name] = load_file(path)
        elif path.suffix == ".pt":
            state[name] = torch.load(path, map_location="cpu", weights_only=False)
    assert state
    digest = hashlib.sha256()
    leaves = sorted(_leaves(state, ""))
    assert any(kind == "tensor" for _, kind, _ in leaves)
    for name, kind, value in leaves:
        digest.update(f"{name} {kind} ".encode() + value)
    return digest.hexdigest()


def _leaves(value: Any, name: str) -> Iterator[tuple[str, str, bytes]]:
    import torch

    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu().contiguous()
        raw = plain.view(-1).view(torch.uint8).numpy().tobytes()
        yield name, "tensor", f"{plain.dtype}{tuple(plain.shape)}".encode() + raw
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}/{key}")
    elif isinstance(value, list | tuple):
        for i, inner in enumerate(value):
            yield from _leaves(inner, f"{name}/{i}")
    elif isinstance(value, int | float):
        yield name, "number", repr(value).encode()


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on interruptions."""
    newest = max((run_dir / "checkpoints").glob("step-*"))
    return {
        "checkpoint": newest.name,
        "state": state_digest(newest),
        "model": [file_digest(path) for path in sorted((run_dir / "model").glob("*.safetensors"))],
        "rows": rows(run_dir),
        "samples": samples.read_text() if (samples := run_dir / "samples.jsonl").is_file() else None,
        "status": json.loads((run_dir / "result.json").read_text())["status"],
    }


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in TensorBoard by tag, as (step, value), without values that depend on time or machine."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
