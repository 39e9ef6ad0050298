"""Closing: once, in order, from any thread, by the collector, at exit; what is left is an error."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import unittest

import need

need.modules("numpy")
import numpy as np

import kvasir
from kvasir import _lib
from test_binding import GEOMETRY, SMALL, rows


@contextlib.contextmanager
def recorded(before=None):
    """Notes every destruction in a list of (call, pointer); before(name) runs ahead of the call."""
    lib, calls, real = _lib.load(), [], {}

    def wrap(name):
        def call(ptr, *args):
            if before is not None:
                before(name)
            result = real[name](ptr, *args)
            calls.append((name, ptr.value))
            return result

        return call

    for name in ("kvw_seq_destroy", "kvw_close", "kvw_append"):
        real[name] = getattr(lib, name)
        setattr(lib, name, wrap(name))
    try:
        yield calls
    finally:
        for name, call in real.items():
            setattr(lib, name, call)


def worker():
    return kvasir.Worker(GEOMETRY, "m", "tokenselect", **SMALL)


def names(calls):
    return [name for name, _ in calls]


class Closing(unittest.TestCase):
    def closed(self, pattern, call, *args):
        with self.assertRaisesRegex(kvasir.KvasirError, pattern) as caught:
            call(*args)
        self.assertEqual(caught.exception.status, kvasir.Status.CLOSED)

    def open_step(self, seq):
        rng = np.random.default_rng(4)
        self.q = rows(rng, 8, 6)
        seq.tokens(np.arange(8))
        seq.append(0, rows(rng, 8, 2), rows(rng, 8, 2))
        return seq.step(0, self.q)

    def test_a_worker_closes_its_sequences(self):
        with recorded() as calls:
            w = worker()
            seq = w.sequence()
            self.assertEqual(len(w.schema_digest), 64)
            w.close()
            w.close()
            seq.close()
        self.assertEqual(names(calls), ["kvw_seq_destroy", "kvw_close"])
        self.closed("the sequence is closed", len, seq)
        self.closed("the sequence is closed", seq.picks, 0)
        self.closed("the worker is closed", w.sequence)
        self.closed("the worker is closed", getattr, w, "schema_digest")

    def test_a_step_ends_with_its_sequence(self):
        for close_worker in (False, True):
            w = worker()
            seq = w.sequence()
            step = self.open_step(seq)
            (w if close_worker else seq).close()
            self.closed("the sequence is closed", step.attend, self.q)
            self.closed("the sequence is closed", step.finish, self.q)
            step.abandon()
            w.close()

    def test_a_finished_step(self):
        with worker() as w:
            step = self.open_step(w.sequence())
            step.finish(self.q)
            self.closed("the step is finished", step.finish, self.q)
            self.closed("the step is finished", step.attend, self.q)
            step.abandon()

    def test_the_collector_may_close_the_worker_first(self):
        class Closer:
            def __del__(self):
                w.close()

        with recorded() as calls:
            w = worker()
            cycle = [Closer(), w.sequence()]
            cycle.append(cycle)
            del cycle
            gc.collect()
        self.assertEqual(names(calls), ["kvw_seq_destroy", "kvw_close"])

    def test_a_dropped_worker_is_closed(self):
        with recorded() as calls:
            w = worker()
            seq = w.sequence()
            seq.cycle, w.cycle = seq, w
            del w, seq
            gc.collect()
        self.assertEqual(names(calls), ["kvw_seq_destroy", "kvw_close"])

    def test_many_threads_close_once(self):
        """Whoever comes second returns when it is done, not before."""
        done = []
        with recorded(before=lambda name: time.sleep(0.05)) as calls:
            w = worker()
            seqs = [w.sequence() for _ in range(3)]

            def close(i):
                (w if i % 2 else seqs[i % 3]).close()
                done.append(list(names(calls)))

            threads = [threading.Thread(target=close, args=(i,)) for i in range(6)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        self.assertEqual(len(calls), len(set(calls)))
        self.assertEqual(sorted(names(calls)), ["kvw_close"] + 3 * ["kvw_seq_destroy"])
        self.assertEqual(calls[-1][0], "kvw_close")
        self.assertTrue(all("kvw_seq_destroy" in seen for seen in done))

    def test_close_waits_for_a_call(self):
        inside = threading.Event()

        def slow(name):
            if name == "kvw_append":
                inside.set()
                time.sleep(0.2)

        kv = rows(np.random.default_rng(4), 8, 2)
        with recorded(before=slow) as calls:
            w = worker()
            seq = w.sequence()
            seq.tokens(np.arange(8))
            thread = threading.Thread(target=seq.append, args=(0, kv, kv))
            thread.start()
            self.assertTrue(inside.wait(60))
            w.close()
            thread.join()
        self.assertEqual(names(calls), ["kvw_append", "kvw_seq_destroy", "kvw_close"])

    def test_closing_inside_a_call_is_refused(self):
        """An engine's callback might try; nothing is lost by it."""
        w = worker()
        seq = w.sequence()
        seq.tokens(np.arange(8))
        kv, seen = rows(np.random.default_rng(4), 8, 2), []

        def close(name):
            if name == "kvw_append":
                for target in (seq, w):
                    with self.assertRaises(kvasir.KvasirError) as caught:
                        target.close()
                    seen.append(caught.exception.status)

        with recorded(before=close):
            seq.append(0, kv, kv)
        self.assertEqual(seen, 2 * [kvasir.Status.INVALID])
        seq.append(1, kv, kv)
        self.assertEqual(len(seq), 8)
        w.close()
        self.closed("the sequence is closed", len, seq)


OPEN = """
import os, sys, threading
import numpy as np, kvasir
from kvasir import _lib
from test_binding import GEOMETRY, SMALL, rows
lib = _lib.load()
def note(name):
    real = getattr(lib, name)
    def call(ptr):
        real(ptr)
        os.write(1, name.encode() + b" ")
    setattr(lib, name, call)
note("kvw_seq_destroy"), note("kvw_close")
worker = kvasir.Worker(GEOMETRY, "m", "tokenselect", **SMALL)
seq = worker.sequence()
rng = np.random.default_rng(4)
q, kv = rows(rng, 8, 6), rows(rng, 8, 2)
seq.tokens(np.arange(8))
seq.append(0, kv, kv)
step = seq.step(0, q)
"""
BUSY = """
def work():
    other = worker.sequence()
    while True:
        other.tokens(np.arange(8))
        for layer in range(2):
            other.forward(layer, q, kv, kv)
        running.set()
running = threading.Event()
threading.excepthook = lambda args: None
threading.Thread(target=work, daemon=True).start()
running.wait()
"""
FORK = """
if os.fork() == 0:
    worker.close()
    sys.exit(7)
_, status = os.wait()
os.write(1, b"child=%d " % os.waitstatus_to_exitcode(status))
"""


class Exit(unittest.TestCase):
    def run_script(self, script):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        ran = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, timeout=60
        )
        self.assertEqual((ran.returncode, ran.stderr), (0, b""))
        return ran.stdout.decode().split()

    def test_what_is_open_is_closed(self):
        self.assertEqual(self.run_script(OPEN), ["kvw_seq_destroy", "kvw_close"])

    def test_while_a_thread_works(self):
        self.assertEqual(self.run_script(OPEN + BUSY), 2 * ["kvw_seq_destroy"] + ["kvw_close"])

    def test_a_forked_process_destroys_nothing(self):
        self.assertEqual(self.run_script(OPEN + FORK), ["child=7", "kvw_seq_destroy", "kvw_close"])


if __name__ == "__main__":
    unittest.main(verbosity=2)
