/*
 * schema.c: rules, canonical text, digest and copies of a schema.
 *
 * Any thread, no state. The canonical text names the schema for ever: its keys, their order and
 * their number format may not change within protocol v1. Fields below are listed in bytewise
 * order, so emitting them in order gives sorted text.
 */
#include <locale.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "base/text.h"

#define PART_ID_WORDS ((KVC_MAX_PART_ID + 1) / 64)

static uint32_t dtype_bytes(kvc_dtype dtype)
{
    switch (dtype) {
    case KVC_DTYPE_F32:
        return 4;
    case KVC_DTYPE_F16:
    case KVC_DTYPE_BF16:
        return 2;
    case KVC_DTYPE_I8:
    case KVC_DTYPE_RAW:
    case KVC_DTYPE_E4M3:
        break; /* laid out as the codec says */
    }
    return 0;
}

static bool name_fits(const char *name, size_t max_bytes, bool may_be_empty)
{
    return name != NULL && strnlen(name, max_bytes + 1) <= max_bytes &&
           (may_be_empty || name[0] != '\0');
}

static bool slice_fits(uint32_t off_bytes, uint32_t len_bytes, uint32_t row_bytes)
{
    return (uint64_t)off_bytes + len_bytes <= row_bytes;
}

static const char *rope_rule(const kvc_part *part)
{
    const kvc_rope *rope = &part->rope;
    bool carries_keys = part->kind == KVC_PART_KV || part->kind == KVC_PART_LATENT ||
                        part->kind == KVC_PART_CHUNK_KV;
    if ((int)rope->type < (carries_keys ? 1 : 0) || rope->type > KVC_ROPE_LLAMA3)
        return "rope type is unknown (none has to be said)";
    if (rope->stored_rotated > 1)
        return "stored_rotated must be 0 or 1";
    if (!isfinite(rope->theta) || !isfinite(rope->factor) || !isfinite(rope->low_freq_factor) ||
        !isfinite(rope->high_freq_factor))
        return "rope factors must be finite";
    return NULL;
}

/* A byte an element and a bf16 scale a head. */
static const char *head_scales_rule(const kvc_part *part)
{
    uint64_t heads = part->kv_head_count;
    if (part->kind != KVC_PART_KV && part->kind != KVC_PART_CHUNK_KV)
        return "codec head-scales is for kv and chunk-kv parts";
    if (heads == 0 || part->q_dim == 0 || part->v_dim == 0)
        return "codec head-scales needs kv_head_count, q_dim and v_dim";
    if (part->dtype != KVC_DTYPE_I8 && part->dtype != KVC_DTYPE_E4M3)
        return "codec head-scales needs dtype I8 or E4M3";
    if (heads > part->row_bytes || heads * ((uint64_t)part->q_dim + 2) != part->k_len_bytes)
        return "k_len_bytes must be kv_head_count * (q_dim + 2) in codec head-scales";
    if (heads * ((uint64_t)part->v_dim + 2) != part->v_len_bytes)
        return "v_len_bytes must be kv_head_count * (v_dim + 2) in codec head-scales";
    return NULL;
}

/* K and V of a kv part fill their slices exactly. */
static const char *kv_rule(const kvc_part *part)
{
    uint32_t size_bytes = dtype_bytes(part->dtype);
    if (part->codec != NULL && strcmp(part->codec, KVC_CODEC_HEAD_SCALES) == 0) {
        const char *why = head_scales_rule(part);
        if (why != NULL)
            return why;
    }
    if (part->kind != KVC_PART_KV)
        return NULL;
    if (part->kv_head_count == 0 || part->q_dim == 0 || part->v_dim == 0)
        return "a kv part needs kv_head_count, q_dim and v_dim";
    if (size_bytes == 0)
        return NULL;
    uint64_t per_dim_bytes = (uint64_t)part->kv_head_count * size_bytes;
    if (per_dim_bytes > part->row_bytes || per_dim_bytes * part->q_dim != part->k_len_bytes)
        return "k_len_bytes must be kv_head_count * q_dim * dtype size";
    if (per_dim_bytes * part->v_dim != part->v_len_bytes)
        return "v_len_bytes must be kv_head_count * v_dim * dtype size";
    return NULL;
}

static const char *part_rule(const kvc_part *part, uint32_t block_tokens, uint32_t max_value_bytes)
{
    if (part->part > KVC_MAX_PART_ID)
        return "part id is above 65535";
    if ((int)part->kind < KVC_PART_KV || part->kind > KVC_PART_STATE)
        return "part kind is unknown";
    if ((int)part->dtype < KVC_DTYPE_F32 || part->dtype > KVC_DTYPE_E4M3)
        return "part dtype is unknown";
    if (part->row_bytes == 0)
        return "row_bytes must not be 0";
    if ((uint64_t)part->row_bytes * block_tokens > max_value_bytes)
        return "block_tokens * row_bytes is above max_value_bytes";
    if (!slice_fits(part->k_off_bytes, part->k_len_bytes, part->row_bytes))
        return "the k slice leaves the row";
    if (!slice_fits(part->v_off_bytes, part->v_len_bytes, part->row_bytes))
        return "the v slice leaves the row";
    if (!isfinite(part->attention_scale) || !isfinite(part->softcap))
        return "attention_scale and softcap must be finite";
    if (part->sinks > 1)
        return "sinks must be 0 or 1";
    if (part->codec != NULL && !name_fits(part->codec, KVC_MAX_NAME_BYTES, true))
        return "codec is above 255 bytes";
    const char *why = kv_rule(part);
    return why != NULL ? why : rope_rule(part);
}

