/*
 * log.c: formats a line in a buffer on the stack and hands it to the sink in one piece.
 *
 * Any thread; level, format and sink are relaxed atomics, no lock is taken and nothing is
 * allocated. A line is at most LINE_BYTES, below PIPE_BUF, so that lines of several processes in
 * one pipe never mix; a longer message is cut and ends in "...".
 */
#include "base/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"

#define LINE_BYTES    2048
#define MESSAGE_BYTES 1536
#define TAIL_BYTES    16 /* kept free for "...", the closing quote and brace, and the newline */

struct line {
    char text[LINE_BYTES];
    size_t len_bytes;
};

static atomic_int g_level = KVC_LOG_LEVEL_WARN;
static atomic_int g_format = KVC_LOG_TEXT;
static kvc_log_sink *g_sink; /* set before threads start, as the header asks */
static void *g_sink_arg;

static const char *const level_names[] = {"off", "error", "warn", "info", "debug", "trace"};

void kvc_log_set_level(kvc_log_level level)
{
    atomic_store_explicit(&g_level, (int)level, memory_order_relaxed);
}

void kvc_log_set_format(kvc_log_format format)
{
    atomic_store_explicit(&g_format, (int)format, memory_order_relaxed);
}

void kvc_log_set_sink(kvc_log_sink *sink, void *arg)
{
    g_sink = sink;
    g_sink_arg = arg;
}

bool kvc_log_enabled(kvc_log_level level)
{
    return (int)level <= atomic_load_explicit(&g_level, memory_order_relaxed);
}

static void put_bytes(struct line *line, const char *bytes, size_t len_bytes)
{
    if (len_bytes > LINE_BYTES - line->len_bytes)
        return;
    memcpy(line->text + line->len_bytes, bytes, len_bytes);
    line->len_bytes += len_bytes;
}

static void put_text(struct line *line, const char *text)
{
    put_bytes(line, text, strlen(text));
}

/* Bytes of the valid UTF-8 sequence at text, 0 if there is none. */
static size_t utf8_bytes(const unsigned char *text)
{
    size_t n = text[0] < 0x80                                ? 1
               : text[0] >= 0xc2 && text[0] < 0xe0           ? 2
               : text[0] >= 0xe0 && (text[0] & 0xf0) == 0xe0 ? 3
               : text[0] >= 0xf0 && text[0] < 0xf5           ? 4
                                                             : 0;
    for (size_t i = 1; i < n; i++) {
        if ((text[i] & 0xc0) != 0x80)
            return 0;
    }
    bool overlong = (text[0] == 0xe0 && text[1] < 0xa0) || (text[0] == 0xf0 && text[1] < 0x90);
    bool outside = (text[0] == 0xed && text[1] > 0x9f) || (text[0] == 0xf4 && text[1] > 0x8f);
    return overlong || outside ? 0 : n;
}

/*
 * The message, quoted: what would end the line or the quotes is escaped, alike in both formats, and
 * bytes that are no UTF-8 become U+FFFD.
 */
static void put_quoted(struct line *line, const char *text)
{
    put_text(line, "\"");
    const unsigned char *at = (const unsigned char *)text;
    while (*at != '\0') {
        if (line->len_bytes > LINE_BYTES - TAIL_BYTES - 8) {
            put_text(line, "...");
            break;
        }
        char escape[8];
        size_t n = utf8_bytes(at);
        if (*at == '"' || *at == '\\') {
            put_text(line, "\\");
            put_bytes(line, (const char *)at, 1);
        } else if (*at < 0x20 || *at == 0x7f) {
            (void)snprintf(escape, sizeof(escape), "\\u%04x", *at);
            put_text(line, escape);
        } else if (n == 0) {
            put_text(line, "\\ufffd");
        } else {
            put_bytes(line, (const char *)at, n);
        }
        at += n == 0 ? 1 : n;
    }
    put_text(line, "\"");
}

static void put_time(struct line *line)
{
    uint64_t now_ns = kvc_wall_ns();
    time_t seconds = (time_t)(now_ns / 1000000000ull);
    struct tm tm;
    char text[64];
    size_t len = strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S", gmtime_r(&seconds, &tm));
    (void)snprintf(text + len, sizeof(text) - len, ".%06uZ",
                   (unsigned)(now_ns % 1000000000ull / 1000u));
    put_text(line, text);
}

static void emit(const struct line *line)
{
    if (g_sink != NULL) {
        g_sink(g_sink_arg, line->text, line->len_bytes);
        return;
    }
    ssize_t n;
    do {
        n = write(STDERR_FILENO, line->text, line->len_bytes);
    } while (n < 0 && errno == EINTR);
    /* A log that cannot be written has nobody to tell. */
}

void kvc_log(kvc_log_level level, const char *area, const char *fmt, ...)
{
    int saved_errno = errno;
    char message[MESSAGE_BYTES];
    va_list args;
    va_start(args, fmt);
    int n = vsnprintf(message, sizeof(message), fmt, args);
    va_end(args);
    if (n < 0)
        (void)snprintf(message, sizeof(message), "message cannot be formatted: %s", fmt);
    else if ((size_t)n >= sizeof(message))
        memcpy(message + sizeof(message) - 4, "...", 4);

    char thread[16] = "";
    (void)pthread_getname_np(pthread_self(), thread, sizeof(thread));
    unsigned index = (unsigned)level < sizeof(level_names) / sizeof(level_names[0])
                         ? (unsigned)level
                         : (unsigned)KVC_LOG_LEVEL_ERROR;
    bool json = atomic_load_explicit(&g_format, memory_order_relaxed) == (int)KVC_LOG_JSON;
    struct line line = {.len_bytes = 0};
    put_text(&line, json ? "{\"time\":\"" : "");
    put_time(&line);
    put_text(&line, json ? "\",\"level\":\"" : " ");
    put_text(&line, level_names[index]);
    put_text(&line, json ? "\",\"area\":\"" : " ");
    put_text(&line, area);
    put_text(&line, json ? "\",\"thread\":" : " ");
    if (json)
        put_quoted(&line, thread);
    else
        put_text(&line, thread);
    put_text(&line, json ? ",\"message\":" : " ");
    put_quoted(&line, message);
    put_text(&line, json ? "}\n" : "\n");
    emit(&line);
    errno = saved_errno;
}
