"""gloo's interface where the own host name resolves to a loopback address."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ptft_dist.launch.local import launch
from ptft_dist.launch.network import Lookups, gloo_interface, interfaces, own_address_towards, resolve

INTERFACES = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["192.168.0.7", "fe80::1%eth0", "00:00:00:00:00:00"],
    "ib0": ["10.0.0.7"],
}
NAMES = {"h2": ["127.0.1.1"], "h1": ["10.0.0.1"], "10.0.0.1": ["10.0.0.1"], "192.168.0.1": ["192.168.0.1"]}


def lookups(host: str = "h2", names: dict[str, list[str]] | None = None) -> Lookups:
    names = NAMES | (names or {})

    def towards(address: str) -> str | None:
        if address.startswith("127."):
            return "127.0.0.1"
        return {"10.0.0": "10.0.0.7", "192.168.0": "192.168.0.7"}.get(address.rpartition(".")[0])

    return Lookups(lambda: host, lambda name: names.get(name, []), towards, lambda: INTERFACES)


@pytest.mark.parametrize(
    ("address", "name", "local"),
    [
        ("10.0.0.1:23456", "ib0", "10.0.0.7"),
        ("h1:23456", "ib0", "10.0.0.7"),
        ("192.168.0.1:1", "eth0", "192.168.0.7"),
    ],
)
def test_the_interface_towards_machine_0(address: str, name: str, local: str) -> None:
    variables, message = gloo_interface(address, {}, lookups())
    assert variables == {"GLOO_SOCKET_IFNAME": name}
    assert message == (
        "the host name h2 resolves to 127.0.1.1, where other machines cannot reach it; "
        f"gloo uses the interface {name} ({local})"
    )


def test_machine_0_by_its_own_name() -> None:
    """/etc/hosts has a line with 127.0.1.1 and one with the address."""
    both = {"h2": ["127.0.1.1", "10.0.0.7"]}
    assert gloo_interface("h2:1", {}, lookups(names=both))[0] == {"GLOO_SOCKET_IFNAME": "ib0"}
    variables, message = gloo_interface("h2:1", {}, lookups())
    assert variables == {}
    assert message is not None
    assert message.startswith("warning: the host name h2 resolves to 127.0.1.1")
    assert "Set GLOO_SOCKET_IFNAME" in message


def test_nothing_is_changed_without_need() -> None:
    assert gloo_interface("10.0.0.1:1", {"GLOO_SOCKET_IFNAME": "ib0"}, lookups()) == ({}, None)
    assert gloo_interface("10.0.0.1:1", {}, lookups(host="h1")) == ({}, None)


@pytest.mark.parametrize("address", ["no.such.host:1", "172.16.0.1:1"])
def test_no_route(address: str) -> None:
    variables, message = gloo_interface(address, {}, lookups(names={"172.16.0.1": ["172.16.0.1"]}))
    assert variables == {}
    assert "no interface towards" in (message or "")


def test_the_system_answers() -> None:
    assert "127.0.0.1" in resolve("localhost")
    assert resolve("no.such.host.invalid") == []
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert "127.0.0.1" in interfaces()["lo"]


def test_the_ranks_get_the_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of several machines only."""
    asked: list[dict[str, str]] = []

    class Child:
        def __init__(self, _words: list[str], env: dict[str, str], **_options: Any) -> None:
            asked.append(env)

        def wait(self) -> int:
            return 0

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(subprocess, "Popen", Child)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr("ptft_dist.launch.network._is_loopback", lambda address: address == "::1" or address is None)
    names = lambda *_: [(0, 0, 0, "", ("::1", 0)), (0, 0, 0, "", ("127.0.0.1", 0))]  # noqa: E731
    monkeypatch.setattr(socket, "getaddrinfo", names)
    for address in ("127.0.0.1:1", None):
        assert launch(["accelerate", "launch"], tmp_path / "run", 1, {}, address) == 0
    assert [env.get("GLOO_SOCKET_IFNAME") for env in asked] == ["lo", None]
    assert capsys.readouterr().err.count("gloo uses the interface lo (127.0.0.1)") == 1
