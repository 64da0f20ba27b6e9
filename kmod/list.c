// SPDX-License-Identifier: GPL-2.0
/*
 * The three import lists of a network namespace. Entries are bounded in number by the lists' maxima and in bytes by
 * the module's memory. A published entry may be the only copy of a connection, so it keeps the module loaded.
 */
#include <linux/cred.h>
#include <linux/module.h>
#include <linux/slab.h>

#include "list.h"
#include "trace.h"

static unsigned int list_of(u8 kind)
{
	return kind == SOCKMI_KIND_LISTENING ? SOCKMI_LIST_LISTENING - 1 :
	       kind == SOCKMI_KIND_CONNECTED ? SOCKMI_LIST_CONNECTED - 1 : SOCKMI_LIST_BOUND - 1;
}

static void entry_free(struct sockmi_entry *entry)
{
	sockmi_blob_put(entry->blob);
	kfree(entry);
	module_put(THIS_MODULE);
}

void sockmi_lists_init(struct sockmi_net *sn)
{
	unsigned int i;

	spin_lock_init(&sn->lists_lock);
	INIT_LIST_HEAD(&sn->waiters);
	INIT_LIST_HEAD(&sn->requests);
	init_waitqueue_head(&sn->wait);
	for (i = 0; i < SOCKMI_LISTS; i++) {
		INIT_LIST_HEAD(&sn->lists[i]);
		sn->max[i] = min_t(unsigned int, sockmi_list_max[i], SOCKMI_LIST_MOST);
	}
}

void sockmi_lists_exit(struct sockmi_net *sn)
{
	struct sockmi_entry *entry, *next;
	unsigned int i;

	for (i = 0; i < SOCKMI_LISTS; i++)
		list_for_each_entry_safe(entry, next, &sn->lists[i], node) {
			list_del(&entry->node);
			entry_free(entry);
		}
}

/* Under the lock: the entry of that id in any list. */
static struct sockmi_entry *find(struct sockmi_net *sn, u64 id)
{
	struct sockmi_entry *entry;
	unsigned int i;

	for (i = 0; i < SOCKMI_LISTS; i++)
		list_for_each_entry(entry, &sn->lists[i], node)
			if (entry->id == id)
				return entry;
	return NULL;
}

/* Under the lock. */
static void publish(struct sockmi_net *sn, struct sockmi_entry *entry)
{
	entry->owner = NULL;
	entry->turn = ++sn->published;
	list_move_tail(&entry->node, &sn->lists[entry->list]);
	wake_up_all(&sn->wait);
}

void sockmi_reserved_end(struct sockmi_file *file)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_entry *entry, *next;
	LIST_HEAD(gone);
	unsigned int i;

	spin_lock_bh(&sn->lists_lock);
	for (i = 0; i < SOCKMI_LISTS; i++)
		list_for_each_entry_safe(entry, next, &sn->lists[i], node)
			if (entry->owner == file) {
				sn->counts[i]--;
				list_move(&entry->node, &gone);
			}
	spin_unlock_bh(&sn->lists_lock);
	list_for_each_entry_safe(entry, next, &gone, node)
		entry_free(entry);
}

unsigned int sockmi_lists_forget(struct sockmi_net *sn)
{
	struct sockmi_entry *entry, *next;
	unsigned int i, count = 0;
	LIST_HEAD(gone);

	spin_lock_bh(&sn->lists_lock);
	for (i = 0; i < SOCKMI_LISTS; i++)
		list_for_each_entry_safe(entry, next, &sn->lists[i], node)
			if (!entry->owner && !entry->taken) {
				sn->counts[i]--;
				list_move(&entry->node, &gone);
				count++;
			}
	spin_unlock_bh(&sn->lists_lock);
	list_for_each_entry_safe(entry, next, &gone, node)
		entry_free(entry);
	return count;
}

/* ---- Matching ---- */

static bool same_prefix(const u8 *a, const u8 *b, unsigned int bits)
{
	unsigned int bytes = bits / 8, rest = bits % 8;

	return !memcmp(a, b, bytes) && (!rest || !((a[bytes] ^ b[bytes]) >> (8 - rest)));
}

static bool fits(const struct sockmi_dev_endpoint *wanted, unsigned int prefix, const struct sockmi_endpoint *is)
{
	return (!wanted->port || wanted->port == is->port) && same_prefix(wanted->address, is->address, prefix);
}

