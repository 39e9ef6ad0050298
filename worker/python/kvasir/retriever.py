"""Retriever: whole chunks chosen by landmarks, attended one by one (selectors "gca" and "hsa")."""

import ctypes

import numpy as np

from . import _abi, _lib, tensors
from .errors import KvasirError, Status

ALL_HEADS = 0xFFFFFFFF


class Retriever:
    """
    Retriever(sequence): what one group retrieves for itself; see kvw_retriever_open. kv_head (HSA):
    for the query heads of that kv head alone. It ends with its sequence at the latest; afterwards
    every call raises KvasirError CLOSED.
    """

    _ptr = None

    def __init__(self, sequence, layer=0, kv_head=None):
        g = sequence.worker.geometry
        self.sequence = sequence
        self._heads = g.n_q_heads if kv_head is None else g.n_q_heads // g.n_kv_heads
        head, ptr = ALL_HEADS if kv_head is None else kv_head, ctypes.c_void_p()
        with sequence.handle:
            sequence.call("kvw_retriever_open", layer, head, ctypes.byref(ptr))
            self._ptr = ptr

    def _call(self, name, *args):
        with self.sequence.handle:
            if self._ptr is None:
                raise KvasirError(Status.CLOSED, name, "the retriever is closed")
            _lib.check(getattr(_lib.load(), name)(self._ptr, *args), name)

    def retrieve(self, query, n_chunks):
        """Chooses among the first n_chunks chunks by query [landmark_dim] float32; asks for what is
        not here and does not wait for it."""
        width = (self.sequence.worker.landmark_dim,)
        self._call("kvw_retrieve", tensors.address("query", query, "float32", width), n_chunks)

    def chosen(self):
        """(chunks, scores, weights) as new arrays, ascending chunks."""
        ids, scores, weights = _abi.u32p(), _abi.f32p(), _abi.f32p()
        n = ctypes.c_uint32()
        with self.sequence.handle:  # the lists are the retriever's
            outputs = (ctypes.byref(x) for x in (ids, scores, weights, n))
            self._call("kvw_retrieved", *outputs)
            if n.value == 0:
                return np.zeros(0, np.uint32), np.zeros(0, np.float32), np.zeros(0, np.float32)
            lists = (ids, scores, weights)
            return tuple(np.ctypeslib.as_array(x, (n.value,)).copy() for x in lists)

    def attend(self, q, out=None):
        """Attention of q [n, heads, head_dim] over the chosen chunks; waits for them once."""
        worker, n = self.sequence.worker, len(q)
        shape = (n, self._heads, worker.geometry.head_dim)
        out = tensors.empty_like(q, tuple(q.shape)) if out is None else out
        self._call(
            "kvw_retriever_attend",
            self.sequence.address("q", q, worker.dtype, shape),
            n,
            self.sequence.address("out", out, worker.dtype, shape, writable=True),
        )
        return out

    def close(self):
        """Gives its memory back; fine at any time, also after its sequence."""
        try:
            with self.sequence.handle:
                ptr, self._ptr = self._ptr, None
                if ptr is not None:
                    _lib.load().kvw_retriever_close(ptr)
        except KvasirError as error:
            if error.status != Status.CLOSED:
                raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
