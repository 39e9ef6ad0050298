/*
 * list.h: a doubly linked list whose nodes are the first member of what they link.
 *
 * The head is a node of its own; an empty list's head points at itself. A node is in one list at
 * most; removing it clears it, so that "in no list" can be told. No locking.
 */
#ifndef KVCI_LIST_H
#define KVCI_LIST_H

#include <stdbool.h>
#include <stddef.h>

typedef struct kvci_node {
    struct kvci_node *next, *prev;
} kvci_node;

static inline void kvci_list_init(kvci_node *head)
{
    head->next = head;
    head->prev = head;
}

static inline bool kvci_list_empty(const kvci_node *head)
{
    return head->next == head;
}

static inline void kvci_list_insert(kvci_node *after, kvci_node *node)
{
    node->prev = after;
    node->next = after->next;
    after->next->prev = node;
    after->next = node;
}

static inline void kvci_list_push(kvci_node *head, kvci_node *node)
{
    kvci_list_insert(head->prev, node);
}

static inline void kvci_list_push_front(kvci_node *head, kvci_node *node)
{
    kvci_list_insert(head, node);
}

/* Fine for a node that is in no list. */
static inline void kvci_list_remove(kvci_node *node)
{
    if (node->next == NULL)
        return;
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node->next = NULL;
    node->prev = NULL;
}

/* NULL when empty. */
static inline kvci_node *kvci_list_first(const kvci_node *head)
{
    return head->next == head ? NULL : head->next;
}

#endif
