"""Handle: a C object that any thread may close while others use it, closed once and in order.

A call into C holds its handle for as long as it runs, so that close() waits for it. A parent (a
client, a worker) closes its children first, also those whose Python objects are being finalised
just then: it knows the handles, not the objects. What is still open when the interpreter exits is
closed then, while threads and modules are still there.

Locks are held for moments only and are reentrant: the collector may run a finaliser, which closes
another handle, inside any of these lines.
"""

import atexit
import os
import sys
import threading

from .errors import KvasirError, Status

EXIT_S = 5.0  # that the interpreter's exit waits for a call that still runs
_roots = {}  # open handles without a parent; a dict, since its single operations are atomic


class Handle:
    """
    Handle("kvw_seq", "the sequence", ptr, destroy, *parents, exclusive=False): owns ptr.
    exclusive: one thread at a time; others wait. A child is made while its parents are held, and
    ends with the first of them that closes. keep: what ptr uses, alive until it is destroyed.
    """

    def __init__(self, call, what, ptr, destroy, *parents, exclusive=False, keep=None):
        self.keep = keep
        self._call, self._what, self._ptr, self._destroy = call, what, ptr, destroy
        self._exclusive, self._pid = exclusive, os.getpid()
        self._changed = threading.Condition(threading.RLock())
        self._users = {}  # thread -> depth
        self._closer = None  # the thread that closes
        self._done = False
        self._children = {}
        self._siblings = [parent._children for parent in parents] or [_roots]
        for siblings in self._siblings:
            siblings[self] = None

    @property
    def closed(self):
        """Whether close() has begun."""
        return self._ptr is None

    def __enter__(self):
        """The pointer, for calls inside the with; KvasirError CLOSED."""
        me = threading.get_ident()
        with self._changed:
            while self._exclusive and self._users and me not in self._users:
                self._changed.wait()
            if self._ptr is None:
                raise KvasirError(Status.CLOSED, self._call, f"{self._what} is closed")
            self._users[me] = self._users.get(me, 0) + 1
            return self._ptr

    def __exit__(self, *_):
        me = threading.get_ident()
        with self._changed:
            self._users[me] -= 1
            if self._users[me] == 0:
                del self._users[me]
                self._changed.notify_all()

    def close(self, patience_s=None):
        """
        Waits for calls of other threads, closes the children and destroys; when it returns, it is
        done, whoever did it. KvasirError INVALID inside a call of the same thread on this handle or
        a child: nothing has changed then. patience_s: a call that takes longer is left alone, and
        so is what it uses. In a forked process, whose threads are gone, nothing is destroyed.
        """
        ptr = self._begin_close(patience_s)
        if ptr is None:
            return
        try:
            while self._children:
                self._close_a_child(patience_s)
        except BaseException:
            self._settle(ptr)
            raise
        try:
            self._destroy(ptr)
        finally:
            for siblings in self._siblings:
                siblings.pop(self, None)
            self._settle(None)

    def _begin_close(self, patience_s):
        """The pointer, for the thread that is to destroy it; None where nothing is left to do."""
        me = threading.get_ident()
        with self._changed:
            if me in self._users:
                text = f"{self._what} cannot be closed inside one of its own calls"
                raise KvasirError(Status.INVALID, self._call, text)
            while self._ptr is None:
                if self._done or self._closer == me:
                    return None
                self._changed.wait()
            if os.getpid() != self._pid:
                self._ptr, self._done = None, True
                return None
            ptr, self._ptr, self._closer = self._ptr, None, me
            if self._changed.wait_for(lambda: not self._users, patience_s):
                return ptr
            raise KvasirError(Status.TIMED_OUT, self._call, f"{self._what} is in use")

    def _settle(self, ptr):
        with self._changed:
            self._ptr, self._closer, self._done = ptr, None, ptr is None
            self._changed.notify_all()

    def _close_a_child(self, patience_s):
        try:
            child, _ = self._children.popitem()
        except KeyError:
            return
        try:
            child.close(patience_s)
        except BaseException:
            self._children[child] = None
            raise


class Owner:
    """What owns one handle, None until it is opened: close() is that handle's, also at the end of
    `with` and when nobody holds it any more."""

    _handle = None

    def close(self):
        """Its children first; twice, and from any thread, is fine. Blocks."""
        if self._handle is not None:
            self._handle.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if not sys.is_finalizing():
            self.close()


@atexit.register
def _close_all():
    """What is in use beyond EXIT_S is left to the system."""
    for root in tuple(_roots):
        try:
            root.close(EXIT_S)
        except KvasirError:
            continue
