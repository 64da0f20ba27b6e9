// SPDX-License-Identifier: GPL-2.0
/*
 * DELIVER: a connection into the accept queue of a program that knows nothing of this module.
 *
 * A faked handshake would do too, but it makes packets that must be caught, and a child that lives before it is
 * restored. Instead, the socket is restored as any other, out of everybody's sight, and then put where the kernel
 * puts a child whose handshake is over: behind a request, in the listener's queue. Requests are allocated from
 * their protocol's own cache, because whoever accepts the socket frees them.
 *
 * What can fail comes before the listener is locked. With its lock held nobody can accept, close or
 * shut it; so once there is room, nothing stands in the way, and only then may the connection live.
 */
#include <linux/cgroup.h>
#include <linux/net.h>
#include <linux/security.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <linux/workqueue.h>
#include <net/request_sock.h>

#include "internal.h"
#include "trace.h"

#define LISTENER_LOCK_MS 20 /* a program that accepts has it for microseconds */

/**
 * struct delivery - one call
 * @net: where it happens
 * @a: the caller's argument
 * @local: as the child will have it
 * @remote: the peer
 * @uid: the listener's owner must be this one
 * @listener: referenced, or NULL
 * @listener_port: on which it listened when it was found
 * @listener_address: where, likewise
 * @child: restored into; its sock leaves it in the end
 * @request: carries the child through the queue
 */
struct delivery {
	struct net *net;
	struct sockmi_ioc_deliver *a;
	struct sockmi_endpoint local;
	struct sockmi_endpoint remote;
	kuid_t uid;
	struct sock *listener;
	u16 listener_port;
	struct in6_addr listener_address;
	struct socket *child;
	struct request_sock *request;
};

static int refuse(struct delivery *d, u32 refusal)
{
	d->a->refusal = refusal;
	return sockmi_refusal_errno(refusal);
}

static __be32 address4(const struct sockmi_endpoint *e)
{
	__be32 address;

	memcpy(&address, e->address + 12, sizeof(address));
	return address;
}

/* ---- Listener ---- */

static struct sock *look_up(const struct delivery *d)
{
	const struct in6_addr *local = (const struct in6_addr *)d->local.address;
	const struct in6_addr *remote = (const struct in6_addr *)d->remote.address;
	int dif = d->a->ifindex ?: d->local.scope_id;

	if (ipv6_addr_v4mapped(local))
		return sockmi_listener4(d->net, address4(&d->remote), htons(d->remote.port), address4(&d->local),
					d->local.port, dif);
#if IS_ENABLED(CONFIG_IPV6)
	return sockmi_listener6(d->net, remote, htons(d->remote.port), local, d->local.port, dif);
#else
	return NULL;
#endif
}

/* Children of a listener with these have something that a restored socket has not. */
static bool children_are_special(const struct sock *sk)
{
	return sockmi_layers(sk) || rcu_access_pointer(sk->sk_filter);
}

static struct in6_addr bound_address(const struct sock *sk)
{
	struct in6_addr address = IN6ADDR_ANY_INIT;

#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6)
		return sk->sk_v6_rcv_saddr;
#endif
	ipv6_addr_set_v4mapped(sk->sk_rcv_saddr, &address);
	return address;
}

/* It may have been disconnected and listen elsewhere. Where is not asked: BPF programs may have chosen it for any port. */
static bool is_where_it_was(const struct delivery *d)
{
	struct in6_addr address = bound_address(d->listener);

	return inet_sk(d->listener)->inet_num == d->listener_port && ipv6_addr_equal(&address, &d->listener_address);
}

