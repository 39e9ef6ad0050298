"""The probe of the stock model: one measure for both sides, and when its cache may be used."""

import tempfile
import unittest
from pathlib import Path

import paths  # noqa: F401
import need

need.modules("numpy", "torch", "transformers")
import stock
from test_context import VERSES, Letters
from context import Builder


class Leading(unittest.TestCase):
    def test_counts_up_to_the_first_difference(self):
        self.assertEqual(stock.leading([1, 2, 9, 4], [1, 2, 3, 4]), 2)
        self.assertEqual(stock.leading([9, 2, 3, 4], [1, 2, 3, 4]), 0)
        self.assertEqual(stock.leading([1, 2], [1, 2]), 2)


class Asked(Exception):
    """The probe ran the model."""


class Model:
    """Only says that it was run."""

    config = None

    def __call__(self, *args, **kwargs):
        raise Asked


class CeilingCache(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.state = Path(self.folder.name)
        self.addCleanup(self.folder.cleanup)
        stock_cache, ceiling = stock.DynamicCache, stock.CEILING
        stock.DynamicCache, stock.CEILING = (lambda config: None), ((4096, 1),)
        self.addCleanup(lambda: setattr(stock, "DynamicCache", stock_cache))
        self.addCleanup(lambda: setattr(stock, "CEILING", ceiling))

    def probe(self, key="weights", verses=VERSES):
        return stock.ceiling(Model(), Builder(Letters(), verses), key, self.state, lambda *_: None)

    def test_only_the_same_model_over_the_same_texts_is_known(self):
        name = stock.ceiling_name(
            "weights", stock.ceiling_contexts(Builder(Letters(), VERSES))
        )
        (self.state / name).write_text('{"rates": {}, "tokens_per_s": 1.0}')
        self.assertEqual(self.probe(), {"rates": {}, "tokens_per_s": 1.0, "cached": True})
        with self.assertRaises(Asked):
            self.probe(key="other weights")
        with self.assertRaises(Asked):
            self.probe(verses=VERSES[5:])


if __name__ == "__main__":
    unittest.main()
