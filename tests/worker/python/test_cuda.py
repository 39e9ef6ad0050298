"""torch tensors on a GPU: given to C as they are, on torch's stream; attach of a model on a GPU."""

import tempfile
import unittest
from pathlib import Path

import need

need.modules("numpy", "torch", "transformers")
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvasir
from kvasir import hf_model
from kvasir.activations import collect
from kvasir.calibrate import fit
from kvasir.projection import Projection

DIMS = 30
SMALL = dict(n_sink=16, n_recent=32, k=48, chunk_tokens=64, block_tokens=64)
GEOMETRY = kvasir.Geometry(2, 8, 4, 64, "bfloat16", kvasir.Rope(10000.0))
WIDE = kvasir.Geometry(2, 16, 8, 64, "bfloat16", kvasir.Rope(10000.0))  # what coded rows need


def make():
    """A random model of a shape that the GPU takes, whose attention is not flat."""
    torch.manual_seed(11)
    sizes = dict(hidden_size=256, intermediate_size=96, num_hidden_layers=3, vocab_size=128)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, rope_parameters=rope)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8
            layer.self_attn.k_proj.weight *= 8
    return model.bfloat16()


def ids_of(n):
    return torch.randint(0, 128, (1, n), generator=torch.Generator().manual_seed(5))


