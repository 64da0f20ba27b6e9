// SPDX-License-Identifier: GPL-2.0
/* RESTORE, ACTIVATE, DISCARD: copies that wait for the decision. */
#include <linux/file.h>
#include <linux/slab.h>

#include "internal.h"
#include "trace.h"

/**
 * struct sockmi_dormant - a restored socket whose lock is held
 * @file: of the socket, referenced
 * @sock: its socket
 * @blob: the image, as long as activation needs it
 * @id: in its device file
 */
struct sockmi_dormant {
	struct file *file;
	struct socket *sock;
	struct sockmi_blob *blob;
	u32 id;
};

static void dormant_free(struct sockmi_file *owner, struct sockmi_dormant *dormant)
{
	sockmi_blob_put(dormant->blob);
	fput(dormant->file);
	kfree(dormant);
	atomic_dec(&owner->exports_count);
}

static void discard(struct sockmi_dormant *dormant)
{
	struct sock *sk = dormant->sock->sk;

	sockmi_adopt(sk);
	trace_sockmi_discard(sk, dormant->id, 0, 0, 0);
	sockmi_close_silently(sk, 0);
	release_sock(sk);
}

void sockmi_dormants_end(struct sockmi_file *file)
{
	struct sockmi_dormant *dormant;
	unsigned long id;

	xa_for_each(&file->dormants, id, dormant) {
		xa_erase(&file->dormants, id);
		discard(dormant);
		dormant_free(file, dormant);
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
	if (IS_ERR(blob))
		return PTR_ERR(blob);
	memcpy(&local, &a->local, sizeof(local));
	result = sockmi_restore(dormant->sock, &blob->image, &local, a->flags, &a->refusal, &losses);
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
	int result = sockmi_activate(dormant->sock, dormant->blob ? &dormant->blob->image : NULL);

	trace_sockmi_activate(dormant->sock->sk, dormant->id, 0, result, 0);
	return result;
}

long sockmi_ioctl_restore(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_dormant *dormant;
	struct sockmi_ioc_restore a;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags & ~(SOCKMI_DEV_ACTIVATE | SOCKMI_DEV_TRANSPARENT | SOCKMI_DEV_RESET_PATH) || a.reserved ||
	    a.local.reserved)
		return -EINVAL;
	a.refusal = SOCKMI_REFUSAL_NONE;
	a.image_error = 0;
	a.id = 0;
	if (atomic_inc_return(&file->exports_count) > SOCKMI_EXPORTS_MAX) {
		atomic_dec(&file->exports_count);
		return -EMFILE;
	}
	dormant = kzalloc(sizeof(*dormant), GFP_KERNEL_ACCOUNT);
	if (!dormant) {
		atomic_dec(&file->exports_count);
		return -ENOMEM;
	}
	dormant->file = target_of(a.fd, &a.refusal);
	if (IS_ERR(dormant->file)) {
		result = PTR_ERR(dormant->file);
		kfree(dormant);
		atomic_dec(&file->exports_count);
		goto out;
	}
	dormant->sock = sock_from_file(dormant->file);
	result = -EPERM;
	if (!sockmi_net_admin(sock_net(dormant->sock->sk)))
		goto failed;
	/* A place for it first: nothing may fail after the restore. */
	result = xa_alloc_cyclic(&file->dormants, &dormant->id, NULL, xa_limit_32b, &file->next_id,
				 GFP_KERNEL_ACCOUNT);
	if (result < 0)
		goto failed;
	result = restore(file, dormant, &a);
	if (result) {
		xa_erase(&file->dormants, dormant->id);
		goto failed;
	}
	if (a.flags & SOCKMI_DEV_ACTIVATE) {
		xa_erase(&file->dormants, dormant->id);
		result = activate(dormant);
		dormant_free(file, dormant);
		goto out;
	}
	a.id = dormant->id;
	/* The caller must learn the id, or nobody could decide. */
	result = sockmi_arg_out(arg, size, &a, sizeof(a));
	if (result) {
		xa_erase(&file->dormants, dormant->id);
		discard(dormant);
		dormant_free(file, dormant);
		return result;
	}
	xa_store(&file->dormants, dormant->id, dormant, GFP_KERNEL);
	return 0;

failed:
	dormant_free(file, dormant);
out:
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: result;
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
	if (a.id > U32_MAX)
		return -ENOENT;
	dormant = xa_load(&file->dormants, a.id);
	/* A reserved place is NULL here, and stays. */
	if (!dormant || xa_cmpxchg(&file->dormants, a.id, dormant, NULL, GFP_KERNEL) != dormant)
		return -ENOENT;
	if (live)
		result = activate(dormant);
	else
		discard(dormant);
	dormant_free(file, dormant);
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
