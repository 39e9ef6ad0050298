/*
 * descriptors.h: the protocol's own files as protoc serialises them, for reflection.
 *
 * The build writes the bytes (embed.cmake); descriptors.c looks into them. Constant, any thread.
 */
#ifndef KVTI_DESCRIPTORS_H
#define KVTI_DESCRIPTORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* A FileDescriptorSet of one file. */
typedef struct kvti_descriptor_set {
    const char *name; /* "kvasir.proto"; NULL: past the last */
    const uint8_t *bytes;
    size_t len_bytes;
} kvti_descriptor_set;

extern const kvti_descriptor_set kvti_descriptor_sets[];

/* Bytes inside a set. */
typedef struct kvti_span {
    const uint8_t *bytes;
    size_t len_bytes;
} kvti_span;

/* The FileDescriptorProto by file name, or of the file that defines a service, message or enum, or
 * a member of one ("kvasir.v1.KvCache.Stats"). False: there is none. */
bool kvti_descriptor_by_name(const char *name, kvti_span *file_p);
bool kvti_descriptor_by_symbol(const char *symbol, kvti_span *file_p);
/* Whether a message type of this full name exists. */
bool kvti_descriptor_has_type(const char *symbol);
/* Calls each for the full name of every service. */
void kvti_descriptor_services(void (*each)(void *arg, const char *name), void *arg);

#endif
