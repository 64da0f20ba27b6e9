// SPDX-License-Identifier: GPL-2.0
/* RESTORE, ACTIVATE, DISCARD: copies that wait for the decision. */
#include <linux/file.h>
#include <linux/slab.h>

#include "internal.h"
#include "trace.h"

/**
 * struct sockmi_dormant - a restored socket whose lock is held
 * @refs: the table, queued work
 * @owner: device file, referenced
 * @claim: on the socket, until it is decided
 * @sock: the socket
 * @blob: the image, as long as activation needs it
 * @kept: the socket's own options, if it is discarded
 * @deadline: discards it
 * @id: in its device file
 *
 * Whoever takes it out of the table decides.
 */
struct sockmi_dormant {
	refcount_t refs;
	struct sockmi_file *owner;
	struct sockmi_claim *claim;
	struct socket *sock;
	struct sockmi_blob *blob;
	struct sockmi_kept *kept;
	struct delayed_work deadline;
	u32 id;
};

static void dormant_put(struct sockmi_dormant *dormant)
{
	if (!refcount_dec_and_test(&dormant->refs))
		return;
	sockmi_file_put(dormant->owner);
	kfree(dormant);
}

/* After the decision; the table's reference is the caller's. */
static void dormant_end(struct sockmi_dormant *dormant)
{
	sockmi_blob_put(dormant->blob);
	sockmi_kept_free(dormant->kept);
	sockmi_claim_put(dormant->claim);
	atomic_dec(&dormant->owner->exports_count);
	if (cancel_delayed_work(&dormant->deadline))
		dormant_put(dormant);
	dormant_put(dormant);
}

/* @dormant is only compared: it may be gone. */
static bool take_out(struct sockmi_file *file, unsigned long id, const struct sockmi_dormant *dormant)
{
	return xa_cmpxchg(&file->dormants, id, (void *)dormant, NULL, GFP_KERNEL) == dormant;
}

static void discard(struct sockmi_dormant *dormant, int why)
{
	struct sock *sk = dormant->sock->sk;

	sockmi_adopt(sk);
	trace_sockmi_discard(sk, dormant->id, 0, why, 0);
	sockmi_close_silently(sk, 0);
	release_sock(sk);
	sockmi_put_back(dormant->sock, dormant->kept);
}

/* Without this, a process that blocks on its own dormant socket could not even be killed. */
static void deadline(struct work_struct *work)
{
	struct sockmi_dormant *dormant = container_of(to_delayed_work(work), struct sockmi_dormant, deadline);
	struct sockmi_event event = { .type = SOCKMI_EVENT_DISCARDED, .id = dormant->id };

	if (take_out(dormant->owner, dormant->id, dormant)) {
		discard(dormant, -ETIMEDOUT);
		sockmi_event(dormant->owner, &event);
		dormant_end(dormant);
	}
	dormant_put(dormant);
}

void sockmi_dormants_end(struct sockmi_file *file)
{
	struct sockmi_dormant *dormant;
	unsigned long id;

	xa_for_each(&file->dormants, id, dormant)
		if (take_out(file, id, dormant)) {
			discard(dormant, 0);
			dormant_end(dormant);
		}
}

/* The socket of the caller's descriptor, its file referenced; ERR_PTR. */
static struct file *target_of(int fd, u32 *refusal)
{
	struct file *file = fget(fd);

	*refusal = SOCKMI_REFUSAL_NO_SOCKET;
	if (!file)
		return ERR_PTR(-EBADF);
	if (!sockmi_tcp_sock(file, refusal)) {
		fput(file);
		return ERR_PTR(sockmi_refusal_errno(*refusal));
	}
	return file;
}

static int restore(struct sockmi_file *file, struct sockmi_dormant *dormant, struct sockmi_ioc_restore *a)
{
	struct sockmi_endpoint local;
	struct sockmi_losses losses;
	struct sockmi_blob *blob;
	int result;

	blob = sockmi_blob_get(file, a->slot, a->image, a->bytes, &a->refusal, &a->image_error);
	if (IS_ERR(blob)) {
		trace_sockmi_restore(dormant->sock->sk, dormant->id, a->bytes, PTR_ERR(blob), a->refusal);
		return PTR_ERR(blob);
	}
	memcpy(&local, &a->local, sizeof(local));
	result = sockmi_restore(dormant->sock, &blob->image, &local, a->flags, &a->refusal, &losses,
				&dormant->kept);
	trace_sockmi_restore(dormant->sock->sk, dormant->id, a->bytes, result, a->refusal);
	a->approximated = losses.approximated;
	a->reset = losses.reset;
	a->lost = losses.lost;
	memcpy(a->lost_options, losses.lost_options, sizeof(a->lost_options));
	if (!result && blob->image.identity.kind == SOCKMI_KIND_LISTENING)
		dormant->blob = blob;
	else
		sockmi_blob_put(blob);
	return result;
}

static int activate(struct sockmi_dormant *dormant)
{
	int result = sockmi_activate(dormant->sock, dormant->blob ? &dormant->blob->image : NULL, dormant->kept);

	trace_sockmi_activate(dormant->sock->sk, dormant->id, 0, result, 0);
	return result;
}