/* May it have one more? Final if the listener's lock is held. */
static int check_listener(struct delivery *d)
{
	const struct sock *sk = d->listener;

	d->a->queued = READ_ONCE(sk->sk_ack_backlog);
	d->a->queue_max = READ_ONCE(sk->sk_max_ack_backlog);
	if (sk->sk_state != TCP_LISTEN || !is_where_it_was(d))
		return refuse(d, SOCKMI_REFUSAL_NO_LISTENER);
	if (children_are_special(sk))
		return refuse(d, SOCKMI_REFUSAL_LISTENER);
	if (!(d->a->flags & SOCKMI_DELIVER_ANY_UID) && !uid_eq(READ_ONCE(sk->sk_uid), d->uid))
		return refuse(d, SOCKMI_REFUSAL_OWNER);
	return sk_acceptq_is_full(sk) ? refuse(d, SOCKMI_REFUSAL_ACCEPT_QUEUE) : 0;
}

static int find_listener(struct delivery *d)
{
	struct sock *sk;

	/* As in the softirq that a SYN would be handled in: BPF programs may have a say. */
	local_bh_disable();
	rcu_read_lock();
	sk = look_up(d);
	if (sk && !refcount_inc_not_zero(&sk->sk_refcnt))
		sk = NULL;
	rcu_read_unlock();
	local_bh_enable();
	if (!sk)
		return refuse(d, SOCKMI_REFUSAL_NO_LISTENER);
	d->listener = sk;
	d->listener_port = inet_sk(sk)->inet_num;
	d->listener_address = bound_address(sk);
	d->a->listener_family = sk->sk_family;
	d->a->listener_uid = from_kuid_munged(current_user_ns(), READ_ONCE(sk->sk_uid));
	return check_listener(d);
}

/* ---- Child ---- */

struct birth {
	struct work_struct work;
	struct net *net;
	int family;
	struct socket *sock;
	int result;
};

static void give_birth(struct work_struct *work)
{
	struct birth *b = container_of(work, struct birth, work);

	b->result = __sock_create(b->net, b->family, SOCK_STREAM, IPPROTO_TCP, &b->sock, 0);
}

/*
 * A child belongs to no memory cgroup until it is accepted; accept() would forget to leave that of a
 * socket which is made here. In a worker there is none to belong to.
 */
static int make_child(struct delivery *d)
{
	struct birth b = { .net = d->net, .family = d->listener->sk_family };

	INIT_WORK_ONSTACK(&b.work, give_birth);
	queue_work(sockmi_slow, &b.work);
	flush_work(&b.work);
	destroy_work_on_stack(&b.work);
	if (b.result == -ENOMEM || b.result == -ENOBUFS || b.result == -ENFILE)
		return refuse(d, SOCKMI_REFUSAL_MEMORY);
	d->child = b.sock;
	return b.result;
}

static void inherit_cgroup(struct sock *child, const struct sock *listener)
{
#ifdef CONFIG_SOCK_CGROUP_DATA
	struct cgroup *before = sock_cgroup_ptr(&child->sk_cgrp_data);

	child->sk_cgrp_data = listener->sk_cgrp_data;
	cgroup_get(sock_cgroup_ptr(&child->sk_cgrp_data));
	cgroup_bpf_get(sock_cgroup_ptr(&child->sk_cgrp_data));
	cgroup_bpf_put(before);
	cgroup_put(before);
#endif
}

/* What the image does not say, or must not. */
static void inherit(struct sock *child, const struct sock *listener)
{
	WRITE_ONCE(child->sk_uid, READ_ONCE(listener->sk_uid));
	WRITE_ONCE(child->sk_mark, READ_ONCE(listener->sk_mark));
	WRITE_ONCE(child->sk_priority, READ_ONCE(listener->sk_priority));
	child->sk_bound_dev_if = READ_ONCE(listener->sk_bound_dev_if);
	if (sockmi_inet_flag(listener, transparent, TRANSPARENT))
		sockmi_inet_set(child, transparent, TRANSPARENT, 1);
	if (sockmi_inet_flag(listener, freebind, FREEBIND))
		sockmi_inet_set(child, freebind, FREEBIND, 1);
	inherit_cgroup(child, listener);
	security_sk_clone(listener, child);
}

