"""Batch: a token of several sequences in one call (kvw_batch_*)."""

import contextlib
import ctypes

from . import _lib, tensors
from ._handle import Handle, Owner
from ._home import Home, alone


class Batch(Owner):
    """
    Batch(worker, n_max): decode steps of up to n_max sequences of one worker at a time, of any
    lengths; on a GPU one launch and one wait a layer. Results are those of Sequence.forward. With
    device_memory it is used on what was torch's current stream here. Its sequences may be used
    alone in between, all by one thread; they are kept open until others take their place or it is
    closed. Not with selectors of chunks or tensor parallelism. Ends with its worker.
    """

    def __init__(self, worker, n_max):
        self.worker, self.n_max = worker, n_max
        home = self._home = Home()
        lib, ptr = _lib.load(), ctypes.c_void_p()
        self._stream = None if worker.device == "cpu" else tensors.current_stream(worker.device)

        def close(pointer):
            with alone([home]):
                lib.kvw_batch_close(pointer)
                home.keep(())

        with worker.handle as owner:
            code = lib.kvw_batch_open(owner, n_max, self._stream, ctypes.byref(ptr))
            _lib.check(code, "kvw_batch_open")
            self._handle = Handle(
                "kvw_batch", "the batch", ptr, close, worker.handle, exclusive=True
            )
        home.handle = self._handle

    def forward(self, sequences, layer, q, k, v, out=None, lse=None):
        """
        Sequence.forward of one token of each of n different sequences, each after its tokens():
        q [n, n_q_heads, head_dim], k, v [n, n_kv_heads, head_dim], sequence after sequence.
        Returns out like q, new unless given. KvasirError is of a sequence that failed: out is
        undefined then, and the others may have their token in this layer.
        """
        n, lib, g = len(sequences), _lib.load(), self.worker.geometry
        self._check_stream()
        out = tensors.empty_like(q, tuple(q.shape)) if out is None else out
        q_shape, kv_shape = (n, g.n_q_heads, g.head_dim), (n, g.n_kv_heads, g.head_dim)
        args = (
            self._address("q", q, q_shape),
            self._address("k", k, kv_shape),
            self._address("v", v, kv_shape),
            self._address("out", out, q_shape, writable=True),
            None if lse is None else self._address("lse", lse, q_shape[:2], True, "float32"),
        )
        with contextlib.ExitStack() as held:
            ptr = held.enter_context(self._handle)
            held.enter_context(self.worker.causes())
            by_id = {id(s): held.enter_context(s.handle) for s in sorted(sequences, key=id)}
            pointers = (ctypes.c_void_p * n)(*(by_id[id(s)].value for s in sequences))
            self._home.admit(sequences)
            code = lib.kvw_batch_forward(ptr, pointers, n, layer, *args)
            _lib.check(code, "kvw_batch_forward")
            self._home.keep(sequences)
        return out

    def _check_stream(self):
        if self._stream is None:
            return
        if tensors.current_stream(self.worker.device) != self._stream:
            raise ValueError("torch's stream is another than when the batch was opened")

    def _address(self, what, x, shape, writable=False, dtype=None):
        w = self.worker
        return tensors.address(what, x, dtype or w.dtype, shape, writable, w.device)
