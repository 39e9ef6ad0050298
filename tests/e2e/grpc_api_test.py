#!/usr/bin/env python3
"""Every call of the protocol from Python grpcio with its own generated stubs, against a real
cachesvc, and the right status for each kind of bad input.

Needs python3-grpcio, python3-protobuf, protobuf-compiler and protobuf-compiler-grpc (Debian 12), or
the same from elsewhere. Exit status 77, which ctest counts as skipped, where they are missing.
"""

import atexit
import hashlib
import os
import random
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "support"))

from cachesvc_fixture import Cachesvc, stubs  # noqa: E402

try:
    import google.protobuf  # noqa: F401
    import grpc
except ImportError as missing:
    print("skipped: %s" % missing)
    sys.exit(77)
if not shutil.which("protoc") or not shutil.which("grpc_python_plugin"):
    print("skipped: protoc or grpc_python_plugin is missing")
    sys.exit(77)

FOLDER = tempfile.mkdtemp(prefix="kvasir-stubs-")
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
pb, rpc, health_pb, health_rpc = stubs(FOLDER)

BLOCK_TOKENS = 64
ROW_BYTES = {0: 256, 1: 1024, 7: 64}
CODES = {
    # Kvasir's code: its number, and the gRPC status that carries it
    "NOT_FOUND": (2, grpc.StatusCode.NOT_FOUND),
    "INVALID": (6, grpc.StatusCode.INVALID_ARGUMENT),
    "UNSUPPORTED": (7, grpc.StatusCode.UNIMPLEMENTED),
    "TIMED_OUT": (8, grpc.StatusCode.DEADLINE_EXCEEDED),
    "PROTOCOL": (12, grpc.StatusCode.INVALID_ARGUMENT),
    "STALE_HANDLE": (14, grpc.StatusCode.FAILED_PRECONDITION),
}


def kv_part(number, row_bytes):
    half = row_bytes // 2
    return pb.Part(
        part=number,
        kind=pb.PART_KIND_KV,
        dtype=pb.DTYPE_BF16,
        layer=number,
        kv_head_count=1,
        row_bytes=row_bytes,
        k_len_bytes=half,
        v_off_bytes=half,
        v_len_bytes=half,
        q_dim=half // 2,
        v_dim=half // 2,
        rope=pb.Rope(type=pb.ROPE_TYPE_NONE),
    )


def good_schema(model="python"):
    index = pb.Part(
        part=7,
        kind=pb.PART_KIND_INDEX,
        dtype=pb.DTYPE_I8,
        row_bytes=ROW_BYTES[7],
        k_len_bytes=ROW_BYTES[7],
        codec="esa d=60",
    )
    return pb.Schema(
        model=model,
        revision="r1",
        recipe="full",
        tp_size=1,
        block_tokens=BLOCK_TOKENS,
        parts=[kv_part(0, ROW_BYTES[0]), kv_part(1, ROW_BYTES[1]), index],
    )


def block_digest(schema, parent, tokens):
    text = b"kvasir-block-v1" + schema + parent + struct.pack("<I", len(tokens))
    text += struct.pack("<%dI" % len(tokens), *tokens) + struct.pack("<I", 0)
    return hashlib.sha256(text).digest()


def row(part, token):
    return random.Random(part * 1000003 + token).randbytes(ROW_BYTES[part])


