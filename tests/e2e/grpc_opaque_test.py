#!/usr/bin/env python3
"""Opaque values from Python grpcio against a real cachesvc, by generated stubs alone: the digest of
a schema and of a key, pieces by PutBlocks and PutBlocksStream, FetchBlocks, MatchPrefix, Hold with
a TTL, Erase, and the right status for each bad input.

Needs what grpc_api_test.py needs, and shares its server and checks; XXH3 comes from libxxhash.
"""

import ctypes
import ctypes.util
import hashlib
import os
import random
import shutil
import sys
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import grpc_api_test as base  # noqa: E402  (exits with 77 where packages are missing)
import grpc  # noqa: E402
import grpc_put_stream_test as streams  # noqa: E402

pb = base.pb
PIECE = 1 << 20
LENGTHS = (0, 1, 4032, 4033, PIECE - 1, PIECE, PIECE + 1, 5557453)

libxxhash = ctypes.CDLL(ctypes.util.find_library("xxhash") or "libxxhash.so.0")
libxxhash.XXH3_64bits.restype = ctypes.c_uint64
libxxhash.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]


def xxh3(data):
    return libxxhash.XXH3_64bits(data, len(data)) or 1


def schema_digest(schema):
    lines = {
        "model": schema.model,
        "opaque": "1",
        "recipe": schema.recipe,
        "revision": schema.revision,
        "tp_size": str(schema.tp_size),
    }
    text = "".join("%s=%s\n" % (key, lines[key]) for key in sorted(lines))
    return hashlib.sha256(text.encode()).digest()


def content(seed, length):
    return random.Random(seed * 7919 + length).randbytes(length)


class Case(base.Case):
    args = ("--dram-bytes", "64MiB") + base.Case.args[2:]

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        schema = pb.Schema(model="m/7b", revision="r", recipe="lmcache", tp_size=2, opaque=True)
        cls.opaque = cls.store.RegisterSchema(pb.RegisterSchemaRequest(schema=schema)).digest
        assert cls.opaque == schema_digest(schema)
        assert cls.store.GetSchema(pb.GetSchemaRequest(schema=cls.opaque)).schema == schema

    def key(self, text):
        return hashlib.sha256(self.opaque + text.encode()).digest()

    def pieces(self, value):
        return [value[at : at + PIECE] for at in range(0, len(value), PIECE)] or [b""]

    def header(self, key, value, piece, total, number, sum_=None):
        return pb.PutValue(
            digest=self.key(key),
            part=number,
            len_bytes=len(piece),
            total_bytes=total,
            sum=xxh3(value) if sum_ is None else sum_,
        )

    def request(self, headers, data, schema=None):
        return pb.PutBlocksRequest(
            schema=schema or self.opaque, promise=pb.PROMISE_MEMORY, values=headers, data=data
        )

    def put(self, key, value):
        out = []
        for number, piece in enumerate(self.pieces(value)):
            header = self.header(key, value, piece, len(value), number)
            out += self.store.PutBlocks(self.request([header], piece)).status
        return out

    def get(self, *keys):
        """The values, None for one that is not there; asserts what the protocol promises."""
        digests = b"".join(self.key(key) for key in keys)
        out = [None] * len(keys)
        wholes, gone = [None] * len(keys), set()
        for message in self.store.FetchBlocks(
            pb.FetchBlocksRequest(schema=self.opaque, digests=digests)
        ):
            self.assertLessEqual(len(message.data), PIECE)
            at = 0
            for v in message.values:
                if v.status != pb.ITEM_OK:
                    gone.add(v.block)
                    continue
                self.assertNotIn(v.block, gone)
                if v.part == 0:
                    out[v.block], wholes[v.block] = b"", (v.total_bytes, v.sum)
                self.assertEqual(wholes[v.block], (v.total_bytes, v.sum))
                out[v.block] += message.data[at : at + v.len_bytes]
                at += v.len_bytes
            self.assertEqual(at, len(message.data))
        for i, value in enumerate(out):
            if i in gone:
                out[i] = None
            else:
                self.assertEqual((len(value), xxh3(value)), wholes[i])
        return out

    def match(self, *keys):
        return list(
            self.store.MatchPrefix(
                pb.MatchPrefixRequest(
                    schema=self.opaque,
                    digests=b"".join(self.key(key) for key in keys),
                    want_each=True,
                )
            ).tiers
        )


