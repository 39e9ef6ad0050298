/*
 * clock.c: readings of the two clocks, and deadlines.
 *
 * Any thread, no state. Deadlines saturate instead of wrapping, so that "for ever" given as a huge
 * timeout stays in the future.
 */
#include "base/clock.h"

#include <time.h>

#define NS_PER_S 1000000000ull

static uint64_t read_ns(clockid_t id)
{
    struct timespec now;
    (void)clock_gettime(id, &now); /* cannot fail for these ids on Linux */
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

uint64_t kvc_now_ns(void)
{
    return read_ns(CLOCK_MONOTONIC);
}

uint64_t kvc_wall_ns(void)
{
    return read_ns(CLOCK_REALTIME);
}

uint64_t kvc_deadline_ns(uint64_t timeout_ns)
{
    if (timeout_ns == 0)
        return 0;
    uint64_t now_ns = kvc_now_ns();
    return timeout_ns > UINT64_MAX - now_ns ? UINT64_MAX : now_ns + timeout_ns;
}

bool kvc_expired(uint64_t deadline_ns)
{
    return deadline_ns != 0 && kvc_now_ns() >= deadline_ns;
}
