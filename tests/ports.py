"""Ports for tests that start several processes of one program."""

import random
import socket
from pathlib import Path

_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a port that nothing uses, for a process that is started with it later.

    The system gives the ports of a range to connections that name none, so one that was free a moment ago may be
    taken. This port is below that range, and chosen at random, so that tests at the same time choose different ones.
    """
    end = int(_RANGE.read_text().split()[0]) if _RANGE.exists() else 32768
    while True:
        port = random.SystemRandom().randrange(max(1024, end - 12000), end)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
