// SPDX-License-Identifier: GPL-2.0
/* Who has a socket: one export or one dormant copy, never two, for each holds its lock across system calls. */
#include <linux/file.h>
#include <linux/hashtable.h>
#include <linux/sched.h>
#include <linux/slab.h>

#include "internal.h"

static DEFINE_HASHTABLE(claims, 10);
static DEFINE_SPINLOCK(claims_lock); /* guards the table; innermost */
static struct workqueue_struct *put_queue;

/*
 * Like an exiting process we do not wait as SO_LINGER would have it: whoever asked for that has closed the socket
 * long ago. An abortive SO_LINGER of zero is still one.
 */
static void put_file(struct work_struct *work)
{
	struct sockmi_claim *claim = container_of(work, struct sockmi_claim, put);

	current->flags |= PF_EXITING;
	__fput_sync(claim->file);
	current->flags &= ~PF_EXITING;
	kfree(claim);
}

struct sockmi_claim *sockmi_claim_get(struct file *file)
{
	struct sock *sk = sock_from_file(file)->sk;
	struct sockmi_claim *claim, *other;

	claim = kzalloc(sizeof(*claim), GFP_KERNEL_ACCOUNT);
	if (!claim)
		return ERR_PTR(-ENOMEM);
	INIT_WORK(&claim->put, put_file);
	claim->sk = sk;
	claim->file = get_file(file);
	spin_lock(&claims_lock);
	hash_for_each_possible(claims, other, node, (unsigned long)sk)
		if (other->sk == sk)
			goto taken;
	hash_add(claims, &claim->node, (unsigned long)sk);
	spin_unlock(&claims_lock);
	return claim;

taken:
	spin_unlock(&claims_lock);
	fput(claim->file);
	kfree(claim);
	return ERR_PTR(-EBUSY);
}

void sockmi_claim_put(struct sockmi_claim *claim)
{
	spin_lock(&claims_lock);
	hash_del(&claim->node);
	spin_unlock(&claims_lock);
	/*
	 * A worker's fput() would be left to the one that the whole kernel shares, and closing a socket can take
	 * as long as somebody likes. Neither deadlines nor who gives up a claim must wait for it: hence a queue of its own.
	 */
	if (current->flags & PF_KTHREAD || sock_flag(claim->sk, SOCK_LINGER)) {
		queue_work(put_queue, &claim->put);
	} else {
		fput(claim->file);
		kfree(claim);
	}
}

int sockmi_claims_init(void)
{
	put_queue = alloc_workqueue("sockmi_put", WQ_UNBOUND, 0);
	return put_queue ? 0 : -ENOMEM;
}

void sockmi_claims_exit(void)
{
	destroy_workqueue(put_queue);
}
