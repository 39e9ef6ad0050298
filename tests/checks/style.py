"""Lengths, forbidden functions, marks and opening comments."""

import ast
import os
import re

import tree as trees

FILE_LINES = 600
# The protocol and its text stay in one file, which clients take as it is.
FILE_LINES_OF = {"proto/kvasir.proto": 900}
FUNCTION_LINES = 70
COLUMNS = 100

# Nowhere, tests included: each has a bounded or reentrant form.
FORBIDDEN = (
    "strcpy strcat sprintf vsprintf gets atoi atol atoll atof system tmpnam tempnam mktemp "
    "alloca strtok asctime ctime localtime gmtime rand srand rand_r"
).split()
# Nowhere but in programs and tests: a library never ends or talks over the head of its host.
LIBRARY_FORBIDDEN = (
    "exit _exit _Exit quick_exit abort printf vprintf puts putchar perror popen"
).split()
LIBRARY_STREAMS = re.compile(
    r"\b(?:fprintf|fputs|fputc|fwrite|vfprintf)\s*\([^;]*\b(?:stderr|stdout)\b"
)
# Main programs, and the one function whose purpose is to abort.
PROGRAMS = re.compile(
    r"cachesvc/main\.c|client/kvctl/.*|[^/]+/(?:examples|tools)/.*|tests/.*|deploy/.*"
)
MAY_ABORT = {"proto/base/assert.c"}

# Written in pieces, so that this file does not find itself.
MARKS = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK|TB" + r"D)\b")


def function_lengths(text):
    """(first line, lines) of each C function: clang-format puts both braces into column 0."""
    start = None
    for number, line in enumerate(text.split("\n"), 1):
        if line == "{":
            start = number
        elif line == "}" and start is not None:
            yield start, number - start + 1
            start = None


def python_lengths(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.lineno, node.end_lineno - node.lineno + 1


def check_lengths(tree):
    wrong = []
    for name in tree.source_files():
        lines = tree.lines(name)
        count = len(lines) - (lines[-1] == "")
        most = FILE_LINES_OF.get(name, FILE_LINES)
        if count > most:
            wrong.append("%s: %d lines, at most %d" % (name, count, most))
        for number, line in enumerate(lines, 1):
            if len(line) > COLUMNS:
                wrong.append("%s:%d: %d columns, at most %d" % (name, number, len(line), COLUMNS))
        functions = []
        if name in tree.c_files():
            functions = function_lengths(tree.text(name))
        elif name.endswith(".py") or "python" in lines[0]:
            functions = python_lengths(tree.text(name))
        for number, length in functions:
            if length > FUNCTION_LINES:
                wrong.append(
                    "%s:%d: a function of %d lines, at most %d"
                    % (name, number, length, FUNCTION_LINES)
                )
    return wrong


def check_forbidden(tree):
    wrong = []
    everywhere = re.compile(r"(?<![\w.>])(%s)\s*\(" % "|".join(FORBIDDEN))
    library = re.compile(r"(?<![\w.>])(%s)\s*\(" % "|".join(LIBRARY_FORBIDDEN))
    for name in tree.c_files():
        code = trees.code_only(tree.text(name))
        found = [(m.start(), m.group(1), "has a safer form") for m in everywhere.finditer(code)]
        includes = re.finditer(r"#\s*include\s*<assert\.h>", tree.text(name))
        found += [(m.start(), "assert.h", "use base/assert.h") for m in includes]
        if not PROGRAMS.fullmatch(name) and name not in MAY_ABORT:
            why = "a library never exits, aborts or prints"
            found += [(m.start(), m.group(1), why) for m in library.finditer(code)]
            found += [(m.start(), "output", why) for m in LIBRARY_STREAMS.finditer(code)]
        for at, what, why in sorted(found):
            wrong.append("%s:%d: %s: %s" % (name, code.count("\n", 0, at) + 1, what, why))
    return wrong


def check_marks(tree):
    """Unfinished work is not marked in the code; it is finished, or an issue."""
    wrong = []
    for name in tree.files:
        suffix = os.path.splitext(name)[1]
        if name in tree.source_files() or suffix in (".md", ".txt", ".yaml", ".json", ".def"):
            for number, line in enumerate(tree.lines(name), 1):
                if MARKS.search(line):
                    wrong.append("%s:%d: %s" % (name, number, MARKS.search(line).group(1)))
    return wrong


def check_opening(tree):
    """Each C file opens by saying what it is for."""
    wrong = []
    for name in tree.c_files():
        base = os.path.basename(name)
        if not re.match(r"/\*\s*(\* )?%s\b" % re.escape(base), tree.text(name)):
            wrong.append("%s:1: must open with /* %s: what it is for */" % (name, base))
    return wrong
