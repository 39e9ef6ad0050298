/*
 * wire_internal.h: what the files of proto/wire share; nobody else includes it.
 *
 * Decoding goes split -> check -> unpack -> convert. After the check the header is known to hold
 * only sane tags, so the unpacker's memory is bounded by it. Everything lives in one arena.
 */
#ifndef KVCI_WIRE_INTERNAL_H
#define KVCI_WIRE_INTERNAL_H

#include "wire/wire.h"

#include "kvasir.pb-c.h"

#define KVCI_BULK_FIELD     15u
#define KVCI_TAIL_BYTES_MAX 11u /* one tag byte and the longest varint */

#define KVCI_TIERS_MAX    64u
#define KVCI_SCHEMAS_MAX  4096u
#define KVCI_COUNTERS_MAX 4096u

/* A message without its bulk field, and where the bulk lies in the received bytes. */
typedef struct kvci_split {
    uint8_t *head; /* contiguous, in the arena */
    size_t head_bytes;
    struct iovec *data; /* [n_data], in the arena; points into the input */
    uint32_t n_data;
    uint64_t data_bytes;
} kvci_split;

/* Message types of a method; NULL never. */
const ProtobufCMessageDescriptor *kvci_request_type(kvc_method method);
const ProtobufCMessageDescriptor *kvci_reply_type(kvc_method method);

/* Walks the top-level tags of in [n_in]; unknown fields are dropped. PROTOCOL, INVALID (header
 * or bulk too long), NO_MEMORY. *why_p is set on failure. */
kvc_status kvci_split_message(const ProtobufCMessageDescriptor *type, const struct iovec *in,
                              uint32_t n_in, kvc_arena *arena, kvci_split *split_p,
                              const char **why_p) KVC_MUST_CHECK;

/* Checks contiguous bytes against their type, nested messages included: tags, wire types, lengths,
 * strings without NUL, and no more fields than any valid message has. */
kvc_status kvci_check_message(const ProtobufCMessageDescriptor *type, const uint8_t *bytes,
                              size_t len_bytes, const char **why_p) KVC_MUST_CHECK;

/* kvci_split_message, kvci_check_message and protobuf-c's unpacking into the arena. */
kvc_status kvci_unpack(const ProtobufCMessageDescriptor *type, const struct iovec *in,
                       uint32_t n_in, kvc_arena *arena, kvci_split *split_p,
                       ProtobufCMessage **msg_p, const char **why_p) KVC_MUST_CHECK;

/* INVALID unless bytes holds exactly one digest. */
kvc_status kvci_get_digest(const ProtobufCBinaryData *bytes, kvc_digest *digest_p) KVC_MUST_CHECK;
/* A run of digests, borrowed from bytes. INVALID: not a multiple of 32, or too many. */
kvc_status kvci_get_digests(const ProtobufCBinaryData *bytes, uint32_t *n_p,
                            const kvc_digest **digests_p) KVC_MUST_CHECK;
/* True if text has at most max_bytes. */
bool kvci_fits(const char *text, size_t max_bytes);

/* ---- one method's messages; the files encode_*.c, decode_*.c and those named after methods ----
 */

/* Where an encoder's bytes go; as kvci_pack. */
typedef struct kvci_out {
    kvc_arena *arena;
    const void **head_p;
    size_t *head_bytes_p;
} kvci_out;

/* One conversion of an unpacked message, with room in arena; why names the fault. */
typedef struct kvci_job {
    const ProtobufCMessage *msg;
    kvc_arena *arena;
    uint64_t data_bytes; /* of the message's payload */
    const char *why;
} kvci_job;

/* kvci_pack to where out says. */
kvc_status kvci_put(const kvci_out *out, const ProtobufCMessage *msg,
                    uint64_t data_bytes) KVC_MUST_CHECK;

/* Gives the fault and returns INVALID. */
static inline kvc_status kvci_refuse(kvci_job *job, const char *why)
{
    job->why = why;
    return KVC_INVALID;
}

static inline kvc_status kvci_no_memory(kvci_job *job)
{
    job->why = "memory for one message is out";
    return KVC_NO_MEMORY;
}

#define KVC_METHOD(upper, lower, name, flags)                                                      \
    kvc_status kvci_put_##lower##_request(const kvc_request *req, const kvci_out *out);            \
    kvc_status kvci_get_##lower##_request(kvci_job *job, kvc_request *req);                        \
    kvc_status kvci_put_##lower##_reply(const kvc_reply *reply, const kvci_out *out);              \
    kvc_status kvci_get_##lower##_reply(kvci_job *job, kvc_reply *reply);
#include "wire/methods.def"
#undef KVC_METHOD

/* What FetchRows and FetchRowsStream share; errors as of the functions above. */
kvc_status kvci_put_groups(const kvc_request *req, kvc_arena *arena,
                           Kvasir__V1__RowGroup ***list_p);
kvc_status kvci_get_groups(kvci_job *job, Kvasir__V1__RowGroup **msgs, size_t n, kvc_request *req);
kvc_status kvci_put_missing(const kvc_reply *reply, kvc_arena *arena,
                            Kvasir__V1__MissingRow ***list_p);
kvc_status kvci_get_missing(kvci_job *job, Kvasir__V1__MissingRow **msgs, size_t n,
                            kvc_reply *reply);
/* A schema inside a message; errors as of the functions above. */
kvc_status kvci_put_schema(const kvc_schema *schema, kvc_arena *arena, Kvasir__V1__Schema *msg_p);
kvc_status kvci_get_schema(kvci_job *job, const Kvasir__V1__Schema *msg,
                           const kvc_schema **schema_p);
/* A status as the wire has it: without the sign. INVALID for a number that is no status. */
kvc_status kvci_put_status(int status, Kvasir__V1__ItemStatus *item_p);

extern const char kvci_bad_schema[], kvci_bad_digests[]; /* texts of decode_request.c */

/* Packs msg and, where data_bytes is not 0, appends the bulk field's tag and length. */
kvc_status kvci_pack(const ProtobufCMessage *msg, uint64_t data_bytes, kvc_arena *arena,
                     const void **head_p, size_t *head_bytes_p) KVC_MUST_CHECK;
ProtobufCBinaryData kvci_put_digest(const kvc_digest *digest);
ProtobufCBinaryData kvci_put_digests(const kvc_digest *digests, uint32_t n);
/* text, or "" for NULL; protobuf-c wants char * and only reads it. */
char *kvci_put_text(const char *text);
/* True if the iovecs sum up to data_bytes (data may be NULL: not known yet) within the limit. */
bool kvci_data_fits(const struct iovec *data, uint32_t n_data, uint64_t data_bytes);

#endif
