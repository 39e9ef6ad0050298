"""attach on tiny random models: equal to stock within the budget, to the oracle beyond it."""

import gc
import tempfile
import unittest
import weakref
from pathlib import Path

import need

need.modules("numpy", "torch", "transformers")
import numpy as np
import torch
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import Cache, DynamicCache

import kvasir
from kvasir import hf, hf_model
from kvasir.activations import collect
from kvasir.calibrate import fit
from oracle import Oracle

torch.set_num_threads(1)
THETA = 10000.0
SIZES = dict(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)
SMALL = dict(n_sink=16, n_recent=32, k=48, chunk_tokens=64, block_tokens=64, n_threads=1)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)


def make(kind=LlamaForCausalLM, config=LlamaConfig, rope=None, **sizes):
    """A random model whose attention is not flat."""
    torch.manual_seed(11)
    rope = rope or {"rope_type": "default", "rope_theta": THETA}
    model = kind(config(**{**SIZES, "rope_parameters": rope, **sizes})).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8
            layer.self_attn.k_proj.weight *= 8
    return model


def ids_of(n, seed=5):
    return torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(seed))


def generate(model, ids, n_new, **kwargs):
    """generate() that neither guesses a mask nor warns."""
    settings = dict(max_new_tokens=n_new, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**settings, **kwargs})


def stock_logits(model, ids, **kwargs):
    with torch.inference_mode():
        return model(ids, **kwargs).logits


class _IdentityRotary(torch.nn.Module):
    def forward(self, x, position_ids):
        shape = (*position_ids.shape, 16)
        return torch.ones(shape), torch.zeros(shape)


class _OracleCache(Cache):
    """Keeps raw keys and values in plain lists, for the oracle."""

    is_compileable = False

    def __init__(self, n_layers, oracle):
        super().__init__(layers=[])
        self.kv, self.oracle = [None] * n_layers, oracle
        self.picks, self.scores = {}, {}

    def update(self, k, v, layer_idx, *args, **kwargs):
        new = torch.stack((k[0], v[0])).transpose(1, 2)
        old = self.kv[layer_idx]
        self.kv[layer_idx] = new if old is None else torch.cat((old, new), 1)
        _OracleCache.active = self
        return k, v

    def get_seq_length(self, layer_idx=0):
        kv = self.kv[-1]
        return 0 if kv is None else kv.shape[1]

    def get_mask_sizes(self, query_length, layer_idx=0):
        return self.get_seq_length() + query_length, 0


def _oracle_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    cache = _OracleCache.active
    k, v = cache.kv[module.layer_idx].numpy()
    out = cache.oracle.attend(query[0].transpose(0, 1).numpy(), k, v)
    cache.picks[module.layer_idx] = cache.oracle.last_picks
    return torch.from_numpy(out)[None].float(), None


AttentionInterface.register("test-oracle", _oracle_attention)


def oracle_run(model, oracle, ids, passes, n_new):
    """Logits of the last position of each pass, then n_new greedy tokens, through the oracle."""
    real, model.model.rotary_emb = model.model.rotary_emb, _IdentityRotary()
    model.set_attn_implementation("test-oracle")
    cache, logits, at = _OracleCache(model.config.num_hidden_layers, oracle), [], 0
    try:
        with torch.inference_mode():
            for n in passes:
                logits.append(model(ids[:, at : at + n], past_key_values=cache).logits[0, -1])
                at += n
            tokens = [int(logits[-1].argmax())]
            while len(tokens) < n_new:
                out = model(torch.tensor([[tokens[-1]]]), past_key_values=cache).logits[0, -1]
                tokens.append(int(out.argmax()))
    finally:
        model.model.rotary_emb = real
        model.set_attn_implementation("sdpa")
    return torch.stack(logits), tokens, cache


