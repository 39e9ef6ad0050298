"""Client: a connection to a store (kvc/client.h). Any thread."""

import ctypes
import weakref
from dataclasses import dataclass

from . import _abi, _lib


@dataclass(frozen=True)
class Tier:
    """One tier of a server: its cap, what is used of it, and its traffic since the start."""

    name: str
    capacity_bytes: int
    used_bytes: int
    values: int
    rows_read: int
    bytes_read: int
    bytes_written: int
    evictions: int


@dataclass(frozen=True)
class ServerStats:
    """What a server says of itself."""

    version: str
    boot_id: int
    uptime_ms: int
    limits: dict
    tiers: dict
    counters: dict
    schemas: list


def _plain(struct):
    return {name: getattr(struct, name) for name, _ in struct._fields_}


def _tier(t):
    values = _plain(t)
    values["name"] = t.name.decode()
    return Tier(**values)


class Client:
    """
    Client(uris): connects to the first of "grpc://host:port,grpc+unix:///path" that answers and
    exchanges limits; blocks up to connect_timeout_s. Raises KvasirError. Also a context manager.
    close() closes the workers that use it first.
    """

    def __init__(self, uris, connect_timeout_s=None, timeout_s=None, n_channels=0):
        self._ptr = None
        self._users = weakref.WeakSet()
        opts = _abi.ClientOpts(
            size_bytes=ctypes.sizeof(_abi.ClientOpts),
            uris=uris.encode(),
            connect_timeout_ns=_lib.ns(connect_timeout_s),
            default_timeout_ns=_lib.ns(timeout_s),
            n_channels=n_channels,
        )
        ptr = ctypes.c_void_p()
        code = _lib.load().kvc_client_open(ctypes.byref(opts), ctypes.byref(ptr))
        _lib.check(code, "kvc_client_open", "kvc_last_error")
        self._ptr = ptr

    @property
    def pointer(self):
        """The kvc_client *, borrowed."""
        if self._ptr is None:
            raise ValueError("the client is closed")
        return self._ptr

    def add_user(self, worker):
        """Notes a worker that must be closed before this client."""
        self._users.add(worker)

    @property
    def limits(self):
        """Limits that the server advertised at connect, by name."""
        return _plain(_lib.load().kvc_client_limits(self.pointer).contents)

    def stats(self, timeout_s=None):
        """ServerStats of the server now. Blocks."""
        lib, out = _lib.load(), ctypes.POINTER(_abi.ServerStats)()
        code = lib.kvc_stats(self.pointer, _lib.deadline_ns(timeout_s), ctypes.byref(out))
        _lib.check(code, "kvc_stats", "kvc_last_error")
        try:
            s = out.contents
            return ServerStats(
                version=(s.version or b"").decode(),
                boot_id=s.boot_id,
                uptime_ms=s.uptime_ms,
                limits=_plain(s.limits),
                tiers={t.name: t for t in (_tier(s.tiers[i]) for i in range(s.n_tiers))},
                counters={
                    s.counters[i].name.decode(): s.counters[i].value for i in range(s.n_counters)
                },
                schemas=[bytes(s.schemas[i].bytes).hex() for i in range(s.n_schemas)],
            )
        finally:
            lib.kvc_stats_free(out)

    def close(self):
        """Closes its workers and then itself; twice is fine."""
        if self._ptr is not None:
            for worker in list(self._users):
                worker.close()
            _lib.load().kvc_client_close(self._ptr)
            self._ptr = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
