/*
 * digest.h: the names of things, the same in every process and language.
 *
 * Block digest: SHA-256("kvasir-block-v1", schema digest, parent digest (32 zero bytes at the
 * root), u32le count, u32le token ids, u32le length, extra). Key digest, of opaque schemas:
 * SHA-256(schema digest, key bytes). Schema digest: SHA-256 of the schema's sorted key=value\n
 * text. Vectors are published in tests/base/digest_vectors.txt.
 */
#ifndef KVC_BASE_DIGEST_H
#define KVC_BASE_DIGEST_H

#include <stdbool.h>
#include <stddef.h>

#include "kvc/types.h"

#define KVC_DIGEST_HEX_BYTES 65 /* 64 hex digits and NUL */

/* SHA-256 of len bytes. IO if libcrypto fails. Any thread. */
kvc_status kvc_sha256(const void *data, size_t len_bytes, kvc_digest *digest_p) KVC_MUST_CHECK;

/*
 * Digest of one block. parent NULL: the root. tokens [n_tokens]; extra may be NULL when
 * extra_bytes is 0. INVALID: n_tokens out of KVC_BLOCK_TOKENS_MIN..MAX.
 */
kvc_status kvc_block_digest(const kvc_digest *schema, const kvc_digest *parent,
                            const uint32_t *tokens, uint32_t n_tokens, const void *extra,
                            uint32_t extra_bytes, kvc_digest *digest_p) KVC_MUST_CHECK;

/*
 * Digest of a key of an opaque schema: SHA-256 of the schema's digest and the key's bytes. key may
 * be NULL when key_bytes is 0. IO if libcrypto fails. Any thread.
 */
kvc_status kvc_key_digest(const kvc_digest *schema, const void *key, size_t key_bytes,
                          kvc_digest *digest_p) KVC_MUST_CHECK;

/*
 * Checks a schema: names and counts within limits, unique part ids up to KVC_MAX_PART_ID, slices
 * inside rows, at least one part, block_tokens a multiple of 16 within limits, block_tokens *
 * row_bytes <= max_value_bytes for each part, KV parts' K and V lengths = kv_heads * dim * dtype
 * size; an opaque one has no parts and no block_tokens. On INVALID, why_p (may be NULL) gets a
 * static text naming the rule that was broken.
 */
kvc_status kvc_schema_check(const kvc_schema *schema, uint32_t max_value_bytes,
                            const char **why_p) KVC_MUST_CHECK;

/*
 * The canonical text: keys sorted bytewise, one key=value\n each, part keys as part.<id in 5
 * digits>.<field>, doubles as %.17g, names percent-encoded where a byte is < 0x21, = 0x25 or
 * > 0x7e. *text_p is malloc'd and given to the caller (free). NO_MEMORY, INVALID.
 */
kvc_status kvc_schema_text(const kvc_schema *schema, char **text_p,
                           size_t *len_bytes_p) KVC_MUST_CHECK;
/* SHA-256 of kvc_schema_text. */
kvc_status kvc_schema_digest(const kvc_schema *schema, kvc_digest *digest_p) KVC_MUST_CHECK;

bool kvc_digest_equal(const kvc_digest *a, const kvc_digest *b);
void kvc_digest_hex(const kvc_digest *digest, char out[KVC_DIGEST_HEX_BYTES]);
/* INVALID unless text is exactly 64 hex digits. */
kvc_status kvc_digest_parse(const char *text, kvc_digest *digest_p) KVC_MUST_CHECK;

/* Deep copy in one malloc'd piece (free it); NULL when memory is out. */
kvc_schema *kvc_schema_copy(const kvc_schema *schema);

#endif
