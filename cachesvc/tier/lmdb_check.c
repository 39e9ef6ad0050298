/*
 * lmdb_check.c: walks an LMDB data file by plain reads; see lmdb_check.h.
 *
 * Thread: the caller's. Invariants: no byte of the file is trusted: what is used as an offset, a
 * length or a page number was compared with its limits first; a page is visited once (used has a
 * bit for each), so the walk ends; the tree is walked in key order, one page in RAM per level.
 *
 * The layout is that of LMDB 0.9: two meta pages; B+ trees of branch and leaf pages of 4 KiB, for
 * the values and for the list of free pages; large records in runs of overflow pages.
 */
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "lmdb_check.h"
#include "lmdb_record.h"

#define PAGE           KVSI_PAGE_BYTES
#define PAGE_HEADER    16u
#define NODE_HEADER    8u
#define MAX_KEY        511u
#define MAX_DEPTH      32u
#define META_MAGIC     0xBEEFC0DEu
#define META_VERSION   1u
#define NO_PAGE        UINT64_MAX
#define FLAG_BRANCH    0x01u
#define FLAG_LEAF      0x02u
#define FLAG_OVERFLOW  0x04u
#define FLAG_META      0x08u
#define NODE_BIGDATA   0x01u
#define DB_INTEGER_KEY 0x08u

/* As they lie in the file. */
typedef struct page_header {
    uint64_t number;
    uint16_t pad, flags, lower, upper; /* of an overflow run: lower and upper are its pages */
} page_header;

typedef struct tree_record {
    uint32_t pad;
    uint16_t flags, depth;
    uint64_t branch_pages, leaf_pages, overflow_pages, entries, root;
} tree_record;

typedef struct meta_record {
    uint32_t magic, version;
    uint64_t address, map_bytes;
    tree_record free, values;
    uint64_t last_page, txn;
} meta_record;

_Static_assert(sizeof(page_header) == PAGE_HEADER, "as in the file");
_Static_assert(sizeof(tree_record) == 48 && sizeof(meta_record) == 136, "as in the file");

typedef struct check {
    int fd;
    bool deep;
    uint64_t file_pages;
    meta_record meta;
    uint8_t *used;   /* a bit for each page of the file */
    uint8_t *levels; /* [MAX_DEPTH] pages */
    char *why;

    /* Of the tree being walked. */
    bool is_free;
    tree_record want, seen;
    uint8_t last_key[MAX_KEY];
    uint32_t last_bytes;
    enum { KEY_NONE, KEY_BEFORE, KEY_AT_MOST } last_kind;
} check;

typedef struct node {
    const uint8_t *key;
    const uint8_t *data;
    uint32_t key_bytes, data_bytes, flags;
    uint64_t child;
} node;

__attribute__((format(printf, 2, 3))) static kvc_status complain(check *c, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    vsnprintf(c->why, KVSI_CHECK_WHY_BYTES, fmt, args);
    va_end(args);
    return KVC_CORRUPT;
}

static kvc_status read_page(check *c, uint64_t number, void *out)
{
    if (number >= c->file_pages)
        return complain(c, "page %llu lies behind the end of the file", (unsigned long long)number);
    ssize_t n = pread(c->fd, out, PAGE, (off_t)(number * PAGE));
    if (n == (ssize_t)PAGE)
        return KVC_OK;
    /* What the disk does not give is as lost as what makes no sense: the other files go on. */
    return complain(c, n < 0 ? "page %llu cannot be read" : "page %llu is cut off",
                    (unsigned long long)number);
}

/* Pages number .. number + n - 1 belong to one place only. */
static kvc_status take_pages(check *c, uint64_t number, uint64_t n)
{
    if (number < 2 || number > c->meta.last_page || n > c->meta.last_page - number + 1)
        return complain(c, "page %llu is out of range", (unsigned long long)number);
    for (uint64_t i = number; i < number + n && i < c->file_pages; i++) {
        if (c->used[i / 8] & 1u << i % 8)
            return complain(c, "page %llu is used twice", (unsigned long long)i);
        c->used[i / 8] |= (uint8_t)(1u << i % 8);
    }
    return KVC_OK;
}

static void read_ahead(check *c, uint64_t number)
{
    if (number < c->file_pages)
        (void)posix_fadvise(c->fd, (off_t)(number * PAGE), PAGE, POSIX_FADV_WILLNEED);
}

