"""A Slurm cluster whose hosts are network namespaces, with addresses of their own: they can die, and be cut off.

Needs root. All hosts share the kernel, the disk and the processors, so file locks behave as on one machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

import psutil
from cluster import SEARCH, Cluster

BRIDGE, CONTROLLER = "ptft-br", "254"
NET = "10.77.0"
DISK_MB = 48


def missing() -> list[str]:
    """What is not there: programs, or the right to make namespaces."""
    absent = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name, path=SEARCH) is None]
    if absent or os.geteuid() != 0:
        return absent or ["the rights of root"]
    made = run("ip", "netns", "add", "ptft-try", check=False)
    run("ip", "netns", "del", "ptft-try", check=False)
    return [] if made else ["the right to make network namespaces"]


def run(*words: str, check: bool = True) -> bool:
    return subprocess.run(words, env={"PATH": SEARCH}, capture_output=True, check=check).returncode == 0


class Hosts(Cluster):
    """Hosts h1, h2, ... with one node each, and a controller."""

    more_config = "SlurmdTimeout=10\nMessageTimeout=5\n"
    ask_every_s = 0.5  # each question starts seven processes, which enter a host

    def __init__(self, folder: Path, count: int) -> None:
        super().__init__(folder, nodes=tuple(f"h{i}" for i in range(1, count + 1)))
        del self.variables["GLOO_SOCKET_IFNAME"]  # the loopback interface, which other tests use
        self.disk, self.local = folder / "disk", folder / "local"
        """A small disk that all hosts share, and a directory that is another one on each host."""

    def address(self, node: str) -> str:
        return f"{NET}.{node.removeprefix('h')}"

    @property
    def controller(self) -> str:
        return f"hc({NET}.{CONTROLLER})"

    def node_lines(self) -> str:
        return "\n".join(
            f"NodeName={node} NodeHostname={node} NodeAddr={self.address(node)} Port=6818 CPUs=8" for node in self.nodes
        )

    def start(self) -> None:
        self._make_network()
        for place in (self.disk, self.local):
            place.mkdir()
        run("mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.disk))
        names = {"hc": f"{NET}.{CONTROLLER}", **{node: self.address(node) for node in self.nodes}}
        for host in names:
            # As on Debian, the own name comes first with a loopback address.
            own = f"127.0.0.1 localhost\n127.0.1.1 {host}\n"
            others = "".join(f"{address} {name}\n" for name, address in names.items() if name != host)
            (self.folder / f"hosts-{host}").write_text(own + others)
        super().start()

    def _make_network(self) -> None:
        self._remove_network()
        run("ip", "netns", "add", "hc")
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "add", BRIDGE, "type", "bridge"),
            ("addr", "add", f"{NET}.{CONTROLLER}/24", "dev", BRIDGE),
            ("link", "set", BRIDGE, "up"),
        ):
            run("ip", "-n", "hc", *words)
        for node in self.nodes:
            run("ip", "netns", "add", node)
            run("ip", "-n", node, "link", "set", "lo", "up")
            run("ip", "link", "add", f"v{node}", "netns", "hc", "type", "veth", "peer", "name", "eth0", "netns", node)
            run("ip", "-n", node, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
            run("ip", "-n", node, "link", "set", "eth0", "up")
            run("ip", "-n", "hc", "link", "set", f"v{node}", "master", BRIDGE)
            run("ip", "-n", "hc", "link", "set", f"v{node}", "up")

    def _remove_network(self) -> None:
        for name in ("hc", *self.nodes):
            if Path(f"/var/run/netns/{name}").exists():
                self.kill_host(name)
                run("ip", "netns", "del", name, check=False)

    def on(self, host: str | None, words: list[str]) -> list[str]:
        """Not by `ip netns exec`, which mounts a /sys without cgroups."""
        host = host or "hc"
        script = f"hostname {host}; mount --bind {self.folder}/hosts-{host} /etc/hosts; "
        script += f'mount -t tmpfs tmpfs {self.local}; exec "$@"'
        return [
            "nsenter",
            f"--net=/var/run/netns/{host}",
            "unshare",
            "--uts",
            "--mount",
            "bash",
            "-c",
            script,
            "bash",
            *words,
        ]

    def _processes_in(self, host: str) -> list[int]:
        done = subprocess.run(
            ["ip", "netns", "pids", host], env={"PATH": SEARCH}, capture_output=True, text=True, check=True
        )
        return [int(pid) for pid in done.stdout.split()]

    def kill_host(self, node: str) -> None:
        """All its processes die at once."""
        for pid in self._processes_in(node):
            with contextlib.suppress(psutil.Error):
                psutil.Process(pid).kill()

    def cut(self, node: str) -> None:
        run("ip", "-n", "hc", "link", "set", f"v{node}", "down")

    def bring_back(self, node: str) -> None:
        """Connect a host and start it again, and wait until all hosts are idle."""
        run("ip", "-n", "hc", "link", "set", f"v{node}", "up")
        self.kill_host(node)
        self._daemon("slurmd", "-D", "-N", node, host=node)
        self._until_idle()

    def stop(self) -> None:
        super().stop()
        self._remove_network()
        run("umount", "--lazy", str(self.disk), check=False)
