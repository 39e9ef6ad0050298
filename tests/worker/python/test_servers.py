"""A worker over three cachesvc: the bits of one that keeps everything, reuse, names, closing."""

import tempfile
import unittest

import need

need.modules("numpy")
import numpy as np

import kvasir
from server import Server
from test_binding import GEOMETRY, SMALL, rows

N = 64 * 8 + 5
NAMES = ["east", "west", "north"]


class Servers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.uris = []
        for _ in NAMES:
            folder = tempfile.TemporaryDirectory()
            cls.addClassCleanup(folder.cleanup)
            server = Server(folder.name)
            cls.addClassCleanup(server.stop)
            cls.uris.append(server.start())

    def setUp(self):
        self.clients = [kvasir.Client(uri) for uri in self.uris]
        for client in self.clients:
            self.addCleanup(client.close)
        self.tokens = np.random.default_rng(5).integers(0, 1000, N)

    def worker(self, client, **options):
        return kvasir.Worker(
            GEOMETRY, "m", "tokenselect", client, index="exact", exact=1, **SMALL, **options
        )

    def run_once(self, worker):
        """Outputs of what was not reused, how much was, and what came from whom."""
        out, rng = {}, np.random.default_rng(6)
        data = [[rows(rng, N, heads) for heads in (6, 2, 2)] for _ in range(2)]
        with worker.sequence(self.tokens) as seq:
            reused = at = seq.n_reused
            while at < N:
                n = 64 if at + 64 <= N else 1
                seq.tokens(self.tokens[at : at + n])
                for layer in range(2):
                    q, k, v = (x[at : at + n] for x in data[layer])
                    out[at, layer] = seq.forward(layer, q, k, v)
                at += n
                if n == 64:
                    seq.flush(60)
            return out, reused, seq.server_stats(), seq.stats()

    def test_three_servers_give_the_bits_of_none(self):
        with self.worker(None) as worker:
            alone, _, servers, _ = self.run_once(worker)
        self.assertEqual(servers, [])
        with self.worker(self.clients, server_names=NAMES) as worker:
            cold, reused, servers, stats = self.run_once(worker)
        self.assertEqual(reused, 0)
        self.assertGreater(stats["misses"], 0)
        self.assertEqual([s["name"] for s in servers], NAMES)
        self.assertEqual(sum(s["blocks"] for s in servers), 8)
        self.assertEqual(sum(s["bytes"] for s in servers), stats["bytes_fetched"])
        turned = [self.clients[i] for i in (2, 0, 1)], [NAMES[i] for i in (2, 0, 1)]
        with self.worker(turned[0], server_names=turned[1]) as worker:
            warm, reused, _, _ = self.run_once(worker)
        self.assertEqual(reused, 64 * 8)
        for key, value in alone.items():
            np.testing.assert_array_equal(cold[key], value)
            if key in warm:
                np.testing.assert_array_equal(warm[key], value)

    def test_one_client_is_one_server(self):
        with self.worker(self.clients[0]) as worker, worker.sequence() as seq:
            self.assertEqual([s["name"] for s in seq.server_stats()], ["0"])

    def test_lists_have_rules(self):
        for client, names in (([], None), (self.clients, ["a", "a", "b"])):
            with self.assertRaises(kvasir.KvasirError) as caught:
                self.worker(client, server_names=names)
            self.assertEqual(caught.exception.status, kvasir.Status.INVALID)
        for client, names in ((self.clients, ["a"]), (self.clients[0], ["a"]), (None, [])):
            with self.assertRaises(ValueError):
                self.worker(client, server_names=names)

    def test_closing_any_client_closes_the_worker(self):
        for i in range(3):
            clients = [kvasir.Client(uri) for uri in self.uris]
            worker = self.worker(clients)
            seq = worker.sequence()
            clients[i].close()
            with self.assertRaises(kvasir.KvasirError) as caught:
                seq.stats()
            self.assertEqual(caught.exception.status, kvasir.Status.CLOSED)
            for client in clients:
                client.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
