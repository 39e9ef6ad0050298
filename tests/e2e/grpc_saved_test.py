#!/usr/bin/env python3
"""PutContext, GetContext, ListContexts, DeleteContext and GetSchema from Python grpcio with
generated stubs, against a real cachesvc; what was saved outlives kill -9.

Needs what grpc_api_test.py needs, and skips as it does.
"""

import random
import signal
import sys
import threading
import time
import unittest

sys.dont_write_bytecode = True

from grpc_api_test import BLOCK_TOKENS, CODES, ROW_BYTES, Case, good_schema, grpc, pb  # noqa: E402

CODES["NO_SPACE"] = (4, grpc.StatusCode.RESOURCE_EXHAUSTED)
CODES["EXISTS"] = (3, grpc.StatusCode.ALREADY_EXISTS)
PIECE = 1 << 20


class Base(Case):
    def context(self, name="chat/1", n_blocks=4, n_tail=3, tail_parts=(0, 1), **fields):
        fields.setdefault("n_ids", n_blocks * BLOCK_TOKENS + n_tail)
        fields.setdefault("promise", pb.PROMISE_DURABLE)
        fields.setdefault("schema", self.schema)
        return pb.SavedContext(
            name=name, n_blocks=n_blocks, n_tail=n_tail, tail_parts=tail_parts, **fields
        )

    def body(self, context, seed):
        size = 32 * context.n_blocks + 4 * context.n_ids
        size += context.n_tail * sum(ROW_BYTES[part] for part in context.tail_parts)
        return random.Random(seed).randbytes(size)

    def put_piece(self, context, data, offset=0, upload=None, **fields):
        upload = upload or random.randrange(1, 1 << 64)
        return self.store.PutContext(
            pb.PutContextRequest(context=context, upload=upload, offset=offset, data=data, **fields)
        )

    def put(self, context, body, **fields):
        upload = random.randrange(1, 1 << 64)
        for at in range(0, len(body), PIECE):
            reply = self.put_piece(context, body[at : at + PIECE], at, upload, **fields)
        self.assertEqual(reply.received, len(body))
        self.assertNotEqual(reply.generation, 0)
        return reply

    def get(self, name):
        first = self.store.GetContext(pb.GetContextRequest(name=name))
        body, at = first.data, first.context
        while len(body) < at.body_bytes:
            ask = pb.GetContextRequest(name=name, generation=at.generation, offset=len(body))
            body += self.store.GetContext(ask).data
        return at, body

    def names(self, **fields):
        reply = self.store.ListContexts(pb.ListContextsRequest(**fields))
        return [context.name for context in reply.contexts]


