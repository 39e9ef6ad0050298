/*
 * clock.h: time. Deadlines are absolute nanoseconds of CLOCK_MONOTONIC; 0 means no deadline.
 */
#ifndef KVC_BASE_CLOCK_H
#define KVC_BASE_CLOCK_H

#include <stdbool.h>
#include <stdint.h>

/* Nanoseconds of CLOCK_MONOTONIC. Any thread. */
uint64_t kvc_now_ns(void);
/* Nanoseconds since 1970 (CLOCK_REALTIME), for logs and stored times. */
uint64_t kvc_wall_ns(void);
/* now + timeout, saturating; a timeout of 0 gives 0 (no deadline). */
uint64_t kvc_deadline_ns(uint64_t timeout_ns);
/* True once a deadline has passed; never for 0. */
bool kvc_expired(uint64_t deadline_ns);

#endif
