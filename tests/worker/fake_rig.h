/*
 * fake_rig.h: a model over the fake device, and a server whose memory it maps. See fake_cuda.h.
 *
 * One thread per test; a served is a test's state.
 */
#ifndef TESTS_WORKER_FAKE_RIG_H
#define TESTS_WORKER_FAKE_RIG_H

#include "daemon.h"
#include "rig.h"

enum { FAKE_TOKENS = 600, FAKE_DIMS = 30 };

/* Not opened yet. client may be NULL. */
void fake_rig(rig *r, kvc_client *client);

/* A server of a test's own, over shm. */
typedef struct served {
    char folder[256];
    support_daemon daemon;
    kvc_client *client;
} served;
int open_served(void **state);
int close_served(void **state);

#endif
