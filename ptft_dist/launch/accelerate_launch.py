"""`accelerate launch` for `ptft train --launch`: failed ranks take one line each, where torchrun prints a traceback.

python -m ptft_dist.launch.accelerate_launch ARGUMENTS
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptft_dist.errors import EXIT_FAILED, EXIT_LOST
from ptft_dist.launch.environment import EXIT_CODE_FILE


def main() -> None:
    from accelerate.commands.launch import main as run
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing import api as processes
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for module in (agent, processes):  # they log each end of a rank, also after a stop
        logging.getLogger(module.__name__).disabled = True
    try:
        run()
    except ChildFailedError as error:
        reported = Path(os.environ[EXIT_CODE_FILE]).read_text()
        for line in ends(error.failures, reported=bool(reported)):
            print(line, file=sys.stderr, flush=True)
        sys.exit(EXIT_LOST if any(map(was_killed, error.failures.values())) else EXIT_FAILED)
    except subprocess.CalledProcessError as error:  # one process, which accelerate starts without torchrun
        sys.exit(max(error.returncode, 1))


def was_killed(failure: Any) -> bool:
    """Whether a signal ended the rank, other than SIGTERM, with which torchrun ends the other ranks."""
    return failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM


def ends(failures: Mapping[int, Any], *, reported: bool) -> list[str]:
    """What to say of each rank that ended with a failure. reported: a rank has already reported the cause."""
    lines = []
    for rank, failure in sorted(failures.items()):
        code, place = int(failure.exitcode), f"rank {rank} on {socket.gethostname()}"
        if was_killed(failure):
            memory = "; perhaps the machine ran out of memory" if -code == signal.SIGKILL else ""
            lines.append(f"{place} was killed by {signal.Signals(-code).name}{memory}")
        elif code > 0 and not reported:
            lines.append(f"{place} ended with exit code {code}")
    return lines


if __name__ == "__main__":
    main()