static const char *schema_rule(const kvc_schema *schema, uint32_t max_value_bytes)
{
    uint64_t seen[PART_ID_WORDS] = {0};
    if (!name_fits(schema->model, KVC_MAX_NAME_BYTES, false))
        return "model must have 1 to 255 bytes";
    if (!name_fits(schema->revision, KVC_MAX_NAME_BYTES, true))
        return "revision must have at most 255 bytes";
    if (!name_fits(schema->recipe, KVC_MAX_RECIPE_BYTES, false))
        return "recipe must have 1 to 4096 bytes";
    if (schema->tp_size == 0)
        return "tp_size must not be 0";
    if (schema->opaque > 1)
        return "opaque must be 0 or 1";
    if (schema->opaque)
        return schema->n_parts || schema->block_tokens
                   ? "an opaque schema has no parts, and block_tokens 0"
                   : NULL;
    if (schema->block_tokens < KVC_BLOCK_TOKENS_MIN || schema->block_tokens > KVC_BLOCK_TOKENS_MAX)
        return "block_tokens must be 64 to 1024";
    if (schema->block_tokens % 16 != 0)
        return "block_tokens must be a multiple of 16";
    if (schema->n_parts == 0 || schema->n_parts > KVC_MAX_PARTS || schema->parts == NULL)
        return "a schema has 1 to 4096 parts";
    for (uint32_t i = 0; i < schema->n_parts; i++) {
        const kvc_part *part = &schema->parts[i];
        const char *why = part_rule(part, schema->block_tokens, max_value_bytes);
        if (why != NULL)
            return why;
        uint64_t bit = 1ull << (part->part % 64);
        if ((seen[part->part / 64] & bit) != 0)
            return "two parts have the same id";
        seen[part->part / 64] |= bit;
    }
    return NULL;
}

kvc_status kvc_schema_check(const kvc_schema *schema, uint32_t max_value_bytes, const char **why_p)
{
    const char *why = schema_rule(schema, max_value_bytes);
    if (why_p != NULL)
        *why_p = why;
    return why == NULL ? KVC_OK : KVC_INVALID;
}

static void text_name(kvc_strbuf *text, const char *key, const char *name)
{
    kvc_strbuf_putf(text, "%s=", key);
    for (const char *at = name == NULL ? "" : name; *at != '\0'; at++) {
        unsigned char c = (unsigned char)*at;
        char escape[4];
        if (c < 0x21 || c == 0x25 || c > 0x7e) {
            (void)snprintf(escape, sizeof(escape), "%%%02x", c);
            kvc_strbuf_put(text, escape, 3);
        } else {
            kvc_strbuf_put(text, at, 1);
        }
    }
    kvc_strbuf_put(text, "\n", 1);
}

static void text_uint(kvc_strbuf *text, const char *key, uint32_t value)
{
    kvc_strbuf_putf(text, "%s=%u\n", key, value);
}

/* -0 and 0 are one number, so they get one text. */
static void text_double(kvc_strbuf *text, const char *key, double value)
{
    kvc_strbuf_putf(text, "%s=%.17g\n", key, value == 0 ? 0.0 : value);
}

/* Joins "part.<id>." and the field; the pointer is good until the next call. */
static const char *part_key(char key[64], uint32_t id, const char *field)
{
    (void)snprintf(key, 64, "part.%05u.%s", id, field);
    return key;
}

static void text_rope(kvc_strbuf *text, uint32_t id, const kvc_rope *rope)
{
    char key[64];
    text_double(text, part_key(key, id, "rope.factor"), rope->factor);
    text_double(text, part_key(key, id, "rope.high_freq_factor"), rope->high_freq_factor);
    text_double(text, part_key(key, id, "rope.low_freq_factor"), rope->low_freq_factor);
    text_uint(text, part_key(key, id, "rope.original_max_position"), rope->original_max_position);
    text_uint(text, part_key(key, id, "rope.stored_rotated"), rope->stored_rotated);
    text_double(text, part_key(key, id, "rope.theta"), rope->theta);
    text_uint(text, part_key(key, id, "rope.type"), (uint32_t)rope->type);
}

