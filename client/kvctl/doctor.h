/*
 * doctor.h: checks and their findings.
 *
 * A check looks at one thing and reports findings; each finding that is not OK says what to do.
 */
#ifndef KVCTL_DOCTOR_H
#define KVCTL_DOCTOR_H

#include "kvctl.h"

#define DOCTOR_MAX_FINDINGS 64
#define DOCTOR_TEXT_BYTES   320

typedef enum doctor_level { DOCTOR_OK = 0, DOCTOR_INFO, DOCTOR_WARN, DOCTOR_FAIL } doctor_level;

typedef struct doctor_finding {
    doctor_level level;
    const char *check;
    char text[DOCTOR_TEXT_BYTES];
    char fix[DOCTOR_TEXT_BYTES]; /* empty: nothing to do */
} doctor_finding;

/* What doctor_check_gpu found: whether its driver exports its memory as dma-bufs. */
typedef enum doctor_gpu {
    DOCTOR_GPU_NONE = 0,
    DOCTOR_GPU_PLAIN,
    DOCTOR_GPU_DMABUF,
} doctor_gpu;

typedef struct doctor {
    const kvctl_globals *globals;
    const char *lmdb_path;   /* NULL: not given */
    const char *admin;       /* HOST:PORT; NULL: not given */
    kvc_server_stats *stats; /* NULL: no server answered */
    bool local;              /* the server is on this machine */
    doctor_gpu gpu;
    uint32_t n_findings;
    doctor_finding findings[DOCTOR_MAX_FINDINGS];
} doctor;

/* Adds a finding; fix may be added with doctor_fix right after it. */
void doctor_report(doctor *d, doctor_level level, const char *check, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
void doctor_fix(doctor *d, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* First line of a small file without its end, "" where it cannot be read. */
const char *doctor_line(const char *path, char *out, size_t out_bytes);

/* ---- doctor_server.c: keeps d->stats, which the caller frees ------------------------------------
 */
void doctor_check_server(doctor *d);
void doctor_check_tiers(doctor *d); /* caps against memory and disk */

/* ---- doctor_admin.c: after doctor_check_server --------------------------------------------------
 */
void doctor_check_admin(doctor *d);

/* ---- doctor_shm.c: after doctor_check_server ----------------------------------------------------
 */
void doctor_check_shm(doctor *d);
void doctor_check_connections(doctor *d); /* against max_connections */

/* ---- doctor_machine.c
 * ----------------------------------------------------------------------------- */
void doctor_check_machine(doctor *d); /* after doctor_check_gpu */

/* ---- doctor_gpu.c
 * ----------------------------------------------------------------------------------- */
void doctor_check_gpu(doctor *d);

/* ---- doctor_disk.c
 * ---------------------------------------------------------------------------------- */
void doctor_check_disk(doctor *d);

#endif
