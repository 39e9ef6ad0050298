#!/usr/bin/env python3
"""Feeds each check a small tree that breaks its rule, and one that does not.

A check that cannot fail proves nothing; this is the proof that each of them can.
"""

import os
import subprocess
import sys
import tempfile
import unittest

sys.dont_write_bytecode = True

HERE = os.path.dirname(os.path.abspath(__file__))
BASE = {
    "CMakeLists.txt": "project(x)\n",
    "README.md": "x\n",
    "LICENSE": "x\n",
    "proto/README.md": "x\n",
    "proto/base/README.md": "x\n",
    "proto/include/kvc/status.h": "/* status.h: x */\ntypedef int kvc_status;\n",
    "proto/include/kvc/types.h": '/* types.h: x */\n#include "kvc/status.h"\n',
    "proto/base/log.h": '/* log.h: x */\n#include "kvc/status.h"\n',
    "proto/base/log_private.h": "/* log_private.h: x */\n",
    "proto/wire/README.md": "x\n",
    "proto/wire/wire.h": '/* wire.h: x */\n#include "base/log.h"\n',
    "proto/transport/README.md": "x\n",
    "proto/transport/transport.h": '/* transport.h: x */\n#include "wire/wire.h"\n',
    "kernels/README.md": "x\n",
    "kernels/include/kvk/compute.h": '/* compute.h: x */\n#include "kvc/status.h"\n',
    "kernels/cpu/isa.h": "/* isa.h: x */\n",
    "client/README.md": "x\n",
    "client/include/kvc/client.h": '/* client.h: x */\n#include "kvc/types.h"\n',
    "cachesvc/README.md": "x\n",
    "cachesvc/server.h": "/* server.h: x */\n",
    "cachesvc/tier/README.md": "x\n",
    "cachesvc/tier/tier.h": "/* tier.h: x */\ntypedef int kvs_tier;\n",
    "worker/README.md": "x\n",
    "worker/include/kvw/worker.h": '/* worker.h: x */\n#include "kvc/status.h"\n',
    "tests/README.md": "x\n",
    "tests/support/support.h": "/* support.h: x */\n#include <cmocka.h>\n",
}


def c_file(name, body):
    return "/* %s: x */\n%s\n" % (os.path.basename(name), body)


