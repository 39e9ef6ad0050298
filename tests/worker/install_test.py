"""An installed tree serves a program outside the source tree: headers, library, pkg-config, tools.

Installs the build folder (KVASIR_BUILD) into a temporary prefix, moves it, and compiles with
KVASIR_CC and what pkg-config says.
"""

import glob
import os
import shutil
import subprocess
import sys
import tempfile
import unittest

PROGRAM = """
#include <kvc/client.h>
#include <kvw/worker.h>
#include <stdio.h>
int main(void)
{
    kvw_opts opts = {.size_bytes = sizeof(opts), .model = "m", .n_layers = 1, .n_q_heads = 2,
                     .n_kv_heads = 1, .head_dim = 16, .dtype = KVK_F32, .selector = "tokenselect"};
    kvw_worker *worker = NULL;
    kvc_client *client = NULL;
    kvc_client_opts to = {.size_bytes = sizeof(to), .uris = "nosuch://x"};
    kvc_status refused = kvc_client_open(&to, &client);
    kvc_status status = kvw_open(&opts, &worker);
    printf("%s %d %s\\n", kvc_status_name(status), refused != KVC_OK, kvw_last_error());
    kvw_close(worker);
    return 0;
}
"""


def run(*words, **kwargs):
    done = subprocess.run(words, capture_output=True, text=True, check=False, **kwargs)
    if done.returncode != 0:
        raise AssertionError(f"{words}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


class Installed(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="kvasir-")
        self.addCleanup(shutil.rmtree, self.folder)
        first, self.prefix = self.folder + "/first", self.folder + "/moved"
        run("cmake", "--install", os.environ["KVASIR_BUILD"], "--prefix", first)
        os.rename(first, self.prefix)
        (self.pc,) = glob.glob(self.prefix + "/lib*/**/kvasir.pc", recursive=True)
        self.lib = os.path.dirname(os.path.dirname(self.pc))

    def test_a_program_builds_and_runs(self):
        source, program = self.folder + "/main.c", self.folder + "/main"
        with open(source, "w", encoding="utf-8") as stream:
            stream.write(PROGRAM)
        where = {**os.environ, "PKG_CONFIG_PATH": os.path.dirname(self.pc)}
        flags = run("pkg-config", "--cflags", "--libs", "kvasir", env=where).split()
        strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
        run(os.environ["KVASIR_CC"], *strict, source, *flags, "-o", program, cwd=self.folder)
        said = run(program, env={**os.environ, "LD_LIBRARY_PATH": self.lib})
        self.assertEqual(said.split()[:2], ["OK", "1"], said)

    def test_the_tools_run(self):
        for tool in ("cachesvc", "kvctl"):
            self.assertIn(tool, run(f"{self.prefix}/bin/{tool}", "--help"))


if __name__ == "__main__":
    for tool in ("cmake", "pkg-config"):
        if shutil.which(tool) is None:
            print(f"SKIPPED: there is no {tool}")
            sys.exit(77)
    unittest.main(verbosity=2)