class Case(unittest.TestCase):
    """One server for the class, and a registered schema."""

    args = ("--dram-bytes", "16MiB", "--lmdb-path", "FOLDER/values", "--lmdb-bytes", "256MiB")

    @classmethod
    def setUpClass(cls):
        cls.server = Cachesvc(*cls.args)
        cls.connect()
        cls.schema = cls.store.RegisterSchema(
            pb.RegisterSchemaRequest(schema=good_schema())
        ).digest

    @classmethod
    def connect(cls):
        cls.channel = grpc.insecure_channel(cls.server.address)
        cls.store = rpc.KvCacheStub(cls.channel)
        cls.health = health_rpc.HealthStub(cls.channel)

    @classmethod
    def tearDownClass(cls):
        cls.channel.close()
        status = cls.server.close()
        assert status == 0, "cachesvc ended with %d" % status

    def digests(self, salt, n):
        out, parent = [], bytes(32)
        for i in range(n):
            tokens = [salt * 100000 + i * BLOCK_TOKENS + t for t in range(BLOCK_TOKENS)]
            parent = block_digest(self.schema, parent, tokens)
            out.append(parent)
        return out

    def value(self, part, block):
        return b"".join(row(part, block * BLOCK_TOKENS + t) for t in range(BLOCK_TOKENS))

    def put_request(self, digests, parts, promise=None, first=0):
        """digests are those of the blocks from first on."""
        values, data = [], []
        for i, digest in enumerate(digests):
            for part in parts:
                data.append(self.value(part, first + i))
                values.append(pb.PutValue(digest=digest, part=part, len_bytes=len(data[-1])))
        return pb.PutBlocksRequest(
            schema=self.schema,
            promise=promise or pb.PROMISE_MEMORY,
            values=values,
            data=b"".join(data),
        )

    def open(self, digests, ttl_ms=0):
        return self.store.OpenContext(
            pb.OpenContextRequest(schema=self.schema, digests=b"".join(digests), ttl_ms=ttl_ms)
        )

    def fails(self, name, call, *words, **options):
        """The call must fail with this code, in all three places, and its text must have words."""
        number, code = CODES[name]
        with self.assertRaises(grpc.RpcError) as caught:
            call(**options)
        error = caught.exception
        self.assertEqual(error.code(), code, error.details())
        self.assertTrue(error.details().startswith(name + ": "), error.details())
        trailers = dict(error.trailing_metadata())
        self.assertEqual(trailers.get("kvc-status"), str(number), trailers)
        for word in words:
            self.assertIn(word, error.details())

    def serves(self):
        self.assertEqual(len(self.store.Describe(pb.DescribeRequest()).tiers), 2)


