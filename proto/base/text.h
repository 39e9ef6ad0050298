/*
 * text.h: numbers with units as people write them, and text that grows.
 *
 * Units: KiB, MiB, GiB, TiB for bytes (none: bytes), ms, s, m, h for durations. Any thread; a
 * kvc_strbuf has one owner at a time.
 */
#ifndef KVC_BASE_TEXT_H
#define KVC_BASE_TEXT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "kvc/status.h"

#define KVC_TEXT_BYTES 32 /* fits what each function below formats, NUL included */

/* Decimal digits only. INVALID: anything else, or past 2^64 - 1. */
kvc_status kvc_uint_parse(const char *text, uint64_t *value_p) KVC_MUST_CHECK;
/* "65536", "64KiB" ... "1TiB". INVALID otherwise or on overflow. */
kvc_status kvc_bytes_parse(const char *text, uint64_t *bytes_p) KVC_MUST_CHECK;
/* "20ms", "5s", "3m", "2h", "0"; other numbers need a unit. INVALID otherwise or on overflow. */
kvc_status kvc_duration_parse(const char *text, uint64_t *duration_ns_p) KVC_MUST_CHECK;
/* true, yes, on, 1 / false, no, off, 0. INVALID otherwise. */
kvc_status kvc_bool_parse(const char *text, bool *value_p) KVC_MUST_CHECK;

/* Exact: the largest unit that divides it, and kvc_bytes_parse gives it back: "2GiB", "1000". */
const char *kvc_bytes_text(uint64_t bytes, char out[KVC_TEXT_BYTES]);
/* Exact down to the millisecond: "5s", "1500ms". What is below is cut off. */
const char *kvc_duration_text(uint64_t duration_ns, char out[KVC_TEXT_BYTES]);
/* For people, three digits: "999 B", "1.46 GiB". */
const char *kvc_bytes_short(uint64_t bytes, char out[KVC_TEXT_BYTES]);
/* For people, three digits: "172 us", "1.24 ms", "5.00 s", "2m 05s", "3h 20m". */
const char *kvc_duration_short(uint64_t duration_ns, char out[KVC_TEXT_BYTES]);

/* Single-character edits between two texts (insert, delete, replace); UINT32_MAX past 63 bytes. */
uint32_t kvc_edit_distance(const char *a, const char *b);

/* Text that grows, always NUL-terminated once something was put. Once failed, it stays failed. */
typedef struct kvc_strbuf {
    char *text; /* malloc'd; NULL while empty */
    size_t len_bytes, size_bytes;
    bool failed; /* memory ran out: what is in text is incomplete */
} kvc_strbuf;

void kvc_strbuf_put(kvc_strbuf *buf, const char *bytes, size_t len_bytes);
void kvc_strbuf_putf(kvc_strbuf *buf, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Gives the text, "" when nothing was put; NULL, everything freed, when memory ran out. */
char *kvc_strbuf_take(kvc_strbuf *buf);

#endif
