// SPDX-License-Identifier: GPL-2.0
/* Exports: claims, freezes, their deadlines and decisions. uapi/sockmi.h has the states. */
#include <linux/capability.h>
#include <linux/file.h>
#include <linux/slab.h>

#include "internal.h"
#include "trace.h"

/**
 * struct sockmi_export - one claimed socket
 * @refs: the file's table, running ioctls, queued work
 * @lock: serialises all that is done with it, the deadline included
 * @state: enum sockmi_export_state, 0 once it is forgotten
 * @epoch: number of the last freeze
 * @timed_out: the last thaw was the deadline's
 * @id: in its file
 * @owner: the device file, referenced
 * @claim: on the socket, NULL once it is forgotten
 * @sk: the socket, as long as it is claimed
 * @deadline: thaws, or ends the claim
 * @frozen_at: when the freeze began
 * @frozen_us: how long the last one lasted
 * @ends: when the claim's lifetime is over, jiffies
 */
struct sockmi_export {
	refcount_t refs;
	struct mutex lock;
	u32 state;
	u32 epoch;
	bool timed_out;
	u32 id;
	struct sockmi_file *owner;
	struct sockmi_claim *claim;
	struct sock *sk;
	struct delayed_work deadline;
	ktime_t frozen_at;
	u64 frozen_us;
	unsigned long ends;
};

#define BUSY_RETRY_MS 100 /* until a deadline that found FREEZE at work looks again */
#define LOCK_WAIT_MS 250 /* a system call has it for microseconds, or, preempted, for some milliseconds */

/* ---- Claims ---- */

static void export_put(struct sockmi_export *export)
{
	if (!refcount_dec_and_test(&export->refs))
		return;
	sockmi_file_put(export->owner);
	mutex_destroy(&export->lock);
	kfree(export);
}

/* A reference on the export of that id, or NULL. */
static struct sockmi_export *export_get(struct sockmi_file *file, u64 id)
{
	struct sockmi_export *export;

	if (id > U32_MAX)
		return NULL;
	xa_lock(&file->exports);
	export = xa_load(&file->exports, id);
	if (export)
		refcount_inc(&export->refs);
	xa_unlock(&file->exports);
	return export;
}

/* Ends a freeze; @export->lock is held, its state FROZEN. */
static void thaw(struct sockmi_export *export, bool timed_out)
{
	export->state = SOCKMI_EXPORT_THAWING;
	export->timed_out = timed_out;
	sockmi_let_go(export->sk);
	export->frozen_us = ktime_us_delta(ktime_get(), export->frozen_at);
	export->state = SOCKMI_EXPORT_THAWED;
	trace_sockmi_thaw(export->sk, export->id, export->frozen_us, timed_out ? -ETIMEDOUT : 0, 0);
}

/*
 * Forgets an export that is no longer in its file's table; the table's reference becomes the caller's. Releases
 * @export->lock.
 */
static void forget(struct sockmi_export *export)
{
	struct sockmi_claim *claim = export->claim;

	if (export->state == SOCKMI_EXPORT_FROZEN)
		thaw(export, false);
	trace_sockmi_unclaim(export->sk, export->id, 0, 0, 0);
	export->state = 0;
	export->sk = NULL;
	export->claim = NULL;
	mutex_unlock(&export->lock);
	sockmi_claim_put(claim);
	atomic_dec(&export->owner->exports_count);
}

/* Queued work has a reference of its own. */
static void set_deadline(struct sockmi_export *export, unsigned long delay)
{
	if (!mod_delayed_work(sockmi_workqueue, &export->deadline, delay))
		refcount_inc(&export->refs);
}

/* It may be about to look again, and nobody would wait for a timer when the module is unloaded: so it has to end. */
static void clear_deadline(struct sockmi_export *export)
{
	if (cancel_delayed_work_sync(&export->deadline))
		export_put(export);
}

static unsigned long life_left(const struct sockmi_export *export)
{
	return time_before(jiffies, export->ends) ? export->ends - jiffies : 0;
}

