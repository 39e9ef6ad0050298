"""deploy/quickstart.py from its arguments to its report: a tiny random model against a cachesvc.

The model answers nothing right; what is checked is the flow: a cold run, then one that finds the
context in the store, and that both ask the same and get the same answers.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

import paths
import need

need.modules("numpy", "torch", "transformers", "tokenizers")
sys.path[:0] = [str(paths.ROOT / "tests" / "support"), str(paths.ROOT / "deploy")]
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quickstart
import stock
from cachesvc_fixture import Cachesvc

TOKENS = 4096
ARGS = ("--dram-bytes", "16MiB", "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "1GiB")


def save_model(folder):
    """A model of 64 dims a head and a tokenizer of characters, as from_pretrained loads them."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    letters = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="?"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)


class Flow(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        save_model(self.folder / "model")
        lines = (f"In year {i % 97} they went to place {i % 89}, all of them." for i in range(400))
        (self.folder / "text").write_text("\n".join(lines))
        self.server = Cachesvc(*ARGS)
        self.addCleanup(self.server.close)
        for module, name, value in (
            (stock, "CEILING", ((1024, 1),)),
            (quickstart, "CALIBRATION_TOKENS", 1024),
        ):
            self.addCleanup(setattr, module, name, getattr(module, name))
            setattr(module, name, value)

    def run_once(self, *args):
        """(the report's numbers, what was printed)."""
        where = ["--server", self.server.listen, "--state", str(self.folder / "state")]
        where += ["--model-dir", str(self.folder / "model"), "--text", str(self.folder / "text")]
        where += ["--tokens", str(TOKENS), "--threads", "1", "--passkeys", "2", "--verses", "1"]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(quickstart.main(where + list(args)), 0)
        report = (self.folder / "state" / "report.txt").read_text()
        self.assertEqual(out.getvalue().strip(), report.strip())
        return json.loads((self.folder / "state" / "report.json").read_text()), report

    def cold_and_warm(self, *args):
        cold, report = self.run_once(*args)
        self.assertEqual(cold["reuse"]["n_reused"], 0)
        self.assertEqual([a["kind"] for a in cold["answers"]], ["passkey", "passkey", "verse"])
        self.assertIn(f"{TOKENS:,} tokens", report)
        self.assertEqual(set(cold["inside"]), {"512", "1536"})
        for chunk in cold["inside"].values():  # so small a model attends nearly alike to all
            self.assertGreater(chunk["top1"], 0.95)
            self.assertLess(chunk["attention_error"], 0.01)
        self.assertIsNotNone(cold["beyond"])
        self.assertGreater(cold["decode"]["misses"], 0)
        warm, report = self.run_once(*args)
        self.assertEqual(warm["reuse"]["n_reused"], TOKENS)
        self.assertTrue(warm["ceiling"]["cached"])
        for key in ("asked", "expected"):
            self.assertEqual([a[key] for a in cold["answers"]], [a[key] for a in warm["answers"]])
        self.assertEqual(cold["beyond"], warm["beyond"])
        self.assertGreater(warm["decode"]["rows_dram"] + warm["decode"]["rows_lmdb"], 0)
        self.assertIn("came from the store", " ".join(report.split()))
        return warm

    def test_tokenselect_compressed(self):
        warm = self.cold_and_warm("--selector", "tokenselect", "--index", "compressed")
        self.assertEqual(warm["index_bytes"], 34)  # 32 columns and the scale of one head

    def test_esa_exact(self):
        warm = self.cold_and_warm("--selector", "esa", "--index", "exact")
        self.assertEqual(warm["index_bytes"], 128)


if __name__ == "__main__":
    if "KVASIR_CACHESVC" not in os.environ:
        print("SKIPPED: KVASIR_CACHESVC is not set")
        sys.exit(need.SKIPPED)
    unittest.main(verbosity=2)
