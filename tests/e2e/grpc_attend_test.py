#!/usr/bin/env python3
"""AttendRows from Python grpcio with generated stubs, against a real cachesvc: one step of
grouped-query attention by hand, partials that merge, rows that are missing, and bad input.

Needs what grpc_api_test.py needs; exit status 77 where it is missing.
"""

import hashlib
import math
import os
import random
import struct
import sys
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from grpc_api_test import Cachesvc, grpc, pb, rpc  # noqa: E402  (77 where packages are missing)

BLOCK_TOKENS = 64
Q_HEADS, KV_HEADS, DIM = 4, 2, 16
ROW_FLOATS = 2 * KV_HEADS * DIM
THETA = 10000.0


def schema():
    side = 4 * KV_HEADS * DIM
    part = pb.Part(
        part=3,
        kind=pb.PART_KIND_KV,
        dtype=pb.DTYPE_F32,
        kv_head_count=KV_HEADS,
        row_bytes=2 * side,
        k_len_bytes=side,
        v_off_bytes=side,
        v_len_bytes=side,
        q_dim=DIM,
        v_dim=DIM,
        rope=pb.Rope(type=pb.ROPE_TYPE_PLAIN, theta=THETA),
    )
    latent = pb.Part(
        part=4,
        kind=pb.PART_KIND_LATENT,
        dtype=pb.DTYPE_BF16,
        row_bytes=64,
        rope=pb.Rope(type=pb.ROPE_TYPE_NONE),
    )
    return pb.Schema(
        model="attend", recipe="full", tp_size=1, block_tokens=BLOCK_TOKENS, parts=[part, latent]
    )


def row(token):
    numbers = random.Random(token)
    return [numbers.uniform(-1, 1) for _ in range(ROW_FLOATS)]


def rotated(x, position):
    half, out = DIM // 2, [0.0] * DIM
    for i in range(half):
        angle = position * THETA ** (-2.0 * i / DIM)
        c, s = math.cos(angle), math.sin(angle)
        out[i] = x[i] * c - x[half + i] * s
        out[half + i] = x[half + i] * c + x[i] * s
    return out


def attention(q, tokens, ranks=None):
    """[(o, lse)] of each query head over the rows of tokens, in double."""
    out = []
    for head in range(Q_HEADS):
        kv = head // (Q_HEADS // KV_HEADS)
        logits, values = [], []
        for i, token in enumerate(tokens):
            numbers = row(token)
            key = numbers[kv * DIM : (kv + 1) * DIM]
            if ranks:
                key = rotated(key, ranks[i])
            dot = sum(a * b for a, b in zip(q[head * DIM : (head + 1) * DIM], key))
            logits.append(dot / math.sqrt(DIM))
            values.append(numbers[(KV_HEADS + kv) * DIM : (KV_HEADS + kv + 1) * DIM])
        top = max(logits)
        weights = [math.exp(x - top) for x in logits]
        o = [sum(w * v[t] for w, v in zip(weights, values)) / sum(weights) for t in range(DIM)]
        out.append((o, top + math.log(sum(weights))))
    return out


