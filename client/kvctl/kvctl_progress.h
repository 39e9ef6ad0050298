/*
 * kvctl_progress.h: a progress bar on standard error for what lasts over a second.
 *
 * Nothing is shown where standard error is no terminal, or before a second has passed. One thread
 * per bar, one bar at a time. For programs, never for libraries.
 */
#ifndef KVCTL_PROGRESS_H
#define KVCTL_PROGRESS_H

#include <stdint.h>

typedef struct kvctl_progress kvctl_progress;

/*
 * label: what is being done ("storing"), kept. total 0: not known; the time that has passed is
 * shown instead of a bar. unit: "bytes" is shown with KiB, MiB ...; other words as they are; may be
 * NULL; kept. NULL when memory is out, which the two below take.
 */
kvctl_progress *kvctl_progress_start(const char *label, uint64_t total, const char *unit);
/* done so far, of total. Cheap: draws ten times a second at most. */
void kvctl_progress_set(kvctl_progress *progress, uint64_t done);
/* Clears the line and frees. */
void kvctl_progress_stop(kvctl_progress *progress);

#endif