static void tell(struct sockmi_export *export, u32 type)
{
	struct sockmi_event event = { .type = type, .id = export->id };
	struct sockmi_identity identity;

	sockmi_identify(export->sk, &identity);
	sockmi_dev_endpoint(&event.local, &identity.local);
	sockmi_dev_endpoint(&event.remote, &identity.remote);
	event.state = identity.state;
	event.kind = identity.kind;
	sockmi_event(export->owner, &event);
}

static void deadline(struct work_struct *work)
{
	struct sockmi_export *export = container_of(to_delayed_work(work), struct sockmi_export, deadline);
	bool over = false;

	/*
	 * FREEZE has it while it waits for a socket that somebody keeps busy. Workers are few: if they waited too, other
	 * deadlines would not come. A later deadline that has been set meanwhile stands. What is frozen thaws now, however
	 * often others come for the lock; they have it for a moment, or for LOCK_WAIT_MS if it was thawed just now.
	 */
	if (READ_ONCE(export->state) == SOCKMI_EXPORT_FROZEN) {
		mutex_lock(&export->lock);
	} else if (!mutex_trylock(&export->lock)) {
		if (queue_delayed_work(sockmi_workqueue, &export->deadline, msecs_to_jiffies(BUSY_RETRY_MS)))
			return;
		goto out;
	}
	if (export->state == SOCKMI_EXPORT_FROZEN) {
		/* A deadline that was queued for an earlier freeze must not end this one. */
		if (!delayed_work_pending(&export->deadline)) {
			thaw(export, true);
			tell(export, SOCKMI_EVENT_THAWED);
			set_deadline(export, life_left(export));
		}
	} else if (export->state && !life_left(export)) {
		/* Whoever takes it out of the table forgets it. */
		over = xa_cmpxchg(&export->owner->exports, export->id, export, NULL, GFP_KERNEL) == export;
		if (over)
			tell(export, SOCKMI_EVENT_CLAIM_ENDED);
	} else if (export->state && !delayed_work_pending(&export->deadline)) {
		set_deadline(export, life_left(export));
	}
	if (over) {
		forget(export);
		export_put(export);
	} else {
		mutex_unlock(&export->lock);
	}
out:
	export_put(export);
}

s64 sockmi_claim(struct sockmi_file *owner, struct file *socket_file, unsigned int lifetime_ms, u32 *refusal)
{
	struct sockmi_export *export;
	struct sock *sk = sockmi_tcp_sock(socket_file, refusal);
	int result;
	u32 id;

	if (!sk)
		return sockmi_refusal_errno(*refusal);
	*refusal = sockmi_preflight(sk);
	if (*refusal)
		return sockmi_refusal_errno(*refusal);
	if (atomic_inc_return(&owner->exports_count) > SOCKMI_EXPORTS_MAX) {
		result = -EMFILE;
		goto too_many;
	}
	export = kzalloc(sizeof(*export), GFP_KERNEL_ACCOUNT);
	result = -ENOMEM;
	if (!export)
		goto too_many;
	refcount_set(&export->refs, 2); /* the table's, and this function's until it ends */
	mutex_init(&export->lock);
	INIT_DELAYED_WORK(&export->deadline, deadline);
	export->state = SOCKMI_EXPORT_CLAIMED;
	export->owner = owner;
	export->sk = sk;
	export->ends = jiffies + msecs_to_jiffies(lifetime_ms);
	export->claim = sockmi_claim_get(socket_file);
	result = PTR_ERR_OR_ZERO(export->claim);
	if (result) {
		*refusal = result == -EBUSY ? SOCKMI_REFUSAL_BUSY : SOCKMI_REFUSAL_NONE;
		goto no_claim;
	}
	refcount_inc(&owner->refs);
	mutex_lock(&export->lock);
	result = xa_alloc_cyclic(&owner->exports, &export->id, export, xa_limit_32b, &owner->next_id,
				 GFP_KERNEL_ACCOUNT);
	if (result < 0) {
		mutex_unlock(&export->lock);
		sockmi_claim_put(export->claim);
		refcount_dec(&owner->refs);
		goto no_claim;
	}
	result = 0;
	set_deadline(export, life_left(export));
	mutex_unlock(&export->lock);
	id = export->id;
	export_put(export);
	return id;

no_claim:
	mutex_destroy(&export->lock);
	kfree(export);
too_many:
	atomic_dec(&owner->exports_count);
	return result;
}