class Checks(unittest.TestCase):
    def run_check(self, check, extra):
        with tempfile.TemporaryDirectory() as root:
            for name, text in {**BASE, **extra}.items():
                path = os.path.join(root, name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with open(path, "w", encoding="utf-8") as file:
                    file.write(text)
            done = subprocess.run(
                [sys.executable, os.path.join(HERE, "run"), "--root", root, check],
                capture_output=True, text=True, check=False,
            )
            return done.returncode, done.stdout + done.stderr

    def clean(self, check, extra=None):
        status, output = self.run_check(check, extra or {})
        self.assertEqual(status, 0, output)

    def caught(self, check, extra, wanted):
        status, output = self.run_check(check, extra)
        self.assertEqual(status, 1, output)
        self.assertIn(wanted, output)

    def includes(self, name, included):
        return {name: c_file(name, "#include %s" % included)}

    def test_layers_allow_the_design(self):
        allowed = [
            ("proto/base/a.c", '"base/log.h"'), ("proto/base/a.c", "<pthread.h>"),
            ("proto/base/a.c", '"log_private.h"'), ("proto/base/sum.c", "<xxhash.h>"),
            ("proto/wire/a.c", '"base/log.h"'), ("proto/wire/a.c", '"kvasir.pb-c.h"'),
            ("proto/transport/grpc/a.c", "<grpc/grpc.h>"),
            ("client/a.c", '"transport/transport.h"'), ("client/a.c", '"kvc/client.h"'),
            ("kernels/cpu/a.c", '"kvc/status.h"'), ("kernels/cpu/a.c", '"isa.h"'),
            ("cachesvc/tier/tier_lmdb.c", "<lmdb.h>"),
            ("cachesvc/admin_http.c", "<microhttpd.h>"),
            ("cachesvc/tier/tier_gpu.c", '"kvk/compute.h"'),
            ("cachesvc/a.c", '"tier/tier.h"'), ("cachesvc/a.c", '"kvk/compute.h"'),
            ("worker/a.c", '"kvc/client.h"'), ("worker/a.c", '"kvk/compute.h"'),
            ("tests/base/a.c", '"log_private.h"'), ("tests/cachesvc/a.c", '"server.h"'),
        ]
        for name, included in allowed:
            with self.subTest(name=name, included=included):
                self.clean("layers", self.includes(name, included))

    def test_layers_refuse_the_rest(self):
        refused = [
            ("proto/base/a.c", '"wire/wire.h"', "base -> wire"),
            ("proto/base/a.c", '"../wire/wire.h"', "base -> wire"),
            ("proto/wire/a.c", '"transport/transport.h"', "wire -> transport"),
            ("proto/wire/a.c", '"base/log_private.h"', "private to its module"),
            ("proto/transport/a.c", '"kvc/client.h"', "transport -> client"),
            ("proto/transport/shm/a.c", "<grpc/grpc.h>", "belongs to"),
            ("client/a.c", '"kvk/compute.h"', "client -> kernels"),
            ("client/a.c", '"server.h"', "client -> cachesvc"),
            ("kernels/cpu/a.c", '"transport/transport.h"', "kernels -> kvc/status.h only"),
            ("kernels/cpu/a.c", '"kvc/types.h"', "kernels -> kvc/status.h only"),
            ("cachesvc/a.c", '"kvw/worker.h"', "cachesvc -> worker"),
            ("cachesvc/a.c", "<lmdb.h>", "belongs to"),
            ("cachesvc/admin.c", "<microhttpd.h>", "belongs to"),
            ("cachesvc/a.c", '"cpu/isa.h"', "sees kernels/include/ only"),
            ("cachesvc/tier/tier_dram.c", '"kvk/compute.h"', "tier -> kernels"),
            ("cachesvc/tier/a.c", '"server.h"', "tier -> cachesvc"),
            ("worker/a.c", '"wire/wire.h"', "worker -> wire"),
            ("worker/a.c", '"support.h"', "nothing includes tests"),
            ("worker/a.c", "<curl/curl.h>", "is in no table"),
            ("worker/a.c", "<cuda_runtime.h>", "belongs to"),
            ("proto/base/a.c", "<openssl/evp.h>", "belongs to"),
        ]
        for name, included, wanted in refused:
            with self.subTest(name=name, included=included):
                self.caught("layers", self.includes(name, included), wanted)

    def test_lengths(self):
        self.clean("lengths", {"proto/base/a.c": "/* a.c: x */\n" + "int a;\n" * 599})
        self.caught("lengths", {"proto/base/a.c": "int a;\n" * 601}, "601 lines")
        body = "void f(void)\n{\n" + "    g();\n" * 68 + "}\n"
        self.clean("lengths", {"proto/base/a.c": body})
        body = "void f(void)\n{\n" + "    g();\n" * 69 + "}\n"
        self.caught("lengths", {"proto/base/a.c": body}, "a.c:2: a function of 71 lines")
        self.caught("lengths", {"tests/a.py": "def f():\n" + "    g()\n" * 71}, "of 72 lines")
        self.clean("lengths", {"proto/base/a.c": "/* %s */\n" % ("x" * 94)})
        self.caught("lengths", {"proto/base/a.c": "/* %s */\n" % ("x" * 95)}, "101 columns")

    def test_forbidden(self):
        for call in ("strcpy(a, b)", "sprintf (a)", "gets(a)", "atoi(a)", "system(a)"):
            self.caught("forbidden", {"tests/a.c": c_file("a.c", call + ";")}, "a.c:2:")
        for call in ("exit(1)", "abort()", "printf(a)", "fprintf(stderr, a)", "fputs(a, stdout)"):
            self.caught("forbidden", {"client/a.c": c_file("a.c", call + ";")}, "a library never")
            self.clean("forbidden", {"client/kvctl/a.c": c_file("a.c", call + ";")})
        self.caught("forbidden", {"worker/a.c": "#include <assert.h>\n"}, "base/assert.h")
        fine = 'snprintf(a); my_exit(1); x->abort(); /* exit(1) */ "exit(1)"; fprintf(file, a);'
        self.clean("forbidden", {"client/a.c": c_file("a.c", fine)})

    def test_marks(self):
        self.clean("marks", {"tests/a.c": c_file("a.c", 'mkdtemp("XXXX' + 'XX");')})
        for mark in ("TO" + "DO", "FIX" + "ME", "XX" + "X"):
            self.caught("marks", {"worker/a.c": c_file("a.c", "/* %s: x */" % mark)}, mark)

    def test_opening(self):
        self.clean("opening")
        self.caught("opening", {"worker/a.c": "int a;\n"}, "must open with")
        self.caught("opening", {"worker/a.c": "/* b.c: x */\n"}, "must open with")

    def test_layout(self):
        self.clean("layout")
        self.caught("layout", {"common/a.c": "x"}, "common: not agreed")
        self.caught("layout", {"proto/wire/sub/a.cc": "x"}, "C11 alone")
        saved = BASE.pop("client/README.md")
        try:
            self.caught("layout", {}, "client/README.md: missing")
        finally:
            BASE["client/README.md"] = saved

    def test_headers_stand_alone(self):
        self.clean("headers")
        name = "client/include/kvc/more.h"
        self.caught("headers", {name: c_file(name, "size_t f(void);")}, "std=c11")
        self.caught("headers", {name: c_file(name, "int f(int class);")}, "std=c++17")

    def test_format(self):
        style = {".clang-format": "BasedOnStyle: LLVM\n"}
        status, output = self.run_check("format", style)
        if status == 77:
            self.skipTest(output)
        self.assertEqual(status, 0, output)
        self.caught("format", {**style, "worker/a.c": "int   a ;\n"}, "worker/a.c:1: clang-format")


if __name__ == "__main__":
    unittest.main()
