"""Worker and Sequence: kvw/worker.h with arrays in and out.

Arrays are numpy arrays or torch tensors of the worker's dtype, contiguous, on the CPU or with
device_memory on the GPU; nothing is copied on this side. A Sequence is used by one thread at a
time; different ones may run in parallel.
"""

import contextlib
import ctypes
from dataclasses import dataclass

import numpy as np

from . import _abi, _lib, tensors
from ._group import AllReduce
from ._handle import Handle, Owner
from ._home import alone
from .errors import KvasirError, Status


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: theta alone, or with the four factors of Llama-3's scaling."""

    theta: float
    factor: float = 0.0
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_max_position: int = 0

    @property
    def is_llama3(self):
        return self.factor != 0.0

    def params(self):
        """As a kvk_rope_params."""
        kind = _abi.ROPE_LLAMA3 if self.is_llama3 else _abi.ROPE_PLAIN
        return _abi.RopeParams(
            kind,
            self.theta,
            self.factor,
            self.low_freq_factor,
            self.high_freq_factor,
            self.original_max_position,
        )


@dataclass(frozen=True)
class Geometry:
    """What a model looks like to the store. dtype: "float32", "float16" or "bfloat16"."""

    n_layers: int
    n_q_heads: int
    n_kv_heads: int
    head_dim: int
    dtype: str
    rope: Rope
    attention_scale: float = 0.0

    @property
    def row_bytes(self):
        """Bytes of one token in one layer: K and V of all its heads."""
        return 2 * self.n_kv_heads * self.head_dim * (4 if self.dtype == "float32" else 2)


CHUNK_TOKENS = 512  # what a Worker asks for unless told otherwise


def _choice(what, table, value):
    if value is None:
        return 0
    if value not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, not {value!r}")
    return table[value]


def device_of(backend, device_memory):
    """Where arrays lie: "cpu" or "cuda:N"."""
    if not device_memory:
        return "cpu"
    kind, _, number = (backend or "cpu").partition(":")
    return f"{kind}:{number or 0}"


def _bytes(text):
    return None if text is None else str(text).encode()


_u32 = ctypes.c_uint32

# Options that pass through to kvw_opts as they are; 0 is the C side's default.
_COUNTS = (
    "tp_size tp_rank block_tokens n_threads n_sink n_recent k eps chunk_tokens far_position "
    "residency_slots exact index_dims rerank_dims rerank_factor put_window reuse_any "
    "landmark_dim max_tokens device_memory retrieval_queries"
).split()