int sockmi_unclaim(struct sockmi_file *owner, u64 id)
{
	struct sockmi_export *export;

	if (id > U32_MAX)
		return -ENOENT;
	export = xa_erase(&owner->exports, id);
	if (!export)
		return -ENOENT;
	mutex_lock(&export->lock);
	forget(export);
	clear_deadline(export);
	export_put(export);
	return 0;
}

int sockmi_withdraw(struct sockmi_file *owner, u64 id)
{
	struct sockmi_export *export = export_get(owner, id);
	int result = -EBUSY;

	if (!export)
		return -ENOENT;
	mutex_lock(&export->lock);
	if (export->state == SOCKMI_EXPORT_CLAIMED)
		result = xa_cmpxchg(&owner->exports, id, export, NULL, GFP_KERNEL) == export ? 0 : -ENOENT;
	if (result) {
		mutex_unlock(&export->lock);
	} else {
		forget(export);
		clear_deadline(export);
		export_put(export);
	}
	export_put(export);
	return result;
}

void sockmi_exports_end(struct sockmi_file *file)
{
	struct sockmi_export *export;
	unsigned long id;

	xa_for_each(&file->exports, id, export)
		sockmi_unclaim(file, id);
}

/* ---- ioctls ---- */

static struct file *claimed_file(s32 pid, s32 fd)
{
	struct file *file;

	if (!pid) {
		file = fget(fd);
		return file ?: ERR_PTR(-EBADF);
	}
	if (pid < 0)
		return ERR_PTR(-EINVAL);
	if (!capable(CAP_SYS_PTRACE) || !capable(CAP_NET_ADMIN))
		return ERR_PTR(-EPERM);
	return sockmi_file_of(pid, fd);
}

long sockmi_ioctl_claim(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_identity identity;
	struct sockmi_ioc_claim a;
	struct file *socket_file;
	unsigned int lifetime;
	struct sock *sk;
	s64 id;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	lifetime = a.lifetime_ms ?: sockmi_claim_max_ms;
	if (a.flags || lifetime > sockmi_claim_max_ms)
		return -EINVAL;
	a.id = 0;
	a.refusal = SOCKMI_REFUSAL_NONE;
	socket_file = claimed_file(a.pid, a.fd);
	if (IS_ERR(socket_file)) {
		a.refusal = PTR_ERR(socket_file) == -EBADF ? SOCKMI_REFUSAL_NO_SOCKET : SOCKMI_REFUSAL_NONE;
		trace_sockmi_claim(NULL, 0, 0, PTR_ERR(socket_file), a.refusal);
		return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: PTR_ERR(socket_file);
	}
	sk = sockmi_tcp_sock(socket_file, &a.refusal);
	if (!sk) {
		id = sockmi_refusal_errno(a.refusal);
		goto refused;
	}
	id = -EPERM;
	if (!sockmi_net_admin(sock_net(sk)))
		goto refused;
	/* May change until it is frozen: a preview. */
	sockmi_identify(sk, &identity);
	sockmi_dev_endpoint(&a.local, &identity.local);
	sockmi_dev_endpoint(&a.remote, &identity.remote);
	a.family = identity.family;
	a.kind = identity.kind;
	a.state = identity.state;
	a.owner_uid = from_kuid_munged(file->user_ns, sk->sk_uid);
	a.bytes = sockmi_dump_bound(sk);
	a.reserved = 0;
	id = sockmi_claim(file, socket_file, lifetime, &a.refusal);
	if (id > 0) {
		trace_sockmi_claim(sk, id, a.bytes, 0, SOCKMI_REFUSAL_NONE);
		a.id = id;
		result = sockmi_arg_out(arg, size, &a, sizeof(a));
		if (result)
			sockmi_unclaim(file, id);
		fput(socket_file);
		return result;
	}
refused:
	trace_sockmi_claim(sk, 0, a.bytes, id, a.refusal);
	fput(socket_file);
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: id;
}

