"""The closed form, the model of the index, the artefact: against plain algebra and the worker."""

import os
import tempfile
import unittest
from types import SimpleNamespace

import need

need.modules("numpy", "torch", "transformers")
import numpy as np
import torch

import kvasir
import kvasir.hf
from kvasir import activations, calibrate, closed_form, index_model, projection, quality
from test_hf import ids_of, make

torch.set_num_threads(1)


def samples(n, d, seed, decay=0.9):
    """Random vectors with a power-law spectrum in a random basis, float64."""
    g = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))
    return (torch.randn(n, d, generator=g, dtype=torch.float64) * decay ** torch.arange(d)) @ basis


class ClosedForm(unittest.TestCase):
    def test_full_rank_is_exact_up_to_a_constant_per_query(self):
        q, k = samples(300, 12, 1), samples(400, 12, 2)
        a, b = closed_form.solve(q, k, 12, top=None, normalise=False, ridge=0)
        torch.testing.assert_close((q @ a) @ (k @ b).T, q @ k.T)

    def test_nothing_of_that_rank_has_less_error(self):
        """Plain least squares beats random nearby compressors and key PCA."""
        q, k = samples(2000, 16, 3), samples(2000, 16, 4)
        k = k - k.mean(0)
        sq, sk = q.T @ q / len(q), k.T @ k / len(k)

        def error(a, b):
            m = torch.eye(16, dtype=torch.float64) - a @ b.T
            return float(torch.trace(m.T @ sq @ m @ sk))

        a, b = closed_form.solve(q, k, 5, top=None, normalise=False, ridge=0)
        best, g = error(a, b), torch.Generator().manual_seed(9)
        for _ in range(50):
            da, db = (0.05 * torch.randn(16, 5, generator=g, dtype=torch.float64) for _ in range(2))
            self.assertLess(best, error(a + da, b + db))
        pca = torch.linalg.eigh(sk)[1][:, -5:]
        self.assertLess(best, error(pca, pca))

    def test_leading_columns_are_the_smaller_solution(self):
        q, k = samples(500, 10, 5), samples(500, 10, 6)
        a, b = closed_form.solve(q, k, 8)
        a4, b4 = closed_form.solve(q, k, 4)
        torch.testing.assert_close(a[:, :4] @ b[:, :4].T, a4 @ b4.T)

    def test_a_constant_added_to_keys_changes_nothing(self):
        q, k = samples(500, 10, 5), samples(500, 10, 6)
        a, b = closed_form.solve(q, k, 4)
        a1, b1 = closed_form.solve(q, k + 100.0, 4)
        torch.testing.assert_close(a @ b.T, a1 @ b1.T, atol=1e-6, rtol=1e-6)

    def test_singular_moments(self):
        q, k = samples(50, 10, 5), samples(50, 10, 6)
        k[:, 3] = k[:, 2]
        q[:, 4] = 0
        a, b = closed_form.solve(q, k, 6)
        self.assertTrue(torch.isfinite(a).all() and torch.isfinite(b).all())

    def test_group_sum_is_the_sum_over_heads(self):
        q, k = torch.randn(3, 6, 4).double(), torch.randn(5, 2, 4).double()
        want = sum(q[:, h] @ k[:, h // 3].T for h in range(6))
        torch.testing.assert_close(closed_form.group_sum(q, 2) @ k.reshape(5, 8).T, want)


class IndexModel(unittest.TestCase):
    def test_rounding_up_to_bfloat16(self):
        x = torch.rand(1000) + 1e-3
        up = index_model.round_up_bf16(x)
        self.assertTrue((up >= x).all() and (up <= x * 1.008).all())
        self.assertTrue(torch.equal(up, up.bfloat16().float()))

    def test_quantised_rows(self):
        x = torch.randn(50, 7)
        x[3] = 0
        error = (index_model.quantise(x) - x).abs().amax(1)
        self.assertTrue((error <= x.abs().amax(1) / 127 * 0.51).all())

    def test_every_form_has_its_steps(self):
        x = torch.randn(50, 64)
        largest = x.abs().amax(1, keepdim=True)
        int4 = index_model.quantise(x, "int4")
        self.assertTrue(((int4 - x).abs() <= largest / 7 * 0.51).all())
        self.assertLessEqual(max(len(row.unique()) for row in int4), 15)
        e4m3 = index_model.quantise(x, "e4m3")
        self.assertTrue(((e4m3 - x).abs() <= x.abs() / 15.9 + largest / 448 * 2**-9).all())
        self.assertGreater(float((e4m3 - x).abs().max()), 0)
        bytes_of = [index_model.row_bytes(3, 64, form) for form in ("int8", "e4m3", "int4")]
        self.assertEqual(bytes_of, [198, 198, 102])


class Artefact(unittest.TestCase):
    """A calibrated file, read back and by the worker; picks over it are the model's."""

    @classmethod
    def setUpClass(cls):
        cls.model = make()
        cls.model.config._name_or_path = "tiny"
        cls.ids = ids_of(64 * 6)
        cls.acts = activations.collect(cls.model, cls.ids[0], window=128, q_stride=2, k_stride=1)
        cls.dir = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.dir.cleanup)

    def fit(self, selector, dims, rope):
        path = os.path.join(self.dir.name, f"{selector}{dims}.kvp")
        calibrate.fit(self.acts, selector, dims, rope, "tiny").write(path)
        return path

    def test_activations_are_raw_and_the_model_is_put_back(self):
        self.assertEqual(self.acts.k.shape, (3, 384, 2, 16))
        self.assertEqual(self.acts.q.shape, (3, 192, 4, 16))
        self.assertEqual(self.model.config._attn_implementation, "sdpa")
        seen = []
        hook = self.model.model.layers[0].self_attn.k_proj.register_forward_hook(
            lambda module, args, out: seen.append(out)
        )
        with torch.inference_mode():
            self.model(self.ids[:, :128])
        hook.remove()
        torch.testing.assert_close(self.acts.k[0, :128].reshape(128, 32), seen[0][0])

    def test_reading_back(self):
        path = self.fit("esa", 8, 32)
        p = projection.read(path)
        self.assertEqual(
            (p.selector, p.model, p.form, p.rope, p.dims), ("esa", "tiny", "shared", 32, 8)
        )
        self.assertEqual(p.a.shape, (3, 1, 32, 8))
        with open(path, "r+b") as f:
            f.truncate(os.path.getsize(path) - 4)
        with self.assertRaisesRegex(ValueError, "length"):
            projection.read(path)

    def check_picks(self, selector, dims, rope, scores_of):
        path = self.fit(selector, dims, rope)
        proj = projection.read(path)
        with kvasir.attach(
            self.model,
            selector=selector,
            index="compressed",
            projection=path,
            n_sink=16,
            n_recent=32,
            k=48,
            chunk_tokens=64,
            block_tokens=64,
        ) as kv:
            layers = {}

            class Keep(kvasir.hf.Observer):
                def on_layer(self, cache, layer, q, k, v, out):
                    layers.setdefault(layer, []).append(k.clone())
                    layers["q", layer] = q.clone()

            kv.observer = Keep()
            with kv.cache() as cache:
                kv.prefill(cache, self.ids)
                with torch.inference_mode():
                    self.model(torch.tensor([[7]]), past_key_values=cache)
                for layer in range(3):
                    k = torch.cat(layers[layer])[16 : len(cache.sequence) - kv_recent(selector)]
                    freq = kvasir.hf_model.inv_freq(kv.geometry.rope, 16)
                    q = kvasir.hf_model.rotate(layers["q", layer], rope, freq)
                    a, b = quality._columns(proj, layer, dims)
                    s = scores_of(q, k, a, b)
                    want = set((s.topk(48).indices + 16).tolist())
                    self.assertGreaterEqual(len(want & set(cache.picks(layer).tolist())), 47)

    def test_esa_picks_over_the_compressed_index(self):
        self.check_picks("esa", 8, 32, lambda q, k, a, b: index_model.esa_scores(q, k, a, b)[0])

    def test_tokenselect_picks_over_the_compressed_index(self):
        self.check_picks(
            "tokenselect",
            8,
            32,
            lambda q, k, a, b: index_model.soft_vote(index_model.vote_logits(q, k, a, b))[0],
        )

    def test_a_projection_of_another_position_is_refused(self):
        path = self.fit("esa", 8, 32)
        with self.assertRaisesRegex(kvasir.KvasirError, "projection_path"):
            kvasir.attach(self.model, selector="esa", projection=path, n_recent=48, k=48)
        self.assertEqual(self.model.config._attn_implementation, "sdpa")


class QualityTable(unittest.TestCase):
    def table(self):
        table, row = quality.Table(), ("decode", "d'=22", 24)
        for k in quality.KS:
            table.add(row, k, 0.9, 0.40, 0.50)
            table.add(row, k, 0.5, 0.15, 0.10)
        return table

    def test_recall_of(self):
        exact = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
        picks = torch.tensor([[3, 2, 9, 8], [7, 6, 5, 4]])
        self.assertEqual(quality.recall_of(picks, exact, 10), 0.75)

    def test_the_last_candidates(self):
        geometry = SimpleNamespace(rope=kvasir.Rope(10000.0), head_dim=16)
        k, q = torch.randn(2, 40, 1, 16), torch.randn(2, 8, 2, 16)
        whole = quality.Context(geometry, k, q, 4)
        torch.testing.assert_close(whole.candidates(1), k[1, 4:32])
        torch.testing.assert_close(whole.last(10).candidates(1), k[1, 22:32])
        self.assertEqual(len(whole.candidates(1)), 28)

    def test_means_and_the_worst_layer(self):
        text = quality.markdown("ESA", self.table(), 384)
        self.assertIn("| decode | d'=22 | 24 | 0.700 / 0.500 | 0.917 / 0.800 |", text)
        self.assertIn("0.300 at k=256", text)

    def test_every_layer_has_its_line_in_each_table(self):
        text = quality.per_layer("ESA", self.table(), [3, 8])
        self.assertEqual(text.count("| 3 | 0.900 / 0.800 |"), len(quality.KS))
        self.assertEqual(text.count("| 8 | 0.500 / 1.500 |"), len(quality.KS))
        for k in quality.KS:
            self.assertIn(f"**ESA; decode queries, k = {k}: recall / mass**", text)


def kv_recent(selector):
    """Tokens behind the candidates when one token was appended."""
    return 32 if selector == "tokenselect" else 33


if __name__ == "__main__":
    unittest.main(verbosity=2)