class Worker(Owner):
    """
    Worker(geometry, model="name", selector="tokenselect", client=None, ...): one model on one
    store. client None: every row stays resident; a list of Clients: blocks are spread over their
    servers, by the names in server_names ("0", "1" ... by default), which are to be the same for
    all that share the store. Other keywords are those of kvw_opts: revision,
    index ("exact", "compressed", "reranked"), projection (path), policy ("fail", "drop"), promise
    ("memory", "durable"), fetch_timeout_s, put_timeout_s, reselect_cos (theta of TokenSelect's
    Selection Cache; 0: off; the paper uses 0.9), row_dtype ("i8" or "e4m3": rows are kept, stored
    and moved coded, a byte an element and a scale a head; not with index "exact"), backend ("cpu";
    "cuda", "cuda:1": passes and steps on a GPU), device_memory (1: k, v, q, out and lse are torch
    tensors on that GPU, used in order on what was torch's current stream when the sequence was
    opened, which must be current in its calls), way (how rows that are not resident are
    reached: "auto", "rows", "near", "shm", "rdma"), and the counts (n_sink, n_recent, k, eps,
    chunk_tokens, block_tokens, ...). Blocks; raises KvasirError.

    Tensor parallelism: one Worker per rank, with tp_size, tp_rank, a geometry of the rank's heads,
    and all_reduce(op, x): combines x (float32, one dimension) over the ranks in place; op is "sum"
    or "max". It is called in whatever thread calls the worker, in the same order on every rank, and
    must raise (TimeoutError, say) rather than wait for ever for a rank that does not come.
    """

    def __init__(
        self,
        geometry,
        model,
        selector,
        client=None,
        revision="",
        index=None,
        projection=None,
        policy=None,
        promise=None,
        fetch_timeout_s=None,
        put_timeout_s=None,
        reselect_cos=0.0,
        backend=None,
        all_reduce=None,
        way=None,
        server_names=None,
        row_dtype=None,
        **counts,
    ):
        self._group = None if all_reduce is None else AllReduce(all_reduce)
        unknown = set(counts) - set(_COUNTS)
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
        g = self.geometry = geometry
        self.client = client
        self.dtype = tensors.dtype_name(g.dtype)
        self.landmark_dim = counts.get("landmark_dim", 0)
        self.device = device_of(backend, counts.get("device_memory", 0))
        self.chunk_tokens = counts["chunk_tokens"] = counts.get("chunk_tokens") or CHUNK_TOKENS
        opts = _abi.WorkerOpts(
            size_bytes=ctypes.sizeof(_abi.WorkerOpts),
            model=_bytes(model),
            revision=_bytes(revision),
            n_layers=g.n_layers,
            n_q_heads=g.n_q_heads,
            n_kv_heads=g.n_kv_heads,
            head_dim=g.head_dim,
            dtype=tensors.DTYPES[self.dtype],
            rope=g.rope.params(),
            attention_scale=g.attention_scale,
            promise=_choice("promise", _abi.PROMISE, promise),
            fetch_timeout_ns=_lib.ns(fetch_timeout_s),
            policy=_choice("policy", _abi.POLICY, policy),
            backend=_bytes(backend),
            selector=_bytes(selector),
            index=_choice("index", _abi.INDEX, index),
            projection_path=_bytes(projection),
            reselect_cos=reselect_cos,
            put_timeout_ns=_lib.ns(put_timeout_s),
            way=_bytes(way),
            row_dtype=_choice("row_dtype", _abi.ROW_DTYPE, row_dtype),
            **counts,
        )
        if self._group is not None:
            opts.all_reduce = self._group.pointer
        self._handle = self._open(opts, client, server_names)

    def _open(self, opts, client, server_names):
        several = isinstance(client, (list, tuple))
        if server_names is not None and not (several and len(server_names) == len(client)):
            raise ValueError("server_names needs a list of as many clients")
        clients = list(client) if several else [] if client is None else [client]
        self.n_servers = n = len(clients)
        lib, ptr = _lib.load(), ctypes.c_void_p()
        with contextlib.ExitStack() as held:
            pointers = [held.enter_context(c.handle) for c in clients]
            if several:
                opts.clients, opts.n_clients = (ctypes.c_void_p * n)(*pointers), n
                if server_names is not None:
                    opts.server_names = (ctypes.c_char_p * n)(*map(_bytes, server_names))
            elif clients:
                opts.client = pointers[0]
            _lib.check(lib.kvw_open(ctypes.byref(opts), ctypes.byref(ptr)), "kvw_open")
            parents = [c.handle for c in clients]
            close = lib.kvw_close
            return Handle("kvw_worker", "the worker", ptr, close, *parents, keep=self._group)

    def causes(self):
        """A context: errors inside it name what all_reduce raised as their cause."""
        return contextlib.nullcontext() if self._group is None else self._group.causes()

    @property
    def handle(self):
        """Handle of the kvw_worker: `with worker.handle as pointer`."""
        return self._handle

    @property
    def schema_digest(self):
        """The digest of the schema that this worker's values have, in hexadecimal."""
        with self._handle as ptr:
            return bytes(_lib.load().kvw_schema_digest(ptr).contents.bytes).hex()

    def sequence(self, tokens=(), adapter=None, salt=None):
        """
        A Sequence over tokens known beforehand; .n_reused of them need no prefill. Sequences share
        blocks only where adapter (id and revision of weights on top of the model's) and salt (of a
        user or session) are equal. Blocks.
        """
        return Sequence(self, tokens, adapter, salt)


