/*
 * evict_policy.c: the textbook policies; see evict_policy.h.
 *
 * Sources: SIEVE: Zhang et al., NSDI 2024. S3-FIFO: Yang et al., SOSP 2023 (small queue a tenth,
 * ghosts as many as the main queue). Belady: of those there, the one read again last gives way.
 */
#include "evict_policy.h"

#include <stdbool.h>
#include <stdlib.h>

#define NIL UINT32_MAX

enum { SMALL = 1, MAIN = 2, GHOST = 3 };

typedef struct item {
    uint32_t prev, next;
    uint8_t where; /* 0: not in the cache */
    uint8_t count;
} item;

typedef struct list {
    uint32_t head, tail, n; /* head: newest */
} list;

typedef struct cache {
    item *items; /* [n_keys] */
    list lists[4];
    uint32_t capacity, hand;
    evict_result *result;
} cache;

static int cache_open(cache *c, const evict_trace *trace, uint32_t capacity, evict_result *result)
{
    *c = (cache){.capacity = capacity, .hand = NIL, .result = result};
    for (int i = 0; i < 4; i++)
        c->lists[i] = (list){NIL, NIL, 0};
    *result = (evict_result){0};
    c->items = calloc(trace->n_keys, sizeof(*c->items));
    return c->items ? 0 : 1;
}

static void push(cache *c, uint8_t where, uint32_t key)
{
    list *l = &c->lists[where];
    item *it = &c->items[key];
    it->where = where;
    it->prev = NIL;
    it->next = l->head;
    if (l->head != NIL)
        c->items[l->head].prev = key;
    else
        l->tail = key;
    l->head = key;
    l->n++;
}

static void cut(cache *c, uint32_t key)
{
    item *it = &c->items[key];
    list *l = &c->lists[it->where];
    if (it->prev != NIL)
        c->items[it->prev].next = it->next;
    else
        l->head = it->next;
    if (it->next != NIL)
        c->items[it->next].prev = it->prev;
    else
        l->tail = it->prev;
    l->n--;
    it->where = 0;
}

static void count_eviction(cache *c, uint64_t steps)
{
    c->result->n_evictions++;
    c->result->steps += steps;
    if (steps > c->result->most_steps)
        c->result->most_steps = steps;
}

/* ---- FIFO, LRU, SIEVE: one list -------------------------------------------------------------- */

static void evict_tail(cache *c)
{
    cut(c, c->lists[MAIN].tail);
    count_eviction(c, 1);
}

static void evict_sieve(cache *c)
{
    uint64_t steps = 1;
    uint32_t key = c->hand != NIL ? c->hand : c->lists[MAIN].tail;
    for (; c->items[key].count; steps++) {
        c->items[key].count = 0;
        key = c->items[key].prev != NIL ? c->items[key].prev : c->lists[MAIN].tail;
    }
    c->hand = c->items[key].prev;
    cut(c, key);
    count_eviction(c, steps);
}

static int run_list(const evict_trace *trace, uint32_t capacity, bool moves,
                    void (*evict)(cache *c), evict_result *result_p)
{
    cache c;
    if (cache_open(&c, trace, capacity, result_p))
        return 1;
    for (uint32_t i = 0; i < trace->n; i++) {
        uint32_t key = trace->keys[i];
        bool hit = c.items[key].where != 0;
        result_p->hits += hit;
        if (hit) {
            c.items[key].count = 1;
            if (!moves)
                continue;
            cut(&c, key);
        } else if (c.lists[MAIN].n == capacity) {
            evict(&c);
        }
        c.items[key].count = hit;
        push(&c, MAIN, key);
    }
    free(c.items);
    return 0;
}

static int run_fifo(const evict_trace *trace, uint32_t capacity, evict_result *result_p)
{
    return run_list(trace, capacity, false, evict_tail, result_p);
}

static int run_lru(const evict_trace *trace, uint32_t capacity, evict_result *result_p)
{
    return run_list(trace, capacity, true, evict_tail, result_p);
}

static int run_sieve(const evict_trace *trace, uint32_t capacity, evict_result *result_p)
{
    return run_list(trace, capacity, false, evict_sieve, result_p);
}

/* ---- S3-FIFO --------------------------------------------------------------------------------- */

static void evict_main(cache *c, uint64_t *steps)
{
    for (;; (*steps)++) {
        uint32_t key = c->lists[MAIN].tail;
        uint8_t count = c->items[key].count;
        cut(c, key);
        if (count == 0)
            return;
        push(c, MAIN, key);
        c->items[key].count = count - 1;
    }
}