class WithinTheBudget(unittest.TestCase):
    """While everything is attended, attach must not change what a model says."""

    def check(self, model, n=90):
        ids = ids_of(n)
        want = stock_logits(model, ids)
        greedy = generate(model, ids, 5)
        torch.manual_seed(3)
        sampled = generate(model, ids, 5, do_sample=True)
        with kvasir.attach(model, None, "tokenselect", **SMALL) as kv:
            with kv.cache() as cache, torch.inference_mode():
                have = model(ids, past_key_values=cache).logits
                self.assertEqual(cache.get_seq_length(), n)
            torch.testing.assert_close(have, want, atol=3e-4, rtol=1e-4)
            with kv.cache(ids) as cache:
                self.assertTrue(torch.equal(greedy, generate(model, ids, 5, past_key_values=cache)))
            torch.manual_seed(3)
            with kv.cache(ids) as cache:
                self.assertTrue(
                    torch.equal(
                        sampled, generate(model, ids, 5, do_sample=True, past_key_values=cache)
                    )
                )

    def test_llama(self):
        self.check(make())

    def test_llama3_scaling(self):
        self.check(make(rope=LLAMA3))

    def test_qwen3_with_query_and_key_norms(self):
        self.check(make(Qwen3ForCausalLM, Qwen3Config))

    def test_mistral_without_window(self):
        self.check(make(MistralForCausalLM, MistralConfig, sliding_window=None))

    def test_bfloat16_stays_close(self):
        model, ids = make().bfloat16(), ids_of(90)
        want = stock_logits(model, ids).float()
        with kvasir.attach(model, **SMALL) as kv, kv.cache() as cache, torch.inference_mode():
            have = model(ids, past_key_values=cache).logits.float()
        self.assertLess(float((have - want).abs().mean()), 0.05 * float(want.abs().mean()))


class BeyondTheBudget(unittest.TestCase):
    """Past the budget, logits, picks and greedy tokens are the oracle's."""

    PASSES = (64, 64, 64, 64, 30, 1, 2, 1)

    def check(self, selector, **options):
        model, ids = make(), ids_of(sum(self.PASSES))
        oracle = Oracle(selector, 16, 32, 48, THETA, options.get("eps", 0))
        want, tokens, state = oracle_run(model, oracle, ids, self.PASSES, 6)
        dense = stock_logits(model, ids)[0, -1]
        self.assertGreater(float((want[-1] - dense).abs().max()), 1e-2, "selection changes nothing")
        with kvasir.attach(model, selector=selector, index="exact", **SMALL, **options) as kv:
            at, have = 0, []
            with kv.cache() as cache, torch.inference_mode():
                for n in self.PASSES:
                    have.append(model(ids[:, at : at + n], past_key_values=cache).logits[0, -1])
                    at += n
                torch.testing.assert_close(torch.stack(have), want, atol=2e-3, rtol=1e-3)
                mine = [int(have[-1].argmax())]
                while len(mine) < 6:
                    out = model(torch.tensor([[mine[-1]]]), past_key_values=cache).logits[0, -1]
                    mine.append(int(out.argmax()))
                self.assertEqual(mine, tokens)
                for layer in range(3):
                    wrong = np.setxor1d(cache.picks(layer), state.picks[layer])
                    self.assertLessEqual(len(wrong), 2, f"layer {layer}")

    def test_tokenselect(self):
        self.check("tokenselect")

    def test_tokenselect_with_window(self):
        self.check("tokenselect", eps=2)

    def test_esa(self):
        self.check("esa")

    def test_generate_prefills_in_chunks(self):
        """generate() over a long prompt runs the same passes as chunks by hand."""
        model, ids = make(), ids_of(64 * 4 + 10)
        with kvasir.attach(model, **SMALL) as kv:
            with kv.cache(ids) as cache:
                whole = generate(model, ids, 6, past_key_values=cache)
            with kv.cache() as cache, torch.inference_mode():
                kv.prefill(cache, ids[0, :256])
                self.assertEqual(cache.get_seq_length(), 256)
                resumed = generate(model, ids, 6, past_key_values=cache)
        self.assertTrue(torch.equal(whole, resumed))


