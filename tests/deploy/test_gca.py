"""What deploy/quickstart --gca runs: the trained GCA decoder finds passkeys in a context that lies
in a cachesvc: in a million tokens once (some 20 s on two idle cores), and in 65,536, or
KVASIR_GCA_TOKENS, beside the same run without a store."""

import os
import re
import subprocess
import sys
import unittest

import paths

sys.path.insert(0, str(paths.ROOT / "tests" / "support"))
from cachesvc_fixture import Cachesvc

PROGRAM = os.environ["KVASIR_GCA_NEEDLES"]
WEIGHTS = paths.ROOT / "worker" / "examples" / "weights"
TOKENS = int(os.environ.get("KVASIR_GCA_TOKENS", "65536"))
ARGS = ("--dram-bytes", "32MiB", "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "8GiB")


def needles(*args, groups=2):
    """(exit status, what it printed, what it said)."""
    command = [PROGRAM, "--weights", str(WEIGHTS / f"gca-{groups}.safetensors"), *args]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def logits(out):
    """The digest of every logit that an answer was read from."""
    return re.search(r"^logits +([0-9a-f]{64})$", out, re.MULTILINE).group(1)


class Needles(unittest.TestCase):
    def setUp(self):
        self.server = Cachesvc(*ARGS)
        self.addCleanup(self.server.close)

    def test_all_are_found_and_nothing_changes_by_the_store(self):
        size = ("--tokens", str(TOKENS))
        pid = str(self.server.process.pid)
        status, stored, said = needles(*size, "--server", self.server.listen, "--server-pid", pid)
        self.assertEqual(status, 0, stored + said)
        self.assertIn("passkey     1 of 1 right", stored)
        for name, n in (("by name", 32), ("two hops", 16)):
            right = int(re.search(rf"{name} +(\d+) of {n} right", stored).group(1))
            self.assertGreaterEqual(right, n - 1, stored)
        fetched, kilobytes, dram = re.search(
            r"answering +([\d.]+) of 8 chunks .*, ([\d.]+) KB; from dram (\d+) %", stored
        ).groups()
        self.assertGreater(float(fetched), 1)
        self.assertAlmostEqual(float(kilobytes), float(fetched) * 65.536, delta=4)
        self.assertLess(int(dram), 100)  # 64 MiB of chunks are not in 32
        self.assertGreater(float(re.search(r"; cachesvc ([\d.]+) MB", stored).group(1)), 1)
        worker, chunks = re.search(r"worker ([\d.]+) MB.*chunks are ([\d.]+) MB", stored).groups()
        self.assertLess(float(worker), float(chunks))
        status, resident, said = needles(*size)
        self.assertEqual(status, 0, resident + said)
        self.assertIn("answering   0.0 of 8 chunks fetched", resident)
        self.assertEqual(logits(stored), logits(resident))

    def test_a_million_tokens(self):
        server = Cachesvc("--dram-bytes", "512MiB", *ARGS[2:])
        self.addCleanup(server.close)
        status, out, said = needles("--tokens", "1048576", "--server", server.listen)
        self.assertEqual(status, 0, out + said)
        self.assertIn("context     1048576 tokens, 16384 chunks", out)
        self.assertIn("passkey     1 of 1 right", out)
        self.assertRegex(out, r"by name +3[12] of 32 right")

    def test_three_servers_change_nothing(self):
        size = ("--tokens", "16384", "--decode", "10")
        servers = [self.server]
        for _ in range(2):
            servers.append(Cachesvc(*ARGS))
            self.addCleanup(servers[-1].close)
        answers = []
        for n in (0, 3):
            args = [x for s in servers[:n] for x in ("--server", s.listen)]
            args += [x for s in servers[:n] for x in ("--server-pid", str(s.process.pid))]
            status, out, said = needles(*size, *args)
            self.assertEqual(status, 0, out + said)
            self.assertEqual(n > 0, re.search(r"answering +0\.0 of", out) is None, out)
            answers.append(logits(out))
        self.assertEqual(len(set(answers)), 1)
        self.assertEqual(needles(*["--server", "x"] * 9)[0], 2)
        self.assertEqual(needles(*["--server-pid", "1"] * 9)[0], 2)

    def test_another_seed_is_another_context(self):
        digests = set()
        for seed in ("1", "2"):
            status, out, said = needles("--tokens", "8192", "--seed", seed, "--decode", "70")
            self.assertEqual(status, 0, out + said)
            digests.add(logits(out))
        self.assertEqual(len(digests), 2)

    def test_one_group_finds_keys_but_follows_no_link(self):
        status, out, said = needles("--tokens", "16384", groups=1)
        self.assertEqual(status, 0, out + said)
        self.assertRegex(out, r"by name +3[12] of 32 right")
        self.assertLess(int(re.search(r"two hops +(\d+) of 16 right", out).group(1)), 8)

    def test_what_cannot_be_is_refused(self):
        for bad in (["--tokens", "x"], ["--tokens", "-5"], ["--keys", "129"], ["more"]):
            self.assertEqual(needles(*bad)[0], 2)
        for bad in (["--tokens", "640"], ["--links", "33"]):
            status, _, said = needles(*bad)
            self.assertEqual(status, 1)
            self.assertIn("INVALID", said)
        with open(os.path.join(self.server.folder, "broken"), "wb") as f:
            f.write((WEIGHTS / "gca-2.safetensors").read_bytes()[:-2])
        done = subprocess.run([PROGRAM, "--weights", f.name], capture_output=True, check=False)
        self.assertEqual(done.returncode, 1)
        self.assertIn(b"INVALID", done.stderr)


if __name__ == "__main__":
    unittest.main(verbosity=2)
