"""attach on a real cachesvc: reuse equals a cold run bit for bit, also from LMDB, restarted."""

import signal
import tempfile
import unittest

import need

need.modules("numpy", "torch", "transformers")
import torch

import kvasir
from server import Server
from test_hf import generate, ids_of, make

torch.set_num_threads(1)
OPTIONS = dict(selector="tokenselect", n_sink=16, n_recent=32, k=48, chunk_tokens=64)
OPTIONS.update(block_tokens=64, residency_slots=64, n_threads=1, promise="durable", exact=1)


class Reuse(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.server = Server(folder.name)
        self.addCleanup(self.server.stop)
        self.uri = self.server.start()
        self.model, self.ids = make(), ids_of(64 * 6 + 9)
        self.model.config._name_or_path = "tiny"

    def run_once(self, n_expected):
        """Greedy tokens and last logits over the ids, through the store."""
        with kvasir.attach(self.model, self.uri, **OPTIONS) as kv:
            with kv.cache(self.ids) as cache:
                self.assertEqual(cache.n_reused, n_expected)
                self.assertEqual(cache.get_seq_length(), n_expected)
                with torch.inference_mode():
                    rest = self.ids[:, n_expected:]
                    logits = self.model(rest, past_key_values=cache).logits[0, -9:]
                stats = cache.stats()
                cache.flush(30)
            with kv.cache(self.ids) as cache:
                tokens = generate(self.model, self.ids, 5, past_key_values=cache)
        return logits, tokens, stats

    def test_a_reused_prefix_equals_a_cold_run(self):
        cold, tokens, stats = self.run_once(0)
        self.assertGreater(stats["reselects"], 0)
        warm, again, stats = self.run_once(64 * 6)
        self.assertTrue(torch.equal(cold, warm))
        self.assertTrue(torch.equal(tokens, again))
        self.assertGreater(stats["misses"], 0)

    def test_the_store_changes_nothing(self):
        stored, tokens, _ = self.run_once(0)
        with kvasir.attach(self.model, None, **OPTIONS) as kv, kv.cache(self.ids) as cache:
            with torch.inference_mode():
                resident = self.model(self.ids, past_key_values=cache).logits[0, -9:]
        self.assertTrue(torch.equal(stored, resident))

    def test_acknowledged_values_outlive_a_kill(self):
        cold, _, _ = self.run_once(0)
        self.server.stop(signal.SIGKILL)
        self.uri = self.server.start()
        warm, _, stats = self.run_once(64 * 6)
        self.assertTrue(torch.equal(cold, warm))
        self.assertGreater(stats["rows_lmdb"] + stats["rows_dram"], 0)

    def test_other_weights_share_nothing(self):
        self.run_once(0)
        with torch.no_grad():
            self.model.model.layers[0].mlp.up_proj.weight += 0.01
        self.run_once(0)

    def test_adapters_and_salts_share_nothing(self):
        self.run_once(0)
        with kvasir.attach(self.model, self.uri, **OPTIONS) as kv:
            labels = ({}, {"adapter": "x@1"}, {"adapter": "x@2"}, {"salt": "x@1"})
            for label, n in [(x, 0) for x in labels[1:]] + [(x, 64 * 6) for x in labels]:
                with kv.cache(self.ids, **label) as cache:
                    self.assertEqual(cache.n_reused, n)
                    kv.prefill(cache, self.ids[0])

    def test_server_statistics(self):
        with kvasir.Client(self.uri) as client:
            stats = client.stats()
            self.assertEqual(set(stats.tiers), {"dram", "lmdb"})
            self.assertEqual(stats.tiers["dram"].capacity_bytes, 64 << 20)
            self.assertEqual(stats.limits["max_value_bytes"], client.limits["max_value_bytes"])
            self.assertTrue(stats.version)

    def test_a_server_that_died_is_an_error_with_a_name(self):
        with kvasir.attach(self.model, self.uri, **OPTIONS, fetch_timeout_s=2) as kv:
            cache = kv.cache()
            kv.prefill(cache, self.ids[0, :320])
            cache.flush(30)
            self.server.stop(signal.SIGKILL)
            with self.assertRaises(kvasir.KvasirError) as caught, torch.inference_mode():
                for i in range(40):
                    self.model(ids_of(1, seed=i), past_key_values=cache)
        self.assertIn(caught.exception.status, (kvasir.Status.UNAVAILABLE, kvasir.Status.TIMED_OUT))


if __name__ == "__main__":
    unittest.main(verbosity=2)
