/*
 * iofault.c: the daemon's side of iofault.h: file calls that pass through here on their way to
 * libc.
 *
 * Any thread. Invariant: without a page, or on a file that is not below page->under, each call is
 * libc's own. A call that fails here has done nothing; a short one has moved the bytes that it
 * says.
 */
#include "iofault.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#ifdef IOFAULT_URING
#include <liburing.h>
#endif

#define EXPORT __attribute__((visibility("default")))
#define GO_ON  0

#define BEYOND_BYTES (1ll << 40) /* behind the end of any file here */

static iofault_page *page;

/* Before main, and by system calls: what is looked at here must not come back here. */
__attribute__((constructor)) static void find_page(void)
{
    const char *path = getenv(IOFAULT_ENV);
    if (path == NULL)
        return;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return;
    void *map =
        (void *)syscall(SYS_mmap, NULL, sizeof *page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    (void)syscall(SYS_close, fd);
    if (map != MAP_FAILED)
        page = map;
}

static bool is_below(const char *path)
{
    size_t len = strlen(page->under);
    return len > 0 && strncmp(path, page->under, len) == 0 &&
           (path[len] == '/' || path[len] == '\0');
}

static bool fd_counts(int fd)
{
    char link[64], path[PATH_MAX];
    if (page == NULL)
        return false;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n <= 0)
        return false;
    path[n] = '\0';
    return is_below(path);
}

static bool path_counts(int dir_fd, const char *path)
{
    if (page == NULL)
        return false;
    return path[0] == '/' ? is_below(path) : dir_fd != AT_FDCWD && fd_counts(dir_fd);
}

/* Counts a pass. GO_ON, or what is to happen instead: an errno, or IOFAULT_SHORT. */
static int pass(iofault_kind kind)
{
    unsigned now = atomic_fetch_add(&page->passes[kind], 1) + 1;
    unsigned nth = atomic_load(&page->nth);
    if (nth == 0 || atomic_load(&page->kind) != (int)kind ||
        (atomic_load(&page->lasting) ? now < nth : now != nth))
        return GO_ON;
    atomic_fetch_add(&page->hits, 1);
    return atomic_load(&page->error);
}

/* The same for calls that cannot be short. True: it fails, and errno says why. */
static bool fails(iofault_kind kind)
{
    int what = pass(kind);
    if (what != GO_ON)
        errno = what == IOFAULT_SHORT ? EIO : what;
    return what != GO_ON;
}

/* For calls that move bytes: *len_p becomes less where the call is to be short. */
static bool fails_or_short(iofault_kind kind, size_t *len_p)
{
    int what = pass(kind);
    if (what == IOFAULT_SHORT)
        *len_p /= 2;
    else if (what != GO_ON)
        errno = what;
    return what != GO_ON && what != IOFAULT_SHORT;
}

/* The names of libc's parameters are not for programs to use. */
/* NOLINTBEGIN(readability-inconsistent-declaration-parameter-name) */

/* ---- names ---- */

static int open_at(int dir_fd, const char *path, int flags, mode_t mode)
{
    if (path_counts(dir_fd, path)) {
        if (fails(IOFAULT_OPEN))
            return -1;
        if (atomic_load(&page->no_sync))
            flags &= ~(O_SYNC | O_DSYNC);
    }
    return (int)syscall(SYS_openat, dir_fd, path, flags, mode);
}

EXPORT int open(const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
    va_end(list);
    return open_at(AT_FDCWD, path, flags, mode);
}

