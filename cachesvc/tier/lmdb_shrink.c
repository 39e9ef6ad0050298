/*
 * lmdb_shrink.c: what gives the disk back: size classes that hold nothing.
 *
 * Thread: kvs-lmdb-w, or open's caller before there is one. Invariants: what is removed was synced
 * as empty, so no crash brings a value back; a write that was queued for the class meanwhile makes
 * it anew, since this thread is the one that will come to it.
 */
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/log.h"
#include "lmdb_tier.h"

/* The caller holds the lock. */
static bool is_empty(const kvsi_class *class)
{
    return class->claim_pages > 0 && class->empty_ns != 0 && class->values == 0 &&
           class->queued_pages == 0 && class->freeing_pages == 0 && !class->broken &&
           !class->release_lost;
}

uint64_t kvsi_empty_due(const kvs_tier *tier)
{
    uint64_t due = 0;

    for (uint32_t i = 0; i < tier->n_classes; i++) {
        const kvsi_class *class = &tier->classes[i];
        if (is_empty(class) && (due == 0 || class->empty_ns + KVSI_EMPTY_NS < due))
            due = class->empty_ns + KVSI_EMPTY_NS;
    }
    return due;
}

static void remove_class(kvs_tier *tier, kvsi_class *class)
{
    char name[sizeof(class->env.name)];

    if (class->dirty && kvsi_class_sync(tier, class) != KVC_OK)
        return;
    memcpy(name, class->env.name, sizeof(name));
    kvsi_env_close(&class->env);
    kvsi_env_remove(tier->root_fd, name);
    if (fsync(tier->root_fd) != 0)
        KVC_LOG_WARN(TIER, "lmdb: cannot sync %s", tier->root);
    kvc_mutex_lock(&tier->lock);
    tier->claimed_pages -= class->claim_pages + KVSI_ENV_SLACK_PAGES;
    class->claim_pages = class->live_pages = class->tree_pages = 0;
    class->empty_ns = 0;
    tier->refused_pages = 0;
    kvc_mutex_unlock(&tier->lock);
    KVC_LOG_INFO(TIER, "lmdb: %s held no value any more: its room is given back", name);
}

void kvsi_remove_empty(kvs_tier *tier)
{
    for (uint32_t i = 0; i < KVSI_MAX_CLASSES; i++) {
        kvsi_class *class = &tier->classes[i];
        kvc_mutex_lock(&tier->lock);
        bool due = is_empty(class) && kvc_now_ns() >= class->empty_ns + KVSI_EMPTY_NS;
        kvc_mutex_unlock(&tier->lock);
        if (due)
            remove_class(tier, class);
    }
}
