/*
 * error.c: texts of errors, for people.
 *
 * Each thread has the text of its last error. An op that fails on another thread leaves its text in
 * a ring of RING_TEXTS under a ticket, for kvc_op_wait; the ring is bounded, so an old ticket finds
 * the status's name only. Any thread; ring_lock guards the ring and is a leaf.
 */
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "internal.h"

#define RING_TEXTS 64u
#define TEXT_BYTES 384u

static _Thread_local char last_error[TEXT_BYTES];
static pthread_mutex_t ring_lock = PTHREAD_MUTEX_INITIALIZER;
static char ring[RING_TEXTS][TEXT_BYTES];
static uintptr_t ring_next = 1;

const char *kvc_last_error(void)
{
    return last_error;
}

kvc_status kvci_fail(kvc_status status, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    (void)vsnprintf(last_error, sizeof(last_error), fmt, args);
    va_end(args);
    return status;
}

uintptr_t kvci_error_store(const char *text)
{
    (void)pthread_mutex_lock(&ring_lock);
    uintptr_t ticket = ring_next++;
    (void)snprintf(ring[ticket % RING_TEXTS], TEXT_BYTES, "%s", text);
    (void)pthread_mutex_unlock(&ring_lock);
    return ticket;
}

void kvci_error_load(uintptr_t ticket, kvc_status status)
{
    (void)pthread_mutex_lock(&ring_lock);
    bool kept = ticket != 0 && ticket < ring_next && ring_next - ticket <= RING_TEXTS;
    if (kept)
        memcpy(last_error, ring[ticket % RING_TEXTS], TEXT_BYTES);
    (void)pthread_mutex_unlock(&ring_lock);
    if (!kept)
        (void)snprintf(last_error, sizeof(last_error), "%s", kvc_status_name(status));
}