class EveryCall(Case):
    def test_describe_and_stats(self):
        reply = self.store.Describe(pb.DescribeRequest())
        self.assertTrue(reply.version)
        self.assertNotEqual(reply.boot_id, 0)
        self.assertEqual(reply.limits.max_message_bytes, 1 << 20)
        self.assertEqual([tier.name for tier in reply.tiers], ["dram", "lmdb"])
        self.assertIn(self.schema, list(reply.schemas))
        stats = self.store.Stats(pb.StatsRequest())
        self.assertEqual(stats.boot_id, reply.boot_id)
        self.assertEqual(stats.tiers[0].capacity_bytes, 16 << 20)
        self.assertTrue(any(c.name == "requests" and c.value > 0 for c in stats.counters))

    def test_schema_is_idempotent(self):
        again = self.store.RegisterSchema(pb.RegisterSchemaRequest(schema=good_schema()))
        self.assertEqual(again.digest, self.schema)
        other = self.store.RegisterSchema(pb.RegisterSchemaRequest(schema=good_schema("other")))
        self.assertNotEqual(other.digest, self.schema)

    def test_put_match_fetch(self):
        digests = self.digests(1, 6)
        request = self.put_request(digests[:4], (0, 1, 7))
        self.assertEqual(list(self.store.PutBlocks(request).status), [pb.ITEM_OK] * 12)
        self.assertEqual(list(self.store.PutBlocks(request).status), [pb.ITEM_EXISTS] * 12)
        durable = self.put_request(digests[4:5], (0,), pb.PROMISE_DURABLE, 4)
        self.assertEqual(list(self.store.PutBlocks(durable).status), [pb.ITEM_OK])
        ask = pb.MatchPrefixRequest(schema=self.schema, digests=b"".join(digests))
        self.assertEqual(self.store.MatchPrefix(ask).hits, 4)
        ask.parts.append(0)
        self.assertEqual(self.store.MatchPrefix(ask).hits, 5)

        opened = self.open(digests[:4])
        self.assertEqual(opened.n_tokens, 4 * BLOCK_TOKENS)
        extended = self.store.ExtendContext(
            pb.ExtendContextRequest(
                context=opened.context, n_blocks_before=4, digests=b"".join(digests[4:])
            )
        )
        self.assertEqual(extended.n_tokens, 6 * BLOCK_TOKENS)

        picks0, picks1 = [300, 0, 255, 7, 7, 380, 256], [63, 64, 300, 12]
        reply = self.store.FetchRows(
            pb.FetchRowsRequest(
                groups=[
                    pb.RowGroup(context=opened.context, part=0, picks=picks0),
                    pb.RowGroup(context=opened.context, part=1, picks=picks1),
                ]
            )
        )
        missing = [(m.index, m.status) for m in reply.missing]
        # Token 380 lies in a block that nobody put; part 1 of block 4 was not put either.
        self.assertEqual(missing, [(5, pb.ITEM_NOT_FOUND), (9, pb.ITEM_NOT_FOUND)])
        wanted = [row(0, t) for t in picks0 if t != 380] + [row(1, t) for t in picks1 if t != 300]
        self.assertEqual(reply.data, b"".join(wanted))
        self.assertEqual(reply.rows_dram + reply.rows_lmdb, 9)

        self.store.CloseContext(pb.CloseContextRequest(context=opened.context))
        self.fails(
            "STALE_HANDLE",
            lambda: self.store.CloseContext(pb.CloseContextRequest(context=opened.context)),
        )

    def test_extend_is_idempotent(self):
        digests = self.digests(2, 4)
        context = self.open(digests[:2]).context
        request = pb.ExtendContextRequest(
            context=context, n_blocks_before=2, digests=b"".join(digests[2:])
        )
        for _ in range(3):
            self.assertEqual(self.store.ExtendContext(request).n_tokens, 4 * BLOCK_TOKENS)
        request.n_blocks_before = 5
        self.fails("INVALID", lambda: self.store.ExtendContext(request), "n_blocks_before")

    def test_positions_beyond_the_context_are_missing(self):
        context = self.open(self.digests(1, 2)).context
        group = pb.RowGroup(context=context, part=0, picks=[128, 0xFFFFFFFF])
        reply = self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))
        self.assertEqual([m.status for m in reply.missing], [pb.ITEM_NOT_FOUND] * 2)
        self.assertEqual(reply.data, b"")

    def test_a_handle_expires(self):
        opened = self.open(self.digests(1, 2), ttl_ms=50)
        self.assertEqual(opened.ttl_ms, 50)
        time.sleep(0.2)
        group = pb.RowGroup(context=opened.context, part=0, picks=[0])
        self.fails(
            "STALE_HANDLE", lambda: self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))
        )

    def test_health(self):
        for service in ("", "kvasir.v1.KvCache"):
            reply = self.health.Check(health_pb.HealthCheckRequest(service=service))
            self.assertEqual(reply.status, health_pb.HealthCheckResponse.SERVING)
        with self.assertRaises(grpc.RpcError) as caught:
            self.health.Check(health_pb.HealthCheckRequest(service="nobody"))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.NOT_FOUND)
        watch = self.health.Watch(health_pb.HealthCheckRequest(), timeout=60)
        self.assertEqual(next(watch).status, health_pb.HealthCheckResponse.SERVING)
        watch.cancel()

    def test_empty_requests(self):
        """What has nothing in it is answered with nothing."""
        put = pb.PutBlocksRequest(schema=self.schema, promise=pb.PROMISE_MEMORY)
        self.assertEqual(list(self.store.PutBlocks(put).status), [])
        self.assertEqual(self.store.FetchRows(pb.FetchRowsRequest()).data, b"")
        ask = pb.MatchPrefixRequest(schema=self.schema)
        self.assertEqual(self.store.MatchPrefix(ask).hits, 0)
        self.assertEqual(self.open([]).n_tokens, 0)


