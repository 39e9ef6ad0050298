/*
 * iofault.h: makes the file calls of a daemon fail, one by one, from outside: iofault.so is loaded
 * before libc (LD_PRELOAD), the test and every process of the daemon share a page of memory.
 *
 * Only files below the folder `under` count. The test sets what is to fail before it starts the
 * daemon, or while it runs; passes are counted in any case, so a first run tells how many calls
 * there are to fail. IOFAULT_FILE in the environment names the page.
 */
#ifndef KVASIR_TEST_IOFAULT_H
#define KVASIR_TEST_IOFAULT_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define IOFAULT_ENV   "IOFAULT_FILE"
/* In place of an errno: half of the bytes are moved; a map's pages cannot be had (SIGBUS). */
#define IOFAULT_SHORT (-1)

typedef enum iofault_kind {
    IOFAULT_OPEN,  /* open, openat */
    IOFAULT_READ,  /* pread, and completions of io_uring */
    IOFAULT_WRITE, /* write, pwrite, writev */
    IOFAULT_SYNC,  /* fsync, fdatasync, msync */
    IOFAULT_SIZE,  /* ftruncate, fallocate */
    IOFAULT_NAME,  /* mkdir, mkdirat, rename, renameat, unlinkat */
    IOFAULT_MAP,   /* mmap */
    IOFAULT_KINDS
} iofault_kind;

typedef struct iofault_page {
    char under[512];     /* a folder, without a slash at its end */
    atomic_bool no_sync; /* syncs do nothing and say that all went well */
    atomic_int kind;     /* what is to fail ... */
    atomic_uint nth;     /* ... at which pass of its kind, from 1; 0: nothing */
    atomic_bool lasting; /* every later one too */
    atomic_int error;    /* an errno, or IOFAULT_SHORT */
    atomic_uint passes[IOFAULT_KINDS];
    atomic_uint hits; /* how often one failed */
} iofault_page;

/* One way in which a call fails. */
typedef struct iofault_sort {
    iofault_kind kind;
    int error;    /* an errno, or IOFAULT_SHORT */
    bool lasting; /* every later call of the kind too */
    const char *name;
} iofault_sort;

#define IOFAULT_SORTS 14u
extern const iofault_sort iofault_sorts[IOFAULT_SORTS];

/* Makes the page in folder, and the environment of the next start. Gives NULL where it fails. */
iofault_page *iofault_arm(const char *folder, const char *under);
/* The environment as it was; the page stays until the process ends. */
void iofault_disarm(void);

#endif
