"""Client: a connection to a store (kvc/client.h). Any thread."""

import ctypes
from dataclasses import dataclass

from . import _abi, _lib
from ._handle import Handle, Owner


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


class Client(Owner):
    """
    Client(uris): connects to the first of "grpc://host:port,grpc+unix:///path" that answers and
    exchanges limits; blocks up to connect_timeout_s. sums: sum and verify what crosses RDMA.
    region_bytes: how much of the sequences' rows RDMA may write to in place (n_layers *
    residency_slots * bytes of a row each; it is locked in memory); 0: 1 GiB, and at most a quarter
    of the limit on locked memory.
    Raises KvasirError. Also a context manager.
    close() closes the workers that use it first.
    """

    def __init__(
        self,
        uris,
        connect_timeout_s=None,
        timeout_s=None,
        n_channels=0,
        sums=False,
        region_bytes=0,
    ):
        opts = _abi.ClientOpts(
            size_bytes=ctypes.sizeof(_abi.ClientOpts),
            uris=uris.encode(),
            connect_timeout_ns=_lib.ns(connect_timeout_s),
            default_timeout_ns=_lib.ns(timeout_s),
            n_channels=n_channels,
            sums=sums,
            region_bytes=region_bytes,
        )
        lib, ptr = _lib.load(), ctypes.c_void_p()
        code = lib.kvc_client_open(ctypes.byref(opts), ctypes.byref(ptr))
        _lib.check(code, "kvc_client_open", "kvc_last_error")
        self._handle = Handle("kvc_client", "the client", ptr, lib.kvc_client_close)

    @property
    def handle(self):
        """Handle of the kvc_client: `with client.handle as pointer`."""
        return self._handle

    @property
    def limits(self):
        """Limits that the server advertised at connect, by name."""
        with self._handle as ptr:
            return _plain(_lib.load().kvc_client_limits(ptr).contents)

    def stats(self, timeout_s=None):
        """ServerStats of the server now. Blocks."""
        lib, out = _lib.load(), ctypes.POINTER(_abi.ServerStats)()
        with self._handle as ptr:
            code = lib.kvc_stats(ptr, _lib.deadline_ns(timeout_s), ctypes.byref(out))
            _lib.check(code, "kvc_stats", "kvc_last_error")
        try:
            s = out.contents
            return ServerStats(
                version=(s.version or b"").decode(),
                boot_id=s.boot_id,
                uptime_ms=s.uptime_ms,
                limits=_plain(s.limits.contents),
                tiers={t.name: t for t in (_tier(s.tiers[i]) for i in range(s.n_tiers))},
                counters={
                    s.counters[i].name.decode(): s.counters[i].value for i in range(s.n_counters)
                },
                schemas=[bytes(s.schemas[i].bytes).hex() for i in range(s.n_schemas)],
            )
        finally:
            lib.kvc_stats_free(out)

    @staticmethod
    def process_counts():
        """Counters of this process by name, as way_near_cheapest (see kvc_process_counts)."""
        lib = _lib.load()
        n = lib.kvc_process_counts(None, 0)
        counts = (_abi.NamedCount * n)()
        lib.kvc_process_counts(counts, n)
        return {count.name.decode(): count.value for count in counts}
