/*
 * text.c: parsing and formatting of numbers with units, edit distance, growing text.
 *
 * Any thread, no state, no locale: digits and units are matched byte by byte, so that a setting
 * means the same everywhere.
 */
#include "base/text.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NS_PER_MS    1000000ull
#define NS_PER_S     1000000000ull
#define NS_PER_M     (60 * NS_PER_S)
#define NS_PER_H     (3600 * NS_PER_S)
#define DISTANCE_MAX 63

struct unit {
    const char *name;
    uint64_t factor;
};

/* Largest first, as the exact formats need it. */
static const struct unit byte_units[] = {
    {"TiB", 1ull << 40}, {"GiB", 1ull << 30}, {"MiB", 1ull << 20}, {"KiB", 1ull << 10}, {"", 1},
};
static const struct unit time_units[] = {
    {"h", NS_PER_H},
    {"m", NS_PER_M},
    {"s", NS_PER_S},
    {"ms", NS_PER_MS},
};

#define N_BYTE_UNITS (sizeof(byte_units) / sizeof(byte_units[0]))
#define N_TIME_UNITS (sizeof(time_units) / sizeof(time_units[0]))

/* Reads leading digits. NULL: there are none, or too many; else what follows them. */
static const char *read_digits(const char *text, uint64_t *value_p)
{
    uint64_t value = 0;
    const char *at = text;
    for (; *at >= '0' && *at <= '9'; at++) {
        uint64_t digit = (uint64_t)(*at - '0');
        if (value > (UINT64_MAX - digit) / 10)
            return NULL;
        value = value * 10 + digit;
    }
    *value_p = value;
    return at == text ? NULL : at;
}

static kvc_status parse_units(const char *text, const struct unit *units, size_t n,
                              uint64_t *value_p)
{
    uint64_t value;
    const char *rest = read_digits(text, &value);
    if (rest == NULL)
        return KVC_INVALID;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(rest, units[i].name) != 0)
            continue;
        if (value > UINT64_MAX / units[i].factor)
            return KVC_INVALID;
        *value_p = value * units[i].factor;
        return KVC_OK;
    }
    return KVC_INVALID;
}

kvc_status kvc_uint_parse(const char *text, uint64_t *value_p)
{
    *value_p = 0;
    uint64_t value;
    const char *rest = read_digits(text, &value);
    if (rest == NULL || *rest != '\0')
        return KVC_INVALID;
    *value_p = value;
    return KVC_OK;
}

kvc_status kvc_bytes_parse(const char *text, uint64_t *bytes_p)
{
    *bytes_p = 0;
    return parse_units(text, byte_units, N_BYTE_UNITS, bytes_p);
}

kvc_status kvc_duration_parse(const char *text, uint64_t *duration_ns_p)
{
    *duration_ns_p = 0;
    if (strcmp(text, "0") == 0)
        return KVC_OK;
    return parse_units(text, time_units, N_TIME_UNITS, duration_ns_p);
}

kvc_status kvc_bool_parse(const char *text, bool *value_p)
{
    static const char *const words[][2] = {
        {"false", "true"}, {"no", "yes"}, {"off", "on"}, {"0", "1"}};
    *value_p = false;
    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        if (strcmp(text, words[i][0]) == 0)
            return KVC_OK;
        if (strcmp(text, words[i][1]) == 0) {
            *value_p = true;
            return KVC_OK;
        }
    }
    return KVC_INVALID;
}

const char *kvc_bytes_text(uint64_t bytes, char out[KVC_TEXT_BYTES])
{
    size_t i = bytes == 0 ? N_BYTE_UNITS - 1 : 0;
    while (i < N_BYTE_UNITS - 1 && bytes % byte_units[i].factor != 0)
        i++;
    const struct unit *unit = &byte_units[i];
    (void)snprintf(out, KVC_TEXT_BYTES, "%llu%s", (unsigned long long)(bytes / unit->factor),
                   unit->name);
    return out;
}

const char *kvc_duration_text(uint64_t duration_ns, char out[KVC_TEXT_BYTES])
{
    uint64_t whole_ns = duration_ns - duration_ns % NS_PER_MS;
    size_t i = 0;
    while (i < N_TIME_UNITS - 1 && whole_ns % time_units[i].factor != 0)
        i++;
    const struct unit *unit = &time_units[i];
    if (whole_ns == 0)
        (void)snprintf(out, KVC_TEXT_BYTES, "0");
    else
        (void)snprintf(out, KVC_TEXT_BYTES, "%llu%s", (unsigned long long)(whole_ns / unit->factor),
                       unit->name);
    return out;
}

