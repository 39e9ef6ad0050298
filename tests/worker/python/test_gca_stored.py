"""The GCA decoder with its memory in a worker: the answers of torch alone, resident and stored."""

import json
import os
import subprocess
import tempfile
import unittest

import need

need.modules("numpy", "torch")
import numpy as np
import torch

import kvasir
from kvasir.gca import stored, weights
from kvasir.gca.model import Config, Model
from kvasir.retriever import Retriever
from server import Server

torch.set_num_threads(1)
BODY, TAIL = 24, 4


def model():
    torch.manual_seed(3)
    return Model(
        Config(vocab=64, hidden=32, heads=2, mlp=32, lower=1, encoder=1, upper=2, window=64, topk=3)
    ).eval()


def logits(m, tokens, client=None, **options):
    """(logits of the tail, statistics): with the memory in a worker."""
    with stored.open_worker(m, client, n_threads=1, **options) as worker:
        with worker.sequence() as sequence:
            memory = stored.StoredMemory(m, sequence)
            memory.append_body(tokens[:BODY], piece=5)
            sequence.flush()
            first = memory.answer(tokens[BODY:])
            stats = sequence.stats()
            again = memory.answer(tokens[BODY:])
            assert torch.equal(first, again)
            return first, stats


class Stored(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.server = Server(folder.name)
        self.addCleanup(self.server.stop)
        self.model = model()
        self.tokens = torch.randint(0, 64, (BODY + TAIL, 64))

    def test_answers_are_those_of_torch_alone_and_of_a_store(self):
        with torch.no_grad():
            want = self.model(self.tokens[None], TAIL)
        resident, stats = logits(self.model, self.tokens)
        torch.testing.assert_close(resident, want, rtol=1e-4, atol=1e-4)
        self.assertEqual(stats["misses"], 0)
        with kvasir.Client(self.server.start()) as client:
            offloaded, stats = logits(self.model, self.tokens, client)
        self.assertTrue(torch.equal(offloaded, resident))
        self.assertGreater(stats["misses"], 0)
        self.assertEqual(stats["bytes_fetched"], stats["misses"] * 2 * 32 * 4)

    def in_c(self, *more, dtype="F32"):
        """Logits by gca_answer, and what it prints."""
        paths = {n: os.path.join(self.folder, n) for n in ("weights", "tokens", "out")}
        command = [os.environ["KVASIR_GCA_ANSWER"], "--tail", str(TAIL), *more]
        for name, path in paths.items():
            command += [f"--{name}", path]
        config = json.dumps(self.model.c.__dict__)
        metadata = {"settings": '{"hidden": "7", "heads": "5"}', "config": config}
        weights.save(paths["weights"], dict(self.model.named_parameters()), metadata, dtype)
        self.tokens.numpy().astype("<u4").tofile(paths["tokens"])
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        return torch.from_numpy(np.fromfile(paths["out"], "<f4").reshape(1, TAIL, 64, 64)), text

    def test_plain_c_gives_the_same_answers(self):
        with torch.no_grad():
            want = self.model(self.tokens[None], TAIL)
        resident, text = self.in_c()
        torch.testing.assert_close(resident, want, rtol=1e-4, atol=1e-4)
        self.assertIn("chunks fetched 0 (0 bytes), retrievals 8", text)
        stored_too, text = self.in_c("--server", self.server.start())
        self.assertTrue(torch.equal(stored_too, resident))
        self.assertNotIn("chunks fetched 0 ", text)

    def test_plain_c_reads_bf16(self):
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(p.bfloat16().float())
        self.assertTrue(torch.equal(self.in_c(dtype="BF16")[0], self.in_c()[0]))

    def test_a_closed_retriever_says_so(self):
        with stored.open_worker(self.model, n_threads=1) as worker:
            with worker.sequence() as sequence:
                stored.StoredMemory(self.model, sequence).append_body(self.tokens[:3])
                with Retriever(sequence) as closed:
                    closed.retrieve(torch.randn(32), 3)
                    chunks, _, weights = closed.chosen()
                    self.assertEqual(list(chunks), [0, 1, 2])
                    self.assertAlmostEqual(float(weights.sum()), 1, 5)
                kept = Retriever(sequence)
                with self.assertRaises(kvasir.KvasirError):
                    closed.retrieve(torch.randn(32), 3)
        with self.assertRaises(kvasir.KvasirError) as caught:
            kept.retrieve(torch.randn(32), 3)
        self.assertEqual(caught.exception.status, kvasir.Status.CLOSED)
        kept.close()


if __name__ == "__main__":
    unittest.main()
