#!/usr/bin/env python3
"""One story with every method of the service in it, told by a client with generated stubs and by
clients that know nothing but what reflection (v1, v1alpha) says: their messages and methods are
built from the server's own description. A method that the story does not have fails the test.

Needs what grpc_api_test needs.
"""

import math
import os
import struct
import sys
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import grpc_reflection_test as reflection  # noqa: E402  (77 where packages are missing)
from grpc_api_test import BLOCK_TOKENS, Case, Cachesvc, grpc, pb, rpc  # noqa: E402
from google.protobuf import descriptor_pb2, descriptor_pool  # noqa: E402

HEADS, DIM = 2, 16
ROW_BYTES = 2 * HEADS * DIM * 4
VALUE_BYTES = BLOCK_TOKENS * ROW_BYTES
SCHEMA = {
    "model": "story",
    "recipe": "full",
    "tp_size": 1,
    "block_tokens": BLOCK_TOKENS,
    "parts": [
        {
            "part": 3,
            "kind": "PART_KIND_KV",
            "dtype": "DTYPE_F32",
            "kv_head_count": HEADS,
            "row_bytes": ROW_BYTES,
            "k_len_bytes": ROW_BYTES // 2,
            "v_off_bytes": ROW_BYTES // 2,
            "v_len_bytes": ROW_BYTES // 2,
            "q_dim": DIM,
            "v_dim": DIM,
            "rope": {"type": "ROPE_TYPE_NONE"},
        }
    ],
}


