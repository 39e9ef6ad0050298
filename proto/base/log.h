/*
 * log.h: structured log lines, one per event, written whole by one write(2).
 *
 * Format: time level area thread "message". Levels by volume: ERROR and WARN are for people to act
 * on, INFO is for starts, stops and rare changes, DEBUG per request, TRACE per step. The message is
 * lowercase, names exact causes, and carries no line break. Any thread; a process-wide sink.
 */
#ifndef KVC_BASE_LOG_H
#define KVC_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>

#include "kvc/status.h"

typedef enum kvc_log_level {
    KVC_LOG_LEVEL_OFF = 0,
    KVC_LOG_LEVEL_ERROR,
    KVC_LOG_LEVEL_WARN,
    KVC_LOG_LEVEL_INFO,
    KVC_LOG_LEVEL_DEBUG,
    KVC_LOG_LEVEL_TRACE,
} kvc_log_level;

typedef enum kvc_log_format { KVC_LOG_TEXT = 0, KVC_LOG_JSON = 1 } kvc_log_format;

/* Called with a finished line (newline included). May be called from any thread; must not log. */
typedef void kvc_log_sink(void *arg, const char *line, size_t len_bytes);

void kvc_log_set_level(kvc_log_level level); /* default WARN: a library is quiet */
void kvc_log_set_format(kvc_log_format format);
/* NULL restores standard error. Call before threads start. */
void kvc_log_set_sink(kvc_log_sink *sink, void *arg);
bool kvc_log_enabled(kvc_log_level level);
/* Writes always; the macros below ask kvc_log_enabled first. */
void kvc_log(kvc_log_level level, const char *area, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* AREA is a bare word: SERVER, TIER, GRPC, WORKER ... The arguments are evaluated only if enabled.
 */
#define KVC_LOG_AT(level, AREA, ...)                                                               \
    (kvc_log_enabled(level) ? kvc_log(level, #AREA, __VA_ARGS__) : (void)0)
#define KVC_LOG_ERROR(AREA, ...) KVC_LOG_AT(KVC_LOG_LEVEL_ERROR, AREA, __VA_ARGS__)
#define KVC_LOG_WARN(AREA, ...)  KVC_LOG_AT(KVC_LOG_LEVEL_WARN, AREA, __VA_ARGS__)
#define KVC_LOG_INFO(AREA, ...)  KVC_LOG_AT(KVC_LOG_LEVEL_INFO, AREA, __VA_ARGS__)
#define KVC_LOG_DEBUG(AREA, ...) KVC_LOG_AT(KVC_LOG_LEVEL_DEBUG, AREA, __VA_ARGS__)
#define KVC_LOG_TRACE(AREA, ...) KVC_LOG_AT(KVC_LOG_LEVEL_TRACE, AREA, __VA_ARGS__)

#endif
