/*
 * fault.h: named places where a test or an operator can make things fail.
 *
 * if (KVC_FAULT("lmdb.commit")) status = KVC_IO; costs one relaxed load while nothing is armed.
 * Armed by a spec: "lmdb.commit=every:3,dram.reserve=once". Modes: always; once; every:N (each
 * N-th pass); after:N (each pass but the first N); nth:N (the N-th pass only). Any thread; may be
 * asked while any lock is held.
 */
#ifndef KVC_BASE_FAULT_H
#define KVC_BASE_FAULT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "kvc/status.h"

#define KVC_FAULT_POINTS_MAX 32 /* armed at one time */
#define KVC_FAULT_NAME_BYTES 48

extern atomic_bool kvc_fault_armed; /* read it through KVC_FAULT only */

bool kvc_fault_hit(const char *name);

#define KVC_FAULT(name)                                                                            \
    (atomic_load_explicit(&kvc_fault_armed, memory_order_relaxed) && kvc_fault_hit(name))

/*
 * Replaces what is armed by the spec; "" or NULL disarms. Warns in the log for each point. INVALID,
 * with nothing changed: a malformed spec, or more than KVC_FAULT_POINTS_MAX points.
 */
kvc_status kvc_fault_arm(const char *spec) KVC_MUST_CHECK;
/* Arms what KVASIR_FAULT says, if it is set. A program's main calls it; libraries do not. */
kvc_status kvc_fault_arm_env(void) KVC_MUST_CHECK;
/* How often an armed point was passed, and how often it failed. 0 where it is not armed. */
uint64_t kvc_fault_passes(const char *name);
uint64_t kvc_fault_failures(const char *name);

#endif
