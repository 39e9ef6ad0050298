#!/usr/bin/env python3
"""A stop as probes see it: grpc.health.v1 and /readyz say the same before and while it drains.

Needs what grpc_api_test.py needs, and skips as it does.
"""

import os
import shutil
import signal
import sys
import threading
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import grpc_api_test as base  # noqa: E402  (exits with 77 where packages are missing)
import grpc  # noqa: E402
from admin_test import admin_uri, get  # noqa: E402
import exposition  # noqa: E402

pb, health = base.pb, base.health_pb
SERVING = health.HealthCheckResponse.SERVING
NOT_SERVING = health.HealthCheckResponse.NOT_SERVING
PART = 1  # values of 64 KiB
BLOCKS = 64


class Drain(base.Case):
    args = ("--admin-listen", "127.0.0.1:0", "--dram-bytes", "32MiB", "--drain", "30s")

    def fill(self):
        digests = self.digests(70, BLOCKS)
        for first in range(0, BLOCKS, 8):
            request = self.put_request(digests[first : first + 8], (PART,), None, first)
            self.assertEqual(set(self.store.PutBlocks(request).status), {pb.ITEM_OK})
        return digests

    def test_health_and_readiness_agree(self):
        uri = admin_uri(self.server)
        watch = self.health.Watch(health.HealthCheckRequest(), timeout=60)
        named = self.health.Watch(
            health.HealthCheckRequest(service="kvasir.v1.KvCache"), timeout=60
        )
        self.assertEqual((next(watch).status, next(named).status), (SERVING, SERVING))
        self.assertEqual(get(uri, "/readyz")[::2], (200, "ready\n"))
        asked = self.fill() * 16  # more than fits into what is buffered on the way
        stream = self.store.FetchBlocks(
            pb.FetchBlocksRequest(schema=self.schema, digests=b"".join(asked), parts=[PART])
        )
        n_values = len(next(stream).values)
        stopping = threading.Thread(target=self.server.stop, args=(signal.SIGTERM,))
        stopping.start()
        self.assertEqual((next(watch).status, next(named).status), (NOT_SERVING, NOT_SERVING))
        self.assertEqual(get(uri, "/readyz")[::2], (503, "draining\n"))
        self.assertEqual(get(uri, "/healthz")[0], 200)
        families = exposition.parse(get(uri, "/metrics")[2])
        self.assertEqual(families["kvasir_ready"].samples[("kvasir_ready", ())], 0)
        self.assertEqual(families["kvasir_streams_open"].samples[("kvasir_streams_open", ())], 1)
        puts = families["kvasir_request_duration_seconds"].samples
        key = ("kvasir_request_duration_seconds_count", (("method", "PutBlocks"),))
        self.assertEqual(puts[key], BLOCKS // 8)
        with self.assertRaises(grpc.RpcError) as caught:
            self.store.Describe(pb.DescribeRequest())
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
        try:  # where it is answered at all, it says the same
            self.assertEqual(self.health.Check(health.HealthCheckRequest()).status, NOT_SERVING)
        except grpc.RpcError as error:
            self.assertEqual(error.code(), grpc.StatusCode.UNAVAILABLE)
        for message in stream:
            n_values += len(message.values)
        self.assertEqual(n_values, len(asked))
        stopping.join()
        self.assertEqual(self.server.process.returncode, 0)


if __name__ == "__main__":
    try:
        unittest.main(verbosity=2)
    finally:
        shutil.rmtree(base.FOLDER, ignore_errors=True)
