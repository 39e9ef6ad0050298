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
        a, b = np.random.default_rng(1).normal(size=(2, 2, 1, 256, DIMS)).astype(np.float32) / 16
        cls.flat = Path(folder.name) / "flat.kvp"
        Projection("esa", "m", 4, 64, "shared", 32, a, b).write(cls.flat)

    def worker(self, **options):
        options = dict(index="compressed", projection=self.flat, **SMALL, **options)
        return kvasir.Worker(GEOMETRY, "m", "esa", **options)

    def run_passes(self, worker, device, made=lambda x: x):
        """Outputs of passes of several tokens and of one, [tokens, ...] of layer 1, on the CPU.

        What is given to the worker goes through `made` first.
        """
        torch.manual_seed(7)
        at, outs = 0, []
        with worker.sequence() as sequence:
            for n in (64, 64, 64, 20, 1, 1, 2):
                sequence.tokens(list(range(at, at + n)))
                for layer in range(2):
                    q = made(torch.randn(n, 8, 64).bfloat16().to(device))
                    k, v = (made(torch.randn(n, 4, 64).bfloat16().to(device)) for _ in range(2))
                    lse = torch.empty(n, 8, device=device)
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
        with self.worker(backend="cpu") as worker:
            cpu, _ = self.run_passes(worker, "cpu")
        with self.worker(backend="cuda", device_memory=1) as worker:
            device, _ = self.run_passes(worker, "cuda:0")
        self.assertLess(float((cpu - device).abs().max()), 2**-6)

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
