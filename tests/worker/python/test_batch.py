"""Batch with numpy alone: a token of several sequences in one call; who closes what, and when."""

import gc
import threading
import unittest

import need

need.modules("numpy")
import numpy as np

import kvasir
from test_binding import GEOMETRY, SMALL, rows

LENGTHS = (200, 130, 40)


def opened():
    return kvasir.Worker(GEOMETRY, "m", "tokenselect", exact=1, **SMALL)


def prefilled(worker, i):
    """A sequence of LENGTHS[i] tokens, always the same ones."""
    rng, sequence, left = np.random.default_rng(i), worker.sequence(), LENGTHS[i]
    while left:
        n = min(left, 64)
        sequence.tokens(rng.integers(0, 1000, n))
        for layer in range(2):
            sequence.forward(layer, rows(rng, n, 6), rows(rng, n, 2), rows(rng, n, 2))
        left -= n
    return sequence


def tokens_of(step):
    """q, k, v of a token of each sequence, per layer."""
    rng = np.random.default_rng(100 + step)
    return [(rows(rng, 3, 6), rows(rng, 3, 2), rows(rng, 3, 2)) for _ in range(2)]


class Batches(unittest.TestCase):
    def test_a_batch_gives_what_its_sequences_give_alone(self):
        with opened() as worker, kvasir.Batch(worker, 3) as batch:
            alone = [prefilled(worker, i) for i in range(3)]
            together = [prefilled(worker, i) for i in range(3)]
            for step in range(6):
                who = (2, 0, 1) if step % 2 else (1, 2)
                for i in who:
                    alone[i].tokens([step])
                    together[i].tokens([step])
                for layer, (q, k, v) in enumerate(tokens_of(step)):
                    at = list(who)
                    want = [alone[i].forward(layer, *(x[i : i + 1] for x in (q, k, v))) for i in at]
                    lse, out = np.zeros((len(at), 6), np.float32), np.empty_like(q[at])
                    have = batch.forward(
                        [together[i] for i in at], layer, q[at], k[at], v[at], out=out, lse=lse
                    )
                    self.assertIs(have, out)
                    np.testing.assert_array_equal(have, np.concatenate(want))
                    self.assertTrue(np.isfinite(lse).all() and (lse != 0).all())
            self.assertEqual([len(s) for s in together], [203, 136, 46])

    def test_what_does_not_fit_is_refused(self):
        with opened() as worker, opened() as other, kvasir.Batch(worker, 2) as batch:
            a, b, stranger = prefilled(worker, 2), prefilled(worker, 2), prefilled(other, 2)
            for sequence in (a, b, stranger):
                sequence.tokens([1])
            q, k, v = (x[:2] for x in tokens_of(0)[0])
            with self.assertRaisesRegex(kvasir.KvasirError, "the same"):
                batch.forward([a, a], 0, q, k, v)
            with self.assertRaisesRegex(kvasir.KvasirError, "not one of the batch"):
                batch.forward([a, stranger], 0, q, k, v)
            with self.assertRaisesRegex(ValueError, "k has shape"):
                batch.forward([a, b], 0, q, k[:1], v)
            with self.assertRaisesRegex(kvasir.KvasirError, "n must be"):
                batch.forward([a, b, stranger], 0, *tokens_of(0)[0])
            with self.assertRaisesRegex(kvasir.KvasirError, "n_max"):
                kvasir.Batch(worker, 0)
            batch.forward([a, b], 0, q, k, v)


class Closing(unittest.TestCase):
    def step(self, batch, sequences):
        q, k, v = (x[: len(sequences)] for x in tokens_of(1)[0])
        for sequence in sequences:
            sequence.tokens([7])
        batch.forward(sequences, 0, q, k, v)
        batch.forward(sequences, 1, q, k, v)

    def test_in_any_order(self):
        for order in ("bsw", "sbw", "wbs", "swb"):
            worker = opened()
            batch, sequences = kvasir.Batch(worker, 2), [prefilled(worker, i) for i in (1, 2)]
            self.step(batch, sequences)
            for what in order:
                {"b": batch, "s": sequences[0], "w": worker}[what].close()
            with self.assertRaises(kvasir.KvasirError) as caught:
                self.step(batch, sequences)
            self.assertEqual(caught.exception.status, kvasir.Status.CLOSED)

    def test_a_member_that_nobody_else_holds_stays_open(self):
        with opened() as worker:
            batch = kvasir.Batch(worker, 2)
            self.step(batch, [prefilled(worker, 1), prefilled(worker, 2)])
            gc.collect()
            other = prefilled(worker, 0)
            self.step(batch, [other])
            batch.close()
            other.tokens([3])
            batch.close()

    def waits(self, sequence, batch):
        """Whether closing it in a thread waits for a call on the batch."""
        closer = threading.Thread(target=sequence.close)
        with batch._handle:
            closer.start()
            closer.join(0.2)
            waited = closer.is_alive()
        closer.join(60)
        self.assertFalse(closer.is_alive())
        return waited

    def test_a_sequence_that_moved_waits_for_its_batch(self):
        with opened() as worker, kvasir.Batch(worker, 2) as a, kvasir.Batch(worker, 2) as b:
            s, t = prefilled(worker, 1), prefilled(worker, 2)
            self.step(a, [s])
            self.step(b, [s])
            self.step(a, [t])
            self.assertTrue(self.waits(s, b))
            self.step(b, [t])
            self.assertTrue(self.waits(t, b))

    def test_a_call_that_is_refused_moves_nobody(self):
        with opened() as worker, kvasir.Batch(worker, 2) as a, kvasir.Batch(worker, 2) as b:
            s, t, u = (prefilled(worker, i) for i in (1, 2, 2))
            q, k, v = (x[:2] for x in tokens_of(0)[0])
            self.step(a, [s, t])
            with self.assertRaisesRegex(kvasir.KvasirError, "the same"):
                a.forward([u, u], 0, q, k, v)
            with self.assertRaisesRegex(kvasir.KvasirError, "the same"):
                b.forward([s, s], 0, q, k, v)
            self.assertTrue(self.waits(s, a))
            self.assertTrue(self.waits(t, a))

    def test_closing_from_another_thread_waits(self):
        """Sequences and batch are closed by threads while one steps them; none gets in between."""
        with opened() as worker:
            for _ in range(4):
                batch, sequences = kvasir.Batch(worker, 2), [prefilled(worker, i) for i in (1, 2)]
                self.step(batch, sequences)
                closers = [threading.Thread(target=x.close) for x in (*sequences, batch)]
                for closer in closers:
                    closer.start()
                try:
                    for _ in range(50):
                        self.step(batch, sequences)
                except kvasir.KvasirError as error:
                    self.assertEqual(error.status, kvasir.Status.CLOSED)
                for closer in closers:
                    closer.join(60)
                    self.assertFalse(closer.is_alive())


if __name__ == "__main__":
    unittest.main()
