"""Tensor parallelism from Python: two ranks on two threads against one worker with all heads."""

import gc
import threading
import unittest

import need

need.modules("numpy")
import numpy as np

import kvasir
from test_binding import SMALL

RANKS, Q_HEADS, KV_HEADS, TOKENS = 2, 8, 4, 64 * 5
WAIT_S = 30


class Meeting:
    """An all-reduce between threads, which gives up on a rank that does not come."""

    def __init__(self):
        self.barrier = threading.Barrier(RANKS)
        self.parts, self.ops = {}, []

    def __call__(self, op, x):
        try:
            self.parts[threading.get_ident()] = x.copy()
            if self.barrier.wait(WAIT_S) == 0:
                self.ops.append(op)
            parts = np.stack(list(self.parts.values()))
            self.barrier.wait(WAIT_S)
        except threading.BrokenBarrierError:
            raise TimeoutError("a rank did not come") from None
        x[:] = parts.sum(0) if op == "sum" else parts.max(0)


def geometry(ranks):
    return kvasir.Geometry(
        n_layers=1,
        n_q_heads=Q_HEADS // ranks,
        n_kv_heads=KV_HEADS // ranks,
        head_dim=16,
        dtype="float32",
        rope=kvasir.Rope(10000.0),
    )


def data():
    rng = np.random.default_rng(9)
    return [rng.standard_normal((TOKENS, n, 16)).astype(np.float32) for n in (8, 4, 4)]


def heads(x, rank, ranks):
    n = x.shape[1] // ranks
    return np.ascontiguousarray(x[:, rank * n : (rank + 1) * n])


def run(rank, ranks, all_reduce):
    """(outputs, picks) of a prefill in chunks."""
    q, k, v = (heads(x, rank, ranks) for x in data())
    options = dict(SMALL, tp_size=ranks, tp_rank=rank, all_reduce=all_reduce)
    with kvasir.Worker(geometry(ranks), "m", "tokenselect", **options) as worker:
        gc.collect()  # nobody but the worker holds the callback
        with worker.sequence() as seq:
            outs = []
            for i in range(0, TOKENS, 64):
                seq.tokens(np.arange(i, i + 64))
                outs.append(seq.forward(0, q[i : i + 64], k[i : i + 64], v[i : i + 64]))
            return np.concatenate(outs), seq.picks(0)


def on_threads(work):
    """work(rank) of every rank at once; what each returned or raised."""
    results = [None] * RANKS

    def keep(rank):
        try:
            results[rank] = work(rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=keep, args=(i,), daemon=True) for i in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    return results


class Group(unittest.TestCase):
    def test_two_ranks_are_one_worker(self):
        meeting = Meeting()
        whole, whole_picks = run(0, 1, None)
        parts = on_threads(lambda rank: run(rank, RANKS, meeting))
        for part in parts:
            self.assertIsInstance(part, tuple, part)
            np.testing.assert_array_equal(part[1], whole_picks)
        np.testing.assert_allclose(np.concatenate([p[0] for p in parts], 1), whole, atol=1e-5)
        self.assertEqual(set(meeting.ops), {"sum", "max"})

    def test_what_it_raises_is_the_cause(self):
        class Broken(Exception):
            pass

        options = dict(SMALL, tp_size=2, tp_rank=0)
        for error, status in ((Broken, "UNAVAILABLE"), (TimeoutError, "TIMED_OUT")):

            def fail(op, x, error=error):
                raise error("no network")

            with kvasir.Worker(
                geometry(2), "m", "esa", index="exact", all_reduce=fail, **options
            ) as w:
                with self.assertRaisesRegex(kvasir.KvasirError, status) as caught:
                    w.sequence()
            self.assertIsInstance(caught.exception.__cause__, error)

    def test_a_rank_that_fails_alone_stops_both(self):
        meeting = Meeting()

        def work(rank):
            options = dict(SMALL, tp_size=RANKS, tp_rank=rank, all_reduce=meeting)
            with kvasir.Worker(geometry(RANKS), "m", "tokenselect", **options) as worker:
                return worker.sequence(salt="two\nlines" if rank else None)

        statuses = [error.status for error in on_threads(work)]
        self.assertEqual(statuses, [kvasir.Status.CANCELLED, kvasir.Status.INVALID])

    def test_refusals(self):
        with self.assertRaisesRegex(TypeError, "all_reduce must be callable"):
            kvasir.Worker(geometry(2), "m", "esa", all_reduce=3)
        with self.assertRaisesRegex(kvasir.KvasirError, "all_reduce: is needed"):
            kvasir.Worker(geometry(2), "m", "tokenselect", tp_size=2)


if __name__ == "__main__":
    unittest.main(verbosity=2)
