/*
 * gather.c: what kernel and libraries say about RDMA on this machine; for kvctl doctor.
 *
 * Any thread; opens each device and closes it again, and changes nothing.
 */
#include <dirent.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "transport/rdma_check.h"

#define PATH_BYTES  384
#define PROBE_BYTES ((size_t)1 << 20)
#define MAX_GIDS    64

/* Entries of a folder whose names begin so. */
static uint32_t count_entries(const char *path, const char *prefix)
{
    DIR *folder = opendir(path);
    struct dirent *entry;
    uint32_t n = 0;
    while (folder != NULL && (entry = readdir(folder)) != NULL)
        n += entry->d_name[0] != '.' && strncmp(entry->d_name, prefix, strlen(prefix)) == 0;
    if (folder != NULL)
        (void)closedir(folder);
    return n;
}

static void read_line(const char *path, char *out, size_t out_bytes)
{
    FILE *stream = fopen(path, "re");
    out[0] = '\0';
    if (stream == NULL)
        return;
    if (fgets(out, (int)out_bytes, stream) == NULL)
        out[0] = '\0';
    out[strcspn(out, "\n")] = '\0';
    (void)fclose(stream);
}

static void gather_netdev(kvt_rdma_port *port)
{
    char path[PATH_BYTES], line[KVT_RDMA_NAME_BYTES];
    (void)snprintf(path, sizeof(path), "/sys/class/infiniband/%s/ports/%u/gid_attrs/ndevs/0",
                   port->device, port->number);
    read_line(path, port->netdev, sizeof(port->netdev));
    if (port->netdev[0] == '\0')
        return;
    (void)snprintf(path, sizeof(path), "/sys/class/net/%s/mtu", port->netdev);
    read_line(path, line, sizeof(line));
    port->netdev_mtu_bytes = (uint32_t)strtoul(line, NULL, 10);
}

/* A GID that is an IPv4 address, or an IPv6 address that is more than link-local. */
static bool is_usable(const union ibv_gid *gid)
{
    static const uint8_t zero[16];
    return memcmp(gid->raw, zero, sizeof(zero)) != 0 &&
           !(gid->raw[0] == 0xfe && (gid->raw[1] & 0xc0) == 0x80);
}

static void gather_port(struct ibv_context *context, kvt_rdma_port *port)
{
    struct ibv_port_attr attr;
    union ibv_gid gid;
    if (ibv_query_port(context, (uint8_t)port->number, &attr) != 0)
        return;
    port->active = attr.state == IBV_PORT_ACTIVE;
    port->infiniband = attr.link_layer == IBV_LINK_LAYER_INFINIBAND;
    port->mtu_bytes = 128u << attr.active_mtu;
    port->max_mtu_bytes = 128u << attr.max_mtu;
    for (int i = 0; i < attr.gid_tbl_len && i < MAX_GIDS; i++)
        port->n_gids +=
            ibv_query_gid(context, (uint8_t)port->number, i, &gid) == 0 && is_usable(&gid);
}

static int try_register(struct ibv_context *context)
{
    int failed = 0;
    void *bytes = NULL;
    struct ibv_pd *pd = ibv_alloc_pd(context);
    if (pd == NULL)
        return errno;
    if (posix_memalign(&bytes, 4096, PROBE_BYTES) != 0) {
        (void)ibv_dealloc_pd(pd);
        return 0; /* not the device's fault */
    }
    struct ibv_mr *mr = ibv_reg_mr(pd, bytes, PROBE_BYTES, IBV_ACCESS_LOCAL_WRITE);
    if (mr == NULL)
        failed = errno;
    else
        (void)ibv_dereg_mr(mr);
    free(bytes);
    (void)ibv_dealloc_pd(pd);
    return failed;
}

/* The kernel looks at the descriptor, which is none, only where it takes such. */
static int try_dmabuf(struct ibv_context *context)
{
#ifdef KVASIR_DMABUF_MR
    struct ibv_pd *pd = ibv_alloc_pd(context);
    if (pd == NULL)
        return errno;
    errno = 0;
    struct ibv_mr *mr = ibv_reg_dmabuf_mr(pd, 0, 4096, 0, -1, IBV_ACCESS_LOCAL_WRITE);
    int failed = errno;
    if (mr != NULL)
        (void)ibv_dereg_mr(mr);
    (void)ibv_dealloc_pd(pd);
    return mr != NULL ? EBADF : failed;
#else
    (void)context;
    return EOPNOTSUPP;
#endif
}

static void gather_device(struct ibv_device *device, kvt_rdma_facts *facts)
{
    struct ibv_device_attr attr = {.phys_port_cnt = 1};
    errno = 0;
    struct ibv_context *context = ibv_open_device(device);
    int open_errno = context == NULL ? (errno != 0 ? errno : EIO) : 0;
    int register_errno = context == NULL ? 0 : try_register(context);
    int dmabuf_errno = context == NULL ? 0 : try_dmabuf(context);
    if (context != NULL)
        (void)ibv_query_device(context, &attr);
    for (uint32_t n = 1; n <= attr.phys_port_cnt && facts->n_ports < KVT_RDMA_MAX_PORTS; n++) {
        kvt_rdma_port *port = &facts->ports[facts->n_ports++];
        (void)snprintf(port->device, sizeof(port->device), "%s", ibv_get_device_name(device));
        port->number = n;
        port->open_errno = open_errno;
        port->register_errno = register_errno;
        port->dmabuf_errno = dmabuf_errno;
        port->iwarp = device->transport_type == IBV_TRANSPORT_IWARP;
        gather_netdev(port);
        if (context != NULL)
            gather_port(context, port);
    }
    if (context != NULL)
        (void)ibv_close_device(context);
}

void kvt_rdma_gather(kvt_rdma_facts *facts_p)
{
    struct rlimit limit;
    int n = 0;
    memset(facts_p, 0, sizeof(*facts_p));
    facts_p->n_kernel = count_entries("/sys/class/infiniband", "");
    facts_p->has_uverbs = count_entries("/dev/infiniband", "uverbs") > 0;
    facts_p->has_cm = access("/dev/infiniband/rdma_cm", R_OK | W_OK) == 0;
    facts_p->has_peer_memory = access("/sys/module/nvidia_peermem", F_OK) == 0 ||
                               access("/sys/kernel/mm/memory_peers/nv_mem", F_OK) == 0;
    facts_p->memlock_bytes = UINT64_MAX;
    if (getrlimit(RLIMIT_MEMLOCK, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY)
        facts_p->memlock_bytes = limit.rlim_cur;
    struct ibv_device **devices = ibv_get_device_list(&n);
    for (int i = 0; devices != NULL && i < n; i++)
        gather_device(devices[i], facts_p);
    if (devices != NULL)
        ibv_free_device_list(devices);
    facts_p->n_verbs = n < 0 ? 0 : (uint32_t)n;
}
