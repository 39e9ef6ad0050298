"""Who may include whom: the table of the design, applied to every #include of the tree.

Paths are matched by the longest prefix. A quoted include is resolved as the compiler would: beside
the file, in its module's folder, then in the public folders.
"""

import os
import re

# Module of a path: the longest prefix wins.
MODULES = {
    "proto/include/": "kvc",
    "proto/base/": "base",
    "proto/wire/": "wire",
    "proto/transport/": "transport",
    "kernels/": "kernels",
    "client/": "client",
    "cachesvc/tier/": "tier",
    "cachesvc/": "cachesvc",
    "worker/": "worker",
    "worker/examples/": "examples",
    "tests/": "tests",
    "deploy/": "deploy",
}

# What each module may include beside itself and the public types (kvc). Tests may include anything.
ALLOWED = {
    "kvc": set(),
    "base": set(),
    "wire": {"base"},
    "transport": {"wire", "base"},
    "client": {"transport", "wire", "base"},
    "kernels": set(),
    "tier": {"base"},
    "cachesvc": {"tier", "transport", "wire", "base", "kernels"},
    "worker": {"client", "kernels", "base"},
    "examples": {"worker", "client", "kernels", "base"},
    "deploy": set(),
}

# Of these, other modules see the public folder only.
PUBLIC_FOLDERS = {
    "kernels": "kernels/include/",
    "client": "client/include/",
    "worker": "worker/include/",
}

# kernels/ may use the status alone, so that it builds without the floor.
KERNELS_MAY_SEE = {"proto/include/kvc/status.h"}

# (file pattern, included pattern): what the table above does not say.
EXCEPTIONS = [
    (r"cachesvc/tier/.*gpu.*", r"kernels/include/kvk/(compute|cuda)\.h"),
    # Programs for people share one progress bar.
    (r"worker/examples/.*", r"client/kvctl/kvctl_progress\.h"),
    # The example makes its projection up; only the worker's own code writes such a file.
    (r"worker/examples/.*", r"worker/projection\.h"),
]

# Third-party headers, and the one place of each. Tests may see cmocka beside all of them.
THIRD_PARTY = [
    (r"grpc/.*|grpc\+\+/.*|absl/.*", r"proto/transport/.*grpc.*"),
    (r"infiniband/.*|rdma/.*", r"proto/transport/.*rdma.*"),
    (r"lmdb\.h", r"cachesvc/tier/.*lmdb.*"),
    (r"liburing.*\.h", r"cachesvc/tier/.*"),
    (r"cuda.*\.h|cooperative_groups.*|cub/.*|nv.*\.h|mma\.h", r"kernels/cuda/.*"),
    (r"cudaTypedefs\.h", r"kernels/cuda/.*"),
    (r"microhttpd\.h", r"cachesvc/admin_http\.c"),
    (r"openssl/.*", r"proto/base/digest\.c"),
    (r"xxhash\.h|xxh_x86dispatch\.h", r"proto/base/sum\.c"),
    (r"cyaml/.*", r"proto/base/config_yaml\.c"),
    (
        r"protobuf-c/.*|.*\.pb-c\.h",
        r"proto/wire/.*|proto/transport/grpc/(health|reflect)\.c|cachesvc/cluster/.*",
    ),
    (r"cmocka\.h", r"tests/.*"),
]

STANDARD = re.compile(
    r"(assert|complex|ctype|errno|fenv|float|inttypes|iso646|limits|locale|math|setjmp|signal|"
    r"stdalign|stdarg|stdatomic|stdbool|stddef|stdint|stdio|stdlib|stdnoreturn|string|tgmath|"
    r"threads|time|uchar|wchar|wctype|"
    r"aio|dirent|dlfcn|endian|fcntl|fnmatch|ftw|getopt|glob|grp|libgen|malloc|netdb|poll|pthread|"
    r"pwd|regex|sched|semaphore|spawn|strings|syslog|termios|unistd|execinfo|link|"
    r"immintrin|x86intrin|cpuid|arm_neon)\.h$|(sys|netinet|arpa|net|linux|asm|sanitizer)/.*\.h$"
)

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.MULTILINE)


def module_of(path):
    best = max((p for p in MODULES if path.startswith(p)), key=len, default=None)
    return MODULES.get(best)


def module_folder(path):
    return max((p for p in MODULES if path.startswith(p)), key=len, default="")


def resolve(files, includer, included):
    """The path of a header of the tree, or None."""
    roots = [os.path.dirname(includer), module_folder(includer), "proto/include", "proto"]
    roots += ["kernels/include", "client/include", "worker/include", "cachesvc", "tests/support"]
    # A module without an include folder of its own is seen from the top of its tree.
    roots += [includer.split("/")[0]]
    for root in roots:
        path = os.path.normpath(os.path.join(root, included))
        if path in files:
            return path
    # Found through a folder that only CMake names: the one file of that name, if it is one.
    same = [path for path in files if path.endswith("/" + included)]
    return same[0] if len(same) == 1 else None


def third_party_rule(includer, included):
    """The broken rule of an include that is not in the tree, or None."""
    if STANDARD.match(included):
        return None
    for pattern, home in THIRD_PARTY:
        if re.fullmatch(pattern, included):
            if re.fullmatch(home, includer) or module_of(includer) == "tests":
                return None
            return "%s belongs to %s alone" % (included, home)
    return "%s is in no table: add it to tests/checks/layers.py, with its one module" % included


def tree_rule(includer, target):
    """The broken rule of an include of the tree, or None."""
    own, other = module_of(includer), module_of(target)
    if own == "tests":
        return None
    if other == "tests":
        return "nothing includes tests"
    if own is None or other is None:
        return "not in a module"
    if any(re.fullmatch(f, includer) and re.fullmatch(t, target) for f, t in EXCEPTIONS):
        return None
    if own == other:
        return None
    if own == "kernels":
        return None if target in KERNELS_MAY_SEE else "kernels -> kvc/status.h only"
    if other == "kvc":
        return None
    if other not in ALLOWED[own]:
        return "%s -> %s is not in the design" % (own, other)
    folder = PUBLIC_FOLDERS.get(other)
    if folder and not target.startswith(folder):
        return "%s sees %s only" % (own, folder)
    if re.search(r"(_private|_internal)\.h$|(^|/)internal\.h$", target):
        return "private to its module"
    return None


def check(tree):
    """Every include of the tree that breaks a rule."""
    files = set(tree.files)
    wrong = []
    for name in tree.c_files():
        text = tree.text(name)
        for match in INCLUDE.finditer(text):
            bracket, included = match.groups()
            target = resolve(files, name, included) if bracket == '"' else None
            if target is None and re.match(r"(kvc|kvk|kvw|base|wire|transport|tier)/", included):
                if bracket == "<":
                    target = resolve(files, name, included)
            if target is None and bracket == '"' and module_of(name) == "tests":
                continue
            rule = tree_rule(name, target) if target else third_party_rule(name, included)
            if rule:
                line = text.count("\n", 0, match.start()) + 1
                wrong.append("%s:%d: includes %s: %s" % (name, line, included, rule))
    return wrong