class Sequence(Owner):
    """
    One context being read and written; made by Worker.sequence. Calls of other threads wait for
    each other; after close() (also the worker's or client's) they raise KvasirError CLOSED.
    close() puts what is full and forgets the rest.
    """

    def __init__(self, worker, tokens, adapter=None, salt=None):
        self._dropped = []  # steps that nobody holds any more
        homes = self.homes = []  # of the batches that it may be in
        self.worker = worker
        lib, ids, ptr, reused = _lib.load(), tensors.token_ids(tokens), ctypes.c_void_p(), _u32()
        self._stream = None if worker.device == "cpu" else tensors.current_stream(worker.device)
        opts = _abi.SeqOpts(
            ctypes.sizeof(_abi.SeqOpts),
            tensors.u32_pointer(ids),
            ids.size,
            _bytes(adapter),
            _bytes(salt),
            self._stream,
        )
        with worker.handle as owner, worker.causes():
            code = lib.kvw_seq_open(
                owner, ctypes.byref(opts), ctypes.byref(ptr), ctypes.byref(reused)
            )
            _lib.check(code, "kvw_seq_open")
            destroy = lib.kvw_seq_destroy

            def leave(pointer):
                with alone(tuple(homes)):
                    destroy(pointer)

            self._handle = Handle(
                "kvw_seq", "the sequence", ptr, leave, worker.handle, exclusive=True
            )
        self.n_reused = reused.value

    @property
    def handle(self):
        """Handle of the kvw_seq, for what belongs to the sequence."""
        return self._handle

    def call(self, name, *args):
        """The same as the methods here, for a Retriever."""
        self._call(name, *args)

    def _call(self, name, *args):
        """A call of the library on this sequence, checked."""
        with self._handle as ptr, self.worker.causes():
            dropped, self._dropped = self._dropped, []
            for step in dropped:
                _lib.load().kvw_step_abandon(step)
            _lib.check(getattr(_lib.load(), name)(ptr, *args), name)

    def __len__(self):
        """Tokens held by all layers."""
        with self._handle as ptr:
            return _lib.load().kvw_seq_tokens(ptr)

    def tokens(self, ids):
        """Begins a pass over the next ids (1 .. chunk_tokens)."""
        ids = tensors.token_ids(ids)
        self._call("kvw_tokens", tensors.u32_pointer(ids), ids.size)

    def truncate(self, n_tokens):
        """Takes back tokens of the last pass; n_tokens remain."""
        self._call("kvw_truncate", n_tokens)

    def address(self, what, x, dtype, shape, writable=False):
        """That of an array which the sequence's calls read or write, in order on its stream."""
        self._check_stream()
        return tensors.address(what, x, dtype, shape, writable, self.worker.device)

    def _check_stream(self):
        """Once a call: torch takes some microseconds to say which one is current."""
        if self._stream is None:
            return
        if tensors.current_stream(self.worker.device) != self._stream:
            raise ValueError("torch's stream is another than when the sequence was opened")

    def _kv(self, what, x, n):
        w, g = self.worker, self.worker.geometry
        return tensors.address(what, x, w.dtype, (n, g.n_kv_heads, g.head_dim), False, w.device)

    def _q(self, what, x, n, writable=False):
        w, g = self.worker, self.worker.geometry
        return tensors.address(what, x, w.dtype, (n, g.n_q_heads, g.head_dim), writable, w.device)

    def append(self, layer, k, v):
        """The pass's K (before RoPE) and V in one layer: [n, n_kv_heads, head_dim]."""
        n = len(k)
        self._check_stream()
        self._call("kvw_append", layer, self._kv("k", k, n), self._kv("v", v, n), n)

    def append_chunks(self, layer, k, v, landmarks):
        """append of whole chunks of 64 tokens, with their landmarks [n / 64, landmark_dim] float32
        (selectors of chunks)."""
        n, width = len(k), self.worker.landmark_dim
        self._check_stream()
        marks = tensors.address("landmarks", landmarks, "float32", (n // 64, width))
        self._call("kvw_append_chunks", layer, self._kv("k", k, n), self._kv("v", v, n), marks, n)

    def step(self, layer, q):
        """Begins attention of q [n, n_q_heads, head_dim], real or predicted. A Step."""
        return Step(self, layer, q)

    def forward(self, layer, q, k, v, out=None, lse=None):
        """append, then a whole step. Returns out [n, n_q_heads, head_dim], new unless given."""
        n = len(q)
        self._check_stream()
        out = tensors.empty_like(q, tuple(q.shape)) if out is None else out
        self._call(
            "kvw_forward",
            layer,
            self._q("q", q, n),
            self._kv("k", k, n),
            self._kv("v", v, n),
            n,
            self._q("out", out, n, writable=True),
            self._lse(lse, n),
        )
        return out

    def _lse(self, lse, n):
        if lse is None:
            return None
        shape = (n, self.worker.geometry.n_q_heads)
        return tensors.address("lse", lse, "float32", shape, True, self.worker.device)

    def flush(self, timeout_s=None):
        """Waits until every full block has been acknowledged."""
        self._call("kvw_flush", _lib.deadline_ns(timeout_s))

    def picks(self, layer):
        """Positions of the layer's last selection, ascending, as a new uint32 array."""
        out, n = _abi.u32p(), _u32()
        with self._handle:  # the picks are the sequence's
            self._call("kvw_last_picks", layer, ctypes.byref(out), ctypes.byref(n))
            if n.value == 0:
                return np.zeros(0, np.uint32)
            return np.ctypeslib.as_array(out, (n.value,)).copy()

    def stats(self):
        """Counters since the start of the sequence, by name (see kvw_stats)."""
        s = _abi.WorkerStats(size_bytes=ctypes.sizeof(_abi.WorkerStats))
        self._call("kvw_seq_stats", ctypes.byref(s))
        return {name: getattr(s, name) for name, _ in s._fields_ if name != "size_bytes"}

    def server_stats(self):
        """What came from each server (see kvw_server_stats): a list of dicts, in their order."""
        out = []
        for i in range(self.worker.n_servers):
            s = _abi.SeqServerStats(size_bytes=ctypes.sizeof(_abi.SeqServerStats))
            with self._handle:  # the name is the worker's
                self._call("kvw_seq_server_stats", i, ctypes.byref(s))
                own = {name: getattr(s, name) for name, _ in s._fields_ if name != "size_bytes"}
                out.append(own | {"name": own["name"].decode()})
        return out


class Step:
    """
    A step under way: attend (optional, while rows travel), then finish (or abandon). KvasirError
    CLOSED once it is finished or its sequence is closed. The end of `with` abandons a step that was
    not finished; one that nobody holds any more is abandoned by the sequence's next call.
    """

    _ptr = None

    def __init__(self, sequence, layer, q):
        self.sequence, self._n = sequence, len(q)
        sequence._check_stream()
        address, ptr = sequence._q("q", q, self._n), ctypes.c_void_p()
        with sequence._handle:
            sequence._call("kvw_step_begin", layer, address, self._n, ctypes.byref(ptr))
            self._ptr = ptr

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.abandon()

    def __del__(self):
        # Not abandoned here: the collector must not wait for a call on the sequence.
        if self._ptr is not None:
            self.sequence._dropped.append(self._ptr)

    def _pointer(self):
        """Inside the sequence's handle only: closing it frees its steps."""
        if self._ptr is None:
            raise KvasirError(Status.CLOSED, "kvw_step", "the step is finished")
        return self._ptr

    def attend(self, q):
        """Attends over resident rows with the real q."""
        self.sequence._check_stream()
        address = self.sequence._q("q", q, self._n)
        with self.sequence._handle:
            _lib.check(_lib.load().kvw_step_attend(self._pointer(), address), "kvw_step_attend")

    def abandon(self):
        """Drops the step; the layer's tokens stay. Fine at any time, also afterwards."""
        try:
            with self.sequence._handle:
                ptr, self._ptr = self._ptr, None
                _lib.load().kvw_step_abandon(ptr)
        except KvasirError as error:
            if error.status != Status.CLOSED:
                raise

    def finish(self, q, out=None, lse=None):
        """Waits for the misses; returns out like q."""
        self.sequence._check_stream()
        out = tensors.empty_like(q, tuple(q.shape)) if out is None else out
        args = (
            self.sequence._q("q", q, self._n),
            self.sequence._q("out", out, self._n, writable=True),
            self.sequence._lse(lse, self._n),
        )
        with self.sequence._handle:
            ptr, self._ptr = self._pointer(), None
            _lib.check(_lib.load().kvw_step_finish(ptr, *args), "kvw_step_finish")
        return out