def parse(data, groups=1):
    size = 4 * (Q_HEADS * DIM + Q_HEADS)
    assert len(data) == groups * size
    results = []
    for g in range(groups):
        numbers = struct.unpack("<%df" % (size // 4), data[g * size : (g + 1) * size])
        results.append(
            [(list(numbers[h * DIM : (h + 1) * DIM]), numbers[Q_HEADS * DIM + h])
             for h in range(Q_HEADS)]
        )
    return results


def merge(a, b):
    merged = []
    for (o1, l1), (o2, l2) in zip(a, b):
        m = max(l1, l2)
        w1, w2 = math.exp(l1 - m), math.exp(l2 - m)
        o = [(w1 * x + w2 * y) / (w1 + w2) for x, y in zip(o1, o2)]
        merged.append((o, m + math.log(w1 + w2)))
    return merged


class Attend(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.server = Cachesvc("--dram-bytes", "16MiB")
        cls.channel = grpc.insecure_channel(cls.server.address)
        cls.stub = rpc.KvCacheStub(cls.channel)
        cls.schema = cls.stub.RegisterSchema(pb.RegisterSchemaRequest(schema=schema())).digest
        cls.digests = [hashlib.sha256(b"block %d" % i).digest() for i in range(4)]
        for i in range(3):  # the fourth is never there
            data = b"".join(
                struct.pack("<%df" % ROW_FLOATS, *row(i * BLOCK_TOKENS + t))
                for t in range(BLOCK_TOKENS)
            )
            value = pb.PutValue(digest=cls.digests[i], part=3, len_bytes=len(data))
            reply = cls.stub.PutBlocks(
                pb.PutBlocksRequest(
                    schema=cls.schema, promise=pb.PROMISE_MEMORY, values=[value], data=data
                )
            )
            assert list(reply.status) == [pb.ITEM_OK]
        cls.context = cls.stub.OpenContext(
            pb.OpenContextRequest(schema=cls.schema, digests=b"".join(cls.digests))
        ).context
        numbers = random.Random(99)
        cls.q = [numbers.uniform(-1, 1) for _ in range(Q_HEADS * DIM)]

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        assert cls.server.close() == 0

    def group(self, picks, ranks=(), part=3, **fields):
        rows = pb.RowGroup(context=self.context, part=part, picks=picks)
        given = dict(
            rows=rows, n_q=1, n_q_heads=Q_HEADS, q_dtype=pb.DTYPE_F32, o_dtype=pb.DTYPE_F32
        )
        given.update(fields)
        return pb.AttendGroup(ranks=ranks, **given)

    def call(self, *groups, data=None):
        if data is None:
            data = struct.pack("<%df" % len(self.q), *self.q)
        return self.stub.AttendRows(pb.AttendRowsRequest(groups=groups, data=data), timeout=60)

    def equal(self, got, want):
        for (o, lse), (o_want, lse_want) in zip(got, want):
            self.assertAlmostEqual(lse, lse_want, delta=1e-5)
            for x, y in zip(o, o_want):
                self.assertAlmostEqual(x, y, delta=1e-5)

    def refused(self, code, word, *groups, data=None):
        with self.assertRaises(grpc.RpcError) as caught:
            self.call(*groups, data=data)
        self.assertEqual(caught.exception.code(), code)
        self.assertIn(word, caught.exception.details())

    def test_equals_attention_by_hand(self):
        picks = [5, 0, 77, 130, 5, 191]
        reply = self.call(self.group(picks))
        self.assertEqual((reply.rows_dram, len(reply.missing)), (6, 0))
        self.equal(parse(reply.data)[0], attention(self.q, picks))
        ranks = [0, 1, 2, 300, 4, 5]
        reply = self.call(self.group(picks, ranks))
        self.equal(parse(reply.data)[0], attention(self.q, picks, ranks))

    def test_partials_merge(self):
        picks = list(range(0, 190, 7))
        reply = self.call(self.group(picks[:5]), self.group(picks[5:], same_q=True))
        first, second = parse(reply.data, 2)
        self.equal(merge(first, second), attention(self.q, picks))

    def test_missing_rows_are_listed(self):
        picks = [1, 3 * BLOCK_TOKENS, 2, 10**6]
        reply = self.call(self.group(picks))
        self.assertEqual(
            [(row.index, row.status) for row in reply.missing],
            [(1, pb.ITEM_NOT_FOUND), (3, pb.ITEM_NOT_FOUND)],
        )
        self.equal(parse(reply.data)[0], attention(self.q, [1, 2]))
        reply = self.call(self.group([10**6]))
        self.assertEqual(
            parse(reply.data)[0], [([0.0] * DIM, -math.inf) for _ in range(Q_HEADS)]
        )

    def test_half_floats(self):
        data = b"".join(struct.pack("<e", x) for x in self.q)
        q = list(struct.unpack("<%de" % len(self.q), data))
        group = self.group([1, 2, 3], q_dtype=pb.DTYPE_F16, o_dtype=pb.DTYPE_F16)
        reply = self.call(group, data=data)
        o = struct.unpack("<%de" % (Q_HEADS * DIM), reply.data[: 2 * Q_HEADS * DIM])
        for head, (want, _) in enumerate(attention(q, [1, 2, 3])):
            for x, y in zip(o[head * DIM : (head + 1) * DIM], want):
                self.assertAlmostEqual(x, y, delta=1e-3)

    def test_bad_input(self):
        invalid = grpc.StatusCode.INVALID_ARGUMENT
        self.refused(invalid, "the queries have", self.group([1]), data=b"1234")
        self.refused(invalid, "no group", data=b"")
        self.refused(invalid, "part 9", self.group([1], part=9))
        self.refused(invalid, "n_q must be", self.group([1], n_q=0))
        self.refused(invalid, "n_q_heads", self.group([1], n_q_heads=3))
        self.refused(invalid, "q_dtype", self.group([1], q_dtype=pb.DTYPE_I8))
        self.refused(invalid, "one rank for each pick", self.group([1, 2], [1]))
        self.refused(invalid, "first group", self.group([1], same_q=True))
        self.refused(grpc.StatusCode.UNIMPLEMENTED, "latent", self.group([1], part=4))
        self.context, right = self.context ^ 1, self.context
        self.refused(grpc.StatusCode.FAILED_PRECONDITION, "STALE_HANDLE", self.group([1]))
        self.context = right
        limits = self.stub.Describe(pb.DescribeRequest()).limits
        self.assertGreaterEqual(limits.max_attend_queries, 1)
        self.call(self.group([1]))


if __name__ == "__main__":
    unittest.main()