class Saved(Base):
    args = Case.args + ("--max-saved", "10", "--max-saved-bytes", "32MiB")

    def tearDown(self):
        for name in self.names():
            self.store.DeleteContext(pb.DeleteContextRequest(name=name))

    def test_round_trip_and_kill(self):
        big = self.context("big", n_blocks=20000)
        small = self.context("small", n_blocks=0, n_ids=0, tail_parts=[1])
        bodies = {"big": self.body(big, 1), "small": self.body(small, 2)}
        self.assertGreater(len(bodies["big"]), 5 * PIECE)
        reply = self.put(big, bodies["big"])
        self.assertEqual(reply.promise, pb.PROMISE_DURABLE)
        self.put(small, bodies["small"])
        half = self.context("half", n_blocks=20000)
        self.put_piece(half, bytes(PIECE), upload=5)
        self.server.stop(signal.SIGKILL)
        self.server.start()
        self.channel.close()
        self.connect()
        self.assertEqual(self.names(), ["big", "small"])
        for want in (big, small):
            got, body = self.get(want.name)
            self.assertEqual(body, bodies[want.name])
            for field in ("schema", "n_blocks", "n_ids", "n_tail", "tail_parts", "promise"):
                self.assertEqual(getattr(got, field), getattr(want, field))
            self.assertAlmostEqual(got.saved_unix_ms / 1000, time.time(), delta=100)
        self.fails("NOT_FOUND", lambda: self.put_piece(half, bytes(PIECE), PIECE, 5), "begin at 0")
        match = pb.MatchPrefixRequest(schema=self.schema, digests=bodies["big"][: 32 * 16384])
        self.assertEqual(self.store.MatchPrefix(match).hits, 0)
        self.serves()

    def test_replace(self):
        one, two = self.context("x"), self.context("x", n_blocks=5)
        first = self.put(one, self.body(one, 1))
        generation = str(first.generation)
        body = self.body(two, 2)
        self.fails("EXISTS", lambda: self.put(two, body), generation)
        self.fails("EXISTS", lambda: self.put(two, body, if_generation=5), generation)
        second = self.put(two, body, if_generation=first.generation)
        self.assertGreater(second.generation, first.generation)
        self.assertEqual(self.get("x")[1], body)
        third = self.put(one, self.body(one, 3), replace=True)
        ask = pb.GetContextRequest(name="x", generation=second.generation)
        self.fails("NOT_FOUND", lambda: self.store.GetContext(ask), str(third.generation))
        delete = pb.DeleteContextRequest(name="x", if_generation=second.generation)
        self.fails("EXISTS", lambda: self.store.DeleteContext(delete), str(third.generation))
        delete.if_generation = third.generation
        self.store.DeleteContext(delete)
        self.fails("NOT_FOUND", lambda: self.store.DeleteContext(delete), "no context")
        self.fails("NOT_FOUND", lambda: self.put(two, body, if_generation=7), "no context")

    def test_kill_while_replacing(self):
        """Whenever the server dies, the name stands for one whole body."""
        rng = random.Random(7)
        context = self.context("x", n_blocks=12000)
        bodies = [self.body(context, 0)]
        self.put(context, bodies[0])
        for turn in range(6):
            bodies.append(self.body(context, turn + 1))
            delay = rng.random() * 0.15
            timer = threading.Timer(delay, lambda: self.server.process.kill())
            timer.start()
            try:
                self.put(context, bodies[-1], replace=True)
                acknowledged = True
            except grpc.RpcError:
                acknowledged = False
            timer.join()
            self.server.process.wait(120)
            self.server.start()
            self.channel.close()
            self.connect()
            body = self.get("x")[1]
            self.assertIn(body, bodies[-1:] if acknowledged else bodies[-2:])
            bodies = [body]

    def test_list(self):
        for i in range(9):
            context = self.context("n%d" % i)
            self.put(context, self.body(context, i))
        self.assertEqual(self.names(), ["n%d" % i for i in range(9)])
        self.assertEqual(self.names(after="n3", max=2), ["n4", "n5"])
        reply = self.store.ListContexts(pb.ListContextsRequest(max=9))
        self.assertFalse(reply.more)
        self.assertTrue(self.store.ListContexts(pb.ListContextsRequest(max=8)).more)
        self.assertEqual(list(reply.contexts[0].tail_parts), [])
        long = pb.ListContextsRequest(after="x" * 256)
        self.fails("INVALID", lambda: self.store.ListContexts(long), "255")
        context = self.context("tenth")
        self.put(context, self.body(context, 9))
        context.name = "eleventh"
        self.fails("NO_SPACE", lambda: self.put_piece(context, b"x"), "max_saved")

    def test_bad_input(self):
        good = self.context()
        body = self.body(good, 1)
        for name in ("", "a b", "ä", "x" * 256, "\x7f"):
            bad = self.context(name)
            self.fails("INVALID", lambda: self.put_piece(bad, body), "255")
            ask = pb.GetContextRequest(name=name)
            self.fails("INVALID", lambda: self.store.GetContext(ask), "255")
            delete = pb.DeleteContextRequest(name=name)
            self.fails("INVALID", lambda: self.store.DeleteContext(delete), "255")
        cases = (
            ("INVALID", self.context(schema=bytes(31)), "32"),
            ("NOT_FOUND", self.context(schema=bytes(32)), "not registered"),
            ("INVALID", self.context(promise=0), "promise"),
            ("INVALID", self.context(promise=3), "promise"),
            ("INVALID", self.context(n_blocks=1 << 20 | 1), "max_context_blocks"),
            ("INVALID", self.context(n_tail=1024), "tail"),
            ("INVALID", self.context(n_tail=BLOCK_TOKENS), "shorter than a block"),
            ("INVALID", self.context(n_ids=5), "5 ids for"),
            ("INVALID", self.context(tail_parts=[1, 0]), "part 0"),
            ("INVALID", self.context(tail_parts=[9]), "part 9 is not in the schema"),
            ("INVALID", self.context(n_blocks=0, n_tail=0, n_ids=0), "nothing to save"),
            ("NO_SPACE", self.context(n_blocks=1 << 20, n_ids=0), "max_saved_bytes"),
        )
        for code, context, text in cases:
            self.fails(code, lambda: self.put_piece(context, body), text)
        none = pb.PutContextRequest(upload=1, data=body)
        self.fails("INVALID", lambda: self.store.PutContext(none), "context is missing")
        zero = pb.PutContextRequest(context=good, data=body)
        self.fails("INVALID", lambda: self.store.PutContext(zero), "upload")
        both = dict(replace=True, if_generation=1)
        self.fails("INVALID", lambda: self.put_piece(good, body, **both), "either")
        self.fails("INVALID", lambda: self.put_piece(good, body + b"x"), "the body has")
        self.fails("INVALID", lambda: self.put_piece(good, body[:-1]), "65536")
        self.fails("INVALID", lambda: self.put_piece(good, b""), "the body has")
        self.fails("NOT_FOUND", lambda: self.put_piece(good, body, 1), "begin at 0")
        self.fails("INVALID", lambda: self.put_piece(good, bytes(PIECE + 1)), "")
        self.fails("NOT_FOUND", lambda: self.get("nobody"), "no context")
        self.put(good, body)
        ask = pb.GetContextRequest(name=good.name, offset=len(body))
        self.fails("INVALID", lambda: self.store.GetContext(ask), str(len(body)))
        self.assertEqual(self.get(good.name)[1], body)
        self.serves()

    def test_schema(self):
        reply = self.store.GetSchema(pb.GetSchemaRequest(schema=self.schema))
        again = pb.RegisterSchemaRequest(schema=reply.schema)
        self.assertEqual(self.store.RegisterSchema(again).digest, self.schema)
        self.assertEqual(reply.schema.model, good_schema().model)
        short = pb.GetSchemaRequest(schema=bytes(5))
        self.fails("INVALID", lambda: self.store.GetSchema(short), "32")
        unknown = pb.GetSchemaRequest(schema=bytes(32))
        self.fails("NOT_FOUND", lambda: self.store.GetSchema(unknown), "not registered")


class InMemory(Base):
    args = ("--dram-bytes", "16MiB")

    def test_memory(self):
        context = self.context()
        body = self.body(context, 1)
        self.fails("UNSUPPORTED", lambda: self.put_piece(context, body), "lmdb")
        context.promise = pb.PROMISE_MEMORY
        self.assertEqual(self.put(context, body).promise, pb.PROMISE_MEMORY)
        got, back = self.get(context.name)
        self.assertEqual((got.promise, back), (pb.PROMISE_MEMORY, body))


if __name__ == "__main__":
    unittest.main(verbosity=2)
