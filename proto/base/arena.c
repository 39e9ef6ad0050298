/*
 * arena.c: a list of malloc'd chunks, the newest first, each filled from its start.
 *
 * One owner at a time. Invariants: used_bytes counts what was handed out, rounded up to 16, and
 * never exceeds max_bytes; a chunk is freed only by reset.
 */
#include "base/arena.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define ALIGN_BYTES     ((size_t)16)
#define CHUNK_MIN_BYTES ((size_t)4096)

struct kvc_arena_chunk {
    kvc_arena_chunk *next;
    size_t size_bytes, used_bytes;
    _Alignas(16) unsigned char data[];
};

void kvc_arena_init(kvc_arena *arena, size_t max_bytes)
{
    *arena = (kvc_arena){.max_bytes = max_bytes};
}

void kvc_arena_reset(kvc_arena *arena)
{
    kvc_arena_chunk *chunk = arena->chunks;
    while (chunk != NULL) {
        kvc_arena_chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
    arena->chunks = NULL;
    arena->used_bytes = 0;
}

/* Puts a chunk with room for need_bytes in front. NULL when memory is out. */
static kvc_arena_chunk *add_chunk(kvc_arena *arena, size_t need_bytes)
{
    size_t size_bytes = need_bytes > CHUNK_MIN_BYTES ? need_bytes : CHUNK_MIN_BYTES;
    if (size_bytes > SIZE_MAX - sizeof(kvc_arena_chunk))
        return NULL;
    kvc_arena_chunk *chunk = malloc(sizeof(*chunk) + size_bytes);
    if (chunk == NULL)
        return NULL;
    chunk->size_bytes = size_bytes;
    chunk->used_bytes = 0;
    chunk->next = arena->chunks;
    arena->chunks = chunk;
    return chunk;
}

void *kvc_arena_alloc(kvc_arena *arena, size_t len_bytes)
{
    size_t left_bytes = arena->max_bytes - arena->used_bytes;
    if (len_bytes > left_bytes || len_bytes > SIZE_MAX - ALIGN_BYTES)
        return NULL;
    /* Zero-length pieces still get their own address. */
    size_t need_bytes = len_bytes == 0 ? ALIGN_BYTES : (len_bytes + ALIGN_BYTES - 1) & ~(size_t)15;
    if (need_bytes > left_bytes)
        return NULL;
    kvc_arena_chunk *chunk = arena->chunks;
    if (chunk == NULL || need_bytes > chunk->size_bytes - chunk->used_bytes)
        chunk = add_chunk(arena, need_bytes);
    if (chunk == NULL)
        return NULL;
    void *piece = chunk->data + chunk->used_bytes;
    chunk->used_bytes += need_bytes;
    arena->used_bytes += need_bytes;
    return piece;
}

void *kvc_arena_calloc(kvc_arena *arena, size_t n, size_t size_bytes)
{
    if (size_bytes != 0 && n > SIZE_MAX / size_bytes)
        return NULL;
    void *piece = kvc_arena_alloc(arena, n * size_bytes);
    if (piece != NULL)
        memset(piece, 0, n * size_bytes);
    return piece;
}

char *kvc_arena_strndup(kvc_arena *arena, const char *text, size_t len_bytes)
{
    if (len_bytes == SIZE_MAX)
        return NULL;
    char *copy = kvc_arena_alloc(arena, len_bytes + 1);
    if (copy == NULL)
        return NULL;
    if (len_bytes > 0)
        memcpy(copy, text, len_bytes);
    copy[len_bytes] = '\0';
    return copy;
}
