/*
 * projection.c: reads and writes calibration artefacts. No shared state; any thread.
 *
 * The header is parsed line by line into a fixed struct; sizes are multiplied only after each
 * factor has been bounded, so no product here can overflow 64 bits.
 */
#include "projection.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/digest.h"

#define MAGIC          "kvasir-projection-v1\n"
#define MAX_LAYERS     1000u
#define MAX_HEADS      1024u
#define MAX_HEAD_DIM   1024u
#define MAX_FILE_BYTES (1ull << 33)

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "matrices are read as they lie");

typedef enum key_id {
    K_SELECTOR,
    K_MODEL,
    K_LAYERS,
    K_HEADS,
    K_DIM,
    K_DIMS,
    K_FORM,
    K_ROPE,
    K_NESTED,
    N_KEYS
} key_id;

static const char *const key_names[N_KEYS] = {
    "selector", "model", "n_layers", "n_kv_heads", "head_dim", "dims", "form", "rope", "nested",
};

/* A decimal number without sign or leading zeros, at most max. */
static bool parse_number(const char *text, uint32_t max, uint32_t *value_p)
{
    uint64_t v = 0;
    if (text[0] == '\0' || (text[0] == '0' && text[1] != '\0')) {
        return false;
    }
    for (const char *c = text; *c != '\0'; c++) {
        if (*c < '0' || *c > '9') {
            return false;
        }
        v = v * 10u + (uint64_t)(*c - '0');
        if (v > max) {
            return false;
        }
    }
    *value_p = (uint32_t)v;
    return true;
}

static bool copy_text(char *dst, size_t cap, const char *value)
{
    size_t n = strlen(value);
    if (n == 0 || n >= cap) {
        return false;
    }
    memcpy(dst, value, n + 1u);
    return true;
}

static bool set_form(kvwi_projection *p, const char *value)
{
    p->form = strcmp(value, "shared") == 0     ? KVWI_SHARED
              : strcmp(value, "per_head") == 0 ? KVWI_PER_HEAD
                                               : (kvwi_form)0;
    return p->form != 0;
}

static bool set_rope(kvwi_projection *p, const char *value)
{
    uint32_t position = 0;
    if (strcmp(value, "raw") == 0) {
        p->rope = KVWI_PROJECTION_RAW;
        return true;
    }
    if (!parse_number(value, INT32_MAX, &position)) {
        return false;
    }
    p->rope = (int32_t)position;
    return true;
}

static bool set_key(kvwi_projection *p, key_id key, const char *value)
{
    uint32_t flag = 0;
    switch (key) {
    case K_SELECTOR:
        return copy_text(p->selector, sizeof(p->selector), value);
    case K_MODEL:
        return copy_text(p->model, sizeof(p->model), value);
    case K_LAYERS:
        return parse_number(value, MAX_LAYERS, &p->n_layers) && p->n_layers > 0;
    case K_HEADS:
        return parse_number(value, MAX_HEADS, &p->n_kv_heads) && p->n_kv_heads > 0;
    case K_DIM:
        return parse_number(value, MAX_HEAD_DIM, &p->head_dim) && p->head_dim > 0;
    case K_DIMS:
        return parse_number(value, KVWI_PROJECTION_MAX_DIMS, &p->dims) && p->dims > 0;
    case K_FORM:
        return set_form(p, value);
    case K_ROPE:
        return set_rope(p, value);
    case K_NESTED:
        if (!parse_number(value, 1, &flag)) {
            return false;
        }
        p->nested = flag == 1;
        return true;
    case N_KEYS:
        break;
    }
    return false;
}

static bool is_key_char(char c)
{
    return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_';
}

/* One line "key=value", NUL-terminated, writable. seen: a bit per known key. */
static const char *parse_line(kvwi_projection *p, char *line, uint32_t *seen)
{
    char *eq = strchr(line, '=');
    if (eq == NULL || eq == line) {
        return "a header line is not key=value";
    }
    *eq = '\0';
    for (const char *c = line; *c != '\0'; c++) {
        if (!is_key_char(*c)) {
            return "a header key has a character other than a-z, 0-9 and _";
        }
    }
    for (uint32_t i = 0; i < N_KEYS; i++) {
        if (strcmp(line, key_names[i]) != 0) {
            continue;
        }
        if (*seen & (1u << i)) {
            return "a header key comes twice";
        }
        *seen |= 1u << i;
        return set_key(p, (key_id)i, eq + 1) ? NULL : "a header value is out of range";
    }
    return NULL;
}