/* Locks and dumps; @export->lock is held. */
static int freeze(struct sockmi_export *export, void *place, size_t room, unsigned int deadline_ms,
		  struct sockmi_ioc_freeze *a)
{
	struct sock *sk = export->sk;
	size_t needed = 0;
	ssize_t length;

	/* Meanwhile the caller does nothing else, and what it has frozen before waits. */
	length = sockmi_lock(sk, min(deadline_ms, LOCK_WAIT_MS));
	if (length) {
		a->refusal = length == -EBUSY ? SOCKMI_REFUSAL_LOCKED : SOCKMI_REFUSAL_NONE;
		trace_sockmi_freeze(sk, export->id, 0, length, a->refusal);
		return length;
	}
	export->frozen_at = ktime_get();
	a->refusal = sockmi_preflight(sk);
	if (a->refusal)
		length = sockmi_refusal_errno(a->refusal);
	else
		length = sockmi_dump(sk, place, room, &a->refusal, &needed);
	trace_sockmi_freeze(sk, export->id, length > 0 ? length : needed, length > 0 ? 0 : length, a->refusal);
	if (length <= 0) {
		release_sock(sk);
		a->bytes = needed;
		return length ?: -EINVAL;
	}
	sockmi_disown(sk);
	export->state = SOCKMI_EXPORT_FROZEN;
	export->timed_out = false;
	export->epoch++;
	set_deadline(export, msecs_to_jiffies(deadline_ms));
	a->epoch = export->epoch;
	a->bytes = length;
	return 0;
}

long sockmi_ioctl_freeze(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_export *export;
	struct sockmi_ioc_freeze a;
	unsigned int deadline_ms;
	size_t room = 0;
	void *place;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	deadline_ms = a.deadline_ms ?: sockmi_freeze_default_ms;
	if (a.flags || a.reserved || deadline_ms > sockmi_freeze_max_ms)
		return -EINVAL;
	if (!sockmi_may_hold(file))
		return -EPERM;
	export = export_get(file, a.id);
	if (!export) {
		trace_sockmi_freeze(NULL, a.id, 0, -ENOENT, 0);
		return -ENOENT;
	}
	a.refusal = SOCKMI_REFUSAL_NONE;
	a.bytes = 0;
	place = sockmi_slot_get(file, SOCKMI_SLOT_EXPORT, a.slot, &room);
	result = -ENXIO;
	if (!place)
		goto no_slot;
	mutex_lock(&export->lock);
	if (export->state == SOCKMI_EXPORT_CLAIMED || export->state == SOCKMI_EXPORT_THAWED) {
		result = freeze(export, place, room, deadline_ms, &a);
	} else {
		result = export->state ? -EBUSY : -ENOENT;
		trace_sockmi_freeze(export->sk, export->id, 0, result, 0);
	}
	mutex_unlock(&export->lock);
	sockmi_slot_put(file, SOCKMI_SLOT_EXPORT, a.slot);
no_slot:
	if (!place)
		trace_sockmi_freeze(NULL, a.id, 0, result, 0);
	export_put(export);
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: result;
}

/* 0 if @export is frozen, in this epoch. */
static int decidable(const struct sockmi_export *export, u32 epoch)
{
	if (!export->state)
		return -ENOENT;
	if (epoch != export->epoch)
		return -ESTALE;
	if (export->state == SOCKMI_EXPORT_THAWED && export->timed_out)
		return -ETIMEDOUT;
	return export->state == SOCKMI_EXPORT_FROZEN ? 0 : -EBUSY;
}

