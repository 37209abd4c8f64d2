"""Two processes that meet and add numbers, started as training starts them.

python -m ptft_dist.doctor.handshake FILE: what each of them runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ptft_dist.doctor.finding import Finding

LIMIT_S, ELEMENTS, REPEATS = 120.0, 4_000_000, 5


def shake_hands(gpus: int) -> Iterator[Finding]:
    """Start two processes with torchrun: on two GPUs with NCCL if there are two, otherwise on the CPU with gloo."""
    backend = "nccl" if gpus >= 2 else "gloo"
    with tempfile.TemporaryDirectory(prefix="ptft-doctor-") as name:
        answer = Path(name) / "answer.json"
        words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m"]
        words += ["ptft_dist.doctor.handshake", str(answer), backend]
        began = time.monotonic()
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            _, stderr = done.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            _kill_all(done)
            text = f"they did not meet within {LIMIT_S:.0f} s"
            remedy = "look for a firewall or a proxy on this machine; try NCCL_P2P_DISABLE=1, and GLOO_SOCKET_IFNAME=lo"
            yield Finding("two processes", backend, "error", text, remedy)
            return
        seconds = time.monotonic() - began
        if done.returncode or not answer.exists():
            last = next((line for line in reversed(stderr.splitlines()) if "Error" in line), stderr[-200:])
            yield Finding("two processes", backend, "error", f"they failed: {last.strip()}")
            return
        found = json.loads(answer.read_text())
    text = (
        f"met and agreed in {seconds:.0f} s; {found['gigabytes_per_s']:.2f} GB/s in sums of {4 * ELEMENTS / 1e6:.0f} MB"
    )
    yield Finding("two processes", backend, "ok", text)


def _kill_all(launcher: subprocess.Popen[str]) -> None:
    """Kill torchrun and its processes, which have sessions of their own and would go on waiting for each other."""
    processes = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    launcher.communicate()


def main(answer: Path, backend: str) -> None:
    """One of the processes. Rank 0 writes the rate of sums over both.

    Raises RuntimeError if a sum is wrong.
    """
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    seconds = []
    for _ in range(REPEATS):
        numbers = torch.full((ELEMENTS,), float(rank + 1), device=device)
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(numbers)
        if not bool((numbers == 3.0).all()):
            raise RuntimeError(f"a sum over both processes is wrong: {float(numbers[0])} instead of 3")
        seconds.append(time.monotonic() - began)
    if rank == 0:
        answer.write_text(json.dumps({"gigabytes_per_s": 4 * ELEMENTS / min(seconds) / 1e9}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