bool sockmi_wants(const struct sockmi_waiter *waiter, unsigned int i, const struct sockmi_identity *identity,
		  kuid_t uid, bool any_uid)
{
	const struct sockmi_ioc_request *request = &waiter->requests[i];

	if (request->fd < 0 || request->result)
		return false;
	if (identity->family && identity->family != waiter->families[i])
		return false;
	if (request->list != list_of(identity->kind) + 1)
		return false;
	if (request->states && !(request->states >> identity->state & 1))
		return false;
	if (!fits(&request->local, request->local_prefix, &identity->local) ||
	    !fits(&request->remote, request->remote_prefix, &identity->remote))
		return false;
	return any_uid || waiter->admin || uid_eq(uid, waiter->uid);
}

struct sockmi_entry *sockmi_entry_take(struct sockmi_net *sn, const struct sockmi_waiter *waiter, unsigned int i,
				       u64 after)
{
	struct sockmi_entry *entry;

	spin_lock_bh(&sn->lists_lock);
	list_for_each_entry(entry, &sn->lists[waiter->requests[i].list - 1], node) {
		if (entry->owner || entry->taken || entry->turn <= after ||
		    !sockmi_wants(waiter, i, &entry->blob->image.identity, entry->uid, entry->any_uid))
			continue;
		entry->taken = true;
		spin_unlock_bh(&sn->lists_lock);
		return entry;
	}
	spin_unlock_bh(&sn->lists_lock);
	return NULL;
}

void sockmi_entry_put_back(struct sockmi_net *sn, struct sockmi_entry *entry)
{
	spin_lock_bh(&sn->lists_lock);
	entry->taken = false;
	spin_unlock_bh(&sn->lists_lock);
	wake_up_all(&sn->wait);
}

void sockmi_entry_done(struct sockmi_net *sn, struct sockmi_entry *entry)
{
	spin_lock_bh(&sn->lists_lock);
	list_del(&entry->node);
	sn->counts[entry->list]--;
	spin_unlock_bh(&sn->lists_lock);
	entry_free(entry);
}

/* ---- ioctls ---- */

/* Into its list, unless that is full. Its id: others may have taken and freed the entry before we return. */
static s64 enlist(struct sockmi_net *sn, struct sockmi_entry *entry, bool published)
{
	s64 result;

	spin_lock_bh(&sn->lists_lock);
	if (sn->counts[entry->list] >= sn->max[entry->list]) {
		result = -ENOSPC;
	} else {
		result = entry->id = ++sn->next_entry;
		sn->counts[entry->list]++;
		list_add_tail(&entry->node, &sn->lists[entry->list]);
		if (published)
			publish(sn, entry);
	}
	spin_unlock_bh(&sn->lists_lock);
	return result;
}

long sockmi_ioctl_list_add(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_ioc_list_add a;
	struct sockmi_entry *entry;
	s64 result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags & ~(SOCKMI_ENTRY_ANY_UID | SOCKMI_ENTRY_PUBLISH) || a.local.reserved ||
	    a.restore_flags & ~(SOCKMI_DEV_TRANSPARENT | SOCKMI_DEV_RESET_PATH))
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	a.id = 0;
	a.refusal = SOCKMI_REFUSAL_NONE;
	a.image_error = 0;
	entry = kzalloc(sizeof(*entry), GFP_KERNEL_ACCOUNT);
	if (!entry)
		return -ENOMEM;
	__module_get(THIS_MODULE);
	entry->uid = make_kuid(current_user_ns(), a.uid);
	entry->any_uid = a.flags & SOCKMI_ENTRY_ANY_UID;
	entry->restore_flags = a.restore_flags;
	memcpy(&entry->local, &a.local, sizeof(entry->local));
	entry->owner = file;
	entry->added = jiffies;
	result = -EINVAL;
	if (!entry->any_uid && !uid_valid(entry->uid))
		goto failed;
	entry->blob = sockmi_blob_get(file, a.slot, a.image, a.bytes, &a.refusal, &a.image_error);
	if (IS_ERR(entry->blob)) {
		result = PTR_ERR(entry->blob);
		entry->blob = NULL;
		goto failed;
	}
	entry->list = list_of(entry->blob->image.identity.kind);
	result = enlist(sn, entry, a.flags & SOCKMI_ENTRY_PUBLISH);
	if (result < 0) {
		a.refusal = SOCKMI_REFUSAL_LIST_FULL;
		goto failed;
	}
	a.id = result;
	trace_sockmi_list_add(NULL, a.id, a.bytes, 0, 0);
	return sockmi_arg_out(arg, size, &a, sizeof(a));

failed:
	entry_free(entry);
	trace_sockmi_list_add(NULL, 0, a.bytes, result, a.refusal);
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: result;
}

