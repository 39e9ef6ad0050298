/*
 * json.c: a JSON writer for standard output.
 *
 * Main thread. Keeps the stack of open brackets, so that commas and ends come by themselves.
 */
#include <stdio.h>

#include "base/assert.h"
#include "kvctl.h"

#define MAX_DEPTH 8

static char brackets[MAX_DEPTH];
static bool filled[MAX_DEPTH];
static int depth;

static void put_string(const char *text)
{
    (void)putchar('"');
    for (const unsigned char *at = (const unsigned char *)text; *at != '\0'; at++) {
        if (*at == '"' || *at == '\\')
            (void)printf("\\%c", *at);
        else if (*at < 0x20)
            (void)printf("\\u%04x", *at);
        else
            (void)putchar(*at);
    }
    (void)putchar('"');
}

static void put_key(const char *key)
{
    if (depth > 0 && filled[depth - 1])
        (void)putchar(',');
    if (depth > 0)
        filled[depth - 1] = true;
    if (key == NULL)
        return;
    put_string(key);
    (void)putchar(':');
}

void kvctl_json_open(const char *key, char bracket)
{
    KVC_ASSERT(depth < MAX_DEPTH);
    put_key(key);
    (void)putchar(bracket);
    brackets[depth] = bracket;
    filled[depth++] = false;
}

void kvctl_json_close(void)
{
    KVC_ASSERT(depth > 0);
    (void)putchar(brackets[--depth] == '{' ? '}' : ']');
    if (depth == 0)
        (void)putchar('\n');
}

void kvctl_json_text(const char *key, const char *text)
{
    put_key(key);
    put_string(text);
}

void kvctl_json_number(const char *key, uint64_t value)
{
    put_key(key);
    (void)printf("%llu", (unsigned long long)value);
}

void kvctl_json_bool(const char *key, bool value)
{
    put_key(key);
    (void)fputs(value ? "true" : "false", stdout);
}
