/*
 * doctor_shm.c: what clients of the server's own host need (shm://): memory that can be passed and
 * sealed, a socket that may be connected to, and maps that were not kept out.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/text.h"
#include "doctor.h"

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif
#define SCHEME "shm://"

static uint64_t counter(const doctor *d, const char *name)
{
    for (uint32_t i = 0; i < d->stats->n_counters; i++)
        if (strcmp(d->stats->counters[i].name, name) == 0)
            return d->stats->counters[i].value;
    return 0;
}

static void check_seals(doctor *d)
{
    int fd = memfd_create("kvctl-doctor", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    bool sealed = fd >= 0 && ftruncate(fd, 4096) == 0 &&
                  fcntl(fd, F_ADD_SEALS,
                        F_SEAL_FUTURE_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL) == 0;
    if (sealed) {
        doctor_report(d, DOCTOR_OK, "shm", "memory can be passed to clients and sealed");
    } else {
        doctor_report(d, DOCTOR_WARN, "shm", "memory cannot be %s: %s",
                      fd < 0 ? "passed to clients (memfd)" : "sealed", strerror(errno));
        doctor_fix(d, "clients of this host read rows by request; maps want Linux 5.1 or newer");
    }
    if (fd >= 0)
        (void)close(fd);
}

/* Who listens there, as the kernel says. */
static void check_peer(doctor *d, const struct sockaddr_un *address)
{
    struct ucred cred = {0};
    socklen_t cred_bytes = sizeof(cred);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return;
    if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) != 0) {
        doctor_report(d, DOCTOR_FAIL, "shm", "nobody answers at %s: %s", address->sun_path,
                      strerror(errno));
        doctor_fix(d, errno == EACCES ? "its owner has to let this user write to the socket and "
                                        "search the folders above"
                                      : "start cachesvc with this address in listen");
    } else if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &cred_bytes) == 0) {
        doctor_report(d, DOCTOR_OK, "shm", "process %d of user %u answers at %s", (int)cred.pid,
                      (unsigned)cred.uid, address->sun_path);
        if (cred.uid != geteuid())
            doctor_fix(d, "user %u maps there only if shm_map_uids or shm_map_gids name it",
                       (unsigned)geteuid());
    }
    (void)close(fd);
}

static void check_socket(doctor *d, const char *path)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct stat st;
    if (strlen(path) >= sizeof(address.sun_path))
        return;
    memcpy(address.sun_path, path, strlen(path) + 1);
    if (stat(path, &st) == 0 && (st.st_mode & S_IWOTH) != 0) {
        doctor_report(d, DOCTOR_WARN, "shm", "every user of this host may connect to %s", path);
        doctor_fix(d, "chmod 660 %s, or start the service with a tighter umask", path);
    }
    check_peer(d, &address);
}

static void check_maps(doctor *d)
{
    char have[KVC_TEXT_BYTES], most[KVC_TEXT_BYTES];
    uint64_t pinned = counter(d, "map_pinned_bytes"), max = d->stats->limits->max_map_pin_bytes;
    (void)kvc_bytes_short(pinned, have);
    (void)kvc_bytes_short(max, most);
    if (counter(d, "maps_refused") > 0) {
        doctor_report(d, DOCTOR_WARN, "shm", "%llu maps were refused: their process may not map",
                      (unsigned long long)counter(d, "maps_refused"));
        doctor_fix(d, "name its user in the server's shm_map_uids, or its group");
    }
    if (counter(d, "map_unpinned_values") > 0) {
        doctor_report(d, DOCTOR_WARN, "shm",
                      "maps left %llu values out: %s of %s a tenant are "
                      "pinned in all",
                      (unsigned long long)counter(d, "map_unpinned_values"), have, most);
        doctor_fix(d, "raise max_map_pin_bytes, or map less; the rest is read by request");
    } else {
        doctor_report(d, DOCTOR_OK, "shm", "%llu maps pin %s; a tenant may pin %s",
                      (unsigned long long)counter(d, "maps"), have, most);
    }
}

void doctor_check_shm(doctor *d)
{
    check_seals(d);
    if (strncmp(d->globals->server, SCHEME, strlen(SCHEME)) == 0)
        check_socket(d, d->globals->server + strlen(SCHEME));
    if (d->stats != NULL)
        check_maps(d);
}

void doctor_check_connections(doctor *d)
{
    uint32_t most = d->stats != NULL ? d->stats->limits->max_connections : 0;
    if (most == 0)
        return;
    uint64_t n = counter(d, "connections"), refused = counter(d, "connections_refused");
    if (refused == 0) {
        doctor_report(d, DOCTOR_OK, "server", "%llu of %u connections, none was refused",
                      (unsigned long long)n, most);
        return;
    }
    doctor_report(d, DOCTOR_WARN, "server", "%llu connections were refused; there are %llu of %u",
                  (unsigned long long)refused, (unsigned long long)n, most);
    doctor_fix(d, "raise max_connections, and the limit on open files with it");
}