/* Parses the header; *body_p is the offset of the matrices. NULL, or the rule that was broken. */
static const char *parse_header(kvwi_projection *p, const char *data, size_t len, size_t *body_p)
{
    char text[KVWI_PROJECTION_MAX_TEXT + 1];
    size_t n = len < KVWI_PROJECTION_MAX_TEXT ? len : KVWI_PROJECTION_MAX_TEXT;
    const size_t magic = sizeof(MAGIC) - 1;
    if (n < magic || memcmp(data, MAGIC, magic) != 0) {
        return "it does not begin with kvasir-projection-v1";
    }
    const char *end = memmem(data + magic - 1, n - magic + 1, "\n\n", 2);
    if (end == NULL) {
        return "no empty line ends the header within 4096 bytes";
    }
    size_t text_len = (size_t)(end - data) + 1;
    if (memchr(data, '\0', text_len) != NULL) {
        return "the header holds a NUL";
    }
    memcpy(text, data, text_len);
    text[text_len] = '\0';
    *body_p = text_len + 1;
    uint32_t seen = 0;
    char *save = NULL;
    for (char *line = strtok_r(text + magic, "\n", &save); line != NULL;
         line = strtok_r(NULL, "\n", &save)) {
        const char *why = parse_line(p, line, &seen);
        if (why != NULL) {
            return why;
        }
    }
    const uint32_t needed = ((1u << N_KEYS) - 1u) & ~(1u << K_NESTED);
    return (seen & needed) == needed ? NULL : "a required header key is missing";
}

static void derive(kvwi_projection *p)
{
    p->heads = p->form == KVWI_SHARED ? 1 : p->n_kv_heads;
    p->d_in = p->form == KVWI_SHARED ? p->n_kv_heads * p->head_dim : p->head_dim;
}

/* Floats of A (or B) of one layer; every factor is bounded, so it fits. */
static uint64_t layer_floats(const kvwi_projection *p)
{
    return (uint64_t)p->heads * p->d_in * p->dims;
}

static kvc_status copy_matrices(kvwi_projection *p, const char *body)
{
    size_t n = (size_t)layer_floats(p), bytes = n * sizeof(float);
    p->a = malloc(p->n_layers * bytes);
    p->b = malloc(p->n_layers * bytes);
    if (p->a == NULL || p->b == NULL) {
        return KVC_NO_MEMORY;
    }
    for (uint32_t layer = 0; layer < p->n_layers; layer++) {
        memcpy(p->a + layer * n, body + 2u * layer * bytes, bytes);
        memcpy(p->b + layer * n, body + (2u * layer + 1u) * bytes, bytes);
    }
    for (size_t i = 0; i < p->n_layers * n; i++) {
        if (!isfinite(p->a[i]) || !isfinite(p->b[i])) {
            return KVC_INVALID;
        }
    }
    return KVC_OK;
}

kvc_status kvwi_projection_parse(const void *data, size_t len_bytes, kvwi_projection **proj_p,
                                 const char **why_p)
{
    const char *why = NULL;
    size_t body = 0;
    kvc_status st = KVC_INVALID;
    *proj_p = NULL;
    kvwi_projection *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        why = "out of memory";
        st = KVC_NO_MEMORY;
        goto err_proj;
    }
    p->nested = true;
    why = parse_header(p, data, len_bytes, &body);
    if (why != NULL) {
        goto err_proj;
    }
    derive(p);
    if (p->dims > p->d_in) {
        why = "dims exceeds the width of what it projects";
        goto err_proj;
    }
    if (len_bytes - body != 2u * p->n_layers * layer_floats(p) * sizeof(float)) {
        why = "the matrices do not have the length that the header says";
        goto err_proj;
    }
    st = copy_matrices(p, (const char *)data + body);
    if (st != KVC_OK) {
        why = st == KVC_NO_MEMORY ? "out of memory" : "a matrix element is not finite";
        goto err_proj;
    }
    st = kvc_sha256(data, len_bytes, &p->digest);
    if (st != KVC_OK) {
        why = "its digest could not be computed";
        goto err_proj;
    }
    *proj_p = p;
    return KVC_OK;
err_proj:
    kvwi_projection_free(p);
    if (why_p != NULL) {
        *why_p = why;
    }
    return st;
}

/* Without waiting, since the path may name a pipe. NULL: *st_p says why. */
static FILE *open_file(const char *path, kvc_status *st_p)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    *st_p = fd >= 0 ? KVC_OK : errno == ENOENT ? KVC_NOT_FOUND : KVC_IO;
    if (fd < 0) {
        return NULL;
    }
    FILE *f = fdopen(fd, "rb");
    if (f == NULL) {
        (void)close(fd);
        *st_p = KVC_NO_MEMORY;
    }
    return f;
}

