/*
 * gca_weights.c: reads the safetensors files of the GCA trainer: 8 bytes of header length, a JSON
 * header without spaces between its words, then f32 data. One thread; immutable afterwards. Nothing
 * in the file is believed before it was compared with the file's length.
 */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/digest.h"
#include "gca_model.h"

#define MAX_FILE_BYTES (256u << 20)

struct gca_weights {
    char *header; /* ends with 0 */
    float *data;
    size_t n_data; /* floats */
    char fingerprint[KVC_DIGEST_HEX_BYTES];
};

static kvc_status read_parts(FILE *f, gca_weights *w)
{
    unsigned char length[8];
    size_t n = 0;
    long end = 0;
    if (fread(length, 1, 8, f) != 8 || fseek(f, 0, SEEK_END) != 0 || (end = ftell(f)) < 8 ||
        (unsigned long)end > MAX_FILE_BYTES || fseek(f, 8, SEEK_SET) != 0)
        return KVC_INVALID;
    for (int i = 7; i >= 0; i--) {
        if (n > MAX_FILE_BYTES)
            return KVC_INVALID;
        n = n << 8 | length[i];
    }
    if (n > (size_t)end - 8)
        return KVC_INVALID;
    w->n_data = ((size_t)end - 8 - n) / sizeof(float);
    w->header = calloc(1, n + 1);
    w->data = malloc(w->n_data * sizeof(float) + 1);
    if (!w->header || !w->data)
        return KVC_NO_MEMORY;
    if (fread(w->header, 1, n, f) != n || fread(w->data, sizeof(float), w->n_data, f) != w->n_data)
        return KVC_IO;
    kvc_digest digest;
    kvc_status st = kvc_sha256(w->data, w->n_data * sizeof(float), &digest);
    if (st == KVC_OK)
        kvc_digest_hex(&digest, w->fingerprint);
    return st;
}

const char *gca_weights_fingerprint(const gca_weights *w)
{
    return w->fingerprint;
}

/* The number behind \"name\": in the metadata's config, which is JSON inside of a JSON string. */
static uint32_t config_number(const gca_weights *w, const char *name)
{
    char key[64];
    const char *at = NULL;
    (void)snprintf(key, sizeof(key), "\\\"%s\\\":", name);
    at = strstr(w->header, key);
    unsigned long x = at ? strtoul(at + strlen(key), NULL, 10) : 0;
    return x > 1u << 20 ? 0 : (uint32_t)x;
}

static kvc_status read_sizes(const gca_weights *w, gca_sizes *s)
{
    const char *const names[] = {"vocab", "hidden", "heads", "mlp",    "lower", "encoder",
                                 "upper", "groups", "chunk", "window", "topk",  "taps"};
    uint32_t *const out[] = {&s->vocab, &s->hidden, &s->heads, &s->mlp,    &s->lower, &s->encoder,
                             &s->upper, &s->groups, &s->chunk, &s->window, &s->topk,  &s->taps};
    for (size_t i = 0; i < sizeof(out) / sizeof(out[0]); i++) {
        *out[i] = config_number(w, names[i]);
        if (*out[i] == 0)
            return KVC_INVALID;
    }
    bool even = s->hidden % (2 * s->heads) == 0 && s->upper % s->groups == 0;
    bool few = s->lower <= GCA_MAX_LAYERS && s->encoder <= GCA_MAX_LAYERS &&
               s->upper <= GCA_MAX_LAYERS && s->groups <= GCA_MAX_GROUPS;
    bool fits = s->hidden <= 1024 && s->mlp <= 8192 && s->window <= 1024 && s->taps <= 16;
    return even && few && fits && s->chunk == KVW_CHUNK_TOKENS ? KVC_OK : KVC_INVALID;
}

kvc_status gca_weights_load(const char *path, gca_weights **weights_p, gca_sizes *sizes_p)
{
    FILE *f = fopen(path, "rb");
    *weights_p = NULL;
    if (!f)
        return KVC_IO;
    gca_weights *w = calloc(1, sizeof(*w));
    kvc_status st = w ? read_parts(f, w) : KVC_NO_MEMORY;
    if (st == KVC_OK)
        st = read_sizes(w, sizes_p);
    if (fclose(f) != 0 && st == KVC_OK)
        st = KVC_IO;
    if (st != KVC_OK) {
        gca_weights_free(w);
        return st;
    }
    *weights_p = w;
    return KVC_OK;
}

void gca_weights_free(gca_weights *w)
{
    if (w) {
        free(w->header);
        free(w->data);
        free(w);
    }
}

const float *gca_weights_get(const gca_weights *w, const char *name, size_t n)
{
    static const char offsets[] = "\"data_offsets\":[";
    char key[96];
    char *end = NULL;
    (void)snprintf(key, sizeof(key), "\"%s\":{\"dtype\":\"F32\"", name);
    const char *at = strstr(w->header, key);
    at = at ? strstr(at, offsets) : NULL;
    if (!at)
        return NULL;
    unsigned long first = strtoul(at + sizeof(offsets) - 1, &end, 10);
    unsigned long last = *end == ',' ? strtoul(end + 1, NULL, 10) : 0;
    if (first % sizeof(float) != 0 || last < first || last / sizeof(float) > w->n_data ||
        last - first != n * sizeof(float))
        return NULL;
    return w->data + first / sizeof(float);
}
