"""The report's words and numbers, over made-up measurements."""

import unittest

import paths  # noqa: F401
import report


def answer(kind, right, n_right, n_asked):
    return {
        "kind": kind, "name": "x", "depth": 0.25, "asked": "\n## x:", "expected": " 1",
        "answered": " 2",
        "right": right, "n_right": n_right, "n_asked": n_asked, "layers_with_it": 7, "layers": 30,
    }  # fmt: skip


def traffic(tokens, **changes):
    base = {
        "tokens": tokens, "seconds": 2.0, "hits": 30, "misses": 10, "rows_dram": 4, "rows_lmdb": 6,
        "bytes_fetched": 10 << 20, "select_ms": 1.0, "wait_ms": 2.0, "attend_ms": 3.0,
    }  # fmt: skip
    return {**base, **changes}


def numbers(**changes):
    difference = {
        "positions": 512, "top1": 0.9, "kl": 0.01, "attention_error": 0.05,
        "attention_error_worst_layer": 0.1, "full": True,
    }  # fmt: skip
    base = {
        "model": "toy", "window": 8192, "tokens": 32768, "selector": "esa", "index": "compressed",
        "index_bytes": 24, "row_bytes": 768, "seconds": 100.0,
        "answers": [
            answer("passkey", True, 6, 6), answer("passkey", False, 0, 6),
            answer("verse", False, 3, 10), answer("verse", False, 2, 10),
        ],
        "ceiling": {"cached": False, "rates": {"2000": {"passkey": [7, 8], "verse": [2.5, 4]}}},
        "memory": {"full_kv": 1000 << 20, "worker": 250 << 20, "index": 100 << 20,
                   "residency": 100 << 20, "window": 50 << 20},
        "tiers": [{"name": "dram", "used_bytes": 1 << 20, "capacity_bytes": 2 << 20, "values": 3}],
        "prefill": traffic(1000), "first": traffic(4), "decode": traffic(0),
        "reuse": {"n_reused": 0, "seconds": 0.0, "first_seconds": None},
        "inside": {1536: difference},
        "beyond": {**difference, "recall": 0.8}, "beyond_note": None,
    }  # fmt: skip
    return {**base, **changes}


class Report(unittest.TestCase):
    def test_sizes(self):
        self.assertEqual(report.size(1023), "1023 B")
        self.assertEqual(report.size(1536), "1.5 KiB")
        self.assertEqual(report.size(5 << 40), "5120.0 GiB")

    def test_percent_of_nothing(self):
        self.assertEqual(report.percent(0, 0), "-")
        self.assertEqual(report.percent(1, 8), "12.5 %")

    def test_sums(self):
        text = report.text(numbers())
        self.assertIn("in all: passkeys 1 of 2, verses 25.0 % of their tokens", text)
        self.assertIn("2,000 tokens: passkeys 7 of 8, verses 62.5 % of their tokens", text)
        self.assertIn("250.0 MiB, 25.0 % of it", text)
        self.assertIn("resident 75.0 %, dram 10.0 %, lmdb 15.0 %", text)
        self.assertIn("2.00 ms/token", text)
        self.assertIn("asked '\\n## x:', expected ' 1'", text)
        self.assertIn("picks: 80.0 % of the exact ones", text)

    def test_what_did_not_happen_is_left_out(self):
        text = report.text(numbers())
        self.assertNotIn("decode ", text)
        self.assertNotIn("Prefix reuse", text)

    def test_a_reused_prefix_says_what_it_saved(self):
        reuse = {"n_reused": 32768, "seconds": 0.5, "first_seconds": 100.0}
        text = report.text(numbers(reuse=reuse, beyond_note="no keys", prefill=traffic(0)))
        self.assertIn("32,768 of 32,768 tokens came from the store in 0.5 s", text)
        self.assertIn("in 0.5 s instead of the 100 s that reading them took", text)
        self.assertNotIn("  prefill", text)
        self.assertIn("(measured when the prefix was read)", text)

    def test_an_unmeasured_comparison_says_why(self):
        text = report.text(numbers(beyond=None, beyond_note="it would need 5 GiB of RAM"))
        self.assertIn("not measured, it would need 5 GiB of RAM", text)


if __name__ == "__main__":
    unittest.main()