/* ---- Request ---- */

/*
 * As the kernel makes one, but it is in no table of connections: its tuple stays zero. The cache's objects may
 * still be looked at by those who found them in an earlier life, so the links in their common part are not touched and
 * the reference count comes last.
 */
static int make_request(struct delivery *d)
{
	const struct request_sock_ops *ops = d->listener->sk_prot->rsk_prot;
	const size_t common = sizeof(struct sock_common);
	struct request_sock *request = kmem_cache_alloc(ops->slab, GFP_KERNEL | __GFP_NOWARN);
	struct inet_request_sock *inet;

	if (!request)
		return refuse(d, SOCKMI_REFUSAL_MEMORY);
	memset((u8 *)request + common, 0, ops->obj_size - common);
	inet = inet_rsk(request);
	sock_hold(d->listener);
	request->rsk_listener = d->listener;
	request->rsk_ops = ops;
	req_to_sk(request)->sk_prot = d->listener->sk_prot;
	sk_node_init(&req_to_sk(request)->sk_node);
	sk_tx_queue_clear(req_to_sk(request));
	write_pnet(&inet->ireq_net, d->net);
	inet->ireq_family = d->listener->sk_family;
	inet->ireq_state = TCP_NEW_SYN_RECV;
	inet->ir_iif = d->listener->sk_bound_dev_if;
	inet->ir_num = 0;
	inet->ir_rmt_port = 0;
	inet->ir_loc_addr = 0;
	inet->ir_rmt_addr = 0;
	refcount_set(&request->rsk_refcnt, 1);
	d->request = request;
	return 0;
}

static void free_request(struct delivery *d)
{
	if (!d->request)
		return;
	refcount_set(&d->request->rsk_refcnt, 0);
	kmem_cache_free(d->request->rsk_ops->slab, d->request);
	sock_put(d->listener);
}

/* ---- Queue ---- */

static void append(struct sock *listener, struct request_sock *request, struct sock *child)
{
	struct request_sock_queue *queue = &inet_csk(listener)->icsk_accept_queue;

	spin_lock_bh(&queue->rskq_lock);
	request->sk = child;
	request->dl_next = NULL;
	if (queue->rskq_accept_head)
		queue->rskq_accept_tail->dl_next = request;
	else
		WRITE_ONCE(queue->rskq_accept_head, request);
	queue->rskq_accept_tail = request;
	sk_acceptq_added(listener);
	spin_unlock_bh(&queue->rskq_lock);
}

/* A child has no struct socket until accept() grafts it on one. */
static void detach(struct sock *sk)
{
	write_lock_bh(&sk->sk_callback_lock);
	sk_set_socket(sk, NULL);
	RCU_INIT_POINTER(sk->sk_wq, NULL);
	write_unlock_bh(&sk->sk_callback_lock);
}

/* The inverse of restore(). */
static void close_child(struct sock *child)
{
	sockmi_adopt(child);
	sockmi_close_silently(child, 0);
	release_sock(child);
}

/* The child's lock is held; afterwards it is not, and the child is the queue's or closed. */
static int enqueue(struct delivery *d)
{
	struct sock *listener = d->listener, *child = d->child->sk;
	int result;

	/* Its owner may hold it for as long as he likes, in a system call that waits for his memory. */
	result = sockmi_lock(listener, LISTENER_LOCK_MS);
	if (result) {
		if (result == -EBUSY)
			d->a->refusal = SOCKMI_REFUSAL_LOCKED;
		close_child(child);
		return result;
	}
	result = check_listener(d);
	if (result) {
		close_child(child);
		goto unlock;
	}
	child->sk_reuse = listener->sk_reuse;
	child->sk_reuseport = listener->sk_reuseport;
	detach(child);
	d->child->sk = NULL;
	sockmi_activate_sock(child);
	append(listener, d->request, child);
	d->request = NULL;
	d->a->queued = READ_ONCE(listener->sk_ack_backlog);
	listener->sk_data_ready(listener);
unlock:
	release_sock(listener);
	return result;
}

