"""No test talks to another machine: Python's sockets go nowhere else. A subprocess has no such guard."""

import ipaddress
from typing import Any

PLACE = {  # of the address among an audit event's arguments
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
}


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: RuntimeError, which nobody who expects an outage catches, where it is not to this machine."""
    if event in PLACE:
        address = arguments[PLACE[event]]
        host = address[0] if isinstance(address, tuple) else address
        if not (isinstance(address, tuple) or event.startswith("socket.get")):
            return  # a path
        if not _is_here(host):
            raise RuntimeError(f"a test asked for the network: {event} {host!r}")


def _is_here(host: Any) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    if not host or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
