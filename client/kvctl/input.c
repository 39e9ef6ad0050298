/*
 * input.c: what people give to commands: files, schemas, digests, tokens, picks.
 *
 * Main thread. Each parser names what it did not understand; nothing is guessed.
 */
#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/text.h"
#include "kvctl.h"

#define MAX_FILE_BYTES ((size_t)256 << 20)
#define MAX_PICKS      (64u << 20)
#define SPACE          " \t\r\n"

char *kvctl_read_file(const char *path, size_t *len_bytes_p)
{
    bool standard = strcmp(path, "-") == 0;
    FILE *stream = standard ? stdin : fopen(path, "re");
    if (stream == NULL) {
        kvctl_error("cannot open %s: %s", path, strerror(errno));
        return NULL;
    }
    kvc_strbuf buf = {0};
    char piece[65536];
    size_t n;
    while ((n = fread(piece, 1, sizeof(piece), stream)) > 0 && buf.len_bytes < MAX_FILE_BYTES)
        kvc_strbuf_put(&buf, piece, n);
    bool failed = ferror(stream) != 0, long_file = n > 0;
    if (!standard)
        (void)fclose(stream);
    *len_bytes_p = buf.len_bytes;
    char *text = kvc_strbuf_take(&buf);
    if (!failed && !long_file && text != NULL)
        return text;
    kvctl_error("cannot read %s: %s", path,
                failed      ? "input error"
                : long_file ? "it has more than 256 MiB"
                            : "memory is out");
    free(text);
    return NULL;
}

bool kvctl_schema_read(const char *word, kvctl_schema *schema_p)
{
    *schema_p = (kvctl_schema){0};
    if (kvc_digest_parse(word, &schema_p->digest) == KVC_OK)
        return true;
    size_t len_bytes = 0;
    schema_p->text = kvctl_read_file(word, &len_bytes);
    if (schema_p->text == NULL) {
        kvctl_error("--schema wants 64 hex digits or a file with the schema's text");
        return false;
    }
    if (kvctl_schema_number(schema_p, "block_tokens") == 0 &&
        kvctl_schema_number(schema_p, "opaque") == 0) {
        kvctl_error("%s is no schema text: it has no line block_tokens=NUMBER or opaque=1", word);
        free(schema_p->text);
        schema_p->text = NULL;
        return false;
    }
    return kvc_sha256(schema_p->text, len_bytes, &schema_p->digest) == KVC_OK;
}

uint32_t kvctl_schema_number(const kvctl_schema *schema, const char *key)
{
    size_t key_bytes = strlen(key);
    for (const char *line = schema->text; line != NULL && *line != '\0';) {
        if (strncmp(line, key, key_bytes) == 0 && line[key_bytes] == '=')
            return (uint32_t)strtoul(line + key_bytes + 1, NULL, 10);
        line = strchr(line, '\n');
        if (line != NULL)
            line++;
    }
    return 0;
}

static int hex_digit(char c)
{
    static const char digits[] = "0123456789abcdef";
    const char *at = c != '\0' ? strchr(digits, c | 0x20) : NULL;
    return at != NULL ? (int)(at - digits) : -1;
}

bool kvctl_key_parse(const char *text, bool is_hex, uint8_t **key_p, size_t *key_bytes_p)
{
    size_t n = strlen(text);
    *key_p = malloc(n + 1);
    *key_bytes_p = is_hex ? n / 2 : n;
    if (*key_p == NULL) {
        kvctl_error("memory is out");
        return false;
    }
    memcpy(*key_p, text, n);
    bool good = !is_hex || n % 2 == 0;
    for (size_t i = 0; is_hex && good && i < n / 2; i++) {
        int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);
        good = high >= 0 && low >= 0;
        (*key_p)[i] = (uint8_t)(good ? high << 4 | low : 0);
    }
    if (good)
        return true;
    kvctl_error("--key-hex wants pairs of hex digits, not '%s'", text);
    free(*key_p);
    *key_p = NULL;
    return false;
}

/* items with room for one more, maybe moved; NULL, with items as they were, when memory is out. */
static void *grow(void *items, uint32_t n, uint32_t *capacity_p, size_t item_bytes)
{
    if (n < *capacity_p)
        return items;
    uint32_t capacity = *capacity_p == 0 ? 256 : *capacity_p * 2;
    void *more = realloc(items, capacity * item_bytes);
    if (more == NULL)
        kvctl_error("memory is out");
    else
        *capacity_p = capacity;
    return more;
}

