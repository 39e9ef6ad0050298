/*
 * files.h: how many connections the process has descriptors for.
 *
 * gRPC stops listening for good once it finds none for a connection, so it must never come to that.
 */
#ifndef KVS_FILES_H
#define KVS_FILES_H

#include "settings.h"

#define KVS_FILES_PROCESSES 64u /* of clients, watched as they have memory of the GPU open */

/* The starting thread. Raises the process's soft limit on open files as far as its settings want
   and the hard limit lets it, and gives the connections that fit beside the rest: max_connections,
   or fewer, with a warning that says so. One over shm may take two descriptors, so where shm is
   served all count as two. */
uint32_t kvs_files_connections(const kvs_settings *settings);
/* A copy of fd for an answer to take; -1 where there is none, or only one of the last, which are
   for connections. Any thread. */
int kvs_files_pass(int fd);

#endif