class BadInput(Case):
    def tearDown(self):
        self.serves()

    def stored(self):
        return [tier.values for tier in self.store.Describe(pb.DescribeRequest()).tiers]

    def test_unknown_schema(self):
        unknown = bytes(range(32))
        put = self.put_request(self.digests(3, 1), (0,))
        put.schema = unknown
        self.fails("NOT_FOUND", lambda: self.store.PutBlocks(put), "schema")
        ask = pb.MatchPrefixRequest(schema=unknown, digests=bytes(32))
        self.fails("NOT_FOUND", lambda: self.store.MatchPrefix(ask), "schema")
        opening = pb.OpenContextRequest(schema=unknown)
        self.fails("NOT_FOUND", lambda: self.store.OpenContext(opening), "schema")

    def test_digests_of_a_wrong_length(self):
        short = bytes(31)
        put = self.put_request(self.digests(3, 1), (0,))
        put.values[0].digest = short
        self.fails("INVALID", lambda: self.store.PutBlocks(put), "32")
        put.schema = short
        self.fails("INVALID", lambda: self.store.PutBlocks(put), "32")
        for n in (31, 33, 63):
            ask = pb.MatchPrefixRequest(schema=self.schema, digests=bytes(n))
            self.fails("INVALID", lambda ask=ask: self.store.MatchPrefix(ask), "32")
            opening = pb.OpenContextRequest(schema=self.schema, digests=bytes(n))
            self.fails("INVALID", lambda opening=opening: self.store.OpenContext(opening), "32")

    def test_bad_schemas(self):
        """Each rule by itself; the text names it."""

        def change(**fields):
            schema = good_schema("bad")
            for name, value in fields.items():
                if name == "parts":
                    del schema.parts[:]
                    schema.parts.extend(value)
                else:
                    setattr(schema, name, value)
            return schema

        def part(**fields):
            changed = kv_part(0, 256)
            for name, value in fields.items():
                setattr(changed, name, value)
            return change(parts=[changed])

        rope = kv_part(0, 256)
        rope.rope.theta = float("nan")
        no_rope = kv_part(0, 256)
        no_rope.ClearField("rope")
        cases = [
            (change(model=""), "model"),
            (change(model="m" * 256), "model"),
            (change(revision="r" * 256), "revision"),
            (change(recipe=""), "recipe"),
            (change(recipe="r" * 4097), "recipe"),
            (change(tp_size=0), "tp_size"),
            (change(block_tokens=48), "block_tokens"),
            (change(block_tokens=1040), "block_tokens"),
            (change(block_tokens=72), "multiple of 16"),
            (change(parts=[]), "parts"),
            (change(parts=[kv_part(0, 256), kv_part(0, 256)]), "same id"),
            (part(part=65536), "part id"),
            (part(kind=0), "kind"),
            (part(kind=99), "kind"),
            (part(dtype=0), "dtype"),
            (part(dtype=99), "dtype"),
            (part(row_bytes=0), "row_bytes"),
            (part(row_bytes=16385), "max_value_bytes"),
            (part(k_off_bytes=200), "k slice"),
            (part(v_off_bytes=200), "v slice"),
            (part(k_off_bytes=0xFFFFFFFF), "k slice"),
            (part(kv_head_count=0), "kv_head_count"),
            (part(q_dim=63), "k_len_bytes"),
            (part(v_dim=63), "v_len_bytes"),
            (part(attention_scale=float("inf")), "finite"),
            (part(softcap=float("nan")), "finite"),
            (part(sinks=2), "sinks"),
            (part(codec="c" * 256), "codec"),
            (change(parts=[rope]), "finite"),
            (change(parts=[no_rope]), "rope"),
        ]
        known = len(self.store.Describe(pb.DescribeRequest()).schemas)
        for schema, word in cases:
            with self.subTest(word=word, schema=str(schema)[:60]):
                request = pb.RegisterSchemaRequest(schema=schema)
                self.fails("INVALID", lambda: self.store.RegisterSchema(request), word)
        self.fails(
            "INVALID", lambda: self.store.RegisterSchema(pb.RegisterSchemaRequest()), "schema"
        )
        self.assertEqual(len(self.store.Describe(pb.DescribeRequest()).schemas), known)

    def test_puts(self):
        before = self.stored()
        good = self.put_request(self.digests(4, 2), (0, 1))

        def changed(change):
            request = pb.PutBlocksRequest()
            request.CopyFrom(good)
            change(request)
            return lambda: self.store.PutBlocks(request)

        def cut(request):
            request.data = request.data[:-1]

        def grow(request):
            request.data = request.data + b"x"

        def wrong_length(request):
            request.values[1].len_bytes += 1

        def unknown_part(request):
            request.values[1].part = 5

        def no_promise(request):
            request.promise = pb.PROMISE_UNSPECIFIED

        def odd_promise(request):
            request.promise = 9

        self.fails("INVALID", changed(cut), "payload")
        self.fails("INVALID", changed(grow), "payload")
        self.fails("INVALID", changed(wrong_length), "value 1")
        self.fails("INVALID", changed(unknown_part), "part 5")
        self.fails("INVALID", changed(no_promise), "promise")
        self.fails("INVALID", changed(odd_promise), "promise")
        values = [pb.PutValue(digest=bytes(32), part=0, len_bytes=0)] * 1025
        many = pb.PutBlocksRequest(schema=self.schema, promise=1, values=values)
        self.fails("INVALID", lambda: self.store.PutBlocks(many))
        self.assertEqual(self.stored(), before)

    def test_messages_that_are_too_large(self):
        before = self.stored()
        large = self.put_request(self.digests(5, 70), (0,))  # 1.1 MiB of payload
        self.assertGreater(len(large.data), 1 << 20)
        self.fails("INVALID", lambda: self.store.PutBlocks(large), "longer than")
        huge = pb.PutBlocksRequest(schema=self.schema, promise=1, data=bytes(64 << 20))
        with self.assertRaises(grpc.RpcError) as caught:
            self.store.PutBlocks(huge)
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        self.assertEqual(self.stored(), before)

    def test_fetches(self):
        context = self.open(self.digests(4, 2)).context

        def fetch(*groups):
            request = pb.FetchRowsRequest(groups=groups)
            return lambda: self.store.FetchRows(request)

        group = pb.RowGroup
        self.fails("INVALID", fetch(group(context=context, part=5, picks=[0])), "part 5")
        for handle in (0, 1, context + 1, 0xFFFFFFFFFFFFFFFF):
            self.fails("STALE_HANDLE", fetch(group(context=handle, part=0, picks=[0])))
        # Two groups, the second stale: nothing of the first is served.
        mixed = fetch(
            group(context=context, part=0, picks=[0]), group(context=0, part=0, picks=[0])
        )
        self.fails("STALE_HANDLE", mixed, "group 1")
        picks = [0] * 65537
        self.fails("INVALID", fetch(group(context=context, part=7, picks=picks)))
        halves = [group(context=context, part=7, picks=picks[:33000])] * 2
        self.fails("INVALID", fetch(*halves))
        rows = [0] * 4097  # 256 bytes each: one row more than a message holds
        many = fetch(group(context=context, part=0, picks=rows))
        self.fails("INVALID", many, "max_message_bytes")
        groups = [group(context=context, part=0, picks=[0])] * 1025
        self.fails("INVALID", fetch(*groups))

    def test_contexts(self):
        for handle in (0, 12345, 0xFFFFFFFFFFFFFFFF):
            extend = pb.ExtendContextRequest(context=handle, digests=bytes(32))
            self.fails("STALE_HANDLE", lambda e=extend: self.store.ExtendContext(e))
            close = pb.CloseContextRequest(context=handle)
            self.fails("STALE_HANDLE", lambda c=close: self.store.CloseContext(c))
        long = pb.OpenContextRequest(schema=self.schema, digests=bytes(32 * 16385))
        self.fails("INVALID", lambda: self.store.OpenContext(long), "digests")
        match = pb.MatchPrefixRequest(schema=self.schema, digests=bytes(32 * 16385))
        self.fails("INVALID", lambda: self.store.MatchPrefix(match), "digests")
        match = pb.MatchPrefixRequest(schema=self.schema, digests=bytes(32), parts=[9])
        self.fails("INVALID", lambda: self.store.MatchPrefix(match), "part 9")

    def test_bytes_that_do_not_parse(self):
        def raw(method, payload):
            call = self.channel.unary_unary(
                "/kvasir.v1.KvCache/" + method,
                request_serializer=lambda data: data,
                response_deserializer=lambda data: data,
            )
            return lambda: call(payload, timeout=60)

        for method in ("RegisterSchema", "PutBlocks", "MatchPrefix", "OpenContext", "FetchRows"):
            for payload in (b"\xff\xff\xff\xff", b"\x0a\x7f", b"\x0b", b"\x0a\xff\xff\xff\xff\x7f"):
                with self.subTest(method=method, payload=payload):
                    self.fails("PROTOCOL", raw(method, payload))
        rng = random.Random(1)
        for _ in range(300):
            payload = rng.randbytes(rng.randrange(1, 200))
            method = rng.choice(("RegisterSchema", "PutBlocks", "MatchPrefix", "FetchRows"))
            try:
                raw(method, payload)()
            except grpc.RpcError as error:
                self.assertIn(
                    error.code(),
                    (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
                    + (grpc.StatusCode.FAILED_PRECONDITION,),
                    error.details(),
                )

    def test_unknown_methods(self):
        for path in ("/kvasir.v1.KvCache/Nope", "/nobody.Service/Method"):
            call = self.channel.unary_unary(
                path, request_serializer=bytes, response_deserializer=bytes
            )
            with self.assertRaises(grpc.RpcError) as caught:
                call(b"", timeout=60)
            self.assertEqual(caught.exception.code(), grpc.StatusCode.UNIMPLEMENTED)

    def test_an_expired_deadline(self):
        self.server.pause()
        try:
            with self.assertRaises(grpc.RpcError) as caught:
                self.store.Describe(pb.DescribeRequest(), timeout=0.2)
        finally:
            self.server.resume()
        self.assertEqual(caught.exception.code(), grpc.StatusCode.DEADLINE_EXCEEDED)

    def test_garbage_on_the_port(self):
        host, port = self.server.address.split(":")
        rng = random.Random(2)
        preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        for i in range(30):
            with socket.create_connection((host, int(port)), 60) as peer:
                try:
                    peer.sendall((preface if i % 2 else b"") + rng.randbytes(4096))
                    peer.settimeout(0.05)
                    peer.recv(4096)
                except OSError:
                    pass  # it may hang up whenever it likes
        with socket.create_connection((host, int(port)), 60):
            self.serves()  # a silent peer disturbs nobody

    def test_durable_needs_lmdb(self):
        server = Cachesvc("--dram-bytes", "8MiB")
        try:
            with grpc.insecure_channel(server.address) as channel:
                store = rpc.KvCacheStub(channel)
                store.RegisterSchema(pb.RegisterSchemaRequest(schema=good_schema()))
                put = self.put_request(self.digests(6, 1), (0,), pb.PROMISE_DURABLE)
                self.fails("UNSUPPORTED", lambda: store.PutBlocks(put), "lmdb")
        finally:
            server.close()


class Lives(Case):
    def test_kill_and_restart(self):
        digests = self.digests(1, 4)
        put = self.put_request(digests, (0, 1, 7), pb.PROMISE_DURABLE)
        self.assertEqual(set(self.store.PutBlocks(put).status), {pb.ITEM_OK})
        old = self.open(digests).context
        boot_id = self.store.Describe(pb.DescribeRequest()).boot_id
        self.server.stop(signal.SIGKILL)
        self.server.start()
        type(self).connect()
        reply = self.store.Describe(pb.DescribeRequest(), wait_for_ready=True, timeout=60)
        self.assertNotEqual(reply.boot_id, boot_id)
        self.assertIn(self.schema, list(reply.schemas))
        group = pb.RowGroup(context=old, part=0, picks=[0])
        self.fails(
            "STALE_HANDLE", lambda: self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))
        )
        ask = pb.MatchPrefixRequest(schema=self.schema, digests=b"".join(digests))
        self.assertEqual(self.store.MatchPrefix(ask).hits, 4)
        group.context = self.open(digests).context
        group.picks[:] = [255, 1, 64]
        rows = self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))
        self.assertEqual(rows.data, row(0, 255) + row(0, 1) + row(0, 64))
        self.assertEqual(len(rows.missing), 0)

    def test_z_watch_sees_the_drain(self):
        """SIGTERM: health says NOT_SERVING, or the stream ends; then the server exits with 0."""
        seen = []

        def watch():
            try:
                for reply in self.health.Watch(health_pb.HealthCheckRequest(), timeout=60):
                    seen.append(reply.status)
            except grpc.RpcError as error:
                seen.append(error.code())

        thread = threading.Thread(target=watch)
        thread.start()
        while not seen:
            time.sleep(0.01)
        self.assertEqual(self.server.stop(), 0)
        thread.join(60)
        self.assertEqual(seen[0], health_pb.HealthCheckResponse.SERVING)
        ends = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        ends += (health_pb.HealthCheckResponse.NOT_SERVING, grpc.StatusCode.OK)
        self.assertIn(seen[-1], ends)


if __name__ == "__main__":
    unittest.main(verbosity=2)
