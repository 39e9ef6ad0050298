/*
 * descriptors.c: finds things in serialised FileDescriptorProtos; see descriptors.h.
 *
 * Pure, any thread. The bytes are protoc's own, written at build time, so they are walked without
 * the checks that a peer's bytes need; a walk still stops at what it does not understand.
 */
#include "descriptors.h"

#include <stdio.h>
#include <string.h>

/* Field numbers of descriptor.proto. */
enum {
    SET_FILE = 1,
    FILE_PACKAGE = 2,
    FILE_MESSAGE = 4,
    FILE_ENUM = 5,
    FILE_SERVICE = 6,
    ANY_NAME = 1,   /* of a file, message, enum, service, field, value and method */
    ANY_MEMBER = 2, /* fields of a message, values of an enum, methods of a service */
};

static bool take_varint(kvti_span *at, uint64_t *value_p)
{
    *value_p = 0;
    for (unsigned shift = 0; shift < 64 && at->len_bytes > 0; shift += 7) {
        uint8_t byte = *at->bytes++;
        at->len_bytes--;
        *value_p |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80)
            return true;
    }
    return false;
}

/* The next field with bytes in it; others are skipped. False: the end. */
static bool next_field(kvti_span *at, uint32_t *number_p, kvti_span *value_p)
{
    uint64_t tag, value;
    while (take_varint(at, &tag)) {
        if (!take_varint(at, &value))
            return false;
        if ((tag & 7) != 2)
            continue; /* these descriptors have varints besides */
        if (value > at->len_bytes)
            return false;
        *number_p = (uint32_t)(tag >> 3);
        *value_p = (kvti_span){at->bytes, (size_t)value};
        at->bytes += value;
        at->len_bytes -= (size_t)value;
        return true;
    }
    return false;
}

/* The first field of this number; empty if there is none. */
static kvti_span field_of(kvti_span message, uint32_t number)
{
    uint32_t found;
    kvti_span value;
    while (next_field(&message, &found, &value))
        if (found == number)
            return value;
    return (kvti_span){0};
}

static bool is_text(kvti_span span, const char *text, size_t len)
{
    return span.len_bytes == len && memcmp(span.bytes, text, len) == 0;
}

/* The element of this name among the repeated fields number; an empty span: none. */
static kvti_span named(kvti_span parent, uint32_t number, const char *name, size_t len)
{
    uint32_t found;
    kvti_span value;
    while (next_field(&parent, &found, &value))
        if (found == number && is_text(field_of(value, ANY_NAME), name, len))
            return value;
    return (kvti_span){0};
}

static kvti_span file_at(const kvti_descriptor_set *set)
{
    return field_of((kvti_span){set->bytes, set->len_bytes}, SET_FILE);
}

bool kvti_descriptor_by_name(const char *name, kvti_span *file_p)
{
    for (const kvti_descriptor_set *set = kvti_descriptor_sets; set->name != NULL; set++) {
        if (strcmp(set->name, name) == 0) {
            *file_p = file_at(set);
            return true;
        }
    }
    return false;
}

/* What of the symbol follows the file's package and a dot; NULL: it is not in there. */
static const char *in_package(kvti_span file, const char *symbol)
{
    kvti_span package = field_of(file, FILE_PACKAGE);
    if (strlen(symbol) <= package.len_bytes ||
        memcmp(symbol, package.bytes, package.len_bytes) != 0 || symbol[package.len_bytes] != '.')
        return NULL;
    return symbol + package.len_bytes + 1;
}

/* Whether the file defines "Name" or "Name.member" among its elements of this kind. */
static bool defines(kvti_span file, uint32_t kind, const char *rest)
{
    size_t len = strcspn(rest, ".");
    kvti_span element = named(file, kind, rest, len);
    if (element.len_bytes == 0 || rest[len] == '\0')
        return element.len_bytes > 0;
    const char *member = rest + len + 1;
    return named(element, ANY_MEMBER, member, strlen(member)).len_bytes > 0;
}

static bool find(const char *symbol, uint32_t first_kind, uint32_t last_kind, kvti_span *file_p)
{
    for (const kvti_descriptor_set *set = kvti_descriptor_sets; set->name != NULL; set++) {
        *file_p = file_at(set);
        const char *rest = in_package(*file_p, symbol);
        for (uint32_t kind = first_kind; rest != NULL && kind <= last_kind; kind++)
            if (defines(*file_p, kind, rest))
                return true;
    }
    return false;
}

bool kvti_descriptor_by_symbol(const char *symbol, kvti_span *file_p)
{
    return find(symbol, FILE_MESSAGE, FILE_SERVICE, file_p);
}

bool kvti_descriptor_has_type(const char *symbol)
{
    kvti_span file;
    return find(symbol, FILE_MESSAGE, FILE_MESSAGE, &file);
}

void kvti_descriptor_services(void (*each)(void *arg, const char *name), void *arg)
{
    for (const kvti_descriptor_set *set = kvti_descriptor_sets; set->name != NULL; set++) {
        kvti_span file = file_at(set), package = field_of(file, FILE_PACKAGE), value;
        uint32_t number;
        while (next_field(&file, &number, &value)) {
            char full[256];
            kvti_span name = field_of(value, ANY_NAME);
            if (number != FILE_SERVICE)
                continue;
            (void)snprintf(full, sizeof(full), "%.*s.%.*s", (int)package.len_bytes,
                           (const char *)package.bytes, (int)name.len_bytes,
                           (const char *)name.bytes);
            each(arg, full);
        }
    }
}
