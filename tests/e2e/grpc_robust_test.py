#!/usr/bin/env python3
"""What strangers may do to the port: garbage, half-open and idle connections by the thousand,
random and mutated requests by the ten thousand. Then the server serves on, its memory is flat, and
every byte that it held is there.

Needs what grpc_api_test needs. KVASIR_MUTATED=1000000 sends that many mutated requests;
KVASIR_TEST_SEED repeats a run.
"""

import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import grpc_api_test as base  # noqa: E402  (exits with 77 where packages are missing)
import grpc  # noqa: E402

pb = base.pb
MUTATED = int(os.environ.get("KVASIR_MUTATED", "10000"))
SEED = int(os.environ.get("KVASIR_TEST_SEED", "20260101"))
IDLE = 2000
SANITIZED = "KVASIR_SANITIZED" in os.environ  # memory then says nothing
STREAMS = ("FetchRowsStream", "FetchBlocks", "PutBlocksStream")
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = b"\0\0\0\x04\0\0\0\0\0"


class Case(base.Case):
    def proc(self, name):
        return "/proc/%d/%s" % (self.server.process.pid, name)

    def memory_mib(self):
        """Anonymous memory and that of the dram tier."""
        sizes = {}
        with open(self.proc("status")) as stream:
            for line in stream:
                if line.startswith("Rss"):
                    name, size = line.split()[:2]
                    sizes[name] = int(size) / 1024
        return sizes["RssAnon:"] + sizes["RssShmem:"]

    def n_sockets(self):
        return len(os.listdir(self.proc("fd")))

    def dial(self, data=b""):
        host, port = self.server.address.rsplit(":", 1)
        link = socket.create_connection((host, int(port)), timeout=60)
        if data:
            link.sendall(data)
        return link

    def waits_for(self, what, seconds=60):
        end = time.monotonic() + seconds
        while not what() and time.monotonic() < end:
            time.sleep(0.02)
        self.assertTrue(what())