/* --- nodes --- */

/* The i-th node of a page whose header is right. False: it does not lie within the page. */
static bool get_node(const uint8_t *page, uint32_t i, node *node_p)
{
    const page_header *header = (const page_header *)(const void *)page;
    uint16_t off, part[4];

    memcpy(&off, page + PAGE_HEADER + 2 * i, sizeof(off));
    if (off < header->upper || off % 2 != 0 || off > PAGE - NODE_HEADER)
        return false;
    memcpy(part, page + off, sizeof(part));
    node_p->flags = part[2];
    node_p->key_bytes = part[3];
    node_p->key = page + off + NODE_HEADER;
    node_p->data = node_p->key + node_p->key_bytes;
    node_p->data_bytes = part[0] | (uint32_t)part[1] << 16;
    node_p->child = node_p->data_bytes | (uint64_t)node_p->flags << 32;
    return node_p->key_bytes <= MAX_KEY && off + NODE_HEADER + node_p->key_bytes <= PAGE;
}

/* Bytes of the node inside the page, or 0: it sticks out. */
static uint32_t node_size(const uint8_t *page, const node *n, bool leaf)
{
    uint64_t size = NODE_HEADER + n->key_bytes;

    if (leaf)
        size += n->flags & NODE_BIGDATA ? sizeof(uint64_t) : n->data_bytes;
    return (uint64_t)(n->key - NODE_HEADER - page) + size <= PAGE ? (uint32_t)size : 0;
}

/* Whether the nodes lie side by side from upper to the page's end, none over another. */
static bool nodes_tile(const uint8_t *page, uint32_t n_nodes, bool leaf)
{
    uint8_t taken[PAGE / 2] = {0};
    uint32_t total = 0;
    node n;

    for (uint32_t i = 0; i < n_nodes; i++) {
        if (!get_node(page, i, &n))
            return false;
        uint32_t from = (uint32_t)(n.key - NODE_HEADER - page) / 2;
        uint32_t size = (node_size(page, &n, leaf) + 1) / 2;
        if (size == 0 || memchr(taken + from, 1, size) != NULL)
            return false;
        memset(taken + from, 1, size);
        total += size;
    }
    return total * 2 == PAGE - ((const page_header *)(const void *)page)->upper;
}

static int compare(const check *c, const uint8_t *a, uint32_t a_bytes, const uint8_t *b,
                   uint32_t b_bytes)
{
    if (c->is_free && a_bytes == sizeof(uint64_t) && b_bytes == sizeof(uint64_t)) {
        uint64_t x, y;
        memcpy(&x, a, sizeof(x));
        memcpy(&y, b, sizeof(y));
        return x < y ? -1 : x > y;
    }
    int order = memcmp(a, b, a_bytes < b_bytes ? a_bytes : b_bytes);
    return order != 0 ? order : (a_bytes > b_bytes) - (a_bytes < b_bytes);
}

/* Keys come in order: each after the one before, or at a separator (KEY_AT_MOST) itself. */
static bool next_key(check *c, const node *n, bool separator)
{
    int order =
        c->last_kind == KEY_NONE ? 1 : compare(c, n->key, n->key_bytes, c->last_key, c->last_bytes);

    if (n->key_bytes == 0 || (c->is_free && n->key_bytes != sizeof(uint64_t)))
        return false;
    memcpy(c->last_key, n->key, n->key_bytes);
    c->last_bytes = n->key_bytes;
    bool fine = order > 0 || (order == 0 && c->last_kind == KEY_AT_MOST);
    c->last_kind = separator ? KEY_AT_MOST : KEY_BEFORE;
    return fine;
}

/* --- records --- */

