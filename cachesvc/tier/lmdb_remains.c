/*
 * lmdb_remains.c: the files of size classes that went, cut shorter a piece at a time: the system
 * takes seconds to free a large one, and the writer has other work meanwhile.
 *
 * Thread: kvs-lmdb-w, and close's caller after it. Invariants: such a file has no name any more,
 * and that is synced, so nothing of it outlives the process; its claim is given back only as its
 * blocks are.
 */
#include <sys/stat.h>
#include <unistd.h>

#include "lmdb_tier.h"

void kvsi_remains_add(kvs_tier *tier, int fd, uint64_t claim_pages)
{
    uint64_t len_bytes = claim_pages * KVSI_PAGE_BYTES;
    struct stat st;

    if (fd >= 0 && fstat(fd, &st) == 0 && (uint64_t)st.st_size > len_bytes)
        len_bytes = (uint64_t)st.st_size;
    /* What is allotted behind its end is cut like the rest. */
    bool later =
        fd >= 0 && tier->n_remains < KVSI_MAX_REMAINS && ftruncate(fd, (off_t)len_bytes) == 0;
    if (later)
        tier->remains[tier->n_remains++] = (kvsi_remains){fd, len_bytes, claim_pages};
    else if (fd >= 0)
        close(fd);
    kvc_mutex_lock(&tier->lock);
    if (later)
        tier->remains_pages += claim_pages;
    else
        tier->claimed_pages -= claim_pages;
    kvc_mutex_unlock(&tier->lock);
}

bool kvsi_remains_cut(kvs_tier *tier, uint64_t *given_p)
{
    *given_p = 0;
    if (tier->n_remains == 0)
        return false;
    kvsi_remains *r = &tier->remains[tier->n_remains - 1];
    r->len_bytes -= r->len_bytes < tier->cut_bytes ? r->len_bytes : tier->cut_bytes;
    bool is_last = r->len_bytes == 0 || ftruncate(r->fd, (off_t)r->len_bytes) != 0;
    uint64_t left = is_last ? 0 : r->len_bytes / KVSI_PAGE_BYTES + KVSI_ENV_SLACK_PAGES;
    if (left < r->claim_pages) {
        *given_p = r->claim_pages - left;
        r->claim_pages = left;
    }
    if (is_last) {
        close(r->fd); /* frees the rest */
        tier->n_remains--;
    }
    kvc_mutex_lock(&tier->lock);
    tier->claimed_pages -= *given_p;
    tier->remains_pages -= *given_p;
    tier->refused_pages = 0;
    kvc_mutex_unlock(&tier->lock);
    return true;
}

void kvsi_remains_close(kvs_tier *tier)
{
    while (tier->n_remains > 0)
        close(tier->remains[--tier->n_remains].fd);
}
