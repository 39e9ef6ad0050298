"""The ctypes binding with numpy alone: layouts, selection against an oracle, refusals."""

import gc
import os
import subprocess
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import need

need.modules("numpy")
import numpy as np

import kvasir
from kvasir import _abi
from kvasir.projection import Projection
from oracle import Oracle

THETA = 10000.0
GEOMETRY = kvasir.Geometry(
    n_layers=2, n_q_heads=6, n_kv_heads=2, head_dim=16, dtype="float32", rope=kvasir.Rope(THETA)
)
SMALL = dict(n_sink=16, n_recent=32, k=48, chunk_tokens=64, block_tokens=64, n_threads=2)


def rows(rng, n, heads):
    """Random vectors of uneven size, so that softmaxes are not flat."""
    return (rng.standard_normal((n, heads, 16)) * rng.uniform(0.3, 2.0, (n, 1, 1))).astype(
        np.float32
    )


class Layout(unittest.TestCase):
    def test_every_field_lies_where_the_compiler_puts_it(self):
        program = os.environ.get("KVASIR_ABI_LAYOUT")
        if not program:
            self.skipTest("KVASIR_ABI_LAYOUT is not set")
        printed = subprocess.run([program], check=True, capture_output=True, text=True).stdout
        expected = [line.split() for line in printed.splitlines()]
        have = []
        for name, struct in _abi.STRUCTS.items():
            have.append([name, "-", "0", str(_abi.C.sizeof(struct))])
            for field, _ in struct._fields_:
                at = getattr(struct, field)
                have.append([name, field, str(at.offset), str(at.size)])
        self.assertEqual(have, expected)


class Selection(unittest.TestCase):
    """A worker without a store against the oracle, over chunks and then single tokens."""

    def run_case(self, selector, eps):
        rng, oracle = np.random.default_rng(7), Oracle(selector, 16, 32, 48, THETA, eps)
        keys = [np.zeros((0, 2, 16), np.float32)] * 2
        values = list(keys)
        beyond = 0
        with kvasir.Worker(GEOMETRY, "m", selector, index="exact", eps=eps, **SMALL) as worker:
            with worker.sequence() as seq:
                for n in (64, 64, 64, 64, 64, 1, 1, 3, 1):
                    seq.tokens(rng.integers(0, 1000, n))
                    for layer in range(2):
                        q, k, v = rows(rng, n, 6), rows(rng, n, 2), rows(rng, n, 2)
                        keys[layer] = np.concatenate((keys[layer], k))
                        values[layer] = np.concatenate((values[layer], v))
                        out = seq.forward(layer, q, k, v)
                        want = oracle.attend(q, keys[layer], values[layer])
                        if oracle.last_picks is not None:
                            beyond += 1
                            self.assertTrue(oracle.agrees(seq.picks(layer), 1e-5))
                        np.testing.assert_allclose(out, want, atol=2e-5, rtol=1e-4)
                self.assertEqual(len(seq), 64 * 5 + 6)
                self.assertEqual(seq.stats()["tokens"], 64 * 5 + 6)
        self.assertGreater(beyond, 10)

    def test_tokenselect(self):
        self.run_case("tokenselect", 0)

    def test_tokenselect_with_window(self):
        self.run_case("tokenselect", 2)

    def test_esa(self):
        self.run_case("esa", 0)

    def test_esa_with_window(self):
        self.run_case("esa", 3)

    def test_the_process_has_counters(self):
        counts = kvasir.Client.process_counts()
        for why in ("cheapest", "only", "tried", "asked", "exact", "broken", "busy", "rest"):
            self.assertEqual(counts[f"way_near_{why}"], 0)
        self.assertGreater(len(counts), 80)

    def test_a_step_in_parts_equals_forward(self):
        rng = np.random.default_rng(3)
        steps = [(rows(rng, 64, 6), rows(rng, 64, 2), rows(rng, 64, 2)) for _ in range(4)]
        outs = []
        with kvasir.Worker(GEOMETRY, "m", "tokenselect", exact=1, **SMALL) as worker:
            for parts in (False, True):
                with worker.sequence() as seq:
                    for q, k, v in steps:
                        seq.tokens(np.arange(64))
                        for layer in range(2):
                            if not parts:
                                out = seq.forward(layer, q, k, v)
                                continue
                            seq.append(layer, k, v)
                            step, lse = seq.step(layer, q), np.zeros((64, 6), np.float32)
                            step.attend(q)
                            out = step.finish(q, lse=lse)
                            self.assertTrue(np.isfinite(lse).all())
                            with self.assertRaisesRegex(kvasir.KvasirError, "finished"):
                                step.attend(q)
                    outs.append(out)
        np.testing.assert_array_equal(outs[0], outs[1])

    def test_coded_rows_are_those_of_the_oracle_rounded(self):
        """A byte an element: bound by a head's largest of K and V, here below 8 (e4m3: 2^-4)."""
        rng, outs = np.random.default_rng(8), {}
        passes = [(n, rows(rng, n, 6), rows(rng, n, 2), rows(rng, n, 2)) for n in (64, 30, 1, 1)]
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        path = Path(folder.name) / "esa.kvp"
        a, b = rng.standard_normal((2, 2, 1, 32, 14)).astype(np.float32)
        Projection("esa", "m", 2, 16, "shared", 32, a, b).write(path)
        options = dict(index="compressed", projection=path, **SMALL)
        for row_dtype in (None, "i8", "e4m3"):
            with kvasir.Worker(GEOMETRY, "m", "esa", row_dtype=row_dtype, **options) as worker:
                with worker.sequence() as seq:
                    for n, q, k, v in passes:
                        seq.tokens(np.arange(n))
                        for layer in range(2):
                            out = seq.forward(layer, q / 16, k, v)
                    outs[row_dtype] = out
        for row_dtype, bound in (("i8", 0.05), ("e4m3", 0.4)):
            off = float(np.abs(outs[row_dtype] - outs[None]).max())
            self.assertTrue(0 < off < bound, f"{row_dtype}: {off}")
        with self.assertRaisesRegex(ValueError, "row_dtype must be one of e4m3, i8"):
            kvasir.Worker(GEOMETRY, "m", "esa", row_dtype="int8", **options)
        with self.assertRaisesRegex(kvasir.KvasirError, "row_dtype"):
            kvasir.Worker(GEOMETRY, "m", "esa", row_dtype="i8", index="exact", **SMALL)

    def test_an_abandoned_step_may_be_begun_again(self):
        rng = np.random.default_rng(4)
        q, k, v = rows(rng, 8, 6), rows(rng, 8, 2), rows(rng, 8, 2)
        with kvasir.Worker(GEOMETRY, "m", "tokenselect", **SMALL) as worker:
            seq = worker.sequence()
            seq.tokens(np.arange(8))
            seq.append(0, k, v)
            step = seq.step(0, q)
            with self.assertRaises(kvasir.KvasirError) as caught:
                seq.step(0, q)
            self.assertEqual(caught.exception.status, kvasir.Status.AGAIN)
            step.abandon()
            step.abandon()
            out = seq.step(0, q).finish(q)
            np.testing.assert_allclose(
                out, Oracle("tokenselect", 16, 32, 48, THETA).attend(q, k, v), atol=2e-5
            )

    def test_a_step_left_alone_does_not_block_its_layer(self):
        rng = np.random.default_rng(4)
        q, k, v = rows(rng, 8, 6), rows(rng, 8, 2), rows(rng, 8, 2)
        with kvasir.Worker(GEOMETRY, "m", "tokenselect", **SMALL) as worker:
            seq = worker.sequence()
            seq.tokens(np.arange(8))
            seq.append(0, k, v)
            want = seq.step(0, q).finish(q)
            with self.assertRaises(ZeroDivisionError), seq.step(0, q):
                raise ZeroDivisionError
            with seq.step(0, q) as step:
                np.testing.assert_array_equal(step.finish(q), want)
            seq.step(0, q)  # dropped
            cycle = [seq.step(0, q)]
            cycle.append(cycle)
            del cycle
            gc.collect()
            np.testing.assert_array_equal(seq.step(0, q).finish(q), want)
            last = seq.step(0, q)
            seq.close()
            del last
            with self.assertRaises(TypeError):
                kvasir.worker.Step(seq, 0, None)