static void text_part(kvc_strbuf *text, const kvc_part *part)
{
    char key[64];
    uint32_t id = part->part;
    text_double(text, part_key(key, id, "attention_scale"), part->attention_scale);
    text_name(text, part_key(key, id, "codec"), part->codec);
    text_uint(text, part_key(key, id, "dtype"), (uint32_t)part->dtype);
    text_uint(text, part_key(key, id, "k_len_bytes"), part->k_len_bytes);
    text_uint(text, part_key(key, id, "k_off_bytes"), part->k_off_bytes);
    text_uint(text, part_key(key, id, "kind"), (uint32_t)part->kind);
    text_uint(text, part_key(key, id, "kv_head_count"), part->kv_head_count);
    text_uint(text, part_key(key, id, "kv_head_first"), part->kv_head_first);
    text_uint(text, part_key(key, id, "layer"), part->layer);
    text_uint(text, part_key(key, id, "q_dim"), part->q_dim);
    text_rope(text, id, &part->rope);
    text_uint(text, part_key(key, id, "row_bytes"), part->row_bytes);
    text_uint(text, part_key(key, id, "sinks"), part->sinks);
    text_double(text, part_key(key, id, "softcap"), part->softcap);
    text_uint(text, part_key(key, id, "v_dim"), part->v_dim);
    text_uint(text, part_key(key, id, "v_len_bytes"), part->v_len_bytes);
    text_uint(text, part_key(key, id, "v_off_bytes"), part->v_off_bytes);
    text_uint(text, part_key(key, id, "window"), part->window);
}

static int by_part_id(const void *a, const void *b)
{
    const kvc_part *x = *(const kvc_part *const *)a, *y = *(const kvc_part *const *)b;
    return x->part < y->part ? -1 : x->part > y->part;
}

/* parts [n_parts] is scratch for the order of the parts. */
static void text_schema(kvc_strbuf *text, const kvc_schema *schema, const kvc_part **parts)
{
    for (uint32_t i = 0; i < schema->n_parts; i++)
        parts[i] = &schema->parts[i];
    qsort(parts, schema->n_parts, sizeof(*parts), by_part_id);
    if (!schema->opaque)
        text_uint(text, "block_tokens", schema->block_tokens);
    text_name(text, "model", schema->model);
    if (schema->opaque)
        text_uint(text, "opaque", schema->opaque);
    for (uint32_t i = 0; i < schema->n_parts; i++)
        text_part(text, parts[i]);
    text_name(text, "recipe", schema->recipe);
    text_name(text, "revision", schema->revision);
    text_uint(text, "tp_size", schema->tp_size);
}

kvc_status kvc_schema_text(const kvc_schema *schema, char **text_p, size_t *len_bytes_p)
{
    *text_p = NULL;
    *len_bytes_p = 0;
    if (schema_rule(schema, UINT32_MAX) != NULL)
        return KVC_INVALID;
    const kvc_part **parts = malloc((schema->n_parts + 1) * sizeof(*parts));
    /* The host program's locale may write doubles with a comma. */
    locale_t c_locale = newlocale(LC_NUMERIC_MASK, "C", (locale_t)0);
    if (parts != NULL && c_locale != (locale_t)0) {
        kvc_strbuf text = {0};
        locale_t old = uselocale(c_locale);
        text_schema(&text, schema, parts);
        (void)uselocale(old);
        *len_bytes_p = text.len_bytes;
        *text_p = kvc_strbuf_take(&text);
    }
    if (c_locale != (locale_t)0)
        freelocale(c_locale);
    free(parts);
    return *text_p == NULL ? KVC_NO_MEMORY : KVC_OK;
}

kvc_status kvc_schema_digest(const kvc_schema *schema, kvc_digest *digest_p)
{
    *digest_p = (kvc_digest){{0}};
    char *text;
    size_t len_bytes;
    kvc_status status = kvc_schema_text(schema, &text, &len_bytes);
    if (status != KVC_OK)
        return status;
    status = kvc_sha256(text, len_bytes, digest_p);
    free(text);
    return status;
}

static size_t name_bytes(const char *name)
{
    return name == NULL ? 0 : strlen(name) + 1;
}

/* Copies name to *at_p and moves it on; NULL stays NULL. */
static const char *copy_name(char **at_p, const char *name)
{
    if (name == NULL)
        return NULL;
    size_t len_bytes = name_bytes(name);
    char *copy = memcpy(*at_p, name, len_bytes);
    *at_p += len_bytes;
    return copy;
}

kvc_schema *kvc_schema_copy(const kvc_schema *schema)
{
    size_t size_bytes = sizeof(kvc_schema) + schema->n_parts * sizeof(kvc_part);
    size_bytes += name_bytes(schema->model) + name_bytes(schema->revision);
    size_bytes += name_bytes(schema->recipe);
    for (uint32_t i = 0; i < schema->n_parts; i++)
        size_bytes += name_bytes(schema->parts[i].codec);
    kvc_schema *copy = malloc(size_bytes);
    if (copy == NULL)
        return NULL;
    kvc_part *parts = (kvc_part *)(copy + 1);
    char *at = (char *)(parts + schema->n_parts);
    *copy = *schema;
    copy->parts = parts;
    copy->model = copy_name(&at, schema->model);
    copy->revision = copy_name(&at, schema->revision);
    copy->recipe = copy_name(&at, schema->recipe);
    for (uint32_t i = 0; i < schema->n_parts; i++) {
        parts[i] = schema->parts[i];
        parts[i].codec = copy_name(&at, schema->parts[i].codec);
    }
    return copy;
}