bool kvctl_digests_parse(const char *text, kvc_digest **digests_p, uint32_t *n_p)
{
    uint32_t capacity = 0;
    *digests_p = NULL;
    *n_p = 0;
    for (text += strspn(text, SPACE); *text != '\0'; text += strspn(text, SPACE)) {
        size_t len = strcspn(text, SPACE);
        char word[KVC_DIGEST_HEX_BYTES + 1];
        (void)snprintf(word, sizeof(word), "%.*s", (int)(len < 65 ? len : 65), text);
        kvc_digest *digests = grow(*digests_p, *n_p, &capacity, sizeof(*digests));
        if (digests == NULL)
            return false;
        *digests_p = digests;
        if (kvc_digest_parse(word, &digests[*n_p]) != KVC_OK) {
            kvctl_error("digest %u is not 64 hex digits: '%s'", *n_p + 1, word);
            return false;
        }
        (*n_p)++;
        text += len;
    }
    return true;
}

static bool parse_ids(const char *text, uint32_t **ids_p, uint32_t *n_p)
{
    uint32_t capacity = 0;
    for (text += strspn(text, SPACE ","); *text != '\0'; text += strspn(text, SPACE ",")) {
        char *end;
        errno = 0;
        unsigned long long id = strtoull(text, &end, 10);
        if (!isdigit((unsigned char)*text) || errno != 0 || id > UINT32_MAX ||
            strchr(SPACE ",", *end) == NULL) {
            kvctl_error("token %u is not a number below 2^32: '%.20s'", *n_p + 1, text);
            return false;
        }
        uint32_t *ids = grow(*ids_p, *n_p, &capacity, sizeof(*ids));
        if (ids == NULL)
            return false;
        *ids_p = ids;
        ids[(*n_p)++] = (uint32_t)id;
        text = end;
    }
    return true;
}

bool kvctl_tokens_parse(const char *text, const kvc_digest *schema, uint32_t block_tokens,
                        kvc_digest **digests_p, uint32_t *n_p, uint32_t **ids_p, uint32_t *n_ids_p)
{
    uint32_t *ids = NULL, n_ids = 0;
    *digests_p = NULL;
    *n_p = 0;
    bool parsed = parse_ids(text, &ids, &n_ids);
    uint32_t n = parsed ? n_ids / block_tokens : 0;
    if (n > 0)
        *digests_p = malloc(n * sizeof(**digests_p));
    for (uint32_t i = 0; parsed && *digests_p != NULL && i < n; i++) {
        parsed = kvc_block_digest(schema, i == 0 ? NULL : &(*digests_p)[i - 1],
                                  ids + (size_t)i * block_tokens, block_tokens, NULL, 0,
                                  &(*digests_p)[i]) == KVC_OK;
        if (!parsed)
            kvctl_error("block %u has no digest: blocks of %u tokens are not allowed", i,
                        block_tokens);
    }
    *n_p = *digests_p != NULL ? n : 0;
    if (ids_p != NULL) {
        *ids_p = ids;
        *n_ids_p = n_ids;
    } else {
        free(ids);
    }
    return parsed && (n == 0 || *digests_p != NULL);
}

/* One number below 2^32; *text_p moves behind it. */
static bool parse_position(const char **text_p, uint32_t *value_p)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(*text_p, &end, 10);
    if (!isdigit((unsigned char)**text_p) || errno != 0 || value > UINT32_MAX)
        return false;
    *value_p = (uint32_t)value;
    *text_p = end;
    return true;
}

/* FIRST[-LAST[:STEP]] */
static bool parse_range(const char **text_p, uint32_t *first_p, uint32_t *last_p, uint32_t *step_p)
{
    *step_p = 1;
    if (!parse_position(text_p, first_p))
        return false;
    *last_p = *first_p;
    if (**text_p != '-')
        return true;
    ++*text_p;
    if (!parse_position(text_p, last_p) || *last_p < *first_p)
        return false;
    if (**text_p != ':')
        return true;
    ++*text_p;
    return parse_position(text_p, step_p) && *step_p > 0;
}

bool kvctl_picks_parse(const char *text, uint32_t **picks_p, uint32_t *n_p)
{
    uint32_t capacity = 0, first, last, step;
    const char *at = text;
    *picks_p = NULL;
    *n_p = 0;
    do {
        if (!parse_range(&at, &first, &last, &step) || (*at != ',' && *at != '\0')) {
            kvctl_error("--picks: '%.40s' is not a position, FIRST-LAST or FIRST-LAST:STEP", at);
            return false;
        }
        for (uint64_t pick = first; pick <= last; pick += step) {
            if (*n_p == MAX_PICKS) {
                kvctl_error("--picks: more than %u", MAX_PICKS);
                return false;
            }
            uint32_t *picks = grow(*picks_p, *n_p, &capacity, sizeof(*picks));
            if (picks == NULL)
                return false;
            *picks_p = picks;
            picks[(*n_p)++] = (uint32_t)pick;
        }
    } while (*at++ == ',');
    return true;
}

bool kvctl_number_parse(const char *option, const char *text, uint64_t min, uint64_t max,
                        uint64_t *value_p)
{
    if (kvc_uint_parse(text, value_p) == KVC_OK && *value_p >= min && *value_p <= max)
        return true;
    kvctl_error("%s wants a number from %llu to %llu, not '%s'", option, (unsigned long long)min,
                (unsigned long long)max, text);
    return false;
}
