"""Worker and Sequence: kvw/worker.h with arrays in and out.

Arrays are numpy arrays or torch CPU tensors of the worker's dtype, contiguous; nothing is copied
on this side. A Sequence is used by one thread at a time; different ones may run in parallel.
"""

import ctypes
import sys
import weakref
from dataclasses import dataclass

import numpy as np

from . import _abi, _lib, tensors


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


def _choice(what, table, value):
    if value is None:
        return 0
    if value not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, not {value!r}")
    return table[value]


def _bytes(text):
    return None if text is None else str(text).encode()


# Options that pass through to kvw_opts as they are; 0 is the C side's default.
_COUNTS = (
    "tp_size tp_rank block_tokens n_threads n_sink n_recent k eps chunk_tokens far_position "
    "residency_slots exact index_dims rerank_dims rerank_factor put_window reuse_any"
).split()


class Worker:
    """
    Worker(geometry, model="name", selector="tokenselect", client=None, ...): one model on one
    store. client None: every row stays resident. Other keywords are those of kvw_opts: revision,
    index ("exact", "compressed", "reranked"), projection (path), policy ("fail", "drop"), promise
    ("memory", "durable"), fetch_timeout_s, put_timeout_s, reselect_cos, backend, and the counts
    (n_sink, n_recent, k, eps, chunk_tokens, block_tokens, ...). Blocks; raises KvasirError.
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
        **counts,
    ):
        self._ptr = None
        self._sequences = weakref.WeakSet()
        unknown = set(counts) - set(_COUNTS)
        if unknown:
            raise TypeError(f"unknown option {', '.join(sorted(unknown))}")
        g = self.geometry = geometry
        self.client = client
        self.dtype = tensors.dtype_name(g.dtype)
        self.chunk_tokens = counts.get("chunk_tokens") or 512
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
            client=None if client is None else client.pointer,
            promise=_choice("promise", _abi.PROMISE, promise),
            fetch_timeout_ns=_lib.ns(fetch_timeout_s),
            policy=_choice("policy", _abi.POLICY, policy),
            backend=_bytes(backend),
            selector=_bytes(selector),
            index=_choice("index", _abi.INDEX, index),
            projection_path=_bytes(projection),
            reselect_cos=reselect_cos,
            put_timeout_ns=_lib.ns(put_timeout_s),
            **counts,
        )
        ptr = ctypes.c_void_p()
        code = _lib.load().kvw_open(ctypes.byref(opts), ctypes.byref(ptr))
        _lib.check(code, "kvw_open")
        self._ptr = ptr
        if client is not None:
            client.add_user(self)

    @property
    def pointer(self):
        """The kvw_worker *, borrowed."""
        if self._ptr is None:
            raise ValueError("the worker is closed")
        return self._ptr

    @property
    def schema_digest(self):
        """The digest of the schema that this worker's values have, in hexadecimal."""
        return bytes(_lib.load().kvw_schema_digest(self.pointer).contents.bytes).hex()

    def sequence(self, tokens=()):
        """A Sequence over tokens known beforehand; .n_reused of them need no prefill. Blocks."""
        return Sequence(self, tokens)

    def close(self):
        """Closes its sequences and then itself; twice is fine."""
        if self._ptr is not None:
            for sequence in list(self._sequences):
                sequence.close()
            _lib.load().kvw_close(self._ptr)
            self._ptr = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Sequence:
    """One context being read and written; made by Worker.sequence."""

    def __init__(self, worker, tokens):
        self._ptr = None
        self.worker = worker
        ids, ptr, reused = tensors.token_ids(tokens), ctypes.c_void_p(), ctypes.c_uint32()
        code = _lib.load().kvw_seq_create(
            worker.pointer,
            tensors.u32_pointer(ids),
            ids.size,
            ctypes.byref(ptr),
            ctypes.byref(reused),
        )
        _lib.check(code, "kvw_seq_create")
        self._ptr = ptr
        self.n_reused = reused.value
        worker._sequences.add(self)

    @property
    def pointer(self):
        """The kvw_seq *, borrowed."""
        if self._ptr is None:
            raise ValueError("the sequence is closed")
        return self._ptr

    def __len__(self):
        """Tokens held by all layers."""
        return _lib.load().kvw_seq_tokens(self.pointer)

    def tokens(self, ids):
        """Begins a pass over the next ids (1 .. chunk_tokens)."""
        ids = tensors.token_ids(ids)
        code = _lib.load().kvw_tokens(self.pointer, tensors.u32_pointer(ids), ids.size)
        _lib.check(code, "kvw_tokens")

    def truncate(self, n_tokens):
        """Takes back tokens of the last pass; n_tokens remain."""
        _lib.check(_lib.load().kvw_truncate(self.pointer, n_tokens), "kvw_truncate")

    def _kv(self, what, x, n):
        g = self.worker.geometry
        return tensors.address(what, x, self.worker.dtype, (n, g.n_kv_heads, g.head_dim))

    def _q(self, what, x, n):
        g = self.worker.geometry
        return tensors.address(what, x, self.worker.dtype, (n, g.n_q_heads, g.head_dim))

    def append(self, layer, k, v):
        """The pass's K (before RoPE) and V in one layer: [n, n_kv_heads, head_dim]."""
        n = len(k)
        code = _lib.load().kvw_append(
            self.pointer, layer, self._kv("k", k, n), self._kv("v", v, n), n
        )
        _lib.check(code, "kvw_append")

    def step(self, layer, q):
        """Begins attention of q [n, n_q_heads, head_dim], real or predicted. A Step."""
        return Step(self, layer, q)

    def forward(self, layer, q, k, v, out=None, lse=None):
        """append, then a whole step. Returns out [n, n_q_heads, head_dim], new unless given."""
        n = len(q)
        out = tensors.empty_like(q, tuple(q.shape)) if out is None else out
        code = _lib.load().kvw_forward(
            self.pointer,
            layer,
            self._q("q", q, n),
            self._kv("k", k, n),
            self._kv("v", v, n),
            n,
            self._q("out", out, n),
            self._lse(lse, n),
        )
        _lib.check(code, "kvw_forward")
        return out

    def _lse(self, lse, n):
        if lse is None:
            return None
        return tensors.address("lse", lse, "float32", (n, self.worker.geometry.n_q_heads))

    def flush(self, timeout_s=None):
        """Waits until every full block has been acknowledged."""
        code = _lib.load().kvw_flush(self.pointer, _lib.deadline_ns(timeout_s))
        _lib.check(code, "kvw_flush")

    def picks(self, layer):
        """Positions of the layer's last selection, ascending, as a new uint32 array."""
        out, n = _abi.u32p(), ctypes.c_uint32()
        code = _lib.load().kvw_last_picks(self.pointer, layer, ctypes.byref(out), ctypes.byref(n))
        _lib.check(code, "kvw_last_picks")
        if n.value == 0:
            return np.zeros(0, np.uint32)
        return np.ctypeslib.as_array(out, (n.value,)).copy()

    def stats(self):
        """Counters since the start of the sequence, by name (see kvw_stats)."""
        s = _abi.WorkerStats(size_bytes=ctypes.sizeof(_abi.WorkerStats))
        _lib.check(_lib.load().kvw_seq_stats(self.pointer, ctypes.byref(s)), "kvw_seq_stats")
        return {name: getattr(s, name) for name, _ in s._fields_ if name != "size_bytes"}

    def close(self):
        """Puts what is full and forgets the rest; twice is fine. Blocks."""
        if self._ptr is not None:
            _lib.load().kvw_seq_destroy(self._ptr)
            self._ptr = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if not sys.is_finalizing():
            self.close()


