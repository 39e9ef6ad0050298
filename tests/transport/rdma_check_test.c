/*
 * rdma_check_test.c: each obstacle to RDMA is named, with what removes it.
 */
#include "support.h"

#include <errno.h>

#include "transport/rdma_check.h"

static char told[4096];
static kvt_rdma_level worst;

static void report(void *arg, kvt_rdma_level level, const char *text, const char *fix)
{
    (void)arg;
    size_t used = strlen(told);
    (void)snprintf(told + used, sizeof(told) - used, "%s | %s\n", text, fix);
    if (level > worst)
        worst = level;
    assert_true(level != KVT_RDMA_WARN || fix[0] != '\0'); /* no complaint without a remedy */
}

static void explain(const kvt_rdma_facts *facts)
{
    told[0] = '\0';
    worst = KVT_RDMA_OK;
    kvt_rdma_explain(facts, report, NULL);
}

#define assert_told(text)                                                                          \
    do {                                                                                           \
        if (strstr(told, (text)) == NULL)                                                          \
            fail_msg("'%s' is not in: %s", (text), told);                                          \
    } while (0)

static kvt_rdma_facts sound(void)
{
    kvt_rdma_facts facts = {.n_kernel = 1,
                            .n_verbs = 1,
                            .has_uverbs = true,
                            .has_cm = true,
                            .memlock_bytes = UINT64_MAX,
                            .n_ports = 1};
    facts.ports[0] = (kvt_rdma_port){.device = "mlx5_0",
                                     .netdev = "eth7",
                                     .number = 1,
                                     .active = true,
                                     .n_gids = 1,
                                     .mtu_bytes = 4096,
                                     .max_mtu_bytes = 4096,
                                     .netdev_mtu_bytes = 4200};
    return facts;
}

static void nothing_in_the_way(void **state)
{
    (void)state;
    kvt_rdma_facts facts = sound();
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_OK);
    assert_string_equal(told, "mlx5_0 port 1 (RoCE) is up, on eth7 | \n");
}

static void no_device(void **state)
{
    (void)state;
    kvt_rdma_facts facts = {0};
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_INFO); /* most machines have none, and need none */
    assert_told("no RDMA device");
}

static void container_without_device(void **state)
{
    (void)state;
    kvt_rdma_facts facts = sound();
    facts.has_uverbs = false;
    facts.n_verbs = facts.n_ports = 0;
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_WARN);
    assert_told("pass /dev/infiniband");
    facts.has_uverbs = true;
    explain(&facts);
    assert_told("ibverbs-providers");
    facts = sound();
    facts.has_cm = false;
    explain(&facts);
    assert_told("modprobe rdma_ucm");
    facts = sound();
    facts.ports[0].open_errno = EACCES;
    explain(&facts);
    assert_told("cannot be opened: Permission denied");
}

static void link_down(void **state)
{
    (void)state;
    kvt_rdma_facts facts = sound();
    facts.ports[0].active = false;
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_WARN);
    assert_told("the link is down | ip link set eth7 up");
    facts.ports[0].infiniband = true;
    explain(&facts);
    assert_told("subnet manager");
}

static void locked_memory(void **state)
{
    (void)state;
    kvt_rdma_facts facts = sound();
    facts.memlock_bytes = 8u << 20;
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_WARN);
    assert_told("locked memory is 8192 KiB | ulimit -l unlimited");
    facts.memlock_bytes = UINT64_C(1) << 30; /* enough to connect, and not for large regions */
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_INFO);
    assert_told("of 1024 MiB of locked memory, workers' clients take 256 for rows");
    facts.memlock_bytes = UINT64_C(4) << 30;
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_OK);
    facts.memlock_bytes = 8u << 20;
    facts.ports[0].register_errno = ENOMEM;
    explain(&facts);
    assert_told("could not be registered");
}

static void no_usable_gid(void **state)
{
    (void)state;
    kvt_rdma_facts facts = sound();
    facts.ports[0].n_gids = 0;
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_WARN);
    assert_told("no usable GID");
    assert_told("ip addr add ADDRESS/PREFIX dev eth7");
    facts.ports[0].iwarp = true; /* has none by nature */
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_OK);
}

static void mtu_mismatch(void **state)
{
    (void)state;
    kvt_rdma_facts facts = sound();
    facts.ports[0].mtu_bytes = 1024;
    facts.ports[0].netdev_mtu_bytes = 1500;
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_INFO);
    assert_told("mtu 4200 on both ends");
    facts.ports[0].netdev_mtu_bytes = 9000; /* the device has not followed its interface */
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_WARN);
    assert_told("ip link set eth7 down, then up");
}

/* Whatever this machine has: the facts are gathered, and something is said about them. */
static void this_machine(void **state)
{
    (void)state;
    kvt_rdma_facts facts;
    kvt_rdma_gather(&facts);
    assert_true(facts.n_verbs <= facts.n_kernel && facts.n_ports <= KVT_RDMA_MAX_PORTS);
    explain(&facts);
    assert_true(told[0] != '\0');
    print_message("%s", told);
}

static kvt_rdma_facts with_gpu(kvt_rdma_gpu gpu, int dmabuf_errno, bool peer_memory)
{
    kvt_rdma_facts facts = sound();
    facts.gpu = gpu;
    facts.ports[0].dmabuf_errno = dmabuf_errno;
    facts.has_peer_memory = peer_memory;
    return facts;
}

/* Whether a device writes to a GPU's memory, by which of two ways, and what is missing for it. */
static void memory_of_a_gpu(void **state)
{
    (void)state;
    kvt_rdma_facts facts = with_gpu(KVT_RDMA_GPU_DMABUF, EBADF, false);
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_OK);
    assert_told("mlx5_0 writes to the GPU's memory itself (dma-buf)");
    facts = with_gpu(KVT_RDMA_GPU_DMABUF, EOPNOTSUPP, true);
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_OK);
    assert_told("mlx5_0 writes to the GPU's memory itself (peer memory)");
    facts = with_gpu(KVT_RDMA_GPU_DMABUF, EOPNOTSUPP, false);
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_INFO);
    assert_told("mlx5_0 takes no dma-buf");
    assert_told("nvidia_peermem");
    facts = with_gpu(KVT_RDMA_GPU_PLAIN, EBADF, false);
    explain(&facts);
    assert_int_equal(worst, KVT_RDMA_INFO);
    assert_told("its driver exports no dma-buf");
    assert_told("open kernel modules");
    facts = with_gpu(KVT_RDMA_GPU_PLAIN, EBADF, true);
    explain(&facts);
    assert_told("peer memory)");
    facts = with_gpu(KVT_RDMA_GPU_NONE, EOPNOTSUPP, false);
    explain(&facts);
    assert_null(strstr(told, "GPU"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(memory_of_a_gpu), cmocka_unit_test(nothing_in_the_way),
        cmocka_unit_test(no_device),       cmocka_unit_test(container_without_device),
        cmocka_unit_test(link_down),       cmocka_unit_test(locked_memory),
        cmocka_unit_test(no_usable_gid),   cmocka_unit_test(mtu_mismatch),
        cmocka_unit_test(this_machine),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
