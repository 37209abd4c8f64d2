"""The network interface over which gloo connects the machines of a run."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def resolve(host: str) -> list[str]:
    """The addresses of a host name; empty if it has none."""
    try:
        return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, None)))
    except OSError:
        return []


def own_address_towards(address: str) -> str | None:
    """The address of this machine from which an address is reached; None without a route. Sends no packet."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])
    return None


def interfaces() -> dict[str, list[str]]:
    """The interfaces of this machine, with their addresses."""
    import psutil

    return {name: [each.address for each in addresses] for name, addresses in psutil.net_if_addrs().items()}


@dataclass(frozen=True)
class Lookups:
    """Questions to the operating system; tests answer them otherwise."""

    host: Callable[[], str] = lambda: socket.gethostname()
    resolve: Callable[[str], list[str]] = resolve
    own_address_towards: Callable[[str], str | None] = own_address_towards
    interfaces: Callable[[], dict[str, list[str]]] = interfaces


def gloo_interface(
    address: str, environ: Mapping[str, str], lookups: Lookups | None = None
) -> tuple[dict[str, str], str | None]:
    """Variables for the ranks with which gloo tells other machines an address that they can reach, and a message.

    gloo tells the other machines the address that this host name resolves to. In Debian's /etc/hosts this is 127.0.1.1,
    where each of them finds only itself.

    Args:
        address: HOST:PORT of machine 0, of several machines.
    """
    lookups = lookups or Lookups()
    own = lookups.host()
    if environ.get(GLOO_INTERFACE) or not any(map(_is_loopback, found := lookups.resolve(own))):
        return {}, None
    problem = f"the host name {own} resolves to {', '.join(found)}, where other machines cannot reach it"
    machine_0 = address.rpartition(":")[0].strip("[]")
    for each in lookups.resolve(machine_0):
        local = lookups.own_address_towards(each)
        for name, addresses in lookups.interfaces().items():
            if local in addresses and not _is_loopback(local):
                return {GLOO_INTERFACE: name}, f"{problem}; gloo uses the interface {name} ({local})"
    return {}, (
        f"warning: {problem}, and no interface towards {machine_0} was found. Set {GLOO_INTERFACE} to the interface "
        "between the machines (see `ip addr`), or correct /etc/hosts"
    )


def _is_loopback(address: str | None) -> bool:
    return address is not None and ipaddress.ip_address(address.partition("%")[0]).is_loopback
