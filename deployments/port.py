"""The port of a server: free, and taken by no other server that is still starting."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from giantserve.errors import ConfigError


@contextmanager
def held_port(host: str, port: int) -> Iterator[None]:
    """Hold the port for the life of the server. Raises ConfigError at once where it is taken, and
    for an IPv6 host: HAProxy listens on all IPv4 addresses for ``::``.

    HAProxy binds with SO_REUSEPORT, under which processes of one user may share a port: the kernel
    would deal the requests of two servers to either. Finding the port free is not enough, since
    minutes of loading pass before HAProxy binds it; hence a lock, which ends with the process.
    """
    if not 0 < port < 65536:
        raise ConfigError(f"port {port} is not between 1 and 65535")
    if ":" in host:
        raise ConfigError(f"host '{host}' is an IPv6 address; give a name or an IPv4 address")
    path = Path(tempfile.gettempdir()) / f"giantserve-{os.getuid()}-port-{port}.lock"
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.create_server((host, port)):
                pass
        except BlockingIOError:
            raise _taken(host, port, "Address already in use") from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise _taken(host, port, reason) from None
        yield
    finally:
        os.close(descriptor)


def _taken(host: str, port: int, reason: str) -> ConfigError:
    return ConfigError(f"cannot listen on {host}:{port}: {reason}; choose another --port")
