/* SPDX-License-Identifier: GPL-2.0 */
/* The entries of the import lists, for list.c and import.c. */
#ifndef SOCKMI_LIST_H
#define SOCKMI_LIST_H

#include "internal.h"

/**
 * struct sockmi_entry - an image that waits in a list
 * @node: in the list
 * @id: in the namespace
 * @turn: which one it was to be published; 0 before
 * @blob: the image
 * @owner: file that reserved it, NULL once it is published
 * @uid: who may take it
 * @any_uid: anybody may
 * @restore_flags: SOCKMI_DEV_*
 * @local: local endpoint to use, or zero
 * @added: jiffies
 * @list: index
 * @taken: an import is trying it; it alone may free it then
 */
struct sockmi_entry {
	struct list_head node;
	u64 id;
	u64 turn;
	struct sockmi_blob *blob;
	struct sockmi_file *owner;
	kuid_t uid;
	bool any_uid;
	u32 restore_flags;
	struct sockmi_endpoint local;
	unsigned long added;
	unsigned int list;
	bool taken;
};

/**
 * struct sockmi_waiter - an import request that waits; see sockmi_net.waiters
 * @node: in the list of waiters
 * @requests: what it wants
 * @families: of the sockets that it wants it for
 * @count: how many
 * @uid: who asks
 * @admin: may take everything
 */
struct sockmi_waiter {
	struct list_head node;
	struct sockmi_ioc_request *requests;
	u8 families[SOCKMI_REQUESTS_MAX];
	unsigned int count;
	kuid_t uid;
	bool admin;
};

/* Does request @i want a socket with this identity (family 0: any), for somebody like @waiter? */
bool sockmi_wants(const struct sockmi_waiter *waiter, unsigned int i, const struct sockmi_identity *identity,
		  kuid_t uid, bool any_uid);
/*
 * Takes the first entry whose turn came after @after and that fits request @i: nobody else gets it. NULL: none. Put
 * it back, or have done with it.
 */
struct sockmi_entry *sockmi_entry_take(struct sockmi_net *sn, const struct sockmi_waiter *waiter, unsigned int i,
				       u64 after);
void sockmi_entry_put_back(struct sockmi_net *sn, struct sockmi_entry *entry);
void sockmi_entry_done(struct sockmi_net *sn, struct sockmi_entry *entry);

#endif