/* A dormant for that descriptor, with a place in the table; -errno. */
static int prepare(struct sockmi_file *file, int fd, u32 *refusal, struct sockmi_dormant **made)
{
	struct sockmi_dormant *dormant;
	struct file *target;
	int result = -EMFILE;

	if (atomic_inc_return(&file->exports_count) > SOCKMI_EXPORTS_MAX)
		goto too_many;
	dormant = kzalloc(sizeof(*dormant), GFP_KERNEL_ACCOUNT);
	result = -ENOMEM;
	if (!dormant)
		goto too_many;
	target = target_of(fd, refusal);
	result = PTR_ERR_OR_ZERO(target);
	if (result)
		goto no_file;
	dormant->sock = sock_from_file(target);
	result = -EPERM;
	if (!sockmi_net_admin(sock_net(dormant->sock->sk)))
		goto no_claim;
	dormant->claim = sockmi_claim_get(target);
	result = PTR_ERR_OR_ZERO(dormant->claim);
	if (result) {
		*refusal = result == -EBUSY ? SOCKMI_REFUSAL_BUSY : SOCKMI_REFUSAL_MEMORY;
		goto no_claim;
	}
	/* NULL until it is dormant: nobody finds it, but nothing can fail after the restore. */
	result = xa_alloc_cyclic(&file->dormants, &dormant->id, NULL, xa_limit_32b, &file->next_id,
				 GFP_KERNEL_ACCOUNT);
	if (result < 0)
		goto no_place;
	refcount_set(&dormant->refs, 1);
	refcount_inc(&file->refs);
	dormant->owner = file;
	INIT_DELAYED_WORK(&dormant->deadline, deadline);
	*made = dormant;
	fput(target);
	return 0;

no_place:
	sockmi_claim_put(dormant->claim);
no_claim:
	fput(target);
no_file:
	kfree(dormant);
too_many:
	atomic_dec(&file->exports_count);
	return result;
}

/* Makes it known under its id, which the caller must have learnt, and starts its deadline. */
static int register_dormant(struct sockmi_dormant *dormant, unsigned int deadline_ms, void __user *arg, size_t size,
			    struct sockmi_ioc_restore *a)
{
	int result;

	a->id = dormant->id;
	result = sockmi_arg_out(arg, size, a, sizeof(*a));
	if (result) {
		xa_erase(&dormant->owner->dormants, dormant->id);
		discard(dormant, result);
		dormant_end(dormant);
		return result;
	}
	refcount_inc(&dormant->refs); /* the work's */
	/*
	 * Whoever finds it cancels its deadline, which must have been set then: afterwards it would be a timer that
	 * nobody waits for when the module is unloaded.
	 */
	xa_lock(&dormant->owner->dormants);
	__xa_store(&dormant->owner->dormants, dormant->id, dormant, GFP_ATOMIC); /* into the place that it has */
	queue_delayed_work(sockmi_slow, &dormant->deadline, msecs_to_jiffies(deadline_ms));
	xa_unlock(&dormant->owner->dormants);
	return 0;
}

long sockmi_ioctl_restore(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_dormant *dormant;
	struct sockmi_ioc_restore a;
	unsigned int deadline_ms;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	deadline_ms = a.deadline_ms ?: sockmi_dormant_max_ms;
	if (a.flags & ~(SOCKMI_DEV_ACTIVATE | SOCKMI_DEV_TRANSPARENT | SOCKMI_DEV_RESET_PATH) ||
	    deadline_ms > sockmi_dormant_max_ms || a.local.reserved)
		return -EINVAL;
	if (!(a.flags & SOCKMI_DEV_ACTIVATE) && !sockmi_may_hold(file))
		return -EPERM;
	a.refusal = SOCKMI_REFUSAL_NONE;
	a.image_error = 0;
	a.id = 0;
	result = prepare(file, a.fd, &a.refusal, &dormant);
	if (result)
		goto out;
	result = restore(file, dormant, &a);
	if (!result && !(a.flags & SOCKMI_DEV_ACTIVATE))
		return register_dormant(dormant, deadline_ms, arg, size, &a);
	xa_erase(&file->dormants, dormant->id);
	if (!result)
		result = activate(dormant);
	dormant_end(dormant);
out:
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: result;
}

/* Looked up and taken out at once, or the deadline could free it in between. */
static struct sockmi_dormant *take_out_by_id(struct sockmi_file *file, u64 id)
{
	struct sockmi_dormant *dormant;

	if (id > U32_MAX)
		return NULL;
	xa_lock(&file->dormants);
	dormant = xa_load(&file->dormants, id);
	if (dormant)
		__xa_cmpxchg(&file->dormants, id, dormant, NULL, GFP_ATOMIC);
	xa_unlock(&file->dormants);
	return dormant;
}

static long decide(struct sockmi_file *file, void __user *arg, size_t size, bool live)
{
	struct sockmi_ioc_decision a;
	struct sockmi_dormant *dormant;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags)
		return -EINVAL;
	dormant = take_out_by_id(file, a.id);
	if (!dormant) {
		if (live)
			trace_sockmi_activate(NULL, a.id, 0, -ENOENT, 0);
		else
			trace_sockmi_discard(NULL, a.id, 0, -ENOENT, 0);
		return -ENOENT;
	}
	if (live)
		result = activate(dormant);
	else
		discard(dormant, 0);
	dormant_end(dormant);
	return result;
}

long sockmi_ioctl_activate(struct sockmi_file *file, void __user *arg, size_t size)
{
	return decide(file, arg, size, true);
}

long sockmi_ioctl_discard(struct sockmi_file *file, void __user *arg, size_t size)
{
	return decide(file, arg, size, false);
}
