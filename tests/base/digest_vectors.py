#!/usr/bin/env python3
"""Recomputes every digest of digest_vectors.txt with hashlib and struct alone.

The vectors are the published contract of block, key and schema digests: a client in any language
can check itself against them. The C library checks itself against the same file. Nothing of the
library is used here, so that a mistake in it cannot hide.

Usage: digest_vectors.py FILE           check; exit status 1 when a digest differs
       digest_vectors.py --write FILE   fill in the digests (after adding cases by hand)
"""

import hashlib
import struct
import sys

ROOT = bytes(32)
PART_UINTS = (
    "dtype", "k_len_bytes", "k_off_bytes", "kind", "kv_head_count", "kv_head_first", "layer",
    "q_dim", "rope.original_max_position", "rope.stored_rotated", "rope.type", "row_bytes",
    "sinks", "v_dim", "v_len_bytes", "v_off_bytes", "window",
)
PART_DOUBLES = (
    "attention_scale", "rope.factor", "rope.high_freq_factor", "rope.low_freq_factor",
    "rope.theta", "softcap",
)


def encode(name):
    """Percent-encodes each byte below 0x21, above 0x7e, and the percent sign."""
    return "".join(
        chr(b) if 0x21 <= b <= 0x7E and b != 0x25 else "%%%02x" % b for b in name.encode()
    )


def schema_text(fields, parts):
    """The canonical text: one key=value line per field, keys sorted bytewise."""
    lines = {
        "model": encode(fields["model"]),
        "revision": encode(fields["revision"]),
        "recipe": encode(fields["recipe"]),
        "tp_size": str(int(fields["tp_size"])),
    }
    if int(fields.get("opaque", "0")):
        lines["opaque"] = "1"
    else:
        lines["block_tokens"] = str(int(fields["block_tokens"]))
    for part in parts:
        prefix = "part.%05d." % int(part["part"])
        for key in PART_UINTS:
            lines[prefix + key] = str(int(part.get(key, "0")))
        for key in PART_DOUBLES:
            lines[prefix + key] = "%.17g" % (float(part.get(key, "0")) + 0.0)
        lines[prefix + "codec"] = encode(part.get("codec", ""))
    return "".join("%s=%s\n" % (k, lines[k]) for k in sorted(lines, key=str.encode)).encode()


def expand_tokens(spec):
    """first:step:count, token i is (first + i * step) modulo 2^32."""
    first, step, count = (int(x) for x in spec.split(":"))
    return [(first + i * step) % 2**32 for i in range(count)]


def block_digest(schema, parent, tokens, extra):
    message = b"kvasir-block-v1" + schema + parent
    message += struct.pack("<I", len(tokens)) + struct.pack("<%dI" % len(tokens), *tokens)
    message += struct.pack("<I", len(extra)) + extra
    return hashlib.sha256(message).hexdigest()


def hex_or_empty(text):
    return b"" if text == "-" else bytes.fromhex(text)


def walk(lines):
    """Yields (line number, the digest as computed) for each digest line."""
    fields, parts = {}, []
    for number, line in enumerate(lines):
        key, _, rest = line.partition(" ")
        if key in ("model", "revision", "recipe", "tp_size", "block_tokens", "opaque"):
            fields[key] = rest
        elif key == "schema":
            fields, parts = {"model": "", "revision": "", "recipe": ""}, []
        elif key == "part":
            parts.append(dict(item.split("=", 1) for item in ("part=" + rest).split(" ")))
        elif key == "schema_digest":
            yield number, hashlib.sha256(schema_text(fields, parts)).hexdigest()
        elif key == "key":
            item = dict(word.split("=", 1) for word in rest.split(" "))
            text = bytes.fromhex(item["schema"]) + hex_or_empty(item["bytes"])
            yield number, hashlib.sha256(text).hexdigest()
        elif key == "block":
            item = dict(word.split("=", 1) for word in rest.split(" "))
            parent = ROOT if item["parent"] == "-" else bytes.fromhex(item["parent"])
            yield number, block_digest(
                bytes.fromhex(item["schema"]), parent, expand_tokens(item["tokens"]),
                hex_or_empty(item["extra"]),
            )


def main(arguments):
    write = arguments[:1] == ["--write"]
    path = arguments[-1]
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    wrong = count = 0
    for number, digest in walk(lines):
        count += 1
        head, _, written = lines[number].rpartition(" " if "digest=" not in lines[number] else "=")
        if write:
            separator = "=" if "digest=" in lines[number] else " "
            lines[number] = head + separator + digest
        elif written != digest:
            wrong += 1
            print("%s:%d: the file says %s, computed %s" % (path, number + 1, written, digest))
    if write:
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    print("%d digests, %d wrong" % (count, wrong))
    return 1 if wrong or count == 0 else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