/* value / factor with three digits in integers only, so that no locale puts a comma in. */
static void put_three_digits(uint64_t value, uint64_t factor, const char *unit,
                             char out[KVC_TEXT_BYTES])
{
    uint64_t whole = value / factor;
    unsigned hundredths = (unsigned)((double)(value % factor) * 100.0 / (double)factor);
    if (whole >= 100)
        (void)snprintf(out, KVC_TEXT_BYTES, "%llu %s", (unsigned long long)whole, unit);
    else if (whole >= 10)
        (void)snprintf(out, KVC_TEXT_BYTES, "%u.%u %s", (unsigned)whole, hundredths / 10, unit);
    else
        (void)snprintf(out, KVC_TEXT_BYTES, "%u.%02u %s", (unsigned)whole, hundredths, unit);
}

const char *kvc_bytes_short(uint64_t bytes, char out[KVC_TEXT_BYTES])
{
    size_t i = 0;
    while (i < N_BYTE_UNITS - 1 && bytes < byte_units[i].factor)
        i++;
    const struct unit *unit = &byte_units[i];
    if (i == N_BYTE_UNITS - 1)
        (void)snprintf(out, KVC_TEXT_BYTES, "%u B", (unsigned)bytes);
    else
        put_three_digits(bytes, unit->factor, unit->name, out);
    return out;
}

const char *kvc_duration_short(uint64_t duration_ns, char out[KVC_TEXT_BYTES])
{
    uint64_t seconds = duration_ns / NS_PER_S;
    if (duration_ns < 1000)
        (void)snprintf(out, KVC_TEXT_BYTES, "%u ns", (unsigned)duration_ns);
    else if (duration_ns < NS_PER_MS)
        put_three_digits(duration_ns, 1000, "us", out);
    else if (duration_ns < NS_PER_S)
        put_three_digits(duration_ns, NS_PER_MS, "ms", out);
    else if (duration_ns < NS_PER_M)
        put_three_digits(duration_ns, NS_PER_S, "s", out);
    else if (duration_ns < NS_PER_H)
        (void)snprintf(out, KVC_TEXT_BYTES, "%um %02us", (unsigned)(seconds / 60),
                       (unsigned)(seconds % 60));
    else
        (void)snprintf(out, KVC_TEXT_BYTES, "%lluh %02um", (unsigned long long)(seconds / 3600),
                       (unsigned)(seconds / 60 % 60));
    return out;
}

static uint32_t min_u32(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

uint32_t kvc_edit_distance(const char *a, const char *b)
{
    size_t a_len = strnlen(a, DISTANCE_MAX + 1), b_len = strnlen(b, DISTANCE_MAX + 1);
    if (a_len > DISTANCE_MAX || b_len > DISTANCE_MAX)
        return UINT32_MAX;
    /* row[j]: edits from the first i bytes of a to the first j bytes of b. */
    uint32_t row[DISTANCE_MAX + 1];
    for (size_t j = 0; j <= b_len; j++)
        row[j] = (uint32_t)j;
    for (size_t i = 1; i <= a_len; i++) {
        uint32_t diagonal = row[0];
        row[0] = (uint32_t)i;
        for (size_t j = 1; j <= b_len; j++) {
            uint32_t replaced = diagonal + (a[i - 1] != b[j - 1] ? 1 : 0);
            diagonal = row[j];
            row[j] = min_u32(replaced, min_u32(row[j], row[j - 1]) + 1);
        }
    }
    return row[b_len];
}

void kvc_strbuf_put(kvc_strbuf *buf, const char *bytes, size_t len_bytes)
{
    if (buf->failed)
        return;
    if (len_bytes >= buf->size_bytes - buf->len_bytes) {
        size_t size_bytes = (buf->len_bytes + len_bytes) * 2 + 256;
        char *grown = realloc(buf->text, size_bytes);
        if (grown == NULL) {
            buf->failed = true;
            return;
        }
        buf->text = grown;
        buf->size_bytes = size_bytes;
    }
    memcpy(buf->text + buf->len_bytes, bytes, len_bytes);
    buf->len_bytes += len_bytes;
    buf->text[buf->len_bytes] = '\0';
}

void kvc_strbuf_putf(kvc_strbuf *buf, const char *fmt, ...)
{
    char small[256];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(small, sizeof(small), fmt, args);
    va_end(args);
    if (n < 0) {
        buf->failed = true;
        return;
    }
    if ((size_t)n < sizeof(small)) {
        kvc_strbuf_put(buf, small, (size_t)n);
        return;
    }
    char *large = malloc((size_t)n + 1);
    if (large == NULL) {
        buf->failed = true;
        return;
    }
    va_start(args, fmt);
    (void)vsnprintf(large, (size_t)n + 1, fmt, args);
    va_end(args);
    kvc_strbuf_put(buf, large, (size_t)n);
    free(large);
}

char *kvc_strbuf_take(kvc_strbuf *buf)
{
    kvc_strbuf_put(buf, "", 0);
    char *text = buf->text;
    if (buf->failed) {
        free(text);
        text = NULL;
    }
    *buf = (kvc_strbuf){0};
    return text;
}