/* A list of free pages: how many, then their numbers, falling. Starts at off of the file. */
static kvc_status check_free_list(check *c, const uint8_t *inline_data, uint64_t off,
                                  uint64_t len_bytes)
{
    uint64_t ids[PAGE / 8], before = NO_PAGE, count = 0;

    for (uint64_t done = 0; done < len_bytes;) {
        uint64_t want = len_bytes - done < sizeof(ids) ? len_bytes - done : sizeof(ids);
        if (inline_data != NULL)
            memcpy(ids, inline_data + done, want);
        else if (pread(c->fd, ids, want, (off_t)(off + done)) != (ssize_t)want)
            return complain(c, "a list of free pages is cut off or cannot be read");
        for (uint64_t i = 0; i < want / 8; i++) {
            uint64_t at = done / 8 + i;
            if (at == 0)
                count = ids[0];
            else if (at <= count && (ids[i] >= before || take_pages(c, ids[i], 1) != KVC_OK))
                return complain(c, "free page %llu is not free", (unsigned long long)ids[i]);
            before = at > 0 ? ids[i] : before;
        }
        done += want;
    }
    if (len_bytes < 8 || len_bytes % 8 != 0 || count > len_bytes / 8 - 1)
        return complain(c, "a list of free pages has a wrong length");
    return KVC_OK;
}

static kvc_status check_run_header(check *c, uint64_t number, uint64_t n_pages)
{
    uint8_t page[PAGE];
    page_header header;
    kvc_status status = read_page(c, number, page);

    if (status != KVC_OK)
        return status;
    memcpy(&header, page, sizeof(header));
    if (header.number != number || header.flags != FLAG_OVERFLOW ||
        (header.lower | (uint32_t)header.upper << 16) != n_pages)
        return complain(c, "the large record at page %llu has a wrong header",
                        (unsigned long long)number);
    return KVC_OK;
}

static kvc_status check_record(check *c, const node *n)
{
    uint64_t number, n_pages = ((uint64_t)n->data_bytes + PAGE_HEADER - 1) / PAGE + 1;

    if (n->flags == 0)
        return c->is_free ? check_free_list(c, n->data, 0, n->data_bytes) : KVC_OK;
    if (n->flags != NODE_BIGDATA)
        return complain(c, "a record has flags that nobody sets");
    memcpy(&number, n->data, sizeof(number));
    kvc_status status = take_pages(c, number, n_pages);
    if (status == KVC_OK && number + n_pages > c->file_pages)
        status =
            complain(c, "the large record at page %llu is cut off", (unsigned long long)number);
    if (status == KVC_OK && (c->deep || c->is_free))
        status = check_run_header(c, number, n_pages);
    c->seen.overflow_pages += n_pages;
    if (status == KVC_OK && c->is_free)
        status = check_free_list(c, NULL, number * PAGE + PAGE_HEADER, n->data_bytes);
    return status;
}

/* --- trees --- */

static kvc_status check_leaf(check *c, const uint8_t *page, uint32_t n_nodes)
{
    kvc_status status = KVC_OK;
    uint64_t number;
    node n = {0};

    for (uint32_t i = 0; c->deep && i < n_nodes; i++) {
        (void)get_node(page, i, &n);
        memcpy(&number, n.data, n.flags & NODE_BIGDATA ? sizeof(number) : 0);
        if (n.flags & NODE_BIGDATA)
            read_ahead(c, number);
    }
    for (uint32_t i = 0; i < n_nodes && status == KVC_OK; i++) {
        (void)get_node(page, i, &n);
        if (!next_key(c, &n, false))
            return complain(c, "a key is out of order");
        status = check_record(c, &n);
    }
    c->seen.entries += n_nodes;
    return status;
}

/* Header, place and nodes of a page; *n_nodes_p only then. */
static kvc_status load_page(check *c, uint64_t number, uint16_t flags, uint8_t *page,
                            uint32_t *n_nodes_p)
{
    page_header header;
    kvc_status status = take_pages(c, number, 1);

    if (status == KVC_OK)
        status = read_page(c, number, page);
    if (status != KVC_OK)
        return status;
    memcpy(&header, page, sizeof(header));
    *n_nodes_p = header.lower >= PAGE_HEADER ? (header.lower - PAGE_HEADER) / 2u : 0;
    if (header.number != number || header.flags != flags || header.lower % 2 != 0 ||
        header.lower > header.upper || header.upper > PAGE ||
        *n_nodes_p < (flags == FLAG_BRANCH ? 2u : 1u) ||
        !nodes_tile(page, *n_nodes_p, flags == FLAG_LEAF))
        return complain(c, "page %llu is damaged", (unsigned long long)number);
    return KVC_OK;
}