class Batches(unittest.TestCase):
    """Several sequences of one length: generate() gives what each alone gives."""

    def test_generate(self):
        model, ids = make(), torch.cat([ids_of(200, seed) for seed in (5, 6, 7)])
        with kvasir.attach(model, **SMALL) as kv, torch.inference_mode():
            alone = []
            for row in ids:
                with kv.cache(row) as cache:
                    alone.append(generate(model, row[None], 12, past_key_values=cache))
            with kv.cache(ids) as cache:
                self.assertEqual(len(cache.sequences), 3)
                kv.prefill(cache, ids[:, :128])
                together = generate(model, ids, 12, past_key_values=cache)
                self.assertEqual(cache.get_seq_length(), 211)
                self.assertEqual({len(s) for s in cache.sequences}, {211})
                self.assertEqual(cache.stats()["tokens"], 3 * 211)
                cache.crop(210)
                self.assertEqual({len(s) for s in cache.sequences}, {210})
        self.assertTrue(torch.equal(together, torch.cat(alone)))

    def test_coded_rows(self):
        """attach(row_dtype=...): logits stay near those of rows that are not coded."""
        model, ids, logits = make(), ids_of(120), []
        acts = collect(model, ids[0].tolist(), 64, q_stride=1, k_stride=1)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "esa.kvp"
            fit(acts, "esa", 14, 32, hf_model.model_id(model)).write(path)
            options = dict(selector="esa", index="compressed", projection=path, **SMALL)
            for row_dtype in (None, "i8"):
                with kvasir.attach(
                    model, row_dtype=row_dtype, **options
                ) as kv, kv.cache() as cache:
                    logits.append(stock_logits(model, ids, past_key_values=cache))
        off = float((logits[1] - logits[0]).abs().mean() / logits[0].abs().mean())
        self.assertTrue(0 < off < 0.2, off)


class Refusals(unittest.TestCase):
    def setUp(self):
        self.model, self.ids = make(), ids_of(8)
        self.kv = kvasir.attach(self.model, **SMALL)
        self.addCleanup(self.kv.detach)

    def refuse(self, pattern, **kwargs):
        with self.assertRaisesRegex(
            (ValueError, NotImplementedError), pattern
        ), torch.inference_mode():
            self.model(**{"past_key_values": self.kv.cache(), **kwargs})

    def test_padding(self):
        mask = torch.ones_like(self.ids)
        mask[0, 0] = 0
        self.refuse("padding", input_ids=self.ids, attention_mask=mask)

    def test_batches(self):
        self.refuse("of 2 sequences, but the cache has 1", input_ids=self.ids.repeat(2, 1))

    def test_embeddings_without_ids(self):
        self.refuse("input_ids", inputs_embeds=torch.zeros(1, 4, 64))

    def test_positions_with_a_gap(self):
        self.refuse(
            "positions must go on from 0", input_ids=self.ids, position_ids=torch.arange(1, 9)[None]
        )

    def test_attention_weights(self):
        self.refuse("weights", input_ids=self.ids, output_attentions=True)

    def test_a_stock_cache(self):
        self.refuse(
            "past_key_values=attachment.cache", input_ids=self.ids, past_key_values=DynamicCache()
        )
        self.refuse("past_key_values=attachment.cache", input_ids=self.ids, past_key_values=None)

    def test_a_cache_of_another_attachment(self):
        other = make()
        with kvasir.attach(other, **SMALL) as kv:
            self.refuse("another attachment", input_ids=self.ids, past_key_values=kv.cache())

    def test_beams(self):
        with self.assertRaises((ValueError, NotImplementedError)):
            generate(self.model, self.ids, 2, num_beams=2, past_key_values=self.kv.cache())

    def test_training(self):
        self.model.train()
        self.refuse("model.eval", input_ids=self.ids)
        self.model.eval()
        self.model.model.layers[1].self_attn.train()
        self.refuse("model.eval", input_ids=self.ids)

    def test_dropout(self):
        self.model.config.attention_dropout = 0.1
        self.model.model.layers[0].self_attn.attention_dropout = 0.1
        cache = self.kv.cache()
        with torch.inference_mode():
            self.model(self.ids, past_key_values=cache)
        self.model.model.layers[0].self_attn.train()
        self.refuse("model.eval", input_ids=self.ids)

    def test_twice(self):
        with self.assertRaisesRegex(RuntimeError, "attached already"):
            kvasir.attach(self.model, **SMALL)

    def test_a_pass_that_failed_half_way_breaks_its_cache_only(self):
        class Fail(hf.Observer):
            def on_layer(self, cache, layer, q, k, v, out):
                if layer == 1:
                    raise KeyError("on purpose")

        cache = self.kv.cache()
        self.kv.observer = Fail()
        with self.assertRaisesRegex(KeyError, "on purpose"), torch.inference_mode():
            self.model(self.ids, past_key_values=cache)
        self.kv.observer = None
        self.refuse_runtime(cache)
        with torch.inference_mode():
            self.model(self.ids, past_key_values=self.kv.cache())

    def test_a_pass_that_only_some_began_breaks_its_cache(self):
        """Of the first sequence nothing has happened: the pass may come again."""
        ids = self.ids.expand(2, -1)
        for fails, call in ((0, "tokens"), (1, "tokens"), (0, "truncate"), (1, "truncate")):
            cache = self.kv.cache(ids)
            sequence = cache.sequences[fails]

            def fail(_):
                raise KeyError("on purpose")

            def run():
                if call == "tokens":
                    self.model(ids, past_key_values=cache)
                else:
                    cache.crop(-1)

            with torch.inference_mode():
                if call == "truncate":
                    self.model(ids, past_key_values=cache)
                setattr(sequence, call, fail)
                with self.assertRaisesRegex(KeyError, "on purpose"):
                    run()
                delattr(sequence, call)
                if fails == 0:
                    run()
                else:
                    self.refuse_runtime(cache, ids)

    def refuse_runtime(self, cache, ids=None):
        with self.assertRaisesRegex(
            RuntimeError, "earlier error.*on purpose"
        ), torch.inference_mode():
            self.model(self.ids if ids is None else ids, past_key_values=cache)


