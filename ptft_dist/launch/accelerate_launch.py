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

from ptft_dist.errors import EXIT_FAILED, EXIT_LOST
from ptft_dist.launch.environment import EXIT_CODE_FILE, RUN_DIR
from ptft_dist.launch.result import RESULT, has_begun, write_failure


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
        sys.exit(_report({rank: int(failure.exitcode) for rank, failure in error.failures.items()}))
    except subprocess.CalledProcessError as error:  # one process, which accelerate starts without torchrun
        sys.exit(_report({0: error.returncode}) if error.returncode < 0 else error.returncode)


def _report(codes: Mapping[int, int]) -> int:
    """Report the ranks that failed; the exit code of the launcher. codes: by rank, negative after a signal."""
    reported = bool(Path(os.environ[EXIT_CODE_FILE]).read_text())
    lines = ends(codes, reported=reported)
    for line in lines:
        print(line, file=sys.stderr, flush=True)
    if not any(map(was_killed, codes.values())):
        return EXIT_FAILED
    if not reported and RUN_DIR in os.environ and has_begun(run_dir := Path(os.environ[RUN_DIR])):
        host = socket.gethostname()
        try:
            write_failure(run_dir, {"exit_code": EXIT_LOST, "error": "\n".join(lines), "host": host})
        except OSError as error:
            print(f"{run_dir / RESULT} cannot be written: {error.strerror}", file=sys.stderr)
    return EXIT_LOST


def was_killed(code: int) -> bool:
    """Whether a signal ended the rank, other than SIGTERM, with which torchrun ends the other ranks."""
    return code < 0 and -code != signal.SIGTERM


def ends(codes: Mapping[int, int], *, reported: bool) -> list[str]:
    """What to say of each rank that ended with a failure. reported: a rank has already reported the cause."""
    lines = []
    for rank, code in sorted(codes.items()):
        place = f"rank {rank} on {socket.gethostname()}"
        if was_killed(code):
            memory = "; perhaps the machine ran out of memory" if -code == signal.SIGKILL else ""
            lines.append(f"{place} was killed by {signal.Signals(-code).name}{memory}")
        elif code > 0 and not reported:
            lines.append(f"{place} ended with exit code {code}")
    return lines


if __name__ == "__main__":
    main()
