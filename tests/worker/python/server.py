"""A cachesvc for a test; importing this skips the test, out loud, where there is none."""

import os
import signal
import subprocess
import sys
import time

import need

SERVER = os.environ.get("KVASIR_CACHESVC")
if not SERVER:
    print("SKIPPED: KVASIR_CACHESVC is not set")
    sys.exit(need.SKIPPED)


class Server:
    """A cachesvc over a folder, with RAM for a part of what is put."""

    def __init__(self, folder):
        self.folder, self.process = folder, None

    def start(self):
        """Starts it; the URI that it serves at."""
        ready = os.path.join(self.folder, "ready")
        if os.path.exists(ready):
            os.unlink(ready)
        command = [SERVER, "--listen", f"grpc+unix://{self.folder}/socket"]
        command += ["--dram-bytes", "64MiB", "--lmdb-path", f"{self.folder}/values"]
        command += ["--lmdb-bytes", "1GiB", "--ready-file", ready]
        with open(os.path.join(self.folder, "log"), "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        for _ in range(2400):
            if os.path.exists(ready) and os.path.getsize(ready):
                with open(ready, encoding="utf-8") as f:
                    return f.readline().split()[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        with open(os.path.join(self.folder, "log"), encoding="utf-8") as log:
            raise RuntimeError("cachesvc did not start:\n" + log.read())

    def stop(self, how=signal.SIGTERM):
        """Ends it and waits."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait(120)
