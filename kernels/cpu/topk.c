/*
 * topk.c: the k best scores, exactly, in order (score desc, position asc; NaN last).
 *
 * Scores become 32-bit keys in the same order (-0 and 0 alike, NaN 0). The fast form cuts n into at
 * most CHUNKS_MAX chunks. A chunk is scanned once with a rising bound: positions at or above it are
 * gathered, and when the list is full a radix select cuts it back to k and raises the bound. Later
 * positions lose ties, and lists stay in position order, so "above the k-th so far" is exact. A
 * sample gives the first bound; where fewer than k scores turn out to reach it, the scan is done
 * again without. The chunks' lists are then cut to k together and sorted by a stable radix sort.
 * The answer is unique, so its bits depend on nothing else.
 */
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "elem.h"
#include "internal.h"
#include "isa.h"

#define SEGMENT    4096u /* scanned between two looks at the list */
#define CHUNK_MIN  65536u
#define CHUNKS_MAX 16u
#define BUCKETS    2048u
#define SAMPLE     16384u /* scores looked at for the first bound, in runs of */
#define SAMPLE_RUN 16u

/* How the workspace is cut: `chunks` lists of `cap`, then the joint list of `joint` and a spare. */
typedef struct plan {
    uint32_t k, chunks;
    size_t chunk, cap, joint;
} plan;

static plan plan_of(uint32_t n, uint32_t k)
{
    plan p = {.k = k < n ? k : n};
    size_t chunk_min = (size_t)p.k * 8 > CHUNK_MIN ? (size_t)p.k * 8 : CHUNK_MIN;
    size_t chunks = n / chunk_min;

    p.chunks = (uint32_t)(chunks < 1 ? 1 : chunks > CHUNKS_MAX ? CHUNKS_MAX : chunks);
    p.chunk = ((size_t)n + p.chunks - 1) / p.chunks;
    p.cap = 2 * (size_t)p.k + 2 * SEGMENT;
    if (p.cap > p.chunk + SEGMENT)
        p.cap = p.chunk + SEGMENT;
    if (p.cap < SAMPLE && n > SAMPLE)
        p.cap = SAMPLE;
    p.joint = p.chunks * (size_t)p.k;
    return p;
}

/* Keys and positions of every list, and the chunks' counts. */
size_t kvk_topk_workspace_bytes(uint32_t n, uint32_t k)
{
    plan p = plan_of(n, k);
    size_t entries = p.chunks * p.cap + 2 * p.joint;

    return 2 * entries * sizeof(uint32_t) + sizeof(uint32_t) * CHUNKS_MAX + 64;
}

kvc_status kvki_check_topk(const kvk_topk_args *a)
{
    if (!a->n_out_p || (a->n && a->base > UINT32_MAX - (a->n - 1)))
        return KVC_INVALID;
    if (a->n == 0 || a->k == 0)
        return KVC_OK;
    if (!a->scores || !a->ids || !a->workspace)
        return KVC_INVALID;
    return a->workspace_bytes >= kvk_topk_workspace_bytes(a->n, a->k) ? KVC_OK : KVC_INVALID;
}

