#!/usr/bin/env python3
"""The admin port of a real cachesvc, as Prometheus and a probe see it, and --print-config.

Needs nothing but Python; with the package prometheus_client its parser reads the metrics too.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import unittest
import urllib.error
import urllib.request

sys.dont_write_bytecode = True
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "support"))

import exposition  # noqa: E402
from cachesvc_fixture import ROOT, Cachesvc  # noqa: E402


def admin_uri(server):
    return re.findall(r"metrics and probes at (http://\S+?)[\"\s]", server.log())[-1]


def get(uri, path, method="GET"):
    """Status, headers, body."""
    request = urllib.request.Request(uri + path, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, reply.headers, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def table_of_metrics():
    """{name: kind} of metrics.def."""
    with open(os.path.join(ROOT, "proto", "base", "metrics.def")) as stream:
        return dict(re.findall(r"^X\((\w+), KVC_METRIC_(\w+),", stream.read(), re.MULTILINE))


class Port(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Cachesvc(
            "--admin-listen", "127.0.0.1:0", "--dram-bytes", "4MiB",
            "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "64MiB",
        )
        cls.uri = admin_uri(cls.server)

    @classmethod
    def tearDownClass(cls):
        status = cls.server.close()
        assert status == 0, "cachesvc ended with %d" % status

    def metrics(self):
        status, headers, text = get(self.uri, "/metrics")
        self.assertEqual(status, 200)
        self.assertEqual(headers["Content-Type"], "text/plain; version=0.0.4; charset=utf-8")
        return exposition.parse(text)

    def test_metrics(self):
        families = self.metrics()
        for name, kind in table_of_metrics().items():
            full = "kvasir_%s%s" % (name, "_total" if kind == "COUNTER" else "")
            self.assertIn(full, families)
            self.assertEqual(families[full].type, kind.lower())
        sizes = families["kvasir_tier_capacity_bytes"].samples
        self.assertEqual(
            sizes,
            {
                ("kvasir_tier_capacity_bytes", (("tier", "dram"),)): 4 << 20,
                ("kvasir_tier_capacity_bytes", (("tier", "lmdb"),)): 64 << 20,
            },
        )
        self.assertEqual(families["kvasir_ready"].samples, {("kvasir_ready", ()): 1})
        latency = families["kvasir_request_duration_seconds"]
        methods = {dict(labels)["method"] for _, labels in latency.samples}
        with open(os.path.join(ROOT, "proto", "wire", "methods.def")) as stream:
            wanted = set(re.findall(r"^KVC_METHOD\(\w+, \w+, \"(\w+)\"", stream.read(), re.M))
        self.assertEqual(methods, wanted)
        for name in families:
            self.assertRegex(name, r"^(kvasir|process)_[a-z0-9_]+$")
        used = families["process_resident_memory_bytes"].samples
        self.assertGreater(used[("process_resident_memory_bytes", ())], 1 << 20)

    def test_counters_do_not_fall(self):
        before, after = self.metrics(), self.metrics()
        self.assertEqual(before.keys(), after.keys())
        for name, family in before.items():
            if family.type == "counter":
                for key, value in family.samples.items():
                    self.assertGreaterEqual(after[name].samples[key], value)

    def test_probes(self):
        self.assertEqual(get(self.uri, "/healthz")[::2], (200, "alive\n"))
        self.assertEqual(get(self.uri, "/readyz")[::2], (200, "ready\n"))
        self.assertEqual(get(self.uri, "/")[0], 404)

    def test_methods(self):
        status, headers, body = get(self.uri, "/metrics", "HEAD")
        self.assertEqual((status, body), (200, ""))
        self.assertGreater(int(headers["Content-Length"]), 1000)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "BREW"):
            status, headers, _ = get(self.uri, "/metrics", method)
            self.assertEqual((status, headers["Allow"]), (405, "GET, HEAD"), method)

    def test_one_connection_many_requests(self):
        host = self.uri[len("http://") :]
        connection = http.client.HTTPConnection(host, timeout=60)
        for _ in range(50):
            connection.request("GET", "/readyz")
            reply = connection.getresponse()
            self.assertEqual((reply.status, reply.read()), (200, b"ready\n"))
        connection.close()

    def test_garbage_leaves_it_standing(self):
        host, port = self.uri[len("http://") :].split(":")
        for garbage in (b"\0" * 4096, b"GET", b"GET /metrics HTTP/9.9\r\n\r\n", b"\r\n" * 9999):
            with socket.create_connection((host, int(port)), timeout=60) as plain:
                try:
                    plain.sendall(garbage)
                    plain.shutdown(socket.SHUT_WR)
                    while plain.recv(65536):
                        pass
                except OSError:
                    pass  # refused early, which is fine
        self.assertEqual(get(self.uri, "/healthz")[0], 200)

    def test_port_is_gone_after_a_stop(self):
        server = Cachesvc("--admin-listen", "localhost:0")
        uri = admin_uri(server)
        self.assertEqual(get(uri, "/readyz")[0], 200)
        self.assertEqual(server.stop(signal.SIGTERM), 0)
        with self.assertRaises(urllib.error.URLError):
            get(uri, "/healthz")
        server.close()


class Doctor(unittest.TestCase):
    """kvctl doctor --admin, against a real port and against one that says what we want."""

    def doctor(self, address):
        done = subprocess.run(
            [os.environ["KVASIR_KVCTL"], "--server", "grpc://127.0.0.1:1", "--timeout", "1s",
             "--json", "doctor", "--admin", address],
            capture_output=True, text=True, timeout=60, check=False,
        )
        findings = json.loads(done.stdout)["findings"]
        return [(f["level"], f["text"]) for f in findings if f["check"] == "admin"]

    def fake(self, answers):
        """The address of a server that gives these answers, one a connection."""
        listener = socket.create_server(("127.0.0.1", 0))

        def serve():
            for answer in answers:
                with listener.accept()[0] as peer:
                    peer.recv(4096)
                    peer.sendall(answer)
            listener.close()

        threading.Thread(target=serve, daemon=True).start()
        return "127.0.0.1:%d" % listener.getsockname()[1]

    def test_real(self):
        server = Cachesvc("--admin-listen", "127.0.0.1:0")
        address = admin_uri(server)[len("http://") :]
        levels, texts = zip(*self.doctor(address))
        self.assertEqual(levels, ("OK", "OK"))
        self.assertIn("ready", texts[0])
        server.stop()
        self.assertEqual([level for level, _ in self.doctor(address)], ["FAIL"])
        server.close()

    def test_what_it_may_say(self):
        fine = b"HTTP/1.0 200 OK\r\n\r\nready\n"
        drains = b"HTTP/1.1 503 Service Unavailable\r\n\r\ndraining\n"
        broken = b'HTTP/1.0 200 OK\r\n\r\nx 1\nkvasir_tier_failed{tier="dram"} 0\n'
        broken += b'kvasir_tier_failed{tier="lmdb"} 1\n'
        level, text = self.doctor(self.fake([drains, fine]))[0]
        self.assertEqual(level, "FAIL")
        self.assertIn("503, not ready: draining", text)
        levels, texts = zip(*self.doctor(self.fake([fine, broken])))
        self.assertEqual(levels, ("OK", "FAIL"))
        self.assertIn("lmdb", texts[1])
        for answer in (b"", b"\0" * 100, b"HTTP/1.", b"220 smtp\r\n\r\n"):
            self.assertEqual([f[0] for f in self.doctor(self.fake([answer]))], ["FAIL"])
        for address in (":1", "[]:1", "nonsense", "127.0.0.1:x"):
            self.assertEqual([f[0] for f in self.doctor(address)], ["FAIL"], address)


class Settings(unittest.TestCase):
    def run_it(self, *words, env=None):
        done = subprocess.run(
            [os.environ["KVASIR_CACHESVC"], *words], capture_output=True, text=True, timeout=60,
            env={**os.environ, **(env or {})}, check=False,
        )
        return done.returncode, done.stdout, done.stderr

    def test_bad_addresses(self):
        for address in ("7812", "example.org:7812", "127.0.0.1:65536", "[::1]", "http://[::1]:1"):
            code, _, error = self.run_it("--admin-listen", address)
            self.assertEqual(code, 2, address)
            self.assertIn("admin_listen is '%s'" % address, error)

    def test_taken_port(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = "127.0.0.1:%d" % taken.getsockname()[1]
            code, _, error = self.run_it("--admin-listen", address)
            self.assertEqual(code, 1)
            self.assertIn("cannot bind the admin port: Address already in use", error)

    def test_print_config_says_where_from_and_can_be_fed_back(self):
        server = Cachesvc()  # only for its folder
        path = os.path.join(server.folder, "first.yaml")
        with open(path, "w") as stream:
            stream.write('max_calls: 77\nlmdb_path: "/with # and \\" quote"\n')
        code, first, _ = self.run_it(
            "--config", path, "--drain", "3s", "--print-config", env={"KVASIR_DISK_THREADS": "5"}
        )
        self.assertEqual(code, 0)
        lines = first.splitlines()
        self.assertIn("max_calls: 77 # %s:1" % path, lines)
        self.assertIn('lmdb_path: "/with # and \\" quote" # %s:2' % path, lines)
        self.assertIn("drain: 3s # --drain", lines)
        self.assertIn("disk_threads: 5 # KVASIR_DISK_THREADS", lines)
        self.assertIn("dram_bytes: 1GiB # default", lines)
        again = os.path.join(server.folder, "again.yaml")
        with open(again, "w") as stream:
            stream.write(first)
        code, second, _ = self.run_it("--config", again, "--print-config")
        self.assertEqual(code, 0)
        values = [line.rsplit(" # ", 1)[0] for line in second.splitlines()]
        self.assertEqual(values, [line.rsplit(" # ", 1)[0] for line in lines])
        self.assertTrue(all(" # %s:" % again in line for line in second.splitlines()))
        server.close()


if __name__ == "__main__":
    unittest.main(verbosity=2)
