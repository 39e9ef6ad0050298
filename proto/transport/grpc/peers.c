/*
 * peers.c: how many connections a gRPC listener has, and which of them may come.
 *
 * gRPC shows each socket as it accepts it (socket.c) and closes it without a word. So what was
 * shown is written down, and looked at now and then: a descriptor that is not that socket any more
 * is a connection that has ended. Whoever comes while there are too many is shut down at once: gRPC
 * reads the end of it and closes it, and its listening socket goes on, which a refusal by the
 * mutator itself, or running out of descriptors, would stop for good.
 *
 * come on gRPC's threads, look on the listener's; the lock guards everything.
 */
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include "base/clock.h"
#include "grpc_internal.h"

#define LOOK_NS ((uint64_t)10 * 1000000) /* between two looks for the sake of who comes */

struct kvti_accepted {
    int fd;
    ino_t inode;
};

static bool is_socket(int fd, ino_t *inode_p)
{
    struct stat info;
    bool is = fstat(fd, &info) == 0 && S_ISSOCK(info.st_mode);
    *inode_p = is ? info.st_ino : 0;
    return is;
}

/* With the lock held. */
static void look(kvti_sockets *sockets)
{
    uint32_t n = 0;
    ino_t inode;
    for (uint32_t i = 0; i < sockets->n; i++) {
        kvti_accepted *one = &sockets->accepted[i];
        if (is_socket(one->fd, &inode) && inode == one->inode)
            sockets->accepted[n++] = *one;
    }
    kvti_peers_give(sockets->peers, sockets->n - n);
    sockets->n = n;
    sockets->looked_ns = kvc_now_ns();
}

/* With the lock held. The descriptor of a connection that has ended is free for the next. */
static kvti_accepted *find(const kvti_sockets *sockets, int fd)
{
    for (uint32_t i = 0; i < sockets->n; i++)
        if (sockets->accepted[i].fd == fd)
            return &sockets->accepted[i];
    return NULL;
}

/* With the lock held. */
static bool has_room(kvti_sockets *sockets)
{
    if (sockets->n < sockets->max)
        return true;
    uint32_t max = sockets->max == 0 ? 64 : sockets->max * 2;
    kvti_accepted *accepted = realloc(sockets->accepted, max * sizeof(*accepted));
    if (accepted == NULL)
        return false;
    sockets->accepted = accepted;
    sockets->max = max;
    return true;
}

/* With the lock held. */
static bool may_come(kvti_sockets *sockets)
{
    kvt_peers *peers = sockets->peers;
    if (!has_room(sockets))
        return false;
    if (peers != NULL && atomic_load(&peers->n) >= peers->max &&
        kvc_now_ns() - sockets->looked_ns >= LOOK_NS)
        look(sockets);
    return kvti_peers_take(peers);
}

void kvti_sockets_come(kvti_sockets *sockets, int fd)
{
    bool may = true;
    ino_t inode;
    kvc_mutex_lock(&sockets->lock);
    kvti_accepted *old = find(sockets, fd);
    if (is_socket(fd, &inode) && old != NULL)
        old->inode = inode;
    else if (!sockets->over && (may = may_come(sockets)))
        sockets->accepted[sockets->n++] = (kvti_accepted){fd, inode};
    kvc_mutex_unlock(&sockets->lock);
    if (!may)
        (void)shutdown(fd, SHUT_RDWR);
}

void kvti_sockets_look(kvti_sockets *sockets)
{
    kvc_mutex_lock(&sockets->lock);
    look(sockets);
    kvc_mutex_unlock(&sockets->lock);
}

void kvti_sockets_init(kvti_sockets *sockets, kvt_peers *peers)
{
    *sockets = (kvti_sockets){.peers = peers};
    kvc_mutex_init(&sockets->lock, KVC_RANK_LEAF);
}

void kvti_sockets_over(kvti_sockets *sockets)
{
    kvc_mutex_lock(&sockets->lock);
    kvti_peers_give(sockets->peers, sockets->n);
    sockets->n = 0;
    sockets->over = true;
    kvc_mutex_unlock(&sockets->lock);
}

void kvti_sockets_fini(kvti_sockets *sockets)
{
    /* gRPC orders this after the last use by another thread, but no sanitizer sees into it. */
    kvc_mutex_lock(&sockets->lock);
    free(sockets->accepted);
    kvc_mutex_unlock(&sockets->lock);
    kvc_mutex_fini(&sockets->lock);
}