/* The argument of PUBLISH and REMOVE. */
static int decision(struct sockmi_file *file, void __user *arg, size_t size, struct sockmi_ioc_decision *a)
{
	int result = sockmi_arg_in(a, sizeof(*a), arg, size);

	if (result)
		return result;
	if (a->flags)
		return -EINVAL;
	return sockmi_net_admin(file->net) ? 0 : -EPERM;
}

long sockmi_ioctl_publish(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_ioc_decision a;
	struct sockmi_entry *entry;
	int result = decision(file, arg, size, &a);

	if (result)
		return result;
	spin_lock_bh(&sn->lists_lock);
	entry = find(sn, a.id);
	if (!entry)
		result = -ENOENT;
	else if (entry->owner != file)
		result = entry->owner ? -EPERM : -EBUSY;
	else
		publish(sn, entry);
	spin_unlock_bh(&sn->lists_lock);
	trace_sockmi_publish(NULL, a.id, 0, result, 0);
	return result;
}

long sockmi_ioctl_remove(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_ioc_decision a;
	struct sockmi_entry *entry;
	int result = decision(file, arg, size, &a);

	if (result)
		return result;
	spin_lock_bh(&sn->lists_lock);
	entry = find(sn, a.id);
	if (!entry) {
		result = -ENOENT;
	} else if (entry->taken) {
		result = -EBUSY;
	} else {
		list_del(&entry->node);
		sn->counts[entry->list]--;
	}
	spin_unlock_bh(&sn->lists_lock);
	trace_sockmi_remove(NULL, a.id, 0, result, 0);
	if (!result)
		entry_free(entry);
	return result;
}

long sockmi_ioctl_list_info(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_ioc_list_info a;
	struct sockmi_waiter *waiter;
	struct sockmi_entry *entry;
	unsigned int i;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.list < 1 || a.list > SOCKMI_LISTS)
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	a = (struct sockmi_ioc_list_info){ .list = a.list };
	spin_lock_bh(&sn->lists_lock);
	a.max = sn->max[a.list - 1];
	list_for_each_entry(entry, &sn->lists[a.list - 1], node) {
		if (entry->owner)
			a.reserved++;
		else
			a.entries++;
	}
	list_for_each_entry(waiter, &sn->waiters, node)
		for (i = 0; i < waiter->count; i++)
			a.waiting += waiter->requests[i].fd >= 0 && waiter->requests[i].list == a.list;
	spin_unlock_bh(&sn->lists_lock);
	return sockmi_arg_out(arg, size, &a, sizeof(a));
}

long sockmi_ioctl_list_next(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_ioc_list_next a;
	struct sockmi_entry *entry, *next = NULL;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.list < 1 || a.list > SOCKMI_LISTS)
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	/* By id, not by place: the entry before may be gone. */
	spin_lock_bh(&sn->lists_lock);
	list_for_each_entry(entry, &sn->lists[a.list - 1], node)
		if (entry->id > a.after && (!next || entry->id < next->id))
			next = entry;
	if (next) {
		const struct sockmi_identity *identity = &next->blob->image.identity;

		a.id = next->id;
		a.published = !next->owner;
		a.bytes = next->blob->bytes;
		memcpy(a.migration_id, identity->migration_id, sizeof(a.migration_id));
		sockmi_dev_endpoint(&a.local, &identity->local);
		sockmi_dev_endpoint(&a.remote, &identity->remote);
		a.age_ms = jiffies_to_msecs(jiffies - next->added);
	}
	spin_unlock_bh(&sn->lists_lock);
	return next ? sockmi_arg_out(arg, size, &a, sizeof(a)) : -ENOENT;
}

long sockmi_ioctl_match(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_net *sn = sockmi_net(file->net);
	struct sockmi_identity identity = {};
	struct sockmi_ioc_match a;
	struct sockmi_waiter *waiter;
	unsigned int i;
	kuid_t uid;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.pad || a.pad2 || a.local.reserved || a.remote.reserved || a.flags & ~SOCKMI_ENTRY_ANY_UID ||
	    a.kind < 1 || a.kind > 4 || a.state > 11)
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	identity.family = a.family;
	identity.kind = a.kind;
	identity.state = a.state;
	memcpy(&identity.local, &a.local, sizeof(a.local));
	memcpy(&identity.remote, &a.remote, sizeof(a.remote));
	uid = make_kuid(current_user_ns(), a.uid);
	a.waiting = 0;
	spin_lock_bh(&sn->lists_lock);
	list_for_each_entry(waiter, &sn->waiters, node)
		for (i = 0; i < waiter->count; i++)
			a.waiting += sockmi_wants(waiter, i, &identity, uid, a.flags & SOCKMI_ENTRY_ANY_UID);
	spin_unlock_bh(&sn->lists_lock);
	return sockmi_arg_out(arg, size, &a, sizeof(a));
}