class Models(unittest.TestCase):
    """What is refused at attach, by name."""

    def refuse(self, pattern, model):
        with self.assertRaisesRegex(hf_model.UnsupportedModel, pattern):
            kvasir.attach(model, **SMALL)
        self.assertEqual(model.config._attn_implementation, "sdpa")

    def test_a_gpu_needs_its_backend(self):
        for backend in (None, "cpu", "cuda:1"):
            with self.assertRaisesRegex(hf_model.UnsupportedModel, 'backend="cuda:0"'):
                hf_model.on_device("cuda:0", {"backend": backend, "k": 5})
        for backend in ("cuda", "cuda:0"):
            options = hf_model.on_device("cuda:0", {"backend": backend, "k": 5})
            self.assertEqual(options, {"backend": backend, "k": 5, "device_memory": 1})
        self.assertEqual(hf_model.on_device("cpu", {"backend": "cuda"}), {"backend": "cuda"})

    def test_a_model_in_two_places(self):
        model = make()
        model.model.layers[1].to("meta")
        self.refuse("several devices", model)

    def test_rope_types(self):
        self.refuse(
            "rope type 'linear'", make(rope=dict(rope_type="linear", rope_theta=1e4, factor=2.0))
        )
        self.refuse(
            "rope type 'yarn'", make(rope=dict(rope_type="yarn", rope_theta=1e4, factor=2.0))
        )

    def test_sliding_windows(self):
        self.refuse("sliding", make(MistralForCausalLM, MistralConfig, sliding_window=64))

    def test_other_pairs_of_dimensions(self):
        from transformers import CohereConfig, CohereForCausalLM

        self.refuse("pairs of dimensions|rotary embedding", make(CohereForCausalLM, CohereConfig))

    def test_no_decoder(self):
        with self.assertRaisesRegex(hf_model.UnsupportedModel, "not a Llama-like model"):
            kvasir.attach(torch.nn.Linear(2, 2))

    def test_fingerprint_tells_weights_apart(self):
        model = make()
        before = hf_model.fingerprint(model)
        self.assertEqual(before, hf_model.fingerprint(make()))
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight += 0.01
        self.assertNotEqual(before, hf_model.fingerprint(model))

    def test_fingerprint_sees_every_element(self):
        """One row of a fine-tuned embedding, one element, one bit, and what is not a parameter."""
        model = make(vocab_size=8192)
        model.register_buffer("scales", torch.ones(3))
        weight = model.model.embed_tokens.weight
        seen = {hf_model.fingerprint(model)}
        with torch.no_grad():
            for change in (
                lambda: weight[4999].mul_(1.5),
                lambda: weight.view(-1)[-1].add_(1.0),
                lambda: weight.view(torch.int32).view(-1)[777].bitwise_xor_(1),
                lambda: model.scales[1].fill_(2.0),
            ):
                change()
                seen.add(hf_model.fingerprint(model))
        self.assertEqual(len(seen), 5)

    def test_fingerprint_of_every_dtype_and_layout(self):
        model = make().bfloat16()
        before = hf_model.fingerprint(model)
        model.lm_head.weight.data = model.lm_head.weight.data.t().contiguous().t()
        self.assertEqual(before, hf_model.fingerprint(model))
        self.assertNotEqual(before, hf_model.fingerprint(make()))


