#!/usr/bin/env python3
"""Server reflection, v1 and v1alpha, from Python grpcio: a client that has no stubs finds the
services, builds their messages from what the server says, and calls them.

Needs what grpc_api_test needs. With the package grpcio-reflection its stock client is used as well.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
import unittest

sys.dont_write_bytecode = True
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import grpc_api_test as base  # noqa: E402  (exits with 77 where packages are missing)
import grpc  # noqa: E402
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: E402

try:
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
        ProtoReflectionDescriptorDatabase,
    )
except ImportError:
    ProtoReflectionDescriptorDatabase = None

PROTO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "proto")
SERVICES = ["kvasir.v1.KvCache", "grpc.health.v1.Health"]


def own_messages():
    """Request and response of reflection.proto, in a pool of their own: the stock package registers
    messages of the same names."""
    path = os.path.join(base.FOLDER, "reflection.pb")
    subprocess.run(
        ["protoc", "-I", PROTO, "--descriptor_set_out=" + path, PROTO + "/reflection.proto"],
        check=True,
    )
    with open(path, "rb") as stream:
        files = descriptor_pb2.FileDescriptorSet.FromString(stream.read())
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return [message_class(pool, "grpc.reflection.v1.ServerReflection" + n)
            for n in ("Request", "Response")]


def message_class(pool, name):
    return message_factory.MessageFactory(pool).GetPrototype(pool.FindMessageTypeByName(name))


Request, Response = own_messages()


class Reflection(base.Case):
    version = "v1"

    def ask(self, *requests):
        method = "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo" % self.version
        call = self.channel.stream_stream(
            method,
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )
        return list(call(iter(requests), timeout=60))

    def file(self, **question):
        (answer,) = self.ask(Request(**question))
        (data,) = answer.file_descriptor_response.file_descriptor_proto
        return descriptor_pb2.FileDescriptorProto.FromString(data)

    def test_services(self):
        (answer,) = self.ask(Request(host="h", list_services=""))
        self.assertEqual([s.name for s in answer.list_services_response.service], SERVICES)
        self.assertEqual(answer.valid_host, "h")
        self.assertEqual(answer.original_request, Request(host="h", list_services=""))

    def test_files(self):
        for question in (
            {"file_by_filename": "kvasir.proto"},
            {"file_containing_symbol": "kvasir.v1.KvCache"},
            {"file_containing_symbol": "kvasir.v1.KvCache.FetchRows"},
            {"file_containing_symbol": "kvasir.v1.FetchRowsReply"},
            {"file_containing_symbol": "kvasir.v1.FetchRowsReply.data"},
            {"file_containing_symbol": "kvasir.v1.ItemStatus"},
        ):
            file = self.file(**question)
            self.assertEqual((file.name, file.package), ("kvasir.proto", "kvasir.v1"), question)
        self.assertEqual(self.file(file_by_filename="health.proto").package, "grpc.health.v1")

    def test_what_is_not_there(self):
        absent = [{"file_by_filename": name} for name in ("", "kvasir", "/etc/passwd")]
        absent += [
            {"file_containing_symbol": name}
            for name in ("", ".", "kvasir.v1", "kvasir.v1.", "kvasir.v1.No", "xkvasir.v1.KvCache")
        ]
        absent += [{"file_containing_symbol": "kvasir.v1.KvCache.No"}, {}]
        absent += [{"all_extension_numbers_of_type": "kvasir.v1.No"}]
        absent += [{"file_containing_extension": {"containing_type": "kvasir.v1.Schema"}}]
        answers = self.ask(*[Request(**question) for question in absent])
        self.assertEqual(len(answers), len(absent))
        for answer, question in zip(answers, absent):
            self.assertEqual(answer.error_response.error_code, 5, question)
            self.assertEqual(answer.original_request, Request(**question))
        (answer,) = self.ask(Request(all_extension_numbers_of_type="kvasir.v1.Schema"))
        numbers = answer.all_extension_numbers_response
        self.assertEqual((numbers.base_type_name, list(numbers.extension_number)),
                         ("kvasir.v1.Schema", []))

    def test_a_client_without_stubs(self):
        pool = descriptor_pool.DescriptorPool()
        pool.Add(self.file(file_containing_symbol="kvasir.v1.KvCache"))
        service = pool.FindServiceByName("kvasir.v1.KvCache")
        streams = [m.name for m in service.methods if m.name in ("FetchRowsStream", "FetchBlocks")]
        self.assertEqual(len(streams), 2)
        method = service.FindMethodByName("Describe")
        call = self.channel.unary_unary(
            "/%s/%s" % (service.full_name, method.name),
            request_serializer=message_class(pool, method.input_type.full_name).SerializeToString,
            response_deserializer=message_class(pool, method.output_type.full_name).FromString,
        )
        reply = call(message_class(pool, "kvasir.v1.DescribeRequest")(), timeout=60)
        self.assertIn(self.schema, list(reply.schemas))

    def test_bad_requests(self):
        method = "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo" % self.version
        raw = self.channel.stream_stream(method)
        for data in (b"\xff\xff\xff", bytes(5000)):
            with self.assertRaises(grpc.RpcError) as caught:
                list(raw(iter([data]), timeout=60))
            self.assertEqual(caught.exception.code(), grpc.StatusCode.INVALID_ARGUMENT)
        self.assertEqual(self.ask(), [])
        self.serves()

    def test_too_many_and_clients_that_leave(self):
        def forever():
            yield Request(list_services="")
            stop.wait()

        stop = threading.Event()
        method = "/grpc.reflection.%s.ServerReflection/ServerReflectionInfo" % self.version
        call = self.channel.stream_stream(
            method,
            request_serializer=Request.SerializeToString,
            response_deserializer=Response.FromString,
        )
        streams = [call(forever()) for _ in range(64)]
        for stream in streams:
            next(stream)
        with self.assertRaises(grpc.RpcError) as caught:
            self.ask(Request(list_services=""))
        self.assertEqual(caught.exception.code(), grpc.StatusCode.RESOURCE_EXHAUSTED)
        for stream in streams:
            stream.cancel()
        stop.set()
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                self.test_services()
                return
            except grpc.RpcError:
                time.sleep(0.01)
        self.test_services()


class ReflectionAlpha(Reflection):
    version = "v1alpha"

    @unittest.skipIf(ProtoReflectionDescriptorDatabase is None, "grpcio-reflection is missing")
    def test_stock_client(self):
        database = ProtoReflectionDescriptorDatabase(self.channel)
        self.assertEqual(list(database.get_services()), SERVICES)
        pool = descriptor_pool.DescriptorPool(database)
        service = pool.FindServiceByName("kvasir.v1.KvCache")
        self.assertTrue(service.FindMethodByName("FetchBlocks").server_streaming)
        part = pool.FindMessageTypeByName("kvasir.v1.Part")
        self.assertEqual(part.fields_by_name["codec"].number, 19)
        with self.assertRaises(KeyError):
            pool.FindServiceByName("kvasir.v1.Nobody")


if __name__ == "__main__":
    try:
        unittest.main(verbosity=2)
    finally:
        shutil.rmtree(base.FOLDER, ignore_errors=True)
