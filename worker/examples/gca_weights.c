/*
 * gca_weights.c: reads the safetensors files of the GCA trainer: 8 bytes of header length, a JSON
 * header without spaces between its words, then data, all f32 or all bf16. One thread; immutable
 * afterwards. Nothing in the file is believed before it was compared with the file's length.
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
    bool bf16;     /* in the file; data is f32 all the same */
    char fingerprint[KVC_DIGEST_HEX_BYTES];
};

/* Turns what lies at the end of data from bf16 into f32, in place from the front. */
static void widen(gca_weights *w)
{
    const unsigned char *in = (const unsigned char *)w->data + w->n_data * 2;
    for (size_t i = 0; i < w->n_data; i++) {
        uint32_t bits = (uint32_t)in[2 * i] << 16 | (uint32_t)in[2 * i + 1] << 24;
        memcpy(&w->data[i], &bits, sizeof(bits));
    }
}

static kvc_status read_data(FILE *f, gca_weights *w, size_t len_bytes)
{
    w->bf16 = strstr(w->header, "\"dtype\":\"BF16\"") != NULL;
    w->n_data = len_bytes / (w->bf16 ? 2 : sizeof(float));
    size_t size = w->n_data * (w->bf16 ? 2 : sizeof(float));
    w->data = malloc(w->n_data * sizeof(float) + 1);
    if (!w->data)
        return KVC_NO_MEMORY;
    char *at = (char *)w->data + w->n_data * sizeof(float) - size;
    kvc_digest digest;
    if (fread(at, 1, size, f) != size)
        return KVC_IO;
    kvc_status st = kvc_sha256(at, size, &digest);
    if (st != KVC_OK)
        return st;
    kvc_digest_hex(&digest, w->fingerprint);
    if (w->bf16)
        widen(w);
    return KVC_OK;
}

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
    w->header = calloc(1, n + 1);
    if (!w->header)
        return KVC_NO_MEMORY;
    if (fread(w->header, 1, n, f) != n)
        return KVC_IO;
    return read_data(f, w, (size_t)end - 8 - n);
}

const char *gca_weights_fingerprint(const gca_weights *w)
{
    return w->fingerprint;
}

/* The number behind \"name\": in the metadata's config, which is JSON inside of a JSON string. */
static uint32_t config_number(const gca_weights *w, const char *name)
{
    char key[64];
    const char *at = strstr(w->header, "\"config\":"); /* other metadata has the same names */
    (void)snprintf(key, sizeof(key), "\\\"%s\\\":", name);
    at = at ? strstr(at, key) : NULL;
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
    bool fits = s->hidden <= 1024 && s->hidden % 16 == 0 && s->mlp <= 8192 && s->window <= 1024 &&
                s->taps <= 16;
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
    (void)snprintf(key, sizeof(key), "\"%s\":{\"dtype\":\"%s\"", name, w->bf16 ? "BF16" : "F32");
    const char *at = strstr(w->header, key);
    at = at ? strstr(at, offsets) : NULL;
    if (!at)
        return NULL;
    unsigned long first = strtoul(at + sizeof(offsets) - 1, &end, 10);
    unsigned long last = *end == ',' ? strtoul(end + 1, NULL, 10) : 0;
    size_t size = w->bf16 ? 2 : sizeof(float);
    if (first % size != 0 || last < first || last / size > w->n_data || last - first != n * size)
        return NULL;
    return w->data + first / size;
}