class Connections(Case):
    args = Case.args + ("--handshake", "3s", "--idle", "3s", "--keepalive", "1s")
    args += ("--max-connections", str(2 * IDLE))

    def closed(self, link):
        """The server's side closes it: all that comes is read, up to the end."""
        try:
            while link.recv(65536):
                pass
        except ConnectionResetError:
            pass
        link.close()

    def test_garbage(self):
        chance = random.Random(SEED)
        before = self.n_sockets()
        tls = bytes.fromhex("16030100c8010000c40303") + chance.randbytes(190)
        frame = b"\xff\xff\xff\x00\x00\x00\x00\x00\x01"  # 16 MiB of data for no stream
        garbage = [tls, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", PREFACE[:10], PREFACE + frame]
        garbage += [PREFACE + SETTINGS + chance.randbytes(200) for _ in range(60)]
        garbage += [chance.randbytes(chance.randrange(1, 5000)) for _ in range(60)]
        for data in garbage:
            link = self.dial(data)
            link.shutdown(socket.SHUT_WR)
            self.closed(link)
            self.serves()
        self.waits_for(lambda: self.n_sockets() <= before + 2)

    def test_half_open(self):
        """Some say nothing, some stop in the middle of the preface: all are closed in time."""
        links = [self.dial(PREFACE[: n % 20]) for n in range(100)]
        start = time.monotonic()
        self.serves()
        for link in links:
            self.closed(link)
        self.assertLess(time.monotonic() - start, 60)
        self.serves()

    def test_thousands_idle(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        self.serves()
        before, sockets = self.memory_mib(), self.n_sockets()
        links = [self.dial(PREFACE + SETTINGS) for _ in range(IDLE)]
        slowest = 0.0
        for _ in range(50):
            start = time.monotonic()
            self.serves()
            slowest = max(slowest, time.monotonic() - start)
        grown = self.memory_mib() - before
        print("%d idle connections: %.0f KiB each, slowest call %.0f ms"
              % (IDLE, grown * 1024 / IDLE, slowest * 1000))
        self.assertTrue(SANITIZED or grown < IDLE * 64 / 1024)
        self.assertLess(slowest, 60)
        # They never call and answer no ping, so they are closed.
        self.waits_for(lambda: self.n_sockets() < sockets + 50)
        for link in links:
            link.close()
        self.serves()

    def test_a_client_outlives_idleness(self):
        """Its connection is closed under it, and its next call just works."""
        self.serves()
        time.sleep(5)
        self.serves()


class Limited(Case):
    """More connections than there may be: they are closed, and the others go on."""

    MOST = 8
    args = Case.args + ("--max-connections", str(MOST))

    def counter(self, name):
        counters = self.store.Stats(pb.StatsRequest()).counters
        return next(counter.value for counter in counters if counter.name == name)

    def lives(self, link):
        """Whether the server has greeted it; else it has closed it."""
        try:
            return len(link.recv(9)) > 0
        except ConnectionResetError:
            return False

    def test_too_many(self):
        self.serves()
        links = [self.dial(PREFACE + SETTINGS) for _ in range(3 * self.MOST)]
        living = [link for link in links if self.lives(link)]
        self.assertEqual(len(living), self.MOST - 1)
        self.serves()
        self.assertEqual(self.counter("connections"), self.MOST)
        self.assertGreaterEqual(self.counter("connections_refused"), 2 * self.MOST + 1)
        for link in links:
            link.close()
        self.waits_for(lambda: self.counter("connections") == 1)
        link = self.dial(PREFACE + SETTINGS)
        self.assertTrue(self.lives(link))
        link.close()
        self.serves()


class Mutations(Case):
    """Valid requests of every method, altered, and plain noise."""

    def seeds(self, digests, context):
        """Whatever takes something away names what nobody looks at afterwards."""
        group = pb.RowGroup(context=context, part=1, picks=range(0, 500, 7))
        queries = pb.AttendGroup(
            rows=group, n_q=1, n_q_heads=2, q_dtype=pb.DTYPE_F32, o_dtype=pb.DTYPE_F32
        )
        named = {"schema": self.schema, "digests": b"".join(digests)}
        prey = self.digests(2, 8)
        self.store.PutBlocks(self.put_request(prey[:2], (0, 1)))
        twins = [self.open(prey, ttl_ms=3600000).context for _ in range(3)]
        hold = self.store.Hold(pb.HoldRequest(context=twins[2], ttl_ms=3600000)).hold
        saved = pb.SavedContext(
            name="prey", schema=self.schema, n_blocks=8, promise=pb.PROMISE_DURABLE
        )
        return {
            "Describe": pb.DescribeRequest(),
            "Stats": pb.StatsRequest(),
            "RegisterSchema": pb.RegisterSchemaRequest(schema=base.good_schema()),
            "PutBlocks": self.put_request(digests[:2], (0, 1)),
            "MatchPrefix": pb.MatchPrefixRequest(parts=[0, 1], **named),
            "OpenContext": pb.OpenContextRequest(ttl_ms=500, **named),
            "ExtendContext": pb.ExtendContextRequest(context=context, digests=digests[0]),
            "FetchRows": pb.FetchRowsRequest(groups=[group]),
            "FetchRowsStream": pb.FetchRowsStreamRequest(groups=[group]),
            "AttendRows": pb.AttendRowsRequest(
                groups=[queries], data=bytes(2 * 4 * base.ROW_BYTES[1] // 4)
            ),
            "FetchBlocks": pb.FetchBlocksRequest(parts=[0, 1], **named),
            "CloseContext": pb.CloseContextRequest(context=twins[0]),
            "TruncateContext": pb.TruncateContextRequest(context=twins[1], n_blocks=7),
            "ForkContext": pb.ForkContextRequest(context=twins[2], n_blocks=3, ttl_ms=500),
            "Erase": pb.EraseRequest(schema=self.schema, digests=b"".join(prey[:3]), parts=[0, 1]),
            "Hold": pb.HoldRequest(context=twins[2], ttl_ms=500),
            "Release": pb.ReleaseRequest(hold=hold),
            "Prefetch": pb.PrefetchRequest(context=twins[2], parts=[0, 1], tier=pb.TIER_DRAM),
            "PutContext": pb.PutContextRequest(
                context=saved, upload=1, replace=True, data=b"".join(prey)
            ),
            "GetContext": pb.GetContextRequest(name="prey"),
            "ListContexts": pb.ListContextsRequest(max=10),
            "DeleteContext": pb.DeleteContextRequest(name="prey"),
            "GetSchema": pb.GetSchemaRequest(schema=self.schema),
            "MapContext": pb.MapContextRequest(context=twins[2], parts=[0, 1]),
            "PutBlocksStream": pb.PutBlocksStreamRequest(
                offers=[
                    pb.PutOffer(
                        schema=self.schema, digest=digest, part=1, len_bytes=65536, promise=promise
                    )
                    for digest, promise in zip(digests[:2], (1, 2))
                ],
            ),
        }

    def mutate(self, chance, data):
        data = bytearray(data[:60000])
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            at = chance.randrange(len(data) + 1)
            kind = chance.randrange(6)
            if kind == 0:
                data[at:at] = chance.randbytes(chance.randrange(1, 9))
            elif kind == 1:
                del data[at : at + chance.randrange(1, 40)]
            elif kind == 2:
                data[at:at] = data[chance.randrange(len(data) + 1) :][:200]
            elif kind == 3:
                del data[at:]
            elif at < len(data):
                data[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
        return bytes(data)

    def send(self, calls, chance, seeds):
        """A hundred at once; any gRPC status is fine, silence is not."""
        flying = []
        for _ in range(100):
            name = chance.choice(list(seeds))
            data = self.mutate(chance, seeds[name])
            if chance.randrange(10) == 0:
                data = chance.randbytes(chance.randrange(300))
            call = calls[name]
            if name in STREAMS:
                flying.append((list, call(data, timeout=60)))
            else:
                flying.append((lambda future: future.result(), call.future(data, timeout=60)))
        for wait, call in flying:
            try:
                wait(call)
            except grpc.RpcError as error:
                self.statuses[error.code()] = self.statuses.get(error.code(), 0) + 1
                continue
            self.statuses["OK"] = self.statuses.get("OK", 0) + 1

    def test_mutated_requests(self):
        print("seed %d" % SEED)
        chance = random.Random(SEED)
        digests = self.digests(1, 8)
        for first in range(0, 8, 2):
            put = self.put_request(digests[first : first + 2], (0, 1, 7), None, first)
            self.assertEqual(set(self.store.PutBlocks(put).status), {pb.ITEM_OK})
        context = self.open(digests, ttl_ms=3600000).context
        for name, message in self.seeds(digests, context).items():
            if name == "MapContext":
                continue  # over shm:// only; here it is refused, altered or not
            request = iter([message]) if name == "PutBlocksStream" else message
            reply = getattr(self.store, name)(request, timeout=60)  # unaltered, each is fine
            if name in STREAMS:
                list(reply)
        seeds = self.seeds(digests, context)
        methods = pb.DESCRIPTOR.services_by_name["KvCache"].methods_by_name
        self.assertEqual(set(seeds), set(methods))
        seeds = {name: message.SerializeToString() for name, message in seeds.items()}
        kinds = (self.channel.unary_unary, self.channel.unary_stream)
        calls = {name: kinds[name in STREAMS]("/kvasir.v1.KvCache/" + name) for name in seeds}
        self.statuses = {}
        half = 0.0
        for done in range(0, MUTATED, 100):
            if done == MUTATED // 200 * 100:
                half = self.memory_mib()
            self.send(calls, chance, seeds)
        grown = self.memory_mib() - half
        print("%d requests: %s; %.1f MiB more over the second half"
              % (MUTATED, {str(k): v for k, v in self.statuses.items()}, grown))
        self.assertGreater(self.statuses.get(grpc.StatusCode.INVALID_ARGUMENT, 0), MUTATED / 10)
        self.assertGreater(self.statuses.get("OK", 0), MUTATED / 50)
        self.assertNotIn(grpc.StatusCode.UNAVAILABLE, self.statuses)
        self.assertNotIn(grpc.StatusCode.DEADLINE_EXCEEDED, self.statuses)
        self.assertTrue(SANITIZED or grown < 32)
        self.intact(digests)

    def intact(self, digests):
        context = self.open(digests).context  # the other may have been met by chance
        for part in (0, 1, 7):
            picks = list(range(8 * base.BLOCK_TOKENS))
            group = pb.RowGroup(context=context, part=part, picks=picks)
            reply = self.store.FetchRows(pb.FetchRowsRequest(groups=[group]))
            self.assertEqual(len(reply.missing), 0)
            self.assertEqual(reply.data, b"".join(self.value(part, b) for b in range(8)))


class Stop(Case):
    def test_with_watchers_and_strangers(self):
        """Nobody who just hangs on keeps the server from stopping."""
        links = [self.dial(), self.dial(PREFACE + SETTINGS)]
        watch = self.health.Watch(base.health_pb.HealthCheckRequest())
        next(watch)
        start = time.monotonic()
        self.assertEqual(self.server.stop(signal.SIGTERM), 0)
        self.assertLess(time.monotonic() - start, 60)
        for link in links:
            link.close()


if __name__ == "__main__":
    try:
        unittest.main(verbosity=2)
    finally:
        shutil.rmtree(base.FOLDER, ignore_errors=True)
