#!/usr/bin/env python3
"""The calls whose replies stream, from Python grpcio against a real cachesvc: every byte,
back-pressure, cancellation, a stop in the middle, and the right status for each kind of bad input.

Needs what grpc_api_test.py needs, and shares its server, schema and checks.
"""

import os
import shutil
import signal
import sys
import threading
import time
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import grpc_api_test as base  # noqa: E402  (exits with 77 where packages are missing)
import grpc  # noqa: E402

pb = base.pb
MIB = 1 << 20
PART = 1  # rows of 1 KiB, values of 64 KiB
BLOCKS = 80


class Case(base.Case):
    def fill(self, salt, n, parts=(0, PART, 7)):
        digests = self.digests(salt, n)
        for first in range(0, n, 8):
            request = self.put_request(digests[first : first + 8], parts, None, first)
            self.assertEqual(set(self.store.PutBlocks(request).status), {pb.ITEM_OK})
        return digests

    def counter(self, name):
        stats = self.store.Stats(pb.StatsRequest())
        return {c.name: c.value for c in stats.counters}[name]

    def settles(self, name, want):
        end = time.monotonic() + 60
        while self.counter(name) != want and time.monotonic() < end:
            time.sleep(0.01)
        self.assertEqual(self.counter(name), want)

    def resident_mib(self):
        with open("/proc/%d/status" % self.server.process.pid) as stream:
            for line in stream:
                if line.startswith("VmRSS"):
                    return int(line.split()[1]) / 1024


class Rows(Case):
    def test_rows_of_a_whole_context(self):
        digests = self.fill(1, BLOCKS)
        context = self.open(digests).context
        tokens = BLOCKS * base.BLOCK_TOKENS
        picks = [t * 7919 % tokens for t in range(tokens)]
        groups = [
            pb.RowGroup(context=context, part=PART, picks=picks),
            pb.RowGroup(context=context, part=0, picks=[tokens + 5, 3, 0xFFFFFFFF]),
        ]
        messages = list(self.store.FetchRowsStream(pb.FetchRowsStreamRequest(groups=groups)))
        self.assertTrue(all(len(m.data) <= MIB for m in messages))
        self.assertGreaterEqual(len(messages), 5)
        self.assertEqual(sum(m.n_picks for m in messages), tokens + 3)
        missing = [(m.index, m.status) for message in messages for m in message.missing]
        absent = pb.ITEM_NOT_FOUND
        self.assertEqual(missing, [(tokens, absent), (tokens + 2, absent)])
        data = b"".join(m.data for m in messages)
        self.assertEqual(data, b"".join(base.row(PART, t) for t in picks) + base.row(0, 3))
        self.assertEqual(sum(m.rows_dram + m.rows_lmdb for m in messages), tokens + 1)

    def test_empty(self):
        self.assertEqual(list(self.store.FetchRowsStream(pb.FetchRowsStreamRequest())), [])

    def test_bad_input(self):
        context = self.open(self.fill(2, 1)).context

        def call(**group):
            request = pb.FetchRowsStreamRequest(groups=[pb.RowGroup(**group)])
            return lambda **options: list(self.store.FetchRowsStream(request, **options))

        self.fails("STALE_HANDLE", call(context=context ^ 1 << 50, picks=[1]), "open it again")
        self.fails("INVALID", call(context=context, part=9, picks=[1]), "part 9")
        self.fails("INVALID", call(context=context, picks=[0] * 65537), "max_picks")
        many = pb.FetchRowsStreamRequest(groups=[pb.RowGroup(context=context)] * 1025)
        self.fails("INVALID", lambda: list(self.store.FetchRowsStream(many)), "max_groups")
        raw = self.channel.unary_stream("/kvasir.v1.KvCache/FetchRowsStream")
        self.fails("PROTOCOL", lambda: list(raw(b"\x0a\x05\x01")))
        self.server.pause()
        try:
            with self.assertRaises(grpc.RpcError) as caught:
                call(context=context, picks=[1])(timeout=0.2)
        finally:
            self.server.resume()
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.serves()


