/*
 * wire.h: protobuf bytes <-> the plain structs of msg.h, every length checked.
 *
 * Encoding packs the header and, where there is a payload, appends field 15's tag and length, so
 * that header bytes followed by the payload bytes are one valid protobuf message. Decoding walks
 * the tags over scattered input, hands the payload on as iovecs and gives only the header to
 * protobuf-c. Pure functions, any thread, no I/O.
 */
#ifndef KVC_WIRE_WIRE_H
#define KVC_WIRE_WIRE_H

#include "base/arena.h"
#include "wire/msg.h"

/*
 * Bytes of the header of req, tag and length of the payload included; *head_p lives in arena.
 * INVALID: a count or length beyond the limits of kvc/types.h. NO_MEMORY.
 */
kvc_status kvc_wire_encode_request(const kvc_request *req, kvc_arena *arena, const void **head_p,
                                   size_t *head_bytes_p) KVC_MUST_CHECK;
kvc_status kvc_wire_encode_reply(const kvc_reply *reply, kvc_arena *arena, const void **head_p,
                                 size_t *head_bytes_p) KVC_MUST_CHECK;

/*
 * Decodes a message scattered over in [n_in], which must outlive *req_p (the payload points into
 * it). Fields may come in any order; the last `data` wins; unknown fields are skipped. PROTOCOL:
 * does not parse. INVALID: parses but breaks a limit or a fixed length (a digest that is not 32
 * bytes). why_p (may be NULL) gets a static text. Semantics (unknown part, wrong length) are not
 * judged here.
 */
kvc_status kvc_wire_decode_request(kvc_method method, const struct iovec *in, uint32_t n_in,
                                   kvc_arena *arena, kvc_request *req_p,
                                   const char **why_p) KVC_MUST_CHECK;
kvc_status kvc_wire_decode_reply(kvc_method method, const struct iovec *in, uint32_t n_in,
                                 kvc_arena *arena, kvc_reply *reply_p,
                                 const char **why_p) KVC_MUST_CHECK;

#endif