class Refusals(unittest.TestCase):
    def setUp(self):
        self.worker = kvasir.Worker(GEOMETRY, "m", "tokenselect", **SMALL)
        self.seq = self.worker.sequence()
        self.addCleanup(self.worker.close)
        self.rng = np.random.default_rng(1)
        self.seq.tokens(np.arange(4))
        self.kv = rows(self.rng, 4, 2)

    def test_dtype(self):
        with self.assertRaisesRegex(TypeError, "k has dtype float64, the worker's is float32"):
            self.seq.append(0, self.kv.astype(float), self.kv)

    def test_shape(self):
        with self.assertRaisesRegex(ValueError, r"v has shape \[4, 1, 16\], expected \[4, 2, 16\]"):
            self.seq.append(0, self.kv, self.kv[:, :1].copy())

    def test_strides(self):
        with self.assertRaisesRegex(ValueError, "k is not contiguous"):
            self.seq.append(0, np.repeat(self.kv, 2, 2)[..., ::2], self.kv)

    def test_kind(self):
        with self.assertRaisesRegex(TypeError, "numpy array or a torch tensor"):
            self.seq.append(0, [[0.0]] * 4, self.kv)

    def test_place(self):
        """What a worker with the GPU's memory takes is a tensor there."""
        address = kvasir.tensors.address
        with self.assertRaisesRegex(TypeError, "k must be a torch tensor on cuda:1, not ndarray"):
            address("k", self.kv, "float32", (4, 2, 16), device="cuda:1")
        self.assertEqual(address("k", self.kv, "float32", (4, 2, 16)), self.kv.ctypes.data)
        for backend, place in (("cuda", "cuda:0"), ("cuda:3", "cuda:3")):
            self.assertEqual(kvasir.worker.device_of(backend, 1), place)
            self.assertEqual(kvasir.worker.device_of(backend, 0), "cpu")

    def test_read_only(self):
        q, fixed = rows(self.rng, 4, 6), np.frombuffer(bytes(4 * 6 * 16 * 4), np.float32)
        fixed = fixed.reshape(4, 6, 16)
        lse = np.frombuffer(bytes(4 * 6 * 4), np.float32).reshape(4, 6)
        with self.assertRaisesRegex(ValueError, "out is read-only"):
            self.seq.forward(0, q, self.kv, self.kv, out=fixed)
        with self.assertRaisesRegex(ValueError, "lse is read-only"):
            self.seq.forward(0, q, self.kv, self.kv, lse=lse)
        self.seq.append(0, self.kv, self.kv)  # neither has begun
        step = self.seq.step(0, fixed)  # as a query it will do
        with self.assertRaisesRegex(ValueError, "out is read-only"):
            step.finish(fixed, out=fixed)
        with self.assertRaisesRegex(ValueError, "lse is read-only"):
            step.finish(fixed, lse=lse)
        step.finish(fixed)

    def test_token_ids(self):
        for bad, error in (([1.5], TypeError), ([-1], ValueError), ([[1]], ValueError)):
            with self.assertRaises(error):
                self.seq.tokens(bad)

    def test_a_refused_call_says_which_and_why(self):
        with self.assertRaises(kvasir.KvasirError) as caught:
            self.seq.append(0, self.kv[:3].copy(), self.kv[:3].copy())
        self.assertEqual(caught.exception.status, kvasir.Status.INVALID)
        self.assertEqual(caught.exception.call, "kvw_append")
        self.assertTrue(caught.exception.detail)

    def test_a_key_that_is_not_finite(self):
        bad = self.kv.copy()
        bad[2, 1, 3] = np.nan
        with self.assertRaises(kvasir.KvasirError) as caught:
            self.seq.append(0, bad, self.kv)
        self.assertEqual(caught.exception.status, kvasir.Status.INVALID)
        self.seq.append(0, self.kv, self.kv)

    def test_options(self):
        with self.assertRaisesRegex(TypeError, "unknown option n_sinks"):
            kvasir.Worker(GEOMETRY, "m", "esa", n_sinks=3)
        with self.assertRaisesRegex(ValueError, "index must be one of"):
            kvasir.Worker(GEOMETRY, "m", "esa", index="best")
        with self.assertRaisesRegex(kvasir.KvasirError, "INVALID.*selector"):
            kvasir.Worker(GEOMETRY, "m", "nosuch")
        with self.assertRaisesRegex(kvasir.KvasirError, "INVALID.*projection_path"):
            kvasir.Worker(GEOMETRY, "m", "esa", index="compressed")

    def test_unknown_status(self):
        error = kvasir.KvasirError(-99, "x")
        self.assertIsNone(error.status)
        self.assertIn("-99", str(error))

    def test_client(self):
        with self.assertRaises(kvasir.KvasirError) as caught:
            kvasir.Client("nosuch://x")
        self.assertIn(caught.exception.status, (kvasir.Status.INVALID, kvasir.Status.UNSUPPORTED))
        with self.assertRaises(kvasir.KvasirError) as caught:
            kvasir.Client("grpc+unix:///nonexistent/kvasir.sock", connect_timeout_s=0.5)
        self.assertIn(
            caught.exception.status,
            (kvasir.Status.UNAVAILABLE, kvasir.Status.TIMED_OUT, kvasir.Status.UNSUPPORTED),
        )

    def test_client_options_reach_the_library(self):
        given = []

        class Library:
            def kvc_client_open(self, opts, client):
                given.append(_abi.ClientOpts.from_buffer_copy(opts._obj))
                return 0

            def kvc_client_close(self, client):
                pass

        with mock.patch("kvasir._lib.load", Library):
            kvasir.Client("rdma://x:1", region_bytes=5 << 30, sums=True).close()
            kvasir.Client("rdma://x:1", n_channels=3).close()
        self.assertEqual([opts.region_bytes for opts in given], [5 << 30, 0])
        self.assertEqual([opts.sums for opts in given], [1, 0])
        self.assertEqual([opts.n_channels for opts in given], [0, 3])


class Truncating(unittest.TestCase):
    def test_truncate_takes_back_the_last_pass(self):
        rng = np.random.default_rng(5)
        with kvasir.Worker(GEOMETRY, "m", "tokenselect", **SMALL) as worker:
            seq = worker.sequence()
            for n in (8, 4):
                seq.tokens(np.arange(n))
                for layer in range(2):
                    seq.forward(layer, rows(rng, n, 6), rows(rng, n, 2), rows(rng, n, 2))
            seq.truncate(9)
            self.assertEqual(len(seq), 9)
            with self.assertRaises(kvasir.KvasirError):
                seq.truncate(3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