static void commit(struct sockmi_export *export)
{
	struct sock *sk = export->sk;
	bool connected = sk->sk_state != TCP_CLOSE && sk->sk_state != TCP_LISTEN;

	export->state = SOCKMI_EXPORT_COMMITTING;
	sockmi_adopt(sk);
	sockmi_close_silently(sk, ECONNABORTED);
	/* Like one whose connection was reset: there is no second life in it. */
	if (!connected)
		sk->sk_socket->state = SS_CONNECTED;
	release_sock(sk);
	export->frozen_us = ktime_us_delta(ktime_get(), export->frozen_at);
	export->state = SOCKMI_EXPORT_COMMITTED;
}

static void trace_decision(const struct sock *sk, u64 id, u64 frozen_us, int result, bool is_commit)
{
	if (is_commit)
		trace_sockmi_commit(sk, id, frozen_us, result, 0);
	else
		trace_sockmi_abort(sk, id, frozen_us, result, 0);
}

/* Claimed, and the caller's: what anybody else had is closed. A system call under way counts as a descriptor. */
#define REFERENCES_OF_NO_OWNER 2

/* Does a flag of COMMIT forbid it? */
static int forbidden(const struct sockmi_export *export, u32 flags)
{
	if (flags & SOCKMI_COMMIT_OWNED && file_count(export->claim->file) <= REFERENCES_OF_NO_OWNER)
		return -EBADF;
	if (flags & SOCKMI_COMMIT_SETTLED && export->sk->sk_state == TCP_LISTEN && inet_csk_reqsk_queue_len(export->sk))
		return -EAGAIN;
	return 0;
}

/* COMMIT or ABORT. */
static long decide(struct sockmi_file *file, void __user *arg, size_t size, bool is_commit)
{
	struct sockmi_ioc_decision a;
	struct sockmi_export *export;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags & ~(is_commit ? SOCKMI_COMMIT_OWNED | SOCKMI_COMMIT_SETTLED : 0))
		return -EINVAL;
	export = export_get(file, a.id);
	if (!export) {
		trace_decision(NULL, a.id, 0, -ENOENT, is_commit);
		return -ENOENT;
	}
	mutex_lock(&export->lock);
	result = decidable(export, a.epoch);
	if (!result)
		result = forbidden(export, a.flags);
	if (!result) {
		if (is_commit)
			commit(export);
		else
			thaw(export, false);
		set_deadline(export, life_left(export));
	}
	trace_decision(export->sk, export->id, export->frozen_us, result, is_commit);
	mutex_unlock(&export->lock);
	export_put(export);
	return result;
}

long sockmi_ioctl_commit(struct sockmi_file *file, void __user *arg, size_t size)
{
	return decide(file, arg, size, true);
}

long sockmi_ioctl_abort(struct sockmi_file *file, void __user *arg, size_t size)
{
	return decide(file, arg, size, false);
}

long sockmi_ioctl_release(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_ioc_decision a;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags)
		return -EINVAL;
	result = sockmi_unclaim(file, a.id);
	trace_sockmi_release(NULL, a.id, 0, result, 0);
	return result;
}

long sockmi_ioctl_export_info(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_ioc_export_info a;
	struct sockmi_export *export;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	export = export_get(file, a.id);
	if (!export)
		return -ENOENT;
	mutex_lock(&export->lock);
	a = (struct sockmi_ioc_export_info){
		.id = export->id,
		.state = export->state,
		.epoch = export->epoch,
		.timed_out = export->timed_out,
		.frozen_us = export->frozen_us,
		.left_ms = jiffies_to_msecs(life_left(export)),
	};
	if (export->state == SOCKMI_EXPORT_FROZEN) {
		unsigned long due = export->deadline.timer.expires;

		a.left_ms = time_before(jiffies, due) ? jiffies_to_msecs(due - jiffies) : 0;
		a.frozen_us = ktime_us_delta(ktime_get(), export->frozen_at);
	}
	mutex_unlock(&export->lock);
	export_put(export);
	return a.state ? sockmi_arg_out(arg, size, &a, sizeof(a)) : -ENOENT;
}
