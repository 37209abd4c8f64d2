"""A stand-in for the Python interpreter with which a real launcher starts its ranks: see preloaded_ranks.py.

python rank_client.py SOCKET [-u] -m MODULE ARGUMENTS... or SCRIPT ARGUMENTS...

It has the life of the rank that the server forks for it: it passes signals on, and ends as the rank ends.
"""

import json
import os
import signal
import socket
import sys
from contextlib import suppress

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT)


def main() -> None:
    words = [word for word in sys.argv[2:] if word != "-u"]
    ignored = [int(number) for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(sys.argv[1])
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # the request comes first
    for number in PASSED_ON:
        signal.signal(number, lambda received, _frame: pass_on(server, received))
    cwd = os.getcwd()  # noqa: PTH109  # pathlib is slow to import
    request = {"words": words, "env": dict(os.environ), "cwd": cwd, "pid": os.getpid(), "parent": os.getppid()}
    with os.fdopen(os.memfd_create("request"), "w") as file:  # an environment may be larger than a packet
        json.dump({**request, "ignored": ignored}, file)
        file.flush()
        socket.send_fds(server, [b"start"], [file.fileno(), 0, 1, 2])
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    code = json.loads(server.recv(64))
    if code < 0:  # ended by a signal
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def pass_on(server: socket.socket, number: int) -> None:
    with suppress(BrokenPipeError):  # the rank has just ended
        server.send(bytes([number]))


if __name__ == "__main__":
    main()
