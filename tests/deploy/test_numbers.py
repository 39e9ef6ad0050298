"""deploy/quickstart: numbers of tokens, sizes, and the arguments that it refuses."""

import subprocess
import tempfile
import unittest
from pathlib import Path

from paths import PARTS, ROOT


def bash(call):
    """(exit status, what it printed) of a call of numbers.sh."""
    script = f'set -euo pipefail; . "{PARTS}/numbers.sh"; {call}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


class Numbers(unittest.TestCase):
    def test_units(self):
        for text, n in (("32k", 32768), ("1m", 1048576), ("2M", 2097152), ("4096", 4096)):
            self.assertEqual(bash(f"plain_number {text}"), (0, str(n)))

    def test_what_is_no_number(self):
        for text in ("", "k", "0", "-1", "1.5k", "08k", "12x", "1kk", "1234567890", "1;ls"):
            status, out = bash(f"plain_number '{text}'")
            self.assertEqual((status, out), (2, ""), text)

    def test_sizes(self):
        for text, n in (("4096", 4096), ("64KiB", 65536), ("128MiB", 128 << 20), ("2GiB", 2 << 30)):
            self.assertEqual(bash(f"size_bytes {text}"), (0, str(n)))
        self.assertEqual(bash("size_bytes 008MiB"), (0, str(8 << 20)))
        self.assertEqual(bash("size_bytes 64TiB"), (0, str(64 << 40)))
        for text in ("", "1x", "MiB", "-1GiB", "1.5GiB", "2gib", "1GB", "65TiB", "16777217GiB"):
            self.assertEqual(bash(f"size_bytes '{text}'"), (2, ""), text)

    def test_absolute(self):
        self.assertEqual(bash("absolute 'a b/c' /home"), (0, "/home/a b/c"))
        self.assertEqual(bash("absolute /x /home"), (0, "/x"))

    def test_a_million_tokens_need_more_disk_than_their_rows(self):
        _, need = bash("disk_bytes 1048576 text")
        self.assertGreater(int(need), 1048576 * 30 * (768 + 204))
        _, need = bash("disk_bytes 1048576 synthetic")
        self.assertGreater(int(need), 1048576 * 2 * (4096 + 128))
        _, need = bash("disk_bytes 1048576 gca")
        self.assertGreater(int(need), 1048576 * 1.05 * (1024 + 8))

    def test_the_cap_has_room_for_two_selectors(self):
        self.assertEqual(bash(f"lmdb_bytes {30 << 30}"), (0, str(60 << 30)))
        self.assertEqual(bash("lmdb_bytes 1000"), (0, str(8 << 30)))

    def test_used_bytes(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "x").write_bytes(b"1" * 100_000)
            _, used = bash(f"used_bytes '{folder}'")
            self.assertGreaterEqual(int(used), 100_000)
            self.assertEqual(bash(f"used_bytes '{folder}/none'"), (0, "0"))
            _, free = bash(f"free_bytes '{folder}'")
            self.assertGreater(int(free), 0)

    def test_people(self):
        self.assertEqual(bash(f"people {3 << 20}"), (0, "3 MiB"))
        self.assertEqual(bash(f"people {30 << 30}"), (0, "30 GiB"))


class Arguments(unittest.TestCase):
    """Refused before anything is installed or built."""

    def refused(self, *args, folder=None):
        done = subprocess.run(
            [ROOT / "deploy" / "quickstart", *args],
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        self.assertEqual(done.returncode, 2, done.stderr)
        return done.stderr

    def test_refusals(self):
        self.assertIn("'3x' is not a number of tokens", self.refused("--tokens", "3x"))
        self.assertIn("'5000' is no multiple of 512", self.refused("--tokens", "5000"))
        self.assertIn("'1024' is under 4096", self.refused("--tokens", "1k"))
        self.assertIn("--tokens needs a value", self.refused("--tokens"))
        self.assertIn("unknown selector 'gca'", self.refused("--selector", "gca"))
        self.assertIn("unknown index 'best'", self.refused("--index", "best"))
        self.assertIn("--seed 'x' is not a number", self.refused("--seed", "x"))
        self.assertIn("unknown argument '--fast'", self.refused("--fast"))
        self.assertIn("--backend needs --gca", self.refused("--backend", "cuda"))
        self.assertIn("'gpu' is not cpu or cuda", self.refused("--gca", "--backend", "gpu"))
        self.assertIn("'1x' is not a size", self.refused("--dram", "1x"))
        self.assertIn("'1024' is under 4096", self.refused("--gca", "--tokens", "1k"))
        self.assertIn("over 64m", self.refused("--gca", "--tokens", "65m"))
        self.assertIn("'2gib' is not a size", self.refused("--synthetic", "--dram", "2gib"))
        self.assertIn("'4096' is under 1MiB", self.refused("--dram", "4096"))
        self.assertIn("--servers needs --gca", self.refused("--servers", "3"))
        self.assertIn("'9' is not a number from 1", self.refused("--gca", "--servers", "9"))
        few = self.refused("--gca", "--servers", "3", "--dram", "2MiB")
        self.assertIn("under 1MiB for a server", few)
        self.assertIn("--state is empty", self.refused("--state", ""))

    def test_a_relative_state_is_the_callers(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "file").write_text("")
            said = self.refused("--state", "file", folder=folder)
            self.assertIn(f"--state '{folder}/file' is not a folder", said)

    def test_help(self):
        done = subprocess.run(
            ["./quickstart", "--help"],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT / "deploy",
        )
        self.assertTrue(done.stdout.rstrip().endswith("2 bad arguments."), done.stdout)


if __name__ == "__main__":
    unittest.main()
