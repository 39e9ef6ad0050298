/*
 * lent.h: the process's table of memory that payloads come from or go to for long.
 *
 * Who maps a lot of memory and keeps it (the dram tier's segments, a client's regions) says so here
 * before its first byte is used and takes it back before it is unmapped. A transport that has to
 * prepare memory (register it with a device) watches the table. Ranges never overlap; the same one
 * may be added more than once, and goes with its last remove. Any thread.
 */
#ifndef KVC_BASE_LENT_H
#define KVC_BASE_LENT_H

#include <stddef.h>

#include "kvc/status.h"

typedef struct kvc_lent_watch kvc_lent_watch;

/* The caller allocates it and keeps it until kvc_lent_unwatch. Both functions run with the table's
 * lock held (rank LENT): they may take locks of the transports and must not call back. */
struct kvc_lent_watch {
    void (*added)(kvc_lent_watch *watch, void *base, size_t len_bytes);
    void (*removed)(kvc_lent_watch *watch, void *base, size_t len_bytes);
    kvc_lent_watch *next; /* the table's */
};

/* Adds [base, base + len_bytes). NO_MEMORY; INVALID: it overlaps another. It stays unknown then,
 * which costs a copy and nothing else. */
kvc_status kvc_lent_add(void *base, size_t len_bytes);
/* Takes it back, before it is unmapped: when this returns no watcher uses it any more, unless it
 * was added once more. Nothing where base was never added. */
void kvc_lent_remove(void *base);

/* Tells watch of all there is and of what comes and goes. */
void kvc_lent_watch_begin(kvc_lent_watch *watch);
/* When this returns, no function of watch runs or will. */
void kvc_lent_watch_end(kvc_lent_watch *watch);

#endif
