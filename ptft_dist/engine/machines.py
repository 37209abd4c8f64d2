"""Notices within a minute that another machine of the run is gone.

A machine that loses its power or its link sends nothing more, so the other ranks would wait in a collective until its
timeout. Therefore the first rank of each machine, its leader, has a TCP connection to rank 0. The kernel at the other
end answers keepalive probes, whatever its process does; a heartbeat in Python would give false alarms while C code
holds the GIL. A thread of each leader waits for the end of a connection. Lines of text are sent:

    hello TOKEN RANK    the first line to rank 0; strangers, who do not know the token, are dropped
    bye                 the end of the run, or of its stop
    failed CODE         this process has failed by itself, and ends with this exit code
    lost LOSS           from rank 0: what it has noticed (a `Loss` as JSON)
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from ptft_dist.errors import EXIT_LOST

CONNECT_S = 10.0
GRACE_S = 10.0
"""So long may the main thread take to fail by itself, for it knows more: which call failed, and where."""
LONGEST_LINE = 4096
_SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH)


class Patience(NamedTuple):
    """When a machine counts as silent."""

    idle_s: int = 10
    """Without a packet for so long, the kernel sends a probe."""
    interval_s: int = 5
    probes: int = 5

    @property
    def total_s(self) -> int:
        return self.idle_s + self.interval_s * self.probes


PATIENCE = Patience()


class Loss(NamedTuple):
    """What has happened to another machine."""

    hosts: tuple[str, ...]
    """The machines that are gone; empty if a process there has failed by itself."""
    how: str
    exit_code: int = EXIT_LOST


def machine_of(environ: Mapping[str, str]) -> str:
    """What the ranks of one machine share: the launcher's number of it, else its host name."""
    for name in ("GROUP_RANK", "SLURM_NODEID"):
        if number := environ.get(name):
            return f"{name} {number}"
    return socket.gethostname()


def watch_machines(
    rank: int,
    gather: Callable[[Any], list[Any]],
    on_loss: Callable[[Loss], None],
    warn: Callable[[str], None],
    patience: Patience = PATIENCE,
) -> Machines | None:
    """Connect the machines of the run; None on a rank that is not the leader of one of several. All ranks must call it.

    Args:
        gather: see Engine.gather_objects.
        on_loss: see Machines.
        warn: called with a message if the machines cannot be connected; training goes on without.
    """
    seats = gather((machine_of(os.environ), socket.gethostname()))
    hosts: dict[int, str] = {}  # by rank of the leader
    for leader, (machine, host) in enumerate(seats):
        if machine not in {seats[other][0] for other in hosts}:
            hosts[leader] = host
    if len(hosts) == 1:
        return None
    listener, token = _listen() if rank == 0 else None, secrets.token_hex(16)
    port, token = gather((listener.getsockname()[1], token) if listener is not None else None)[0]
    if rank not in hosts:
        return None
    machines = Machines(hosts, on_loss, patience, listener, token, GRACE_S)
    if listener is None:
        address = os.environ["MASTER_ADDR"]
        try:
            machines.join(address, port, rank)
        except OSError as error:
            warn(f"no connection to {address}:{port} ({error}): the loss of a machine is noticed only after a timeout")
            return None
    machines.start()
    return machines


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


@dataclass
class _Peer:
    """The other end of a connection."""

    host: str | None
    """None until it has said hello."""
    received: bytes = b""
    said_bye: bool = False
    exit_code: int | None = None
    """That with which it has failed by itself."""