class Attaching(unittest.TestCase):
    def test_the_name_alone_says_what_to_do(self):
        model = make()
        model.set_attn_implementation("kvasir")
        with self.assertRaisesRegex(RuntimeError, r"kvasir\.attach\(model"), torch.inference_mode():
            model(ids_of(4))

    def test_detach_restores(self):
        model, ids = make(), ids_of(40)
        rotary, want = model.model.rotary_emb, stock_logits(model, ids)
        kv = kvasir.attach(model, **SMALL)
        self.assertIsNot(model.model.rotary_emb, rotary)
        with torch.inference_mode():
            model(ids, past_key_values=kv.cache())
        kvasir.detach(model)
        kvasir.detach(model)
        self.assertIs(model.model.rotary_emb, rotary)
        self.assertEqual(model.config._attn_implementation, "sdpa")
        self.assertNotIn("forward", vars(model.model))
        self.assertTrue(torch.equal(stock_logits(model, ids), want))
        kvasir.attach(model, **SMALL).detach()

    def test_detach_gives_back_a_forward_of_the_models_own(self):
        model, ids, seen = make(), ids_of(8), []
        stock = model.model.forward

        def own(*args, **kwargs):
            seen.append(1)
            return stock(*args, **kwargs)

        model.model.forward = own
        with kvasir.attach(model, **SMALL) as kv, torch.inference_mode():
            model(ids, past_key_values=kv.cache())
            self.assertEqual(len(seen), 1)
        self.assertIs(model.model.forward, own)

    def test_attach_that_fails_half_way_changes_nothing(self):
        model, ids = make(), ids_of(8)
        rotary, want, set_real = model.model.rotary_emb, stock_logits(model, ids), hf.RawRotary

        class Fail(hf.RawRotary):
            def __init__(self, real):
                raise MemoryError("on purpose")

        hf.RawRotary = Fail
        try:
            with self.assertRaisesRegex(MemoryError, "on purpose"):
                kvasir.attach(model, **SMALL)
        finally:
            hf.RawRotary = set_real
        self.assertEqual(model.config._attn_implementation, "sdpa")
        self.assertIs(model.model.rotary_emb, rotary)
        self.assertNotIn("forward", vars(model.model))
        self.assertTrue(torch.equal(stock_logits(model, ids), want))
        kvasir.attach(model, **SMALL).detach()

    def test_an_attached_model_that_is_dropped_goes(self):
        model = make()
        kv = kvasir.attach(model, **SMALL)
        cache = kv.cache()
        gone = [weakref.ref(x) for x in (model, model.model, kv, kv.worker, cache.sequence)]
        del model, kv, cache
        gc.collect()
        self.assertEqual([x() for x in gone], 5 * [None])

    def test_crop_takes_back_drafts(self):
        model, ids = make(), ids_of(20)
        with kvasir.attach(model, **SMALL) as kv, kv.cache() as cache, torch.inference_mode():
            model(ids[:, :10], past_key_values=cache)
            model(ids_of(5, seed=9), past_key_values=cache)
            cache.crop(-5)
            self.assertEqual(cache.get_seq_length(), 10)
            have = model(ids[:, 10:], past_key_values=cache).logits
        torch.testing.assert_close(have, stock_logits(model, ids)[:, 10:], atol=3e-4, rtol=1e-4)


if __name__ == "__main__":
    unittest.main(verbosity=2)
