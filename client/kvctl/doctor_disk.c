/*
 * doctor_disk.c: the folder of the lmdb tier, where it is on this machine.
 */
#include <dirent.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

#include "base/text.h"
#include "doctor.h"

/* From linux/magic.h, which not every libc's headers agree with. */
#define MAGIC_TMPFS   0x01021994
#define MAGIC_NFS     0x6969
#define MAGIC_OVERLAY 0x794c7630
#define RESERVE_BYTES ((uint64_t)1 << 30)

static void check_permissions(doctor *d, const struct stat *st)
{
    if ((st->st_mode & S_IWOTH) != 0) {
        doctor_report(d, DOCTOR_FAIL, "lmdb", "everybody may write to %s", d->lmdb_path);
        doctor_fix(d, "chmod 700 %s", d->lmdb_path);
    } else if ((st->st_mode & (S_IRWXO | S_IRWXG)) != 0) {
        doctor_report(d, DOCTOR_WARN, "lmdb", "others may look into %s (mode %03o)", d->lmdb_path,
                      (unsigned)st->st_mode & 0777u);
        doctor_fix(d, "chmod 700 %s: what it holds is what users wrote", d->lmdb_path);
    } else {
        doctor_report(d, DOCTOR_OK, "lmdb", "only its owner may look into %s", d->lmdb_path);
    }
    if (geteuid() != 0 && st->st_uid != geteuid()) {
        doctor_report(d, DOCTOR_WARN, "lmdb", "%s belongs to user %u, you are %u", d->lmdb_path,
                      (unsigned)st->st_uid, (unsigned)geteuid());
        doctor_fix(d, "cachesvc must run as the owner");
    }
}

static void check_file_system(doctor *d)
{
    struct statfs fs;
    if (statfs(d->lmdb_path, &fs) != 0)
        return;
    switch ((unsigned long)fs.f_type) {
    case MAGIC_TMPFS:
        doctor_report(d, DOCTOR_WARN, "lmdb", "the folder lies in memory (tmpfs)");
        doctor_fix(d, "nothing in it survives a reboot and it takes RAM from dram: use a disk");
        break;
    case MAGIC_NFS:
        doctor_report(d, DOCTOR_FAIL, "lmdb", "the folder lies on NFS");
        doctor_fix(d, "LMDB needs a local file system: its memory map and locks do not work there");
        break;
    case MAGIC_OVERLAY:
        doctor_report(d, DOCTOR_WARN, "lmdb",
                      "the folder lies on an overlay (a container's layer)");
        doctor_fix(d, "mount a volume: the layer is slow and goes with the container");
        break;
    default:
        doctor_report(d, DOCTOR_OK, "lmdb", "the folder lies on a local file system");
    }
}

static void check_space(doctor *d)
{
    struct statvfs fs;
    const kvc_tier_stats *lmdb = NULL;
    char cap[KVC_TEXT_BYTES], have[KVC_TEXT_BYTES];
    for (uint32_t i = 0; d->stats != NULL && i < d->stats->n_tiers; i++)
        if (strcmp(d->stats->tiers[i].name, "lmdb") == 0)
            lmdb = &d->stats->tiers[i];
    if (statvfs(d->lmdb_path, &fs) != 0)
        return;
    uint64_t free_bytes = (uint64_t)fs.f_bavail * fs.f_frsize;
    (void)kvc_bytes_short(free_bytes, have);
    if (lmdb == NULL) {
        doctor_report(d, DOCTOR_INFO, "lmdb", "%s free; the tier's cap is not known", have);
        return;
    }
    (void)kvc_bytes_short(lmdb->capacity_bytes, cap);
    if (lmdb->capacity_bytes > free_bytes + lmdb->used_bytes) {
        doctor_report(d, DOCTOR_FAIL, "lmdb", "it may grow to %s, and %s are free", cap, have);
        doctor_fix(d, "lower lmdb_bytes or use a larger disk: a full disk takes the tier down");
    } else if (lmdb->capacity_bytes + RESERVE_BYTES > free_bytes + lmdb->used_bytes) {
        doctor_report(d, DOCTOR_WARN, "lmdb", "it may grow to %s, which leaves less than 1 GiB",
                      cap);
        doctor_fix(d, "lower lmdb_bytes");
    } else {
        doctor_report(d, DOCTOR_OK, "lmdb", "it may grow to %s, and %s are free", cap, have);
    }
}

/* Environments that a server found damaged and renamed; it serves on without them. */
static void check_set_aside(doctor *d)
{
    DIR *dir = opendir(d->lmdb_path);
    const struct dirent *entry;

    if (dir == NULL)
        return;
    while ((entry = readdir(dir)) != NULL) {
        size_t len = strlen(entry->d_name);
        if (len < 4 || strcmp(entry->d_name + len - 4, ".bad") != 0)
            continue;
        doctor_report(d, DOCTOR_WARN, "lmdb", "%s was found damaged and set aside", entry->d_name);
        doctor_fix(d,
                   "its values are lost and its bytes count against lmdb_bytes: look at the "
                   "disk, then remove %s/%s",
                   d->lmdb_path, entry->d_name);
    }
    closedir(dir);
}

void doctor_check_disk(doctor *d)
{
    struct stat st;
    if (d->lmdb_path == NULL) {
        doctor_report(d, DOCTOR_INFO, "lmdb", "not checked: give --lmdb-path");
        return;
    }
    if (stat(d->lmdb_path, &st) != 0) {
        doctor_report(d, DOCTOR_FAIL, "lmdb", "%s: %s", d->lmdb_path, strerror(errno));
        doctor_fix(d, "make the folder: install -d -m 700 -o USER %s", d->lmdb_path);
        return;
    }
    if (!S_ISDIR(st.st_mode)) {
        doctor_report(d, DOCTOR_FAIL, "lmdb", "%s is no folder", d->lmdb_path);
        doctor_fix(d, "name the folder that cachesvc's lmdb_path names");
        return;
    }
    check_permissions(d, &st);
    check_file_system(d);
    check_space(d);
    check_set_aside(d);
}
