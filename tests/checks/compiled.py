"""Checks that need a compiler or the clang tools."""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import time

PUBLIC_ROOTS = ["proto/include", "client/include", "kernels/include", "worker/include"]
# Headers that other modules see without being public must stand alone too, in C.
SHARED_ROOTS = ["proto/base", "proto/wire", "proto/transport", "cachesvc/tier"]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fsyntax-only"]


class Missing(Exception):
    """A tool is not installed: the check is skipped, out loud."""


def tool(*names):
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    raise Missing("none of %s is installed" % ", ".join(names))


def run_all(commands):
    """Runs commands on all cores; gives (command, its output) of those that failed."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        done = pool.map(
            lambda c: subprocess.run(c, capture_output=True, text=True, check=False), commands
        )
        return [(c, d.stdout + d.stderr) for c, d in zip(commands, done) if d.returncode != 0]


def check_headers(tree):
    cc, cxx = tool("cc", "gcc", "clang-14"), tool("c++", "g++")
    roots = [flag for root in PUBLIC_ROOTS for flag in ("-I", tree.path(root))]
    commands = []
    for name in tree.files:
        if not name.endswith(".h"):
            continue
        path = tree.path(name)
        if any(name.startswith(root + "/") for root in PUBLIC_ROOTS):
            commands.append([cc, "-std=c11", *WARNINGS, *roots, "-x", "c", path])
            commands.append([cxx, "-std=c++17", *WARNINGS, *roots, "-x", "c++", path])
        elif os.path.dirname(name) in SHARED_ROOTS and "_private" not in name:
            inner = ["-D_GNU_SOURCE", "-I", tree.path("proto"), "-I", tree.path("cachesvc")]
            if "_internal" not in name and "lmdb" not in name:
                commands.append([cc, "-std=c11", *WARNINGS, *roots, *inner, "-x", "c", path])
    failed = run_all(commands)
    if not commands:
        return ["no header found: wrong root?"]
    return ["%s alone as %s:\n%s" % (c[-1], c[1], output) for c, output in failed]


def check_format(tree):
    clang_format = tool("clang-format-14", "clang-format")
    files = [n for n in tree.c_files() if not n.endswith(".def")]
    groups = [files[i : i + 16] for i in range(0, len(files), 16)]
    commands = [
        [clang_format, "--dry-run", "-Werror", "-style=file", *(tree.path(n) for n in group)]
        for group in groups
    ]
    lines = "".join(output for _, output in run_all(commands)).split("\n")
    places = [line.split(":")[:2] for line in lines if "clang-format-violations" in line]
    return [
        "%s:%s: clang-format -i would change %d places"
        % (os.path.relpath(path, tree.root), line, sum(p[0] == path for p in places))
        for path, line in {path: line for path, line in reversed(places)}.items()
    ]


def tidy_key(entry, config, root):
    """Names the result of one file: its preprocessed text, its command and the rules.

    The tree's own place is left out of it, so that every checkout knows what was clean in another.
    Comments are part of the text, for NOLINT is one, and so are definitions of macros.
    """
    words = entry["command"].split()
    while words and os.path.basename(words[0]) in ("ccache",):
        words = words[1:]
    if "-o" in words:
        at = words.index("-o")
        words = words[:at] + words[at + 2 :]
    words = [w for w in words if w not in ("-c", "-MD")]
    done = subprocess.run(
        words + ["-E", "-C", "-dD"], cwd=entry["directory"], capture_output=True, check=False
    )
    text = b"\0".join([" ".join(words).encode(), config, done.stdout])
    return hashlib.sha256(text.replace(root.encode(), b"")).hexdigest()


def clean_folder():
    """The folder that remembers clean files, of all checkouts; what is a month old goes."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = os.path.join(home, "kvasir-lint")
    os.makedirs(folder, exist_ok=True)
    for stamp in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # another checkout was faster
            if stamp.stat().st_mtime < time.time() - 30 * 86400:
                os.unlink(stamp.path)
    return folder


def tidy_one(tidy, entry, config, root, database, clean):
    """Lints one file, or remembers that the very same text was clean."""
    # The analyzer does not see that cmocka's asserts end a test, so it walks on into what they
    # rule out. Tests get the other checks.
    tests = os.sep + "tests" + os.sep in entry["file"]
    extra = ["--checks=-clang-analyzer-*"] if tests else []
    stamp = os.path.join(clean, tidy_key(entry, config, root))
    if os.path.exists(stamp):
        with contextlib.suppress(FileNotFoundError):
            os.utime(stamp)
        return None
    done = subprocess.run(
        [tidy, "-p", database, "--quiet", *extra, "--warnings-as-errors=*",
         "--extra-arg=-Wno-unknown-warning-option", entry["file"]],
        capture_output=True, text=True, check=False,
    )
    if done.returncode == 0:
        with open(stamp, "w", encoding="utf-8"):
            pass
        return None
    if not done.stdout.strip():
        return "%s: clang-tidy ended with %d: %s" % (entry["file"], done.returncode, done.stderr)
    return done.stdout


def check_tidy(tree, build):
    tidy = tool("clang-tidy-14", "clang-tidy")
    database = os.path.join(build or "", "compile_commands.json")
    if not build or not os.path.exists(database):
        raise Missing("no compile_commands.json: give --build FOLDER")
    with open(database, encoding="utf-8") as file:
        entries = json.load(file)
    with open(tree.path(".clang-tidy"), "rb") as file:
        rules = file.read()
    # What judged a file clean is part of its name: the program's version and the rules.
    version = subprocess.run([tidy, "--version"], capture_output=True, check=True).stdout
    config = version + rules
    root = os.path.realpath(tree.root) + os.sep
    build_root = os.path.realpath(build) + os.sep
    own = {}
    for entry in entries:
        path = os.path.realpath(os.path.join(entry["directory"], entry["file"]))
        if path.startswith(root) and not path.startswith(build_root) and path.endswith(".c"):
            own.setdefault(path, entry)
    once = os.path.join(build, "tidy-once")
    os.makedirs(once, exist_ok=True)
    # A file that two targets compile is looked at once: clang-tidy 14 would do it twice in one
    # process, and its va_list check does not stand that.
    with open(os.path.join(once, "compile_commands.json"), "w", encoding="utf-8") as file:
        json.dump(list(own.values()), file)
    clean = clean_folder()
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        results = pool.map(
            lambda e: tidy_one(tidy, e, config, root, once, clean), own.values()
        )
        return [r for r in results if r is not None]