class Values(Case):
    def test_every_length(self):
        names = ["n%d" % length for length in LENGTHS]
        self.assertEqual(self.match(*names), [0] * len(names))
        self.assertEqual(self.get(*names), [None] * len(names))
        for name, length in zip(names, LENGTHS):
            self.assertEqual(set(self.put(name, content(1, length))), {pb.ITEM_OK})
        self.assertEqual(self.match(*names), [pb.TIER_DRAM] * len(names))
        self.assertEqual(self.get(*names), [content(1, length) for length in LENGTHS])
        for name, length in zip(names, LENGTHS):
            self.assertEqual(set(self.put(name, content(2, length + 1))), {pb.ITEM_EXISTS})
        self.assertEqual(self.get(*names), [content(1, length) for length in LENGTHS])

    def test_server_computes_the_sum_of_one_piece(self):
        value = content(3, 5000)
        header = self.header("sum", value, value, len(value), 0, sum_=0)
        reply = self.store.PutBlocks(self.request([header], value))
        self.assertEqual(list(reply.status), [pb.ITEM_OK])
        self.assertEqual(self.get("sum"), [value])
        header = self.header("sum2", value, value, len(value), 0, sum_=77)
        reply = self.store.PutBlocks(self.request([header], value))
        self.assertEqual(list(reply.status), [pb.ITEM_INVALID])
        self.assertEqual(self.get("sum2"), [None])

    def test_streams(self):
        values = {"s%d" % n: content(4, n) for n in (0, 9, 3 * PIECE + 5)}
        stream = streams.Stream(self.store)
        offers, bodies = [], []
        for key, value in values.items():
            for number, piece in enumerate(self.pieces(value)):
                bodies.append(piece)
                offers.append(
                    pb.PutOffer(
                        schema=self.opaque,
                        digest=self.key(key),
                        part=number,
                        len_bytes=len(piece),
                        promise=pb.PROMISE_MEMORY,
                        ttl_ms=60000,
                        total_bytes=len(value),
                        sum=xxh3(value),
                    )
                )
        stream.send(offers)
        last = {}
        for answer in stream.answers():
            if answer.send:
                stream.send(value=answer.value, data=bodies[answer.value])
                continue
            last[answer.value] = answer
            if len(last) == len(offers):
                stream.end()
        self.assertEqual({a.status for a in last.values()}, {pb.ITEM_OK})
        self.assertTrue(all(a.ttl_ms > 0 for a in last.values()))
        self.assertEqual(self.get(*values), list(values.values()))

    def test_hold_prefetch_erase(self):
        self.put("kept", content(5, PIECE + 3))
        hold = self.store.Hold(
            pb.HoldRequest(schema=self.opaque, digests=self.key("kept"), ttl_ms=60000)
        )
        self.assertGreater(hold.tenant_bytes, PIECE)
        loaded = self.store.Prefetch(
            pb.PrefetchRequest(schema=self.opaque, digests=self.key("kept"), tier=pb.TIER_DRAM)
        )
        self.assertEqual((loaded.there, loaded.missing), (2, 0))
        self.store.Release(pb.ReleaseRequest(hold=hold.hold))
        erased = self.store.Erase(pb.EraseRequest(schema=self.opaque, digests=self.key("kept")))
        self.assertEqual(erased.values, 2)
        self.assertEqual((self.get("kept"), self.match("kept")), ([None], [0]))

    def test_bad_input(self):
        value = content(6, 10)

        def put(total, number, length=10, sum_=1, data=None):
            header = pb.PutValue(
                digest=self.key("bad"), part=number, len_bytes=length, total_bytes=total, sum=sum_
            )
            return lambda: self.store.PutBlocks(
                self.request([header], value if data is None else data)
            )

        self.fails("INVALID", put(10, 1), "part")
        self.fails("INVALID", put(11, 0), "len_bytes")
        self.fails("INVALID", put(PIECE + 10, 1, sum_=0), "sum")
        self.fails("INVALID", put(2048 * PIECE + 1, 0), "pieces")
        self.fails("INVALID", put(10, 0, data=b""), "payload")
        digests = self.key("bad")
        self.fails(
            "INVALID",
            lambda: self.store.OpenContext(
                pb.OpenContextRequest(schema=self.opaque, digests=digests)
            ),
            "opaque",
        )
        for request, call in (
            (pb.MatchPrefixRequest, self.store.MatchPrefix),
            (pb.EraseRequest, self.store.Erase),
            (pb.FetchBlocksRequest, lambda r: list(self.store.FetchBlocks(r))),
        ):
            asked = request(schema=self.opaque, digests=digests, parts=[0])
            self.fails("INVALID", lambda: call(asked), "opaque")
        self.fails(
            "INVALID",
            lambda: self.store.MatchPrefix(
                pb.MatchPrefixRequest(schema=self.schema, digests=digests, want_each=True)
            ),
            "want_each",
        )
        for change in (dict(block_tokens=64), dict(parts=[base.kv_part(0, 64)])):
            schema = pb.Schema(model="m", recipe="r", tp_size=1, opaque=True, **change)
            self.fails(
                "INVALID",
                lambda: self.store.RegisterSchema(pb.RegisterSchemaRequest(schema=schema)),
                "opaque",
            )
        self.assertEqual(self.get("bad"), [None])


class SmallDram(base.Case):
    def test_is_told(self):
        schema = pb.Schema(model="m", recipe="r", tp_size=1, opaque=True)
        with self.assertRaises(grpc.RpcError) as caught:
            self.store.RegisterSchema(pb.RegisterSchemaRequest(schema=schema))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        self.assertIn("dram_bytes", caught.exception.details())


if __name__ == "__main__":
    try:
        unittest.main(verbosity=2)
    finally:
        shutil.rmtree(base.FOLDER, ignore_errors=True)
