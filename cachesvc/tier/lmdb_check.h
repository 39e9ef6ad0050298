/*
 * lmdb_check.h: whether an environment's data file is sound. Private to the lmdb tier.
 *
 * LMDB trusts its pages: a damaged one may crash the process that maps it, or make it hand the same
 * page to two values. So before LMDB maps a file, it is walked here by plain reads, with every
 * offset, length and page number checked; and after an unclean stop a process of its own walks it
 * once more through LMDB, since that may die of what it finds.
 */
#ifndef KVSI_LMDB_CHECK_H
#define KVSI_LMDB_CHECK_H

#include <stdbool.h>

#include "kvc/status.h"

#define KVSI_CHECK_WHY_BYTES 160u

/*
 * Walks data.mdb in dir_fd by plain reads; no content of it can do harm. deep: the first page of
 * every large record too, one disk read each. Any thread; blocks. No file or an empty one is sound.
 * CORRUPT: why says where; a page that the disk does not give counts as damaged. IO: the file
 * cannot be opened. NO_MEMORY.
 */
kvc_status kvsi_check_file(int dir_fd, bool deep, char why[KVSI_CHECK_WHY_BYTES]) KVC_MUST_CHECK;

/*
 * Has the environment root/name checked by a child process `program --check-env root/name`, which
 * may die of it alone; or where program is NULL or does not answer, by kvsi_check_file in this
 * process. OK, CORRUPT (logged), IO, NO_MEMORY. Call it before gRPC starts; blocks.
 */
kvc_status kvsi_check_env(int root_fd, const char *root, const char *name, const char *program,
                          bool deep) KVC_MUST_CHECK;

#endif
