/*
 * residency_trace.c: see residency_trace.h. What a file says is checked before it is believed.
 * Single-threaded.
 */
#include "residency_trace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BACK = 12, HEAD_BYTES = 20, MAX_LAYERS = 1024, MAX_POSITIONS = 1 << 24 };

static uint64_t random64(uint64_t *state)
{
    uint64_t x = (*state += 0x9e3779b97f4a7c15ull);
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static double uniform(uint64_t *state)
{
    return (double)(random64(state) >> 11) * 0x1p-53;
}

void *trace_get(size_t n, size_t size)
{
    void *p = calloc(n, size);
    if (!p) {
        fputs("residency_bench: no memory\n", stderr);
        exit(1);
    }
    return p;
}

static picks_trace trace_of(uint32_t n_steps, uint32_t n_positions, size_t n_picks)
{
    return (picks_trace){.n_steps = n_steps,
                         .n_positions = n_positions,
                         .first = trace_get(n_steps + 1u, 4),
                         .picks = trace_get(n_picks, 4),
                         .next = trace_get(n_picks, 4)};
}

/* Fills next and k. */
static void look_ahead(picks_trace *trace)
{
    uint32_t *picked = trace_get(trace->n_positions, 4);

    memset(picked, 0xff, (size_t)trace->n_positions * 4);
    for (uint32_t t = trace->n_steps; t-- > 0;) {
        uint32_t n = trace->first[t + 1] - trace->first[t];
        trace->k = n > trace->k ? n : trace->k;
        for (uint32_t i = trace->first[t]; i < trace->first[t + 1]; i++) {
            trace->next[i] = picked[trace->picks[i]];
            picked[trace->picks[i]] = t;
        }
    }
    free(picked);
}

/* One more pick of step t: from the past, or by its heat. */
static uint32_t another(const picks_trace *trace, uint32_t t, uint32_t k, double back,
                        uint64_t *state)
{
    double u = uniform(state);
    if (t > BACK && uniform(state) < back) {
        uint32_t from = t - 2 - (uint32_t)(random64(state) % (BACK - 1));
        return trace->picks[(size_t)from * k + random64(state) % k];
    }
    /* heat, spread out */
    return (uint32_t)(u * u * u * trace->n_positions) * 40503u % trace->n_positions;
}

picks_trace trace_make_up(uint32_t n_steps, uint32_t k, uint32_t n_positions, double keep,
                          double back)
{
    picks_trace trace = trace_of(n_steps, n_positions, (size_t)n_steps * k);
    uint32_t *picked = trace_get(n_positions, 4); /* step + 1 that picked it last */
    uint64_t state = 1;

    for (uint32_t t = 0; t < n_steps; t++) {
        uint32_t *now = trace.picks + (size_t)t * k, n = 0;
        for (uint32_t i = 0; t > 0 && i < k; i++) {
            if (uniform(&state) < keep)
                picked[now[n++] = trace.picks[(size_t)(t - 1) * k + i]] = t + 1;
        }
        while (n < k) {
            uint32_t position = another(&trace, t, k, back, &state);
            if (picked[position] != t + 1)
                picked[now[n++] = position] = t + 1;
        }
        trace.first[t + 1] = (t + 1) * k;
    }
    free(picked);
    look_ahead(&trace);
    return trace;
}

typedef struct reader {
    const uint8_t *at, *end;
    bool bad;
} reader;

/* The next number, at most max; 0 and bad where there is none such. */
static uint32_t number(reader *r, uint32_t max)
{
    uint64_t x = 0;
    for (uint32_t shift = 0; shift < 35 && r->at < r->end; shift += 7) {
        x |= (uint64_t)(*r->at & 0x7fu) << shift;
        if ((*r->at++ & 0x80u) == 0 && x <= max)
            return (uint32_t)x;
    }
    r->bad = true;
    return 0;
}

static uint32_t *shrink(uint32_t *x, size_t n)
{
    uint32_t *less = realloc(x, (n + 1) * sizeof(*x));
    return less != NULL ? less : x;
}

/* The next layer; of no use where the reader is bad afterwards. */
static picks_trace layer_of(reader *r, uint32_t n_steps, uint32_t n_positions)
{
    size_t most = (size_t)(r->end - r->at); /* a pick is a byte at least */
    picks_trace trace = trace_of(n_steps, n_positions, most + 1);

    for (uint32_t t = 0; t < n_steps && !r->bad; t++) {
        uint32_t n = number(r, n_positions), at = trace.first[t], position = 0;
        for (uint32_t i = 0; i < n && !r->bad; i++) {
            uint32_t step = number(r, n_positions - 1 - position);
            r->bad |= i > 0 && step == 0;
            trace.picks[at++] = position += step;
        }
        trace.first[t + 1] = at;
    }
    if (r->bad)
        return trace;
    trace.picks = shrink(trace.picks, trace.first[n_steps]);
    trace.next = shrink(trace.next, trace.first[n_steps]);
    look_ahead(&trace);
    return trace;
}

static uint8_t *whole_file(const char *path, size_t *len_bytes_p)
{
    FILE *f = fopen(path, "rb");
    uint8_t *bytes = NULL;
    long len = 0;

    if (f != NULL && fseek(f, 0, SEEK_END) == 0 && (len = ftell(f)) > 0 && len < UINT32_MAX &&
        fseek(f, 0, SEEK_SET) == 0) {
        bytes = trace_get((size_t)len, 1);
        *len_bytes_p = fread(bytes, 1, (size_t)len, f);
    }
    if (f != NULL)
        (void)fclose(f);
    return bytes;
}

/* The layers of a file's bytes, *n_p of them; NULL where they are no trace. */
static picks_trace *layers_of(const uint8_t *bytes, size_t len_bytes, uint32_t *n_p)
{
    uint32_t head[3]; /* layers, steps, positions */
    reader r = {bytes + HEAD_BYTES, bytes + len_bytes, false};
    picks_trace *layers = NULL;

    if (len_bytes < HEAD_BYTES || memcmp(bytes, "kvpicks1", 8) != 0)
        return NULL;
    memcpy(head, bytes + 8, sizeof(head));
    if (head[0] < 1 || head[0] > MAX_LAYERS || head[1] < 1 || head[1] > len_bytes || head[2] < 1 ||
        head[2] > MAX_POSITIONS)
        return NULL;
    layers = trace_get(head[0], sizeof(*layers));
    for (*n_p = 0; *n_p < head[0] && !r.bad; ++*n_p)
        layers[*n_p] = layer_of(&r, head[1], head[2]);
    if (!r.bad && r.at == r.end)
        return layers;
    while (*n_p > 0)
        trace_free(&layers[--*n_p]);
    free(layers);
    return NULL;
}

picks_trace *trace_read(const char *path, uint32_t *n_p)
{
    size_t len = 0;
    uint8_t *bytes = whole_file(path, &len);
    picks_trace *layers = bytes != NULL ? layers_of(bytes, len, n_p) : NULL;

    if (layers == NULL)
        (void)fprintf(stderr, "residency_bench: %s is no trace of picks\n", path);
    free(bytes);
    return layers;
}

void trace_free(picks_trace *trace)
{
    free(trace->first);
    free(trace->picks);
    free(trace->next);
}
