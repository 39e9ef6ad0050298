/*
 * ghost.c: a table that remembers names for a while; see ghost.h.
 *
 * The owner's lock guards all of it. Invariant: an entry stands at its name's low bits; 0 is none.
 */
#include "ghost.h"

#include <stdlib.h>

#define SIZE_MIN (1u << 10)
#define SIZE_CAP (1u << 20)

static uint32_t tag_of(uint64_t name)
{
    uint32_t tag = (uint32_t)name;
    return tag ? tag : 1;
}

/* Twice as many entries as names. Without memory for them, the old ones go on. */
static void fit(kvs_ghosts *ghosts, uint64_t n_values)
{
    uint32_t size = ghosts->size ? ghosts->size : SIZE_MIN;
    while (size < 2 * n_values && size < SIZE_CAP)
        size *= 2;
    if (size == ghosts->size)
        return;
    uint64_t *entries = calloc(size, sizeof(*entries));
    if (!entries)
        return;
    for (uint32_t i = 0; i < ghosts->size; i++)
        entries[(uint32_t)ghosts->entries[i] & (size - 1)] = ghosts->entries[i];
    free(ghosts->entries);
    ghosts->entries = entries;
    ghosts->size = size;
}

void kvs_ghosts_fini(kvs_ghosts *ghosts)
{
    free(ghosts->entries);
    *ghosts = (kvs_ghosts){0};
}

void kvs_ghost_note(kvs_ghosts *ghosts, uint64_t name, uint32_t now, uint64_t n_values)
{
    uint32_t tag = tag_of(name);
    fit(ghosts, n_values);
    if (ghosts->size)
        ghosts->entries[tag & (ghosts->size - 1)] = (uint64_t)now << 32 | tag;
}

bool kvs_ghost_take(kvs_ghosts *ghosts, uint64_t name, uint32_t now, uint32_t max_age)
{
    uint32_t tag = tag_of(name);
    uint64_t *entry = ghosts->size ? &ghosts->entries[tag & (ghosts->size - 1)] : NULL;
    if (!entry || (uint32_t)*entry != tag)
        return false;
    uint32_t age = now - (uint32_t)(*entry >> 32);
    *entry = 0;
    return age < max_age;
}
