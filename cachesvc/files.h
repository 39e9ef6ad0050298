/*
 * files.h: how many connections the process has descriptors for.
 *
 * gRPC stops listening for good once it finds none for a connection, so it must never come to that.
 * The starting thread.
 */
#ifndef KVS_FILES_H
#define KVS_FILES_H

#include "settings.h"

/* Raises the process's soft limit on open files as far as its settings want and the hard limit lets
   it, and gives the connections that fit beside the rest: max_connections, or fewer, with a warning
   that says so. */
uint32_t kvs_files_connections(const kvs_settings *settings);

#endif