class Step:
    """A step under way: attend (optional, while rows travel), then finish (or abandon)."""

    def __init__(self, sequence, layer, q):
        self.sequence, self._n, self._ptr = sequence, len(q), None
        ptr = ctypes.c_void_p()
        code = _lib.load().kvw_step_begin(
            sequence.pointer, layer, sequence._q("q", q, self._n), self._n, ctypes.byref(ptr)
        )
        _lib.check(code, "kvw_step_begin")
        self._ptr = ptr

    def _pointer(self):
        if self._ptr is None:
            raise ValueError("the step is finished")
        return self._ptr

    def attend(self, q):
        """Attends over resident rows with the real q."""
        code = _lib.load().kvw_step_attend(self._pointer(), self.sequence._q("q", q, self._n))
        _lib.check(code, "kvw_step_attend")

    def abandon(self):
        """Drops the step; the layer's tokens stay. Twice is fine."""
        if self._ptr is not None:
            _lib.load().kvw_step_abandon(self._ptr)
            self._ptr = None

    def finish(self, q, out=None, lse=None):
        """Waits for the misses; returns out like q."""
        out = tensors.empty_like(q, tuple(q.shape)) if out is None else out
        args = (
            self.sequence._q("q", q, self._n),
            self.sequence._q("out", out, self._n),
            self.sequence._lse(lse, self._n),
        )
        ptr, self._ptr = self._pointer(), None
        _lib.check(_lib.load().kvw_step_finish(ptr, *args), "kvw_step_finish")
        return out
