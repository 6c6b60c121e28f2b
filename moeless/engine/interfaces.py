"""Which network interface the ranks' gloo groups use.

Gloo takes the address that the host's own name resolves to. On one machine no address is needed: the loopback interface
always is there. Among several machines that address is wrong where ``/etc/hosts`` maps the name to ``127.0.1.1``, as
Debian does; then the interface is taken that reaches the meeting point of all ranks. ``GLOO_SOCKET_IFNAME`` overrides
it.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, MutableMapping
from pathlib import Path

VARIABLE = "GLOO_SOCKET_IFNAME"
_SIOCGIFADDR = 0x8915


def choose_interface(one_machine: bool, environment: MutableMapping[str, str] = os.environ) -> None:
    """Name the interface for gloo, unless the user has; it has to come before the first group is made."""
    if environment.get(VARIABLE):
        return
    name = loopback() if one_machine else outward(environment.get("MASTER_ADDR", ""))
    if name is not None:
        environment[VARIABLE] = name


def loopback() -> str | None:
    """The loopback interface's name; None where none is known."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), None)


def outward(
    meeting: str,
    own_address: Callable[[], str | None] | None = None,
    towards: Callable[[str], str | None] | None = None,
    address_of: Callable[[str], str | None] | None = None,
    routes: Path = Path("/proc/net/route"),
) -> str | None:
    """The interface by which other machines reach this one; None where gloo's own choice will do or none is found.

    Args:
        meeting: host name or address at which all ranks meet.
        own_address: what the host's name resolves to; None where it does not.
        towards: this machine's address on the way to another one.
        address_of: an interface's address.
    """
    mine = (own_address or _own_address)()
    if mine is not None and not mine.startswith("127."):
        return None
    here = (towards or _towards)(meeting) if meeting else None
    if here is not None and not here.startswith("127."):
        for _, name in socket.if_nameindex():
            if (address_of or _address_of)(name) == here:
                return name
    # this machine is the meeting point: the interface of its default route
    try:
        lines = [line.split() for line in routes.read_text(encoding="ascii").splitlines()[1:]]
    except OSError:
        return None
    return next((words[0] for words in lines if len(words) > 7 and words[1] == words[7] == "00000000"), None)


def _own_address() -> str | None:
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return None


def _towards(meeting: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            # nothing is sent; the kernel picks the way
            probe.connect((meeting, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _address_of(name: str) -> str | None:
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            return socket.inet_ntoa(found[20:24])
    except (OSError, ImportError):
        return None