def row(token):
    floats = [math.sin(token + 0.1 * i) for i in range(ROW_BYTES // 4)]
    return struct.pack("<%df" % len(floats), *floats)


def value(block):
    return b"".join(row(block * BLOCK_TOKENS + t) for t in range(BLOCK_TOKENS))


class Stubs:
    """A client with the stubs that protoc generated."""

    def __init__(self, channel):
        self.store = rpc.KvCacheStub(channel)
        service = pb.DESCRIPTOR.services_by_name["KvCache"]
        self.methods = {m.name for m in service.methods}

    def message(self, kind, **fields):
        return getattr(pb, kind)(**fields)

    def call(self, method, request):
        return getattr(self.store, method)(request, timeout=60)


class Reflected:
    """A client that asks the server for its files and builds the rest from them."""

    def __init__(self, channel, version):
        self.channel, self.pool = channel, descriptor_pool.DescriptorPool()
        ask = channel.stream_stream(
            "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo" % version,
            request_serializer=reflection.Request.SerializeToString,
            response_deserializer=reflection.Response.FromString,
        )
        question = reflection.Request(file_containing_symbol="kvasir.v1.KvCache")
        (answer,) = ask(iter([question]), timeout=60)
        for data in answer.file_descriptor_response.file_descriptor_proto:
            self.pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
        self.service = self.pool.FindServiceByName("kvasir.v1.KvCache")
        self.methods = {m.name for m in self.service.methods}
        proto = descriptor_pb2.ServiceDescriptorProto()
        self.service.CopyToProto(proto)
        self.streams = {m.name: (m.client_streaming, m.server_streaming) for m in proto.method}

    def message(self, kind, **fields):
        return reflection.message_class(self.pool, "kvasir.v1." + kind)(**fields)

    def call(self, method, request):
        kinds = {(False, False): "unary_unary", (False, True): "unary_stream",
                 (True, True): "stream_stream"}
        info = self.service.FindMethodByName(method)
        reply = reflection.message_class(self.pool, info.output_type.full_name)
        make = getattr(self.channel, kinds[self.streams[method]])
        callable_ = make(
            "/%s/%s" % (self.service.full_name, method),
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        return callable_(request, timeout=60)


class Story(Case):
    """Every call does what it says, in one go."""

    @classmethod
    def setUpClass(cls):
        cls.server = Cachesvc(*cls.args)
        cls.connect()

    def do(self, method, **fields):
        self.done.add(method)
        return self.client.call(method, self.client.message(method + "Request", **fields))

    def tell(self, client, salt):
        self.client, self.done = client, set()
        schema = self.do("RegisterSchema", schema=SCHEMA).digest
        self.assertEqual(self.do("GetSchema", schema=schema).schema.model, "story")
        limits = self.do("Describe").limits
        digests = [bytes([salt]) * 31 + bytes([i]) for i in range(4)]
        self.puts(schema, digests)
        context = self.contexts(schema, digests)
        self.reads(schema, digests, context, limits)
        self.keeps(schema, digests, context)
        self.saves(schema, digests, b"story/%d" % salt)
        counters = {c.name: c.value for c in self.do("Stats").counters}
        self.assertGreater(counters["requests"], len(self.done))
        self.assertEqual(self.done, self.client.methods)

    def puts(self, schema, digests):
        values = [{"digest": d, "part": 3, "len_bytes": VALUE_BYTES} for d in digests[:2]]
        reply = self.do("PutBlocks", schema=schema, promise="PROMISE_DURABLE", values=values,
                        data=value(0) + value(1))
        self.assertEqual(list(reply.status), [pb.ITEM_OK] * 2)
        self.put_stream(schema, digests[1:3])

    def put_stream(self, schema, digests):
        """The first is there already: its body is not asked for."""
        self.done.add("PutBlocksStream")
        offers = [{"schema": schema, "digest": d, "part": 3, "len_bytes": VALUE_BYTES,
                   "promise": "PROMISE_MEMORY"} for d in digests]
        make = lambda **fields: self.client.message("PutBlocksStreamRequest", **fields)  # noqa
        messages = [make(offers=offers), make(value=1, data=value(2))]
        last = {}
        for reply in self.client.call("PutBlocksStream", iter(messages)):
            last.update({a.value: a.status for a in reply.answers if not a.send})
        self.assertEqual(last, {0: pb.ITEM_EXISTS, 1: pb.ITEM_OK})

    def contexts(self, schema, digests):
        match = self.do("MatchPrefix", schema=schema, digests=b"".join(digests), want_tiers=True)
        self.assertEqual((match.hits, list(match.tiers)), (3, [pb.TIER_DRAM] * 3))
        opened = self.do("OpenContext", schema=schema, digests=digests[0])
        extended = self.do("ExtendContext", context=opened.context, n_blocks_before=1,
                           digests=b"".join(digests[1:]))
        self.assertEqual(extended.n_tokens, 4 * BLOCK_TOKENS)
        fork = self.do("ForkContext", context=opened.context, n_blocks=2)
        self.assertEqual(fork.n_tokens, 2 * BLOCK_TOKENS)
        cut = self.do("TruncateContext", context=opened.context, n_blocks=3)
        self.assertEqual(cut.n_tokens, 3 * BLOCK_TOKENS)
        self.do("CloseContext", context=fork.context)
        return opened.context

    def reads(self, schema, digests, context, limits):
        picks = [150, 3, 70, 191]
        group = {"context": context, "part": 3, "picks": picks}
        wanted = b"".join(row(t) for t in picks)
        self.assertEqual(self.do("FetchRows", groups=[group]).data, wanted)
        stream = list(self.do("FetchRowsStream", groups=[group]))
        self.assertEqual(b"".join(m.data for m in stream), wanted)
        blocks = list(self.do("FetchBlocks", schema=schema, digests=b"".join(digests)))
        self.assertEqual(b"".join(m.data for m in blocks), value(0) + value(1) + value(2))
        self.assertEqual([v.status for m in blocks for v in m.values],
                         [pb.ITEM_OK] * 3 + [pb.ITEM_NOT_FOUND])
        self.assertGreater(limits.max_attend_queries, 0)
        attend = {"rows": {"context": context, "part": 3, "picks": [5]}, "n_q": 1,
                  "n_q_heads": HEADS, "q_dtype": "DTYPE_F32", "o_dtype": "DTYPE_F32"}
        reply = self.do("AttendRows", groups=[attend], data=bytes(4 * HEADS * DIM))
        self.assertEqual(reply.data[: ROW_BYTES // 2], row(5)[ROW_BYTES // 2 :])  # one row: its V
        with self.assertRaises(grpc.RpcError) as caught:  # memory is passed over shm:// only
            self.do("MapContext", context=context, parts=[3])
        self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)

    def keeps(self, schema, digests, context):
        hold = self.do("Hold", context=context, ttl_ms=60000)
        self.assertEqual(hold.n_blocks, 3)
        self.do("Release", hold=hold.hold)
        fetched = self.do("Prefetch", context=context, tier="TIER_DRAM")
        self.assertEqual((fetched.there, fetched.missing), (3, 0))
        gone = self.do("Erase", schema=schema, digests=digests[2])
        self.assertEqual((gone.values, gone.bytes), (1, VALUE_BYTES))

    def saves(self, schema, digests, name):
        name = name.decode()
        body = b"".join(digests[:2])
        saved = {"name": name, "schema": schema, "n_blocks": 2, "promise": "PROMISE_DURABLE"}
        put = self.do("PutContext", context=saved, upload=7, data=body)
        self.assertEqual(put.received, len(body))
        got = self.do("GetContext", name=name)
        self.assertEqual((got.data, got.context.generation), (body, put.generation))
        self.assertEqual([c.name for c in self.do("ListContexts").contexts], [name])
        self.do("DeleteContext", name=name)
        self.assertEqual(len(self.do("ListContexts").contexts), 0)

    def test_by_stubs(self):
        self.tell(Stubs(self.channel), 1)

    def test_by_reflection(self):
        self.tell(Reflected(self.channel, "v1"), 2)

    def test_by_reflection_v1alpha(self):
        self.tell(Reflected(self.channel, "v1alpha"), 3)


if __name__ == "__main__":
    unittest.main(verbosity=2)
