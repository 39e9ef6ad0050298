"""The engine's all-reduce as the C callback kvw_all_reduce_fn.

The callable is the engine's; it runs in the thread that made the call into C, with the interpreter
lock held again. What it raises cannot pass through C: it becomes a status there, and the
KvasirError that comes back out has it as its cause.
"""

import contextlib
import threading

import numpy as np

from . import _abi
from .errors import KvasirError, Status


def _status_of(error):
    if isinstance(error, KvasirError) and error.status not in (None, Status.OK):
        return error.status
    return Status.TIMED_OUT if isinstance(error, TimeoutError) else Status.UNAVAILABLE


class AllReduce:
    """AllReduce(call): .pointer is call(op, x) for C; it must live as long as the worker."""

    def __init__(self, call):
        if not callable(call):
            raise TypeError(f"all_reduce must be callable, not {type(call).__name__}")
        self._call, self._raised = call, threading.local()
        self.pointer = _abi.ALL_REDUCE(self._run)

    def _run(self, _arg, op, x, n):
        try:
            self._call(op.decode(), np.ctypeslib.as_array(x, (n,)))
            return int(Status.OK)
        except BaseException as error:  # nothing may be lost in C, KeyboardInterrupt neither
            self._raised.error = error
            return int(_status_of(error))

    @contextlib.contextmanager
    def causes(self):
        """Inside it, an error of the library names what the callable raised."""
        self._raised.error = None
        try:
            yield
        except KvasirError as error:
            raise error from self._raised.error
        finally:
            self._raised.error = None