/* Reads the whole file; *data_p is malloc'd. *why_p is set where a better text is known. */
static kvc_status read_file(FILE *f, char **data_p, size_t *len_p, const char **why_p)
{
    off_t len = 0;
    struct stat about;
    if (fstat(fileno(f), &about) != 0 || !S_ISREG(about.st_mode)) {
        *why_p = "it is not a regular file";
        return KVC_INVALID;
    }
    if (fseeko(f, 0, SEEK_END) != 0 || (len = ftello(f)) < 0 || fseeko(f, 0, SEEK_SET) != 0) {
        return KVC_IO;
    }
    if ((uint64_t)len > MAX_FILE_BYTES) {
        *why_p = "it is longer than 8 GiB";
        return KVC_INVALID;
    }
    char *data = malloc((size_t)len + 1u);
    if (data == NULL) {
        *why_p = "out of memory";
        return KVC_NO_MEMORY;
    }
    if (fread(data, 1, (size_t)len, f) != (size_t)len) {
        free(data);
        return KVC_IO;
    }
    *data_p = data;
    *len_p = (size_t)len;
    return KVC_OK;
}

kvc_status kvwi_projection_load(const char *path, kvwi_projection **proj_p, const char **why_p)
{
    char *data = NULL;
    size_t len = 0;
    *proj_p = NULL;
    const char *why = "it cannot be read";
    kvc_status st = KVC_OK;
    FILE *f = open_file(path, &st);
    if (f != NULL) {
        st = read_file(f, &data, &len, &why);
        (void)fclose(f);
    }
    if (st == KVC_OK) {
        st = kvwi_projection_parse(data, len, proj_p, &why);
    }
    free(data);
    if (why_p != NULL) {
        *why_p = why;
    }
    return st;
}

void kvwi_projection_drop_matrices(kvwi_projection *proj)
{
    free(proj->a);
    free(proj->b);
    proj->a = NULL;
    proj->b = NULL;
}

void kvwi_projection_free(kvwi_projection *proj)
{
    if (proj == NULL) {
        return;
    }
    kvwi_projection_drop_matrices(proj);
    free(proj);
}

static bool write_matrices(FILE *f, const kvwi_projection *p)
{
    size_t n = (size_t)layer_floats(p);
    for (uint32_t layer = 0; layer < p->n_layers; layer++) {
        if (fwrite(p->a + layer * n, sizeof(float), n, f) != n ||
            fwrite(p->b + layer * n, sizeof(float), n, f) != n) {
            return false;
        }
    }
    return true;
}

static bool write_all(FILE *f, const kvwi_projection *p)
{
    char rope[16] = "raw";
    if (p->rope != KVWI_PROJECTION_RAW) {
        (void)snprintf(rope, sizeof(rope), "%d", p->rope);
    }
    int n = fprintf(f,
                    MAGIC "selector=%s\nmodel=%s\nn_layers=%u\nn_kv_heads=%u\nhead_dim=%u\n"
                          "dims=%u\nform=%s\nrope=%s\nnested=%d\n\n",
                    p->selector, p->model, p->n_layers, p->n_kv_heads, p->head_dim, p->dims,
                    p->form == KVWI_SHARED ? "shared" : "per_head", rope, p->nested ? 1 : 0);
    return n > 0 && write_matrices(f, p) && fflush(f) == 0 && fsync(fileno(f)) == 0;
}

static bool writable(const kvwi_projection *p)
{
    return p->selector[0] != '\0' && p->model[0] != '\0' && strchr(p->model, '\n') == NULL &&
           strchr(p->selector, '\n') == NULL && p->n_layers >= 1 && p->n_layers <= MAX_LAYERS &&
           p->n_kv_heads >= 1 && p->n_kv_heads <= MAX_HEADS && p->head_dim >= 1 &&
           p->head_dim <= MAX_HEAD_DIM && p->dims >= 1 && p->dims <= p->d_in &&
           p->dims <= KVWI_PROJECTION_MAX_DIMS;
}

kvc_status kvwi_projection_write(const char *path, const kvwi_projection *proj)
{
    char tmp[4096];
    kvwi_projection p = *proj;
    derive(&p);
    if (!writable(&p) || (size_t)snprintf(tmp, sizeof(tmp), "%s.tmp", path) >= sizeof(tmp)) {
        return KVC_INVALID;
    }
    FILE *f = fopen(tmp, "wb");
    if (f == NULL) {
        return KVC_IO;
    }
    bool ok = write_all(f, &p);
    ok = fclose(f) == 0 && ok;
    if (!ok || rename(tmp, path) != 0) {
        (void)unlink(tmp);
        return KVC_IO;
    }
    return KVC_OK;
}