class OnAGpu(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.model = make()
        name = hf_model.model_id(cls.model)
        acts = collect(cls.model, ids_of(1024)[0].tolist(), 512, q_stride=2, k_stride=1)
        cls.path = Path(folder.name) / "esa.kvp"
        fit(acts, "esa", DIMS, 32, name).write(cls.path)
        cls.flat = {}
        for g in (GEOMETRY, WIDE):
            size = (2, 2, 1, g.n_kv_heads * 64, DIMS)
            a, b = np.random.default_rng(1).normal(size=size).astype(np.float32) / 16
            cls.flat[g] = Path(folder.name) / f"flat{g.n_kv_heads}.kvp"
            Projection("esa", "m", g.n_kv_heads, 64, "shared", 32, a, b).write(cls.flat[g])

    def worker(self, geometry=GEOMETRY, **options):
        options = dict(index="compressed", projection=self.flat[geometry], **SMALL, **options)
        return kvasir.Worker(geometry, "m", "esa", **options)

    def run_passes(self, worker, device, made=lambda x: x):
        """Outputs of passes of several tokens and of one, [tokens, ...] of layer 1, on the CPU.

        What is given to the worker goes through `made` first.
        """
        torch.manual_seed(7)
        at, outs, g = 0, [], worker.geometry
        with worker.sequence() as sequence:
            for n in (64, 64, 64, 20, 1, 1, 2):
                sequence.tokens(list(range(at, at + n)))
                for layer in range(2):
                    heads = (g.n_q_heads, g.n_kv_heads, g.n_kv_heads)
                    q, k, v = (made(torch.randn(n, h, 64).bfloat16().to(device)) for h in heads)
                    lse = torch.empty(n, g.n_q_heads, device=device)
                    out = sequence.forward(layer, q, k, v, lse=lse)
                    self.assertEqual(str(out.device), str(q.device))
                    self.assertTrue(bool(lse.isfinite().all()))
                outs.append(out.cpu().float())
                at += n
            stats = sequence.stats()
        return torch.cat(outs), stats

    def test_device_memory_gives_what_host_memory_gives(self):
        with self.worker(backend="cuda") as worker:
            host, _ = self.run_passes(worker, "cpu")
        with self.worker(backend="cuda", device_memory=1) as worker:
            device, stats = self.run_passes(worker, "cuda:0")
        self.assertTrue(torch.equal(host, device))
        self.assertEqual(stats["steps_device"], stats["steps"])

    def test_the_cpu_agrees(self):
        for geometry, row_dtype in ((GEOMETRY, None), (WIDE, "i8"), (WIDE, "e4m3")):
            options = dict(geometry=geometry, row_dtype=row_dtype)
            with self.worker(backend="cpu", **options) as worker:
                cpu, _ = self.run_passes(worker, "cpu")
            with self.worker(backend="cuda", **options) as worker:
                host, _ = self.run_passes(worker, "cpu")
            with self.worker(backend="cuda", device_memory=1, **options) as worker:
                device, stats = self.run_passes(worker, "cuda:0")
            self.assertTrue(torch.equal(host, device), row_dtype)
            self.assertEqual(stats["steps_device"], stats["steps"])
            self.assertLess(float((cpu - device).abs().max()), 2**-6, row_dtype)

    def test_a_batch_gives_what_its_sequences_give_alone(self):
        outs = {}
        with self.worker(backend="cuda", device_memory=1) as worker:
            for together in (False, True):
                torch.manual_seed(9)
                sequences, outs[together] = [worker.sequence() for _ in range(3)], []
                batch = kvasir.Batch(worker, 3)
                for step, n in enumerate((64, 64, 50, 1, 1, 1)):
                    for i, sequence in enumerate(sequences):
                        sequence.tokens([step * 3 + i] * n)
                    for layer in range(2):
                        q = torch.randn(3, n, 8, 64, device="cuda").bfloat16()
                        k, v = torch.randn(2, 3, n, 4, 64, device="cuda").bfloat16()
                        if together and n == 1:
                            parts = (x[:, 0] for x in (q, k, v))
                            outs[together].append(batch.forward(sequences, layer, *parts))
                            continue
                        alone = [
                            s.forward(layer, q[i], k[i], v[i]) for i, s in enumerate(sequences)
                        ]
                        if n == 1:
                            outs[together].append(torch.cat(alone))
                batch.close()
                for sequence in sequences:
                    sequence.close()
        self.assertTrue(torch.equal(torch.stack(outs[True]), torch.stack(outs[False])))

    def test_a_key_that_is_not_finite_is_refused_and_repeated(self):
        for geometry, row_dtype in ((GEOMETRY, None), (WIDE, "i8")):
            options = dict(geometry=geometry, row_dtype=row_dtype, backend="cuda", device_memory=1)
            g = geometry
            with self.worker(**options) as worker, worker.sequence() as sequence:
                for n in (64, 64, 33, 1, 2):
                    sequence.tokens([3] * n)
                    for layer in range(2):
                        q = torch.randn(n, g.n_q_heads, 64, device="cuda").bfloat16()
                        k, v = torch.randn(2, n, g.n_kv_heads, 64, device="cuda").bfloat16()
                        bad = (v if row_dtype and layer else k).clone()
                        bad[n - 1, -1, 63] = float("inf") if layer else float("nan")
                        given = (k, bad) if row_dtype and layer else (bad, v)
                        with self.assertRaisesRegex(kvasir.KvasirError, "not finite") as caught:
                            sequence.forward(layer, q, *given)
                        self.assertEqual(caught.exception.status, kvasir.Status.INVALID)
                        self.assertTrue(bool(sequence.forward(layer, q, k, v).isfinite().all()))

    def test_on_a_stream_of_its_own(self):
        """What is made on the stream just before a call is read after it was made."""
        busy = torch.zeros(1 << 26, device="cuda")

        def late(x):
            for _ in range(10):
                busy.add_(1)
            return x * 1

        with self.worker(backend="cuda", device_memory=1) as worker:
            want, _ = self.run_passes(worker, "cuda:0")
            with torch.cuda.stream(torch.cuda.Stream()):
                have, _ = self.run_passes(worker, "cuda:0", late)
        self.assertTrue(torch.equal(want, have))

    def test_what_lies_elsewhere_is_refused(self):
        x = torch.zeros(1, 8, 64, dtype=torch.bfloat16)
        with self.worker(backend="cuda", device_memory=1) as worker:
            with worker.sequence() as sequence:
                sequence.tokens([1])
                for q in (x, x.float().numpy()):
                    with self.assertRaisesRegex(TypeError, "cuda:0"):
                        sequence.append(0, q[:, :4], q[:, :4])
                with torch.cuda.stream(torch.cuda.Stream()):
                    with self.assertRaisesRegex(ValueError, "stream"):
                        sequence.append(0, x[:, :4].cuda(), x[:, :4].cuda())
        with self.worker(backend="cuda") as worker, worker.sequence() as sequence:
            sequence.tokens([1])
            with self.assertRaisesRegex(TypeError, "lies on cuda:0"):
                sequence.append(0, x[:, :4].cuda(), x[:, :4].cuda())

    def attached(self, model, **options):
        options = dict(options, index="compressed", projection=self.path, **SMALL)
        return kvasir.attach(model, selector="esa", **options)

    def test_attach_on_a_gpu(self):
        """Logits over passes of all kinds are those of the CPU, model and backend."""
        passes, ids, logits = (64, 64, 64, 30, 1, 1, 2), ids_of(226), []
        for device in ("cpu", "cuda"):
            model, at, have = make().to(device), 0, []
            with self.attached(model, backend=device) as kv, kv.cache() as cache:
                with torch.inference_mode():
                    for n in passes:
                        part = ids[:, at : at + n].to(device)
                        out = model(part, past_key_values=cache).logits[0, -1]
                        have.append(out.float().cpu())
                        at += n
                stats = cache.stats()
            logits.append(torch.stack(have))
        self.assertEqual(stats["steps_device"], stats["steps"])
        off = (logits[0] - logits[1]).abs().mean()
        self.assertLess(float(off), 0.05 * float(logits[0].abs().mean()))

    def test_a_model_elsewhere_is_refused(self):
        with self.assertRaisesRegex(hf_model.UnsupportedModel, 'backend="cuda:0"'):
            self.attached(make().cuda())


if __name__ == "__main__":
    need.cuda()
    unittest.main()
