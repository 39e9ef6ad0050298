/*
 * lmdb_guard.h: work on a mapped file that survives the file's failure. Private to the lmdb tier.
 *
 * A page of a map that cannot be had (the file was cut, the disk gives an error or is full) raises
 * SIGBUS; LMDB asserts on pages that make no sense, or follows them out of the map: SIGSEGV. They
 * end the function that is being run under a guard, not the process: SIGSEGV only where that merely
 * reads, since one that writes may have spoilt our memory before, and not near address 0, which is
 * a bug of ours. Only threads inside a guard are affected; any other such signal does what it did
 * before.
 */
#ifndef KVSI_LMDB_GUARD_H
#define KVSI_LMDB_GUARD_H

#include <lmdb.h>

/* What kvsi_guard_run gives instead of fn's result: LMDB's own codes start above. */
#define KVSI_GUARD_BUS    (-40001)
#define KVSI_GUARD_ASSERT (-40002)
#define KVSI_GUARD_WILD   (-40003) /* a SIGSEGV, in what merely reads */

/* Installs the handlers, unless they are in force. Before the first guard; any thread. */
void kvsi_guard_install(void);

/*
 * Runs fn(arg) on this thread and gives its result, or why it was ended: then fn stopped somewhere,
 * and what it had taken (no locks, please) is the caller's to give back. Guards nest.
 */
int kvsi_guard_run(int (*fn)(void *arg), void *arg);
/* The same for an fn that writes to nothing but arg and memory that arg points to. */
int kvsi_guard_read(int (*fn)(void *arg), void *arg);

/* For mdb_env_set_assert. Returns, and lets LMDB abort, only outside of guards. */
void kvsi_guard_assert(MDB_env *env, const char *text);

#endif