static int restore(struct delivery *d, struct sockmi_image *image)
{
	struct sockmi_losses losses;
	int result;

	image->identity.family = d->listener->sk_family;
	image->identity.v6only = 0;
	inherit(d->child->sk, d->listener);
	result = sockmi_restore(d->child, image, &d->local, d->a->restore_flags | SOCKMI_RESTORE_CHILD,
				&d->a->refusal, &losses, NULL);
	d->a->approximated = losses.approximated;
	d->a->reset = losses.reset;
	d->a->lost = losses.lost;
	memcpy(d->a->lost_options, losses.lost_options, sizeof(d->a->lost_options));
	return result;
}

static int deliver(struct delivery *d, struct sockmi_blob *blob)
{
	static const struct sockmi_endpoint none;
	const struct sockmi_identity *id = &blob->image.identity;
	int result;

	if (id->kind != SOCKMI_KIND_CONNECTED || (id->state != SOCKMI_ESTABLISHED && id->state != SOCKMI_CLOSE_WAIT))
		return refuse(d, SOCKMI_REFUSAL_STATE);
	if (!memcmp(&d->local, &none, sizeof(none)))
		d->local = id->local;
	d->remote = id->remote;
	sockmi_dev_endpoint(&d->a->remote, &d->remote);
	result = find_listener(d);
	if (!result)
		result = make_child(d);
	if (!result)
		result = make_request(d);
	if (!result)
		result = restore(d, &blob->image);
	if (!result)
		result = enqueue(d);
	trace_sockmi_deliver(d->listener, d->a->queued, blob->bytes, result, d->a->refusal);
	free_request(d);
	if (d->child)
		sock_release(d->child);
	return result;
}

static int check_argument(const struct sockmi_ioc_deliver *a)
{
	if (a->flags & ~(SOCKMI_DELIVER_ANY_UID | SOCKMI_DELIVER_PROBE) ||
	    a->restore_flags & ~(SOCKMI_DEV_TRANSPARENT | SOCKMI_DEV_RESET_PATH) ||
	    a->local.reserved || a->reserved || a->reserved2 || a->ifindex > S32_MAX)
		return -EINVAL;
	return a->flags & SOCKMI_DELIVER_PROBE && a->remote.reserved ? -EINVAL : 0;
}

long sockmi_ioctl_deliver(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_ioc_deliver a;
	struct delivery d = { .net = file->net, .a = &a };
	struct sockmi_blob *blob;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (!result)
		result = check_argument(&a);
	if (result)
		return result;
	d.uid = make_kuid(current_user_ns(), a.uid);
	if (!(a.flags & SOCKMI_DELIVER_ANY_UID) && !uid_valid(d.uid))
		return -EINVAL;
	if (!sockmi_net_admin(file->net))
		return -EPERM;
	a.refusal = SOCKMI_REFUSAL_NONE;
	a.image_error = 0;
	a.lost = 0;
	a.approximated = 0;
	a.reset = 0;
	memset(a.lost_options, 0, sizeof(a.lost_options));
	a.listener_uid = 0;
	a.listener_family = 0;
	a.queued = 0;
	a.queue_max = 0;
	memcpy(&d.local, &a.local, sizeof(d.local));
	memcpy(&d.remote, &a.remote, sizeof(d.remote));
	if (a.flags & SOCKMI_DELIVER_PROBE) {
		result = find_listener(&d);
	} else {
		blob = sockmi_blob_get(file, a.slot, a.image, a.bytes, &a.refusal, &a.image_error);
		result = PTR_ERR_OR_ZERO(blob);
		if (!result) {
			result = deliver(&d, blob);
			sockmi_blob_put(blob);
		}
	}
	if (d.listener)
		sock_put(d.listener);
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: result;
}
