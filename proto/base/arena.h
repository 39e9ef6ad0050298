/*
 * arena.h: a bump allocator for what lives as long as one request.
 *
 * Not thread-safe; one owner at a time. Memory comes in malloc'd chunks, up to max_bytes in all of
 * what is handed out; past that kvc_arena_alloc gives NULL.
 */
#ifndef KVC_BASE_ARENA_H
#define KVC_BASE_ARENA_H

#include <stddef.h>

typedef struct kvc_arena_chunk kvc_arena_chunk;

typedef struct kvc_arena {
    kvc_arena_chunk *chunks;
    size_t used_bytes, max_bytes;
} kvc_arena;

void kvc_arena_init(kvc_arena *arena, size_t max_bytes);
/* Frees every allocation; the arena may be used again. */
void kvc_arena_reset(kvc_arena *arena);
/* 16-byte aligned, not zeroed; NULL when max_bytes or memory is out. */
void *kvc_arena_alloc(kvc_arena *arena, size_t len_bytes);
/* n * size zeroed, overflow checked. */
void *kvc_arena_calloc(kvc_arena *arena, size_t n, size_t size_bytes);
/* Copy of len bytes plus a NUL. */
char *kvc_arena_strndup(kvc_arena *arena, const char *text, size_t len_bytes);

#endif
