// SPDX-License-Identifier: GPL-2.0
/* IMPORT: the paper's import_socket(). */
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/pid_namespace.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

#include "list.h"
#include "trace.h"

/**
 * struct batch - one call
 * @waiter: the requests, and who asks
 * @files: of the requests' sockets, referenced; NULL: skipped
 * @sn: of the sockets' namespace
 * @done: requests with a result
 * @imported: of these, those with a socket
 */
struct batch {
	struct sockmi_waiter waiter;
	struct file **files;
	struct sockmi_net *sn;
	unsigned int done;
	unsigned int imported;
};

static void finish(struct batch *b, unsigned int i, int result)
{
	/* Waiters are read by others under the lock. */
	spin_lock_bh(&b->sn->lists_lock);
	b->waiter.requests[i].result = result;
	spin_unlock_bh(&b->sn->lists_lock);
	b->done++;
	if (result > 0)
		b->imported++;
}

static int copy_context(struct sockmi_ioc_request *request, const struct sockmi_view *context)
{
	request->context_bytes = context->length;
	if (!request->context || !context->length)
		return 0;
	return copy_to_user(u64_to_user_ptr(request->context), context->data,
			    min_t(size_t, request->context_room, context->length)) ? -EFAULT : 0;
}

static void tell_taken(struct batch *b, const struct sockmi_entry *entry)
{
	const struct sockmi_identity *identity = &entry->blob->image.identity;
	struct sockmi_event event = {
		.type = SOCKMI_EVENT_TAKEN,
		.id = entry->id,
		.list = entry->list + 1,
		.state = identity->state,
		.kind = identity->kind,
		.bytes = entry->blob->bytes,
	};

	sockmi_dev_endpoint(&event.local, &identity->local);
	sockmi_dev_endpoint(&event.remote, &identity->remote);
	spin_lock_bh(&b->sn->lists_lock);
	if (b->sn->serving) {
		event.pid = task_tgid_nr_ns(current, b->sn->serving->pid_ns);
		event.uid = from_kuid_munged(b->sn->serving->user_ns, current_euid());
		sockmi_event(b->sn->serving, &event);
	}
	spin_unlock_bh(&b->sn->lists_lock);
}

/* One entry into one socket: 1, or a negative errno. */
static int import_one(struct batch *b, unsigned int i, struct sockmi_entry *entry)
{
	struct sockmi_ioc_request *request = &b->waiter.requests[i];
	const struct sockmi_image *image = &entry->blob->image;
	struct socket *sock = sock_from_file(b->files[i]);
	struct sockmi_kept *kept = NULL;
	struct sockmi_losses losses;
	u32 refusal = SOCKMI_REFUSAL_NONE;
	int result;

	/* What may fault comes before the socket is touched. */
	result = copy_context(request, &image->context);
	if (!result)
		result = sockmi_restore(sock, image, &entry->local, entry->restore_flags, &refusal, &losses, &kept);
	if (!result) {
		result = sockmi_activate(sock, image, kept);
		sockmi_kept_free(kept);
		request->approximated = losses.approximated;
		request->reset = losses.reset;
	}
	trace_sockmi_import(sock->sk, entry->id, entry->blob->bytes, result, refusal);
	request->refusal = refusal;
	request->id = entry->id;
	memcpy(request->migration_id, image->identity.migration_id, sizeof(request->migration_id));
	if (result) {
		sockmi_entry_put_back(b->sn, entry);
		return result;
	}
	tell_taken(b, entry);
	sockmi_entry_done(b->sn, entry);
	return 1;
}

/* What this host cannot take for its address is in nobody's way: the next one may do. */
static void serve(struct batch *b, unsigned int i)
{
	struct sockmi_entry *entry;
	u64 after = 0;
	int result = 0;

	while ((entry = sockmi_entry_take(b->sn, &b->waiter, i, after))) {
		after = entry->turn;
		result = import_one(b, i, entry);
		if ((result != -EADDRINUSE && result != -EADDRNOTAVAIL) || fatal_signal_pending(current))
			break;
	}
	if (result)
		finish(b, i, result);
}

/* Gives every request what there is for it. True: at least one has a result. */
static bool sweep(struct batch *b)
{
	unsigned int i;

	for (i = 0; i < b->waiter.count; i++)
		if (b->files[i] && !b->waiter.requests[i].result)
			serve(b, i);
	return b->done;
}

/* Is there anything for us? Asked with the task already on the wait queue, so it must not sleep. */
static bool anything(struct batch *b)
{
	struct sockmi_entry *entry;
	unsigned int i, list;
	bool found = false;

	spin_lock_bh(&b->sn->lists_lock);
	for (list = 0; list < SOCKMI_LISTS && !found; list++)
		list_for_each_entry(entry, &b->sn->lists[list], node) {
			if (entry->owner || entry->taken)
				continue;
			for (i = 0; i < b->waiter.count && !found; i++)
				found = sockmi_wants(&b->waiter, i, &entry->blob->image.identity, entry->uid,
						     entry->any_uid);
			if (found)
				break;
		}
	spin_unlock_bh(&b->sn->lists_lock);
	return found;
}