class Blocks(Case):
    def request(self, digests, **options):
        return pb.FetchBlocksRequest(schema=self.schema, digests=b"".join(digests), **options)

    def test_values_of_blocks(self):
        digests = self.fill(3, 30, (0, PART))
        asked = digests[:20] + self.digests(4, 2) + digests[20:]
        messages = list(self.store.FetchBlocks(self.request(asked, parts=[PART, 0])))
        self.assertTrue(all(len(m.data) <= MIB for m in messages))
        values = [value for m in messages for value in m.values]
        order = [(b, p) for b in range(len(asked)) for p in (PART, 0)]
        self.assertEqual([(v.block, v.part) for v in values], order)
        data, want = b"".join(m.data for m in messages), []
        for value in values:
            if value.block in (20, 21):
                self.assertEqual((value.status, value.len_bytes), (pb.ITEM_NOT_FOUND, 0))
                continue
            self.assertEqual(value.status, pb.ITEM_OK)
            self.assertIn(value.tier, (pb.TIER_DRAM, pb.TIER_LMDB))
            want.append(self.value(value.part, value.block - 2 * (value.block > 21)))
            self.assertEqual(value.len_bytes, len(want[-1]))
        self.assertEqual(data, b"".join(want))
        every = [v.part for m in self.store.FetchBlocks(self.request(asked[:1])) for v in m.values]
        self.assertEqual(every, [0, PART, 7])

    def test_bad_input(self):
        digests = self.digests(5, 1)

        def call(request):
            return lambda: list(self.store.FetchBlocks(request))

        self.fails("INVALID", call(self.request(digests, parts=[2])), "part 2")
        self.fails("INVALID", call(self.request([b"short"])), "32 bytes")
        self.fails("INVALID", call(self.request([bytes(32)] * 16385)), "max_digests")
        self.fails("INVALID", call(pb.FetchBlocksRequest(schema=b"x")), "32 bytes")
        self.fails("NOT_FOUND", call(pb.FetchBlocksRequest(schema=bytes(32))), "not registered")
        self.serves()


class Flow(Case):
    def slow(self, digests):
        """A stream of 16,384 values of 64 KiB, 1 GiB in all."""
        asked = (digests * (16384 // len(digests)))[:16384]
        request = pb.FetchBlocksRequest(
            schema=self.schema, digests=b"".join(asked), parts=[PART]
        )
        return self.store.FetchBlocks(request)

    def test_slow_reader_costs_little(self):
        digests = self.fill(6, 16)
        before, begun = self.resident_mib(), self.counter("stream_messages")
        streams = [self.slow(digests) for _ in range(8)]
        for stream in streams:
            next(stream)
        last, sent, still = 0, -1, 0
        end = time.monotonic() + 60
        while still < 3 and time.monotonic() < end:
            time.sleep(0.3)
            last, sent = sent, self.counter("stream_messages")
            still = still + 1 if sent == last else 0
        self.assertEqual(still, 3)  # they stand still
        self.assertLess(sent - begun, 8 * 100)  # of 8 * 1,024
        grown = self.resident_mib() - before
        self.assertTrue("KVASIR_SANITIZED" in os.environ or grown < 64)
        self.assertEqual(self.counter("streams_open"), 8)
        for stream in streams:
            stream.cancel()
        self.settles("streams_open", 0)
        self.settles("requests_in_flight", 1)  # the one that asks
        self.serves()

    def test_deadline(self):
        digests = self.fill(7, 16)
        asked = (digests * 1024)[:16384]
        request = pb.FetchBlocksRequest(
            schema=self.schema, digests=b"".join(asked), parts=[PART]
        )
        for seconds in (2, 8, 32):  # a busy machine may need more for the first message
            stream = self.store.FetchBlocks(request, timeout=seconds)
            try:
                next(stream)
                break
            except grpc.RpcError as error:
                self.assertEqual(error.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        time.sleep(seconds + 0.2)
        with self.assertRaises(grpc.RpcError) as caught:
            list(stream)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.settles("streams_open", 0)


class Stop(Case):
    def test_a_stream_in_flight_is_finished(self):
        digests = self.fill(8, 64)
        asked = digests * 16
        stream = self.store.FetchBlocks(
            pb.FetchBlocksRequest(schema=self.schema, digests=b"".join(asked), parts=[PART])
        )
        values = [value for value in next(stream).values]
        stopping = threading.Thread(target=self.server.stop, args=(signal.SIGTERM,))
        stopping.start()
        with self.assertRaises(grpc.RpcError) as caught:
            for _ in range(6000):  # until it has heard of it
                self.store.Describe(pb.DescribeRequest())
                time.sleep(0.01)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNAVAILABLE)
        for message in stream:
            values += message.values
        self.assertEqual(len(values), len(asked))
        self.assertEqual({value.status for value in values}, {pb.ITEM_OK})
        stopping.join()
        self.assertEqual(self.server.process.returncode, 0)


if __name__ == "__main__":
    try:
        unittest.main(verbosity=2)
    finally:
        shutil.rmtree(base.FOLDER, ignore_errors=True)