/* The page at a level below the root, and all under it, in the order of the keys. */
static kvc_status walk(check *c, uint64_t number, uint32_t level)
{
    uint8_t *page = c->levels + (size_t)level * PAGE;
    bool leaf = level + 1 == c->want.depth;
    uint32_t n_nodes;
    node n = {0};
    kvc_status status = load_page(c, number, leaf ? FLAG_LEAF : FLAG_BRANCH, page, &n_nodes);

    if (status != KVC_OK)
        return status;
    if (leaf) {
        c->seen.leaf_pages++;
        return check_leaf(c, page, n_nodes);
    }
    c->seen.branch_pages++;
    for (uint32_t i = 0; i < n_nodes; i++) {
        (void)get_node(page, i, &n);
        read_ahead(c, n.child);
    }
    for (uint32_t i = 0; i < n_nodes && status == KVC_OK; i++) {
        (void)get_node(page, i, &n);
        if (i > 0 && !next_key(c, &n, true))
            return complain(c, "a key of page %llu is out of order", (unsigned long long)number);
        status = walk(c, n.child, level + 1);
    }
    return status;
}

static kvc_status check_tree(check *c, const tree_record *tree, bool is_free)
{
    c->is_free = is_free;
    c->want = *tree;
    c->last_kind = KEY_NONE;
    memset(&c->seen, 0, sizeof(c->seen));
    if (tree->flags != (is_free ? DB_INTEGER_KEY : 0) || tree->depth > MAX_DEPTH ||
        (tree->root == NO_PAGE) != (tree->depth == 0))
        return complain(c, "the record of a tree is damaged");
    kvc_status status = tree->depth > 0 ? walk(c, tree->root, 0) : KVC_OK;
    if (status == KVC_OK &&
        (c->seen.entries != tree->entries || c->seen.branch_pages != tree->branch_pages ||
         c->seen.leaf_pages != tree->leaf_pages || c->seen.overflow_pages != tree->overflow_pages))
        status = complain(c, "the %s tree does not hold what it counts",
                          is_free ? "free page" : "value");
    return status;
}

/* Both meta pages must make sense; the younger one counts, as for LMDB. */
static kvc_status check_metas(check *c)
{
    uint8_t page[PAGE];
    page_header header;
    meta_record meta;

    for (uint32_t i = 0; i < 2; i++) {
        kvc_status status = read_page(c, i, page);
        if (status != KVC_OK)
            return status;
        memcpy(&header, page, sizeof(header));
        memcpy(&meta, page + PAGE_HEADER, sizeof(meta));
        if (header.number != i || header.flags != FLAG_META || meta.magic != META_MAGIC ||
            meta.version != META_VERSION || meta.free.pad != PAGE || meta.last_page < 1 ||
            meta.last_page >= UINT64_MAX / PAGE / 2)
            return complain(c, "meta page %u is damaged", i);
        if (i == 0 || meta.txn > c->meta.txn)
            c->meta = meta;
    }
    return KVC_OK;
}

static kvc_status check_fd(check *c)
{
    c->used = calloc(1, (size_t)(c->file_pages / 8 + 1));
    c->levels = malloc((size_t)MAX_DEPTH * PAGE);
    kvc_status status = c->used != NULL && c->levels != NULL ? KVC_OK : KVC_NO_MEMORY;
    if (status == KVC_OK)
        status = check_metas(c);
    if (status == KVC_OK)
        status = check_tree(c, &c->meta.values, false);
    if (status == KVC_OK)
        status = check_tree(c, &c->meta.free, true);
    free(c->used);
    free(c->levels);
    return status;
}

kvc_status kvsi_check_file(int dir_fd, bool deep, char why[KVSI_CHECK_WHY_BYTES])
{
    check c = {.deep = deep, .why = why};
    struct stat st;

    why[0] = '\0';
    c.fd = openat(dir_fd, "data.mdb", O_RDONLY | O_CLOEXEC);
    if (c.fd < 0)
        return faccessat(dir_fd, "data.mdb", F_OK, 0) != 0 ? KVC_OK : KVC_IO;
    kvc_status status = fstat(c.fd, &st) == 0 ? KVC_OK : KVC_IO;
    if (status == KVC_OK && st.st_size > 0) {
        c.file_pages = (uint64_t)st.st_size / PAGE;
        status = check_fd(&c);
    }
    close(c.fd);
    return status;
}
