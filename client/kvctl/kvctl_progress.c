/*
 * kvctl_progress.c: draws one line over and over: label, bar, percent, amounts, time left.
 *
 * Owned by the thread that started it. Invariant: what is drawn never wraps, since it is cut to the
 * terminal's width.
 */
#include "kvctl_progress.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/text.h"

#define SHOW_AFTER_NS   1000000000ull
#define DRAW_EVERY_NS   100000000ull
#define BAR_COLUMNS     24u
#define DEFAULT_COLUMNS 80u

struct kvctl_progress {
    const char *label, *unit;
    uint64_t total, start_ns, drawn_ns;
    bool terminal, shown;
};

static void amount(uint64_t value, const char *unit, char out[KVC_TEXT_BYTES])
{
    if (unit != NULL && strcmp(unit, "bytes") == 0)
        (void)kvc_bytes_short(value, out);
    else
        (void)snprintf(out, KVC_TEXT_BYTES, "%llu", (unsigned long long)value);
}

static uint64_t elapsed_ns(const kvctl_progress *progress)
{
    return kvc_now_ns() - progress->start_ns;
}

/* "  61 % [==============          ] 1.20 GiB of 1.95 GiB, 12.4 s left" */
static void put_bar(const kvctl_progress *progress, uint64_t done, kvc_strbuf *line)
{
    char have[KVC_TEXT_BYTES], all[KVC_TEXT_BYTES], left[KVC_TEXT_BYTES], bar[BAR_COLUMNS + 1];
    double share = (double)done / (double)progress->total;
    unsigned filled = (unsigned)(share * BAR_COLUMNS);
    for (unsigned i = 0; i < BAR_COLUMNS; i++)
        bar[i] = i < filled ? '=' : ' ';
    bar[BAR_COLUMNS] = '\0';
    amount(done, progress->unit, have);
    amount(progress->total, progress->unit, all);
    bool named = progress->unit != NULL && strcmp(progress->unit, "bytes") != 0;
    kvc_strbuf_putf(line, " %3u %% [%s] %s of %s%s%s", (unsigned)(share * 100), bar, have, all,
                    named ? " " : "", named ? progress->unit : "");
    if (done == 0)
        return;
    double left_ns = (double)elapsed_ns(progress) * (1 - share) / share;
    kvc_strbuf_putf(line, ", %s left", kvc_duration_short((uint64_t)left_ns, left));
}

static size_t columns(void)
{
    struct winsize size;
    if (ioctl(STDERR_FILENO, TIOCGWINSZ, &size) != 0 || size.ws_col == 0)
        return DEFAULT_COLUMNS;
    return size.ws_col;
}

static void draw(kvctl_progress *progress, uint64_t done)
{
    char passed[KVC_TEXT_BYTES];
    kvc_strbuf line = {0};
    kvc_strbuf_putf(&line, "%s", progress->label);
    if (progress->total > 0)
        put_bar(progress, done < progress->total ? done : progress->total, &line);
    else
        kvc_strbuf_putf(&line, " ... %s", kvc_duration_short(elapsed_ns(progress), passed));
    char *text = kvc_strbuf_take(&line);
    if (text == NULL)
        return;
    (void)fprintf(stderr, "\r%.*s\033[K", (int)(columns() - 1), text);
    (void)fflush(stderr);
    free(text);
    progress->shown = true;
}

kvctl_progress *kvctl_progress_start(const char *label, uint64_t total, const char *unit)
{
    kvctl_progress *progress = calloc(1, sizeof(*progress));
    if (progress == NULL)
        return NULL;
    progress->label = label;
    progress->unit = unit;
    progress->total = total;
    progress->start_ns = kvc_now_ns();
    progress->terminal = isatty(STDERR_FILENO) == 1;
    return progress;
}

void kvctl_progress_set(kvctl_progress *progress, uint64_t done)
{
    if (progress == NULL || !progress->terminal)
        return;
    uint64_t now_ns = kvc_now_ns();
    if (now_ns - progress->start_ns < SHOW_AFTER_NS || now_ns - progress->drawn_ns < DRAW_EVERY_NS)
        return;
    progress->drawn_ns = now_ns;
    draw(progress, done);
}

void kvctl_progress_stop(kvctl_progress *progress)
{
    if (progress == NULL)
        return;
    if (progress->shown) {
        (void)fputs("\r\033[K", stderr);
        (void)fflush(stderr);
    }
    free(progress);
}
