#!/usr/bin/env python3
"""Erase, Hold, Release and Prefetch from Python grpcio with generated stubs, against a real
cachesvc.

Needs what grpc_api_test.py needs, and skips as it does.
"""

import signal
import sys
import time
import unittest

sys.dont_write_bytecode = True

from grpc_api_test import BLOCK_TOKENS, CODES, Case, grpc, pb  # noqa: E402

CODES["NO_SPACE"] = (4, grpc.StatusCode.RESOURCE_EXHAUSTED)
VALUE = 1024 * BLOCK_TOKENS  # of part 1


class Keep(Case):
    """A dram of 1 MiB: 16 values of part 1; half of them may be held."""

    args = ("--dram-bytes", "1MiB", "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "256MiB")

    def put(self, digests, promise=None):
        for i, digest in enumerate(digests):
            request = self.put_request([digest], (1,), promise or pb.PROMISE_DURABLE, i)
            self.assertEqual(list(self.store.PutBlocks(request).status), [pb.ITEM_OK])

    def tiers(self, digests):
        ask = pb.MatchPrefixRequest(
            schema=self.schema, digests=b"".join(digests), parts=[1], want_tiers=True
        )
        return list(self.store.MatchPrefix(ask).tiers)

    def hold(self, **fields):
        return self.store.Hold(pb.HoldRequest(**fields))

    def release(self, hold):
        return self.store.Release(pb.ReleaseRequest(hold=hold))

    def prefetch(self, **fields):
        fields.setdefault("tier", pb.TIER_DRAM)
        return self.store.Prefetch(pb.PrefetchRequest(**fields))

    def erase(self, digests=(), **fields):
        if "context" not in fields:
            fields.setdefault("schema", self.schema)
        return self.store.Erase(pb.EraseRequest(digests=b"".join(digests), **fields))

    def test_hold(self):
        digests = self.digests(50, 8)
        self.put(digests)
        context = self.open(digests).context
        held = self.hold(context=context, ttl_ms=70000)
        self.assertNotEqual(held.hold, 0)
        self.assertEqual((held.n_blocks, held.ttl_ms), (8, 70000))
        self.assertEqual((held.tenant_bytes, held.max_bytes), (8 * VALUE, 8 * VALUE))
        self.assertEqual(self.hold(hold=held.hold, ttl_ms=65000).ttl_ms, 65000)
        more = self.digests(51, 1)
        self.put(more)
        other = self.open(more).context
        self.fails("NO_SPACE", lambda: self.hold(context=other), "max_hold_bytes", str(8 * VALUE))
        self.release(held.hold)
        self.fails("NOT_FOUND", lambda: self.release(held.hold), "hold")
        self.fails("NOT_FOUND", lambda: self.hold(hold=held.hold), "hold")
        self.fails("INVALID", lambda: self.hold(hold=1, context=context), "either")
        self.fails("STALE_HANDLE", lambda: self.hold(), "open it again")
        self.fails("STALE_HANDLE", lambda: self.hold(context=context ^ (1 << 63)), "open it again")
        short = self.hold(context=other, ttl_ms=1)
        deadline = time.time() + 60
        while time.time() < deadline:
            try:
                self.hold(hold=short.hold, ttl_ms=1)
                time.sleep(0.4)
            except grpc.RpcError:
                break
        self.fails("NOT_FOUND", lambda: self.release(short.hold), "hold")
        self.serves()

    def test_erase_survives_kill(self):
        digests = self.digests(52, 6)
        self.put(digests)
        context = self.open(digests[:2]).context
        gone = self.erase(context=context)
        self.assertEqual((gone.values, gone.bytes), (2, 2 * VALUE))
        self.assertEqual(self.erase(context=context).values, 0)
        self.assertEqual(self.erase(digests[2:4], parts=[0]).values, 0)
        self.assertEqual(self.erase(digests[2:4], parts=[1]).values, 2)
        self.server.stop(signal.SIGKILL)
        self.server.start()
        self.channel.close()
        self.connect()
        for digest in digests[:4]:
            self.assertEqual(self.tiers([digest]), [])
        self.assertEqual(self.tiers(digests[4:]), [pb.TIER_LMDB] * 2)

    def test_erase_bad_input(self):
        digests = self.digests(53, 2)
        self.put(digests)
        self.fails("NOT_FOUND", lambda: self.erase(digests, schema=bytes(32)), "schema")
        self.fails("INVALID", lambda: self.erase(digests, schema=bytes(31)), "32")
        self.fails("INVALID", lambda: self.erase([bytes(33)]), "32")
        self.fails("INVALID", lambda: self.erase(digests, parts=[9]), "part 9")
        self.fails("INVALID", lambda: self.erase(digests, parts=[1, 1]), "twice")
        both = pb.EraseRequest(schema=self.schema, digests=bytes(32), context=5)
        self.fails("INVALID", lambda: self.store.Erase(both), "either")
        self.fails("STALE_HANDLE", lambda: self.erase(context=99), "open it again")
        many = bytes(32 * 16385)
        self.fails("INVALID", lambda: self.erase([many]), "max_digests")
        self.assertEqual(self.erase([]).values, 0)
        self.assertEqual(len(self.tiers(digests)), 2)
        self.serves()

    def test_prefetch(self):
        digests = self.digests(54, 40)
        self.put(digests)
        context = self.open(digests + [bytes(32)]).context
        before = self.tiers(digests)
        reply = self.prefetch(context=context, parts=[1], first_block=2, n_blocks=6)
        there = before[2:8].count(pb.TIER_DRAM)
        self.assertEqual((reply.there, reply.moved), (there, 6 - there))
        self.assertEqual(reply.moved_bytes, reply.moved * VALUE)
        self.assertEqual(self.tiers(digests)[2:8], [pb.TIER_DRAM] * 6)
        reply = self.prefetch(context=context, parts=[1])
        self.assertEqual(reply.missing, 1)
        self.assertEqual(reply.there + reply.moved + reply.left, 40)
        self.assertLessEqual(reply.moved, 8)
        with self.assertRaises(grpc.RpcError) as caught:
            self.store.Prefetch(
                pb.PrefetchRequest(context=context, parts=[1], tier=pb.TIER_DRAM), timeout=-1
            )
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)
        self.assertEqual(len(self.tiers(digests)), 40)

    def test_prefetch_bad_input(self):
        context = self.open(self.digests(55, 3)).context
        self.fails("INVALID", lambda: self.prefetch(context=context, first_block=4), "there are 3")
        self.fails(
            "INVALID",
            lambda: self.prefetch(context=context, first_block=2, n_blocks=2),
            "there are 3",
        )
        self.fails("INVALID", lambda: self.prefetch(context=context, parts=[9]), "part 9")
        self.fails("INVALID", lambda: self.prefetch(context=context, tier=0), "tier")
        self.fails("INVALID", lambda: self.prefetch(context=context, tier=9), "tier")
        self.fails("UNSUPPORTED", lambda: self.prefetch(context=context, tier=pb.TIER_GPU), "DRAM")
        self.fails("STALE_HANDLE", lambda: self.prefetch(context=1), "open it again")
        self.serves()


if __name__ == "__main__":
    unittest.main(verbosity=2)
