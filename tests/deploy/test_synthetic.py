"""What deploy/quickstart --synthetic runs: needles against a cachesvc that holds a part in RAM."""

import os
import re
import subprocess
import sys
import unittest

import paths

sys.path.insert(0, str(paths.ROOT / "tests" / "support"))
from cachesvc_fixture import Cachesvc

NEEDLES = os.environ["KVASIR_NEEDLES"]
ARGS = ("--dram-bytes", "64MiB", "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "1GiB")


def needles(*args):
    """(exit status, what it printed, what it said)."""
    done = subprocess.run([NEEDLES, *args], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


class Needles(unittest.TestCase):
    def setUp(self):
        self.server = Cachesvc(*ARGS)
        self.addCleanup(self.server.close)
        self.projection = os.path.join(self.server.folder, "needles.projection")

    def test_each_needle_is_found_and_comes_back_from_the_store(self):
        where = ("--server", self.server.listen, "--projection", self.projection)
        status, out, said = needles(*where, "--tokens", "16384", "--layers", "2", "--needles", "8")
        self.assertEqual(status, 0, out + said)
        self.assertRegex(out, r"context +16384 tokens x 2 layers, 0\.13 GB")
        self.assertIn("16 of 16 found (8 needles in 2 layers)", out)
        self.assertIn("16 of 16 came back from the store bit for bit", out)
        missing, picked, dram, lmdb = map(
            int,
            re.search(
                r"(\d+) rows missing of (\d+) picked; from dram (\d+), from lmdb (\d+)", out
            ).groups(),
        )
        self.assertEqual(missing, dram + lmdb)
        self.assertGreater(lmdb, 0)  # 128 MiB of rows are not in 64
        self.assertGreaterEqual(picked, missing)

    def test_a_server_that_is_not_there(self):
        self.assertEqual(self.server.stop(), 0)
        status, _, said = needles(
            "--server", self.server.listen, "--projection", self.projection, "--tokens", "8192"
        )
        self.assertEqual(status, 1)
        self.assertRegex(said, "UNAVAILABLE|TIMED_OUT")


if __name__ == "__main__":
    unittest.main(verbosity=2)