/* Others walk the list of waiters under the lock: no user makes it long. */
static int tell_waiting(struct batch *b)
{
	const struct sockmi_waiter *other;
	unsigned int i, same = 0;

	spin_lock_bh(&b->sn->lists_lock);
	list_for_each_entry(other, &b->sn->waiters, node)
		same += uid_eq(other->uid, b->waiter.uid);
	if (same >= SOCKMI_WAITERS_MAX && !b->waiter.admin) {
		spin_unlock_bh(&b->sn->lists_lock);
		return -EBUSY;
	}
	list_add_tail(&b->waiter.node, &b->sn->waiters);
	for (i = 0; b->sn->serving && i < b->waiter.count; i++) {
		struct sockmi_event event = {
			.type = SOCKMI_EVENT_WAITING,
			.list = b->waiter.requests[i].list,
			.pid = task_tgid_nr_ns(current, b->sn->serving->pid_ns),
			.uid = from_kuid_munged(b->sn->serving->user_ns, b->waiter.uid),
			.local = b->waiter.requests[i].local,
			.remote = b->waiter.requests[i].remote,
		};

		if (b->files[i])
			sockmi_event(b->sn->serving, &event);
	}
	spin_unlock_bh(&b->sn->lists_lock);
	return 0;
}

static int wait_and_take(struct batch *b, int timeout_ms)
{
	unsigned long deadline = jiffies + msecs_to_jiffies(max(timeout_ms, 0));
	int result;

	if (sweep(b) || !timeout_ms)
		return 0;
	result = tell_waiting(b);
	if (result)
		return result;
	while (!sweep(b)) {
		long left = timeout_ms < 0 ? MAX_SCHEDULE_TIMEOUT : (long)(deadline - jiffies);

		if (left <= 0)
			break;
		left = wait_event_interruptible_timeout(b->sn->wait, anything(b), left);
		if (left < 0) {
			result = -EINTR;
			break;
		}
	}
	spin_lock_bh(&b->sn->lists_lock);
	list_del(&b->waiter.node);
	spin_unlock_bh(&b->sn->lists_lock);
	return b->done ? 0 : result;
}

static int check_request(const struct sockmi_ioc_request *request)
{
	return request->list < 1 || request->list > SOCKMI_LISTS || request->local_prefix > 128 ||
		       request->remote_prefix > 128 || request->flags || request->reserved ||
		       request->local.reserved || request->remote.reserved ? -EINVAL : 0;
}

/* Opens the requests' sockets; they must be of one namespace. */
static int open_requests(struct batch *b)
{
	struct net *net = NULL;
	unsigned int i;

	for (i = 0; i < b->waiter.count; i++) {
		struct sockmi_ioc_request *request = &b->waiter.requests[i];
		struct sock *sk;

		request->result = 0;
		request->refusal = SOCKMI_REFUSAL_NONE;
		if (request->fd < 0)
			continue;
		if (check_request(request))
			return -EINVAL;
		b->files[i] = fget(request->fd);
		if (!b->files[i])
			return -EBADF;
		sk = sockmi_tcp_sock(b->files[i], &request->refusal);
		if (!sk)
			return sockmi_refusal_errno(request->refusal);
		if (net && !net_eq(net, sock_net(sk)))
			return -EXDEV;
		net = sock_net(sk);
		b->waiter.families[i] = sk->sk_family;
	}
	if (!net)
		return -EINVAL;
	b->sn = sockmi_net(net);
	b->waiter.uid = current_euid();
	b->waiter.admin = sockmi_net_admin(net);
	return 0;
}

static int copy_in(struct batch *b, const struct sockmi_ioc_import *a)
{
	unsigned int i;

	for (i = 0; i < a->count; i++) {
		int result = sockmi_arg_in(&b->waiter.requests[i], sizeof(b->waiter.requests[i]),
					   u64_to_user_ptr(a->requests + (u64)i * a->request_bytes), a->request_bytes);

		if (result)
			return result;
	}
	return 0;
}

static int copy_out(const struct batch *b, const struct sockmi_ioc_import *a)
{
	unsigned int i;

	for (i = 0; i < a->count; i++) {
		int result = sockmi_arg_out(u64_to_user_ptr(a->requests + (u64)i * a->request_bytes), a->request_bytes,
					    &b->waiter.requests[i], sizeof(b->waiter.requests[i]));

		if (result)
			return result;
	}
	return 0;
}

long sockmi_ioctl_import(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct batch b = {};
	struct sockmi_ioc_import a;
	unsigned int i;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags || !a.count || a.count > SOCKMI_REQUESTS_MAX || a.request_bytes < 64 || a.request_bytes > PAGE_SIZE)
		return -EINVAL;
	b.waiter.count = a.count;
	b.waiter.requests = kcalloc(a.count, sizeof(*b.waiter.requests), GFP_KERNEL_ACCOUNT);
	b.files = kcalloc(a.count, sizeof(*b.files), GFP_KERNEL_ACCOUNT);
	result = -ENOMEM;
	if (!b.waiter.requests || !b.files)
		goto out;
	result = copy_in(&b, &a);
	if (!result)
		result = open_requests(&b);
	if (!result)
		result = wait_and_take(&b, a.timeout_ms);
	if (!result)
		result = copy_out(&b, &a) ?: b.imported;
	else if (result != -EINTR)
		copy_out(&b, &a);
out:
	for (i = 0; b.files && i < a.count; i++)
		if (b.files[i])
			fput(b.files[i]);
	kfree(b.files);
	kfree(b.waiter.requests);
	return result;
}
