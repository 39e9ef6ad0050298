"""A real cachesvc for tests in Python, and stubs made from the project's own .proto files.

KVASIR_CACHESVC names the program; ctest sets it.
"""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
START_SECONDS = 120


class Cachesvc:
    """One daemon in a folder of its own; it can be stopped, killed and started again."""

    def __init__(self, *args):
        self.folder = tempfile.mkdtemp(prefix="kvasir-")
        self.args = args
        self.listen = "grpc://127.0.0.1:0"
        self.process = None
        self.start()

    def start(self):
        ready = os.path.join(self.folder, "ready")
        if os.path.exists(ready):
            os.unlink(ready)
        program = os.environ["KVASIR_CACHESVC"]
        words = [program, "--listen", self.listen, "--ready-file", ready]
        words += [word.replace("FOLDER", self.folder) for word in self.args]
        with open(self.log_path(), "ab") as log:
            self.process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=log)
        end = time.monotonic() + START_SECONDS
        while not os.path.exists(ready):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("cachesvc did not start:\n" + self.log())
            time.sleep(0.01)
        with open(ready) as stream:
            self.listen = stream.readline().strip()
        self.address = self.listen[len("grpc://") :]

    def log_path(self):
        return os.path.join(self.folder, "cachesvc.log")

    def log(self):
        with open(self.log_path(), errors="replace") as stream:
            return stream.read()

    def stop(self, how=signal.SIGTERM):
        """Ends it; gives its exit status."""
        self.process.send_signal(how)
        return self.process.wait(120)

    def pause(self):
        """Every thread of it stands still until resume."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = "/proc/%d/task" % self.process.pid
        for task in os.listdir(tasks):
            while True:
                with open(os.path.join(tasks, task, "stat")) as stream:
                    if stream.read().rsplit(") ", 1)[1][0] == "T":
                        break
                time.sleep(0.001)

    def resume(self):
        self.process.send_signal(signal.SIGCONT)

    def close(self):
        """Ends it for good; gives its exit status."""
        status = self.stop() if self.process.poll() is None else self.process.returncode
        if status not in (0, -signal.SIGKILL):  # what it said last says why
            sys.stderr.write("cachesvc ended with %d:\n%s" % (status, self.log()[-4000:]))
        shutil.rmtree(self.folder)
        return status


def stubs(folder):
    """Generates Python code for kvasir.proto and health.proto in folder; gives the four modules:
    kvasir_pb2, kvasir_pb2_grpc, health_pb2, health_pb2_grpc."""
    plugin = shutil.which("grpc_python_plugin")
    proto = os.path.join(ROOT, "proto")
    subprocess.run(
        ["protoc", "-I", proto, "--python_out=" + folder, "--grpc_python_out=" + folder]
        + ["--plugin=protoc-gen-grpc_python=" + plugin]
        + [os.path.join(proto, name) for name in ("kvasir.proto", "health.proto")],
        check=True,
    )
    sys.path.insert(0, folder)
    names = ("kvasir_pb2", "kvasir_pb2_grpc", "health_pb2", "health_pb2_grpc")
    return [importlib.import_module(name) for name in names]