EXPORT int openat(int dir_fd, const char *path, int flags, ...)
{
    va_list list;
    va_start(list, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;
    va_end(list);
    return open_at(dir_fd, path, flags, mode);
}

EXPORT int mkdir(const char *path, mode_t mode)
{
    return mkdirat(AT_FDCWD, path, mode);
}

EXPORT int mkdirat(int dir_fd, const char *path, mode_t mode)
{
    if (path_counts(dir_fd, path) && fails(IOFAULT_NAME))
        return -1;
    return (int)syscall(SYS_mkdirat, dir_fd, path, mode);
}

EXPORT int rename(const char *from, const char *to)
{
    return renameat(AT_FDCWD, from, AT_FDCWD, to);
}

EXPORT int renameat(int from_fd, const char *from, int to_fd, const char *to)
{
    if (path_counts(from_fd, from) && fails(IOFAULT_NAME))
        return -1;
    return (int)syscall(SYS_renameat, from_fd, from, to_fd, to);
}

EXPORT int unlinkat(int dir_fd, const char *path, int flags)
{
    if (path_counts(dir_fd, path) && fails(IOFAULT_NAME))
        return -1;
    return (int)syscall(SYS_unlinkat, dir_fd, path, flags);
}

/* ---- bytes ---- */

EXPORT ssize_t pread(int fd, void *bytes, size_t len, off_t off)
{
    if (fd_counts(fd) && fails_or_short(IOFAULT_READ, &len))
        return -1;
    return syscall(SYS_pread64, fd, bytes, len, off);
}

EXPORT ssize_t write(int fd, const void *bytes, size_t len)
{
    if (fd_counts(fd) && fails_or_short(IOFAULT_WRITE, &len))
        return -1;
    return syscall(SYS_write, fd, bytes, len);
}

EXPORT ssize_t pwrite(int fd, const void *bytes, size_t len, off_t off)
{
    if (fd_counts(fd) && fails_or_short(IOFAULT_WRITE, &len))
        return -1;
    return syscall(SYS_pwrite64, fd, bytes, len, off);
}

EXPORT ssize_t writev(int fd, const struct iovec *pieces, int n)
{
    size_t len = n > 0 ? pieces[0].iov_len : 0;
    if (!fd_counts(fd))
        return syscall(SYS_writev, fd, pieces, n);
    size_t wanted = len;
    if (fails_or_short(IOFAULT_WRITE, &wanted))
        return -1;
    if (wanted != len) /* of the first piece half, of the others nothing */
        return syscall(SYS_write, fd, pieces[0].iov_base, wanted);
    return syscall(SYS_writev, fd, pieces, n);
}

/* ---- sizes and syncs ---- */

EXPORT int ftruncate(int fd, off_t len)
{
    if (fd_counts(fd) && fails(IOFAULT_SIZE))
        return -1;
    return (int)syscall(SYS_ftruncate, fd, len);
}

EXPORT int fallocate(int fd, int mode, off_t off, off_t len)
{
    if (fd_counts(fd) && fails(IOFAULT_SIZE))
        return -1;
    return (int)syscall(SYS_fallocate, fd, mode, off, len);
}

/* Whether a sync is to be left out, with *rc_p as its answer. */
static bool leaves_out_sync(int *rc_p)
{
    if (fails(IOFAULT_SYNC)) {
        *rc_p = -1;
        return true;
    }
    *rc_p = 0;
    return atomic_load(&page->no_sync);
}

EXPORT int fsync(int fd)
{
    int rc;
    if (fd_counts(fd) && leaves_out_sync(&rc))
        return rc;
    return (int)syscall(SYS_fsync, fd);
}

EXPORT int fdatasync(int fd)
{
    int rc;
    if (fd_counts(fd) && leaves_out_sync(&rc))
        return rc;
    return (int)syscall(SYS_fdatasync, fd);
}

EXPORT int msync(void *at, size_t len, int flags)
{
    int rc;
    if (page != NULL && leaves_out_sync(&rc))
        return rc;
    return (int)syscall(SYS_msync, at, len, flags);
}

EXPORT void *mmap(void *at, size_t len, int protection, int flags, int fd, off_t off)
{
    int what = fd >= 0 && fd_counts(fd) ? pass(IOFAULT_MAP) : GO_ON;
    if (what == IOFAULT_SHORT) {
        off += BEYOND_BYTES;
    } else if (what != GO_ON) {
        errno = what;
        return MAP_FAILED;
    }
    return (void *)syscall(SYS_mmap, at, len, protection, flags, fd, off);
}

/* ---- io_uring ---- */

#ifdef IOFAULT_URING

typedef int submit_and_wait(struct io_uring *, struct io_uring_cqe **, unsigned,
                            struct __kernel_timespec *, sigset_t *);

/* Only the tier's reads go through rings, so each completion is one. */
EXPORT int io_uring_submit_and_wait_timeout(struct io_uring *ring, struct io_uring_cqe **cqe_p,
                                            unsigned wait_n, struct __kernel_timespec *time,
                                            sigset_t *mask)
{
    submit_and_wait *next;
    *(void **)&next = dlsym(RTLD_NEXT, "io_uring_submit_and_wait_timeout");
    int rc = next(ring, cqe_p, wait_n, time, mask);
    struct io_uring_cqe *cqe;
    unsigned head;
    if (page == NULL)
        return rc;
    io_uring_for_each_cqe(ring, head, cqe)
    {
        int what = pass(IOFAULT_READ);
        if (what == IOFAULT_SHORT && cqe->res > 0)
            cqe->res /= 2;
        else if (what != GO_ON && what != IOFAULT_SHORT)
            cqe->res = -what;
    }
    return rc;
}

#endif

/* NOLINTEND(readability-inconsistent-declaration-parameter-name) */