/* True once a value has left the cache; false: it went on to the main queue. */
static bool evict_small(cache *c)
{
    uint32_t key = c->lists[SMALL].tail;
    bool again = c->items[key].count > 1;
    cut(c, key);
    c->items[key].count = 0;
    push(c, again ? MAIN : GHOST, key);
    if (c->lists[GHOST].n > c->capacity - c->capacity / 10)
        cut(c, c->lists[GHOST].tail);
    return !again;
}

static void evict_s3(cache *c)
{
    uint64_t steps = 1;
    uint32_t small = c->capacity / 10 ? c->capacity / 10 : 1;
    for (bool gone = false; !gone; steps++) {
        if (c->lists[SMALL].n >= small || c->lists[MAIN].n == 0) {
            gone = evict_small(c);
        } else {
            evict_main(c, &steps);
            gone = true;
        }
    }
    count_eviction(c, steps - 1);
}

static int run_s3(const evict_trace *trace, uint32_t capacity, evict_result *result_p)
{
    cache c;
    if (cache_open(&c, trace, capacity, result_p))
        return 1;
    for (uint32_t i = 0; i < trace->n; i++) {
        item *it = &c.items[trace->keys[i]];
        if (it->where == SMALL || it->where == MAIN) {
            result_p->hits++;
            it->count = it->count < 3 ? (uint8_t)(it->count + 1) : it->count;
            continue;
        }
        bool ghost = it->where == GHOST;
        if (ghost)
            cut(&c, trace->keys[i]);
        if (c.lists[SMALL].n + c.lists[MAIN].n == capacity)
            evict_s3(&c);
        it->count = 0;
        push(&c, ghost ? MAIN : SMALL, trace->keys[i]);
    }
    free(c.items);
    return 0;
}

/* ---- Belady ---------------------------------------------------------------------------------- */

/* A heap of (next read, key), the latest on top; entries that are out of date are dropped there. */
typedef struct due {
    uint32_t next, key;
} due;

static void heap_push(due *heap, uint32_t *n, due d)
{
    uint32_t i = (*n)++;
    for (; i > 0 && heap[(i - 1) / 2].next < d.next; i = (i - 1) / 2)
        heap[i] = heap[(i - 1) / 2];
    heap[i] = d;
}

static due heap_pop(due *heap, uint32_t *n)
{
    due top = heap[0], last = heap[--*n];
    uint32_t i = 0;
    for (uint32_t child = 1; child < *n; child = 2 * i + 1) {
        child += child + 1 < *n && heap[child + 1].next > heap[child].next;
        if (heap[child].next <= last.next)
            break;
        heap[i] = heap[child];
        i = child;
    }
    heap[i] = last;
    return top;
}

static int run_belady(const evict_trace *trace, uint32_t capacity, evict_result *result_p)
{
    uint32_t *next = malloc(trace->n * sizeof(*next)), n_heap = 0, n_in = 0;
    uint32_t *due_of = malloc(trace->n_keys * sizeof(*due_of)); /* NIL + in cache: never again */
    bool *in = calloc(trace->n_keys, sizeof(*in));
    due *heap = calloc(trace->n, sizeof(*heap));
    int failed = !next || !due_of || !in || !heap;
    *result_p = (evict_result){0};
    for (uint32_t k = 0; !failed && k < trace->n_keys; k++)
        due_of[k] = NIL;
    for (uint32_t i = trace->n; !failed && i-- > 0; due_of[trace->keys[i]] = i)
        next[i] = due_of[trace->keys[i]];
    for (uint32_t i = 0; !failed && i < trace->n; i++) {
        uint32_t key = trace->keys[i];
        result_p->hits += in[key];
        if (!in[key] && n_in == capacity) {
            due d = heap_pop(heap, &n_heap);
            while (!in[d.key] || due_of[d.key] != d.next)
                d = heap_pop(heap, &n_heap);
            in[d.key] = false;
            result_p->n_evictions++;
        } else if (!in[key]) {
            n_in++;
        }
        in[key] = true;
        due_of[key] = next[i];
        heap_push(heap, &n_heap, (due){next[i], key});
    }
    free(next);
    free(due_of);
    free(in);
    free(heap);
    return failed;
}

const evict_policy evict_policies[EVICT_POLICIES] = {
    {"Belady", run_belady}, {"FIFO", run_fifo},  {"LRU", run_lru},
    {"SIEVE", run_sieve},   {"S3-FIFO", run_s3}, {"cachesvc", evict_run_ours},
};