class Machines:
    """The connections of this rank to the leaders of other machines, and the thread that watches them."""

    def __init__(
        self,
        hosts: Mapping[int, str],
        on_loss: Callable[[Loss], None],
        patience: Patience,
        listener: socket.socket | None = None,
        token: str = "",
        grace_s: float = 10.0,
    ) -> None:
        """Call `join` on all ranks but 0, and `start`.

        Args:
            hosts: rank of the leader -> host of the machine.
            on_loss: called from the thread, unless the main thread ends by itself within grace_s. It must end the
                process.
            listener: of rank 0, for the connections of the others.
            token: what they say to be let in.
        """
        self.hosts, self.on_loss, self.patience = dict(hosts), on_loss, patience
        self.listener, self.token, self.grace_s = listener, token, grace_s
        self.peers: dict[socket.socket, _Peer] = {}
        self.loss: Loss | None = None
        self._deadline: float | None = None
        self._main_ends = False
        self._changed = threading.Condition(threading.RLock())
        self._selector = selectors.PollSelector()  # a forked process shares an epoll with its parent
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ)
        os.register_at_fork(after_in_child=self._forget)

    def join(self, address: str, port: int, rank: int) -> None:
        """Connect to rank 0. Raises OSError."""
        connection = socket.create_connection((address, port), timeout=CONNECT_S)
        connection.settimeout(None)
        self._add(connection, self.hosts[0])
        connection.sendall(f"hello {self.token} {rank}\n".encode())

    def start(self) -> None:
        threading.Thread(target=self._watch, daemon=True, name="machines").start()

    # --- for the main thread ------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Declare that the main thread ends the process by itself. `on_loss` is not called any more."""
        with self._changed:
            self._main_ends = True

    def known_loss(self, wait_s: float) -> Loss | None:
        """What has happened to other machines, if it is known within wait_s."""
        with self._changed:
            self._changed.wait_for(lambda: self.loss is not None, wait_s)
            return self.loss

    def failed(self, exit_code: int) -> None:
        """Tell the others that this process fails by itself. Call before its end."""
        self._tell(f"failed {exit_code}")

    def close(self) -> None:
        """Say goodbye, at the regular end of the run."""
        self.take_over()
        self._tell("bye")
        for each in (*self.peers, *([self.listener] if self.listener is not None else [])):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)  # wakes the thread, which closes it

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while self._selector.get_map() or self._deadline is not None:
            wait_s = None if self._deadline is None else max(0.0, self._deadline - time.monotonic())
            for key, _ in self._selector.select(wait_s):
                if key.fileobj is self.listener:
                    self._accept(self.listener)
                elif key.fileobj in self.peers:  # not closed by what another has just said
                    self._read(key.fileobj)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._deadline = None
                self._end()

    def _end(self) -> None:
        with self._changed:  # the main thread can no longer begin to fail
            if not self._main_ends and self.loss is not None:
                self._main_ends = True
                self.failed(self.loss.exit_code)
                self.on_loss(self.loss)

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # closed
            self._close(listener)
        else:
            self._add(connection, None)

    def _add(self, connection: socket.socket, host: str | None) -> None:
        """Watch a connection. host: None if the other end has yet to say hello."""
        keep_alive(connection, self.patience)
        self.peers[connection] = _Peer(host)
        self._selector.register(connection, selectors.EVENT_READ)

    def _read(self, connection: socket.socket) -> None:
        peer, error = self.peers[connection], None
        try:
            received = connection.recv(LONGEST_LINE)
        except OSError as caught:
            received, error = b"", caught
        *lines, peer.received = (peer.received + received).split(b"\n")
        for line in lines:
            self._understand(peer, line.decode(errors="replace"))
        stranger = peer.host is None and (bool(lines) or len(peer.received) >= LONGEST_LINE)
        if not received or stranger:
            self._close(connection)
            self._ended(peer, error)

    def _close(self, connection: socket.socket) -> None:
        if connection in self._selector.get_map():
            self._selector.unregister(connection)
        self.peers.pop(connection, None)
        connection.close()

    def _understand(self, peer: _Peer, line: str) -> None:
        word, _, rest = line.partition(" ")
        if peer.host is None:
            token, _, rank = rest.partition(" ")
            if word == "hello" and hmac.compare_digest(token.encode(), self.token.encode()):
                peer.host = self.hosts[int(rank)]
                self._let_in()
        elif word == "bye":
            peer.said_bye = True
        elif word == "failed":
            peer.exit_code = int(rest)
        elif word == "lost":
            hosts, how, exit_code = json.loads(rest)
            self._lost(Loss(tuple(hosts), how, exit_code))

    def _let_in(self) -> None:
        """Stop listening once all other machines have connected."""
        here = sum(peer.host is not None for peer in self.peers.values())
        if self.listener is not None and here == len(self.hosts) - 1:
            self._close(self.listener)
            for connection, peer in list(self.peers.items()):
                if peer.host is None:
                    self._close(connection)

    def _ended(self, peer: _Peer, error: OSError | None) -> None:
        """Note a loss, unless the other end has said goodbye before its connection ended."""
        if peer.host is None or peer.said_bye:
            return
        if peer.exit_code is not None:
            self._lost(Loss((), f"a process on machine {peer.host} has failed", peer.exit_code))
        elif error is not None and error.errno in _SILENT:
            how = f"machine {peer.host} does not answer any more (no packet for {self.patience.total_s} s)"
            self._lost(Loss((peer.host,), how))
        else:
            self._lost(Loss((peer.host,), f"machine {peer.host} has ended"))

    def _lost(self, loss: Loss) -> None:
        """Note a loss. The first one tells why the run ends; later ones add hosts to it."""
        with self._changed:
            if self.loss is None:
                self.loss, self._deadline = loss, time.monotonic() + self.grace_s
            elif self.loss.hosts:
                more = tuple(host for host in loss.hosts if host not in self.loss.hosts)
                self.loss = self.loss._replace(hosts=self.loss.hosts + more)
            self._changed.notify_all()
        if self.listener is not None:
            self._tell(f"lost {json.dumps(self.loss)}")

    def _tell(self, line: str) -> None:
        """Send a line to all who have said hello."""
        for connection, peer in list(self.peers.items()):
            if peer.host is not None:
                with contextlib.suppress(OSError):
                    connection.sendall(line.encode() + b"\n")

    def _forget(self) -> None:
        """Close the connections in a forked process: they must end with this one."""
        for each in (*self.peers, *([self.listener] if self.listener is not None else [])):
            each.close()


def keep_alive(connection: socket.socket, patience: Patience) -> None:
    """Let the kernel end a connection whose other end is silent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {
        "TCP_KEEPIDLE": patience.idle_s,
        "TCP_KEEPINTVL": patience.interval_s,
        "TCP_KEEPCNT": patience.probes,
        "TCP_USER_TIMEOUT": patience.total_s * 1000,  # the same for a line that is not acknowledged
    }
    for name, value in options.items():
        if hasattr(socket, name):  # some exist on Linux only
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