static uint32_t key_of(float score)
{
    uint32_t bits = kvki_bits_of_f32(score);

    if (isnan(score))
        return 0;
    if (score == 0)
        return 0x80000000u;
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/* ---- reference: sort everything ---- */

typedef struct entry {
    float score;
    uint32_t pos;
} entry;

static int compare_entries(const void *pa, const void *pb)
{
    const entry *a = pa, *b = pb;
    bool nan_a = isnan(a->score), nan_b = isnan(b->score);

    if (nan_a != nan_b)
        return nan_a ? 1 : -1;
    if (!nan_a && a->score != b->score)
        return a->score > b->score ? -1 : 1;
    return a->pos < b->pos ? -1 : a->pos > b->pos;
}

kvc_status kvki_ref_topk(const kvk_topk_args *a)
{
    uint32_t k = a->k < a->n ? a->k : a->n;
    entry *all = NULL;

    *a->n_out_p = 0;
    if (k == 0)
        return KVC_OK;
    all = malloc(a->n * sizeof(*all));
    if (!all)
        return KVC_NO_MEMORY;
    for (uint32_t j = 0; j < a->n; j++)
        all[j] = (entry){a->scores[j], j};
    qsort(all, a->n, sizeof(*all), compare_entries);
    for (uint32_t i = 0; i < k; i++) {
        a->ids[i] = a->base + all[i].pos;
        if (a->out_scores)
            a->out_scores[i] = all[i].score;
    }
    *a->n_out_p = k;
    free(all);
    return KVC_OK;
}

/* ---- fast ---- */

typedef struct list {
    uint32_t *key, *pos;
    uint32_t n;
} list;

/* Finds, from the top, the bucket that holds the rank-th entry; *rank_p becomes its rank inside. */
static uint32_t find_bucket(const uint32_t *counts, uint32_t *rank_p)
{
    for (uint32_t b = BUCKETS; b-- > 0;) {
        if (counts[b] >= *rank_p)
            return b;
        *rank_p -= counts[b];
    }
    return 0;
}

/* The k-th largest key, 1 <= k <= n; *ties_p = how many of its equals belong to the k. */
static uint32_t kth_key(const list *l, uint32_t k, uint32_t *ties_p)
{
    static const struct {
        uint32_t shift, bits;
    } digits[] = {{21, 11}, {10, 11}, {0, 10}};
    uint32_t prefix = 0, mask = 0;
    uint32_t counts[BUCKETS];

    for (size_t d = 0; d < 3; d++) {
        uint32_t digit_mask = (1u << digits[d].bits) - 1;
        memset(counts, 0, sizeof(counts));
        for (uint32_t i = 0; i < l->n; i++) {
            if ((l->key[i] & mask) == prefix)
                counts[(l->key[i] >> digits[d].shift) & digit_mask]++;
        }
        prefix |= find_bucket(counts, &k) << digits[d].shift;
        mask |= digit_mask << digits[d].shift;
    }
    *ties_p = k;
    return prefix;
}

/* Keeps the k best in position order; gives the k-th key. */
static uint32_t shrink(list *l, uint32_t k)
{
    uint32_t ties = 0, kept = 0;
    uint32_t kth = kth_key(l, k, &ties);

    for (uint32_t i = 0; i < l->n; i++) {
        uint32_t key = l->key[i];
        bool keep = key > kth || (key == kth && ties > 0);
        ties -= key == kth && ties > 0;
        l->key[kept] = key;
        l->pos[kept] = l->pos[i];
        kept += keep;
    }
    l->n = kept;
    return kth;
}

/* Back from a key that is not NaN's. */
static float score_of(uint32_t key)
{
    return kvki_f32_of_bits(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

/* The least float above the score of this key, as a bound for >=; NaN: nothing is above. */
static float bound_above(uint32_t key)
{
    float score = 0;

    if (key == 0)
        return -INFINITY;
    score = score_of(key);
    return score == INFINITY ? NAN : nextafterf(score, INFINITY);
}

typedef struct job {
    const kvk_topk_args *a;
    const kvki_isa *isa;
    plan p;
    uint32_t *entries; /* chunk c: keys at c * 2 cap, positions cap after */
    uint32_t *counts;  /* [chunks] */
    bool bounded;      /* low is a bound to start from */
    float low;
} job;

static list chunk_list(const job *w, size_t c)
{
    uint32_t *at = w->entries + c * 2 * w->p.cap;
    return (list){at, at + w->p.cap, 0};
}

/* Takes every position of [from, to): the list has no k yet, so nothing can be left out. */
static void take_all(list *l, uint32_t from, uint32_t to)
{
    for (uint32_t j = from; j < to; j++)
        l->pos[l->n++] = j;
}

static void scan_chunk(void *arg, size_t c, uint32_t worker)
{
    const job *w = arg;
    const float *x = w->a->scores;
    size_t end = (c + 1) * w->p.chunk < w->a->n ? (c + 1) * w->p.chunk : w->a->n;
    list l = chunk_list(w, c);
    bool bounded = w->bounded;
    float low = w->low;

    (void)worker;
    for (size_t from = c * w->p.chunk; from < end; from += SEGMENT) {
        uint32_t to = (uint32_t)(end - from < SEGMENT ? end : from + SEGMENT);
        uint32_t had = l.n;
        if (bounded)
            l.n += w->isa->filter(x, (uint32_t)from, to, low, l.pos + l.n);
        else
            take_all(&l, (uint32_t)from, to);
        for (uint32_t i = had; i < l.n; i++)
            l.key[i] = key_of(x[l.pos[i]]);
        if (l.n > w->p.k && (l.n + SEGMENT > w->p.cap || to == end)) {
            low = bound_above(shrink(&l, w->p.k));
            bounded = true;
        }
    }
    w->counts[c] = l.n;
}

/*
 * A score that about k + 6 sqrt(k) of n reach, judged by a sample; false where n is too small or k
 * too large a part of it for that to help. Uses the first chunk's list.
 */
static bool sample_bound(const job *w, float *low_p)
{
    double expected = (double)w->p.k * SAMPLE / w->a->n;
    uint32_t rank = (uint32_t)(expected + 4 * sqrt(expected) + 4), ties = 0, key = 0;
    size_t step = w->a->n / (SAMPLE / SAMPLE_RUN);
    list l = chunk_list(w, 0);

    if (w->a->n < 4 * SAMPLE || rank > SAMPLE / 4)
        return false;
    for (size_t run = 0; run < SAMPLE / SAMPLE_RUN; run++) {
        for (size_t i = 0; i < SAMPLE_RUN; i++)
            l.key[l.n++] = key_of(w->a->scores[run * step + i]);
    }
    key = kth_key(&l, rank, &ties);
    *low_p = key == 0 ? -INFINITY : score_of(key);
    return true;
}

/* Scans all chunks; how many positions they hold. */
static size_t scan(kvk_backend *be, job *w)
{
    size_t total = 0;

    kvki_pool_run(be->pool, w->p.chunks, scan_chunk, w);
    for (size_t c = 0; c < w->p.chunks; c++)
        total += w->counts[c];
    return total;
}

/* Joins the chunks' lists in position order at the end of the workspace. */
static list join(const job *w)
{
    uint32_t *at = w->entries + w->p.chunks * 2 * w->p.cap;
    list all = {at, at + w->p.joint, 0};

    for (size_t c = 0; c < w->p.chunks; c++) {
        list l = chunk_list(w, c);
        memcpy(all.key + all.n, l.key, w->counts[c] * sizeof(uint32_t));
        memcpy(all.pos + all.n, l.pos, w->counts[c] * sizeof(uint32_t));
        all.n += w->counts[c];
    }
    return all;
}

/* One stable pass of the sort, descending in the 8 bits at shift. */
static void sort_pass(const list *from, list *to, uint32_t shift)
{
    uint32_t at[256] = {0};
    uint32_t sum = 0;

    for (uint32_t i = 0; i < from->n; i++)
        at[(from->key[i] >> shift) & 255]++;
    for (uint32_t b = 256; b-- > 0;) {
        uint32_t count = at[b];
        at[b] = sum;
        sum += count;
    }
    for (uint32_t i = 0; i < from->n; i++) {
        uint32_t slot = at[(from->key[i] >> shift) & 255]++;
        to->key[slot] = from->key[i];
        to->pos[slot] = from->pos[i];
    }
    to->n = from->n;
}

static void sort_descending(list *l, list *spare)
{
    for (uint32_t shift = 0; shift < 32; shift += 16) {
        sort_pass(l, spare, shift);
        sort_pass(spare, l, shift + 8);
    }
}

kvc_status kvki_fast_topk(kvk_backend *be, const kvk_topk_args *a)
{
    job w = {.a = a, .isa = be->isa, .p = plan_of(a->n, a->k)};
    list best, spare;

    *a->n_out_p = 0;
    if (w.p.k == 0)
        return KVC_OK;
    w.counts = (uint32_t *)(((uintptr_t)a->workspace + 63) & ~(uintptr_t)63);
    w.entries = w.counts + CHUNKS_MAX;
    w.bounded = sample_bound(&w, &w.low);
    if (scan(be, &w) < w.p.k) {
        w.bounded = false;
        (void)scan(be, &w);
    }
    best = join(&w);
    if (best.n > w.p.k)
        (void)shrink(&best, w.p.k);
    spare = (list){best.key + 2 * w.p.joint, best.pos + 2 * w.p.joint, 0};
    sort_descending(&best, &spare);
    for (uint32_t i = 0; i < w.p.k; i++) {
        a->ids[i] = a->base + best.pos[i];
        if (a->out_scores)
            a->out_scores[i] = a->scores[best.pos[i]];
    }
    *a->n_out_p = w.p.k;
    return KVC_OK;
}
