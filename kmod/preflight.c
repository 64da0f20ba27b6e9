// SPDX-License-Identifier: GPL-2.0
/* What a socket is, whether it can be moved, and how its lock is kept across system calls. */
#include <linux/errqueue.h>
#include <linux/fdtable.h>
#include <linux/file.h>
#include <linux/pid.h>
#include <linux/sched/task.h>
#include <net/mptcp.h>

#include "internal.h"

/* ---- The file of another process's descriptor ---- */

struct wanted {
	int fd;
	struct file *found;
};

static int pick(const void *data, struct file *file, unsigned int fd)
{
	struct wanted *wanted = (struct wanted *)data;

	if (fd != wanted->fd)
		return fd > wanted->fd;
	wanted->found = get_file(file);
	return 1;
}

struct file *sockmi_file_of(pid_t pid, int fd)
{
	struct wanted wanted = { .fd = fd };
	struct task_struct *task;

	if (fd < 0)
		return ERR_PTR(-EBADF);
	rcu_read_lock();
	task = pid_task(find_vpid(pid), PIDTYPE_TGID);
	if (task)
		get_task_struct(task);
	rcu_read_unlock();
	if (!task)
		return ERR_PTR(-ESRCH);
	task_lock(task);
	if (task->files)
		iterate_fd(task->files, fd, pick, &wanted);
	task_unlock(task);
	put_task_struct(task);
	return wanted.found ?: ERR_PTR(-EBADF);
}

/* ---- May it be moved? ---- */

struct sock *sockmi_tcp_sock(struct file *file, u32 *refusal)
{
	struct socket *sock = sock_from_file(file);
	struct sock *sk;

	*refusal = SOCKMI_REFUSAL_NO_SOCKET;
	if (!sock || !sock->sk)
		return NULL;
	sk = sock->sk;
	*refusal = sk->sk_protocol == IPPROTO_MPTCP ? SOCKMI_REFUSAL_MPTCP : SOCKMI_REFUSAL_NOT_TCP;
	if ((sk->sk_family != AF_INET && sk->sk_family != AF_INET6) || sk->sk_type != SOCK_STREAM ||
	    sk->sk_protocol != IPPROTO_TCP)
		return NULL;
	*refusal = SOCKMI_REFUSAL_NONE;
	return sk;
}

/* One of its own (IP_XFRM_POLICY): what is to be encrypted must not go out in the clear elsewhere. */
static bool has_ipsec_policy(const struct sock *sk)
{
#ifdef CONFIG_XFRM
	return rcu_access_pointer(sk->sk_policy[0]) || rcu_access_pointer(sk->sk_policy[1]);
#else
	return false;
#endif
}

u32 sockmi_layers(const struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);

	if (sk_is_mptcp(sk))
		return SOCKMI_REFUSAL_MPTCP;
	if (inet_csk(sk)->icsk_ulp_ops)
		return SOCKMI_REFUSAL_ULP;
	if (sk->sk_user_data)
		return SOCKMI_REFUSAL_USER_DATA;
	if (tp->repair)
		return SOCKMI_REFUSAL_REPAIR;
	if (sockmi_authenticated(tp))
		return SOCKMI_REFUSAL_AUTHENTICATED;
	if (has_ipsec_policy(sk))
		return SOCKMI_REFUSAL_IPSEC;
	return SOCKMI_REFUSAL_NONE;
}

/* Completions of MSG_ZEROCOPY that its owner has not read: the copy's owner would wait for them. */
static bool has_completions(struct sock *sk)
{
	struct sk_buff_head *queue = &sk->sk_error_queue;
	struct sk_buff *skb;
	unsigned long flags;
	bool has = false;

	spin_lock_irqsave(&queue->lock, flags);
	skb_queue_walk(queue, skb)
		has |= SKB_EXT_ERR(skb)->ee.ee_origin == SO_EE_ORIGIN_ZEROCOPY;
	spin_unlock_irqrestore(&queue->lock, flags);
	return has;
}

u32 sockmi_preflight(struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);
	u32 refusal = sockmi_layers(sk);

	if (refusal)
		return refusal;
	switch (sk->sk_state) {
	case TCP_LISTEN:
		return SOCKMI_REFUSAL_NONE;
	case TCP_CLOSE:
		/* One that was connected, and is dead, has nothing that could be moved. */
		return inet_sk(sk)->inet_dport || !skb_queue_empty(&sk->sk_receive_queue) || sk->sk_err ?
			       SOCKMI_REFUSAL_STATE : SOCKMI_REFUSAL_NONE;
	case TCP_SYN_SENT:
	case TCP_ESTABLISHED:
	case TCP_FIN_WAIT1:
	case TCP_FIN_WAIT2:
	case TCP_CLOSE_WAIT:
	case TCP_LAST_ACK:
	case TCP_CLOSING:
		break;
	default:
		return SOCKMI_REFUSAL_STATE;
	}
	if (rcu_access_pointer(tp->fastopen_rsk) || tp->fastopen_req || sockmi_defer_connect(sk))
		return SOCKMI_REFUSAL_FASTOPEN;
	if (sk->sk_state == TCP_SYN_SENT && (tp->syn_data || tp->syn_fastopen))
		return SOCKMI_REFUSAL_FASTOPEN;
	if (sockmi_accecn(tp))
		return SOCKMI_REFUSAL_ACCECN;
	if (has_completions(sk))
		return SOCKMI_REFUSAL_ZEROCOPY;
	return SOCKMI_REFUSAL_NONE;
}

int sockmi_refusal_errno(u32 refusal)
{
	switch (refusal) {
	case SOCKMI_REFUSAL_NONE:
		return 0;
	case SOCKMI_REFUSAL_NO_SOCKET:
		return -ENOTSOCK;
	case SOCKMI_REFUSAL_BUSY:
	case SOCKMI_REFUSAL_LOCKED:
		return -EBUSY;
	case SOCKMI_REFUSAL_TOO_LARGE:
	case SOCKMI_REFUSAL_LIST_FULL:
		return -ENOSPC;
	case SOCKMI_REFUSAL_IMAGE:
		return -EBADMSG;
	case SOCKMI_REFUSAL_FAMILY:
		return -EAFNOSUPPORT;
	case SOCKMI_REFUSAL_TARGET:
		return -EISCONN;
	case SOCKMI_REFUSAL_ADDRESS:
		return -EADDRNOTAVAIL;
	case SOCKMI_REFUSAL_PORT_TAKEN:
	case SOCKMI_REFUSAL_TUPLE_TAKEN:
		return -EADDRINUSE;
	case SOCKMI_REFUSAL_MEMORY:
		return -ENOMEM;
	case SOCKMI_REFUSAL_NAMESPACE:
		return -EXDEV;
	case SOCKMI_REFUSAL_NO_LISTENER:
		return -ECONNREFUSED;
	case SOCKMI_REFUSAL_OWNER:
		return -EACCES;
	case SOCKMI_REFUSAL_ACCEPT_QUEUE:
		return -EAGAIN;
	default:
		return -EOPNOTSUPP;
	}
}

/* ---- Name ---- */

static void endpoint4(struct sockmi_endpoint *to, __be32 address, __be16 port)
{
	memset(to, 0, sizeof(*to));
	if (!address && !port)
		return;
	to->address[10] = 0xff;
	to->address[11] = 0xff;
	memcpy(to->address + 12, &address, 4);
	to->port = ntohs(port);
}

static void endpoint6(struct sockmi_endpoint *to, const struct sock *sk, const struct in6_addr *address, __be16 port)
{
	memset(to, 0, sizeof(*to));
	memcpy(to->address, address, 16);
	to->port = ntohs(port);
	if (!ipv6_addr_v4mapped(address))
		to->scope_id = ipv6_iface_scope_id(address, sk->sk_bound_dev_if);
}

static u8 kind_of(const struct sock *sk, const struct sockmi_identity *identity)
{
	static const struct sockmi_endpoint none;

	if (sk->sk_state == TCP_LISTEN)
		return SOCKMI_KIND_LISTENING;
	if (sk->sk_state != TCP_CLOSE)
		return SOCKMI_KIND_CONNECTED;
	return memcmp(&identity->local, &none, sizeof(none)) ? SOCKMI_KIND_BOUND : SOCKMI_KIND_UNCONNECTED;
}

void sockmi_identify(const struct sock *sk, struct sockmi_identity *identity)
{
	const struct inet_sock *inet = inet_sk(sk);

	memset(identity, 0, sizeof(*identity));
	identity->family = sk->sk_family;
	identity->state = sk->sk_state;
	if (sk->sk_userlocks & SOCK_BINDADDR_LOCK)
		identity->bind_locks |= SOCKMI_BIND_ADDRESS;
	if (sk->sk_userlocks & SOCK_BINDPORT_LOCK)
		identity->bind_locks |= SOCKMI_BIND_PORT;
	identity->owner_uid = from_kuid_munged(&init_user_ns, sk->sk_uid);
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6) {
		const struct in6_addr *local = &sk->sk_v6_rcv_saddr;

		if (ipv6_addr_any(local))
			local = &inet6_sk(sk)->saddr;
		endpoint6(&identity->local, sk, local, inet->inet_sport);
		if (sk->sk_state != TCP_CLOSE && sk->sk_state != TCP_LISTEN)
			endpoint6(&identity->remote, sk, &sk->sk_v6_daddr, inet->inet_dport);
		identity->v6only = ipv6_only_sock(sk) && !ipv6_addr_v4mapped(local);
	} else
#endif
	{
		endpoint4(&identity->local, inet->inet_rcv_saddr ?: inet->inet_saddr, inet->inet_sport);
		if (sk->sk_state != TCP_CLOSE && sk->sk_state != TCP_LISTEN)
			endpoint4(&identity->remote, inet->inet_daddr, inet->inet_dport);
	}
	identity->kind = kind_of(sk, identity);
}

void sockmi_dev_endpoint(struct sockmi_dev_endpoint *to, const struct sockmi_endpoint *from)
{
	BUILD_BUG_ON(sizeof(*to) != sizeof(*from));
	memcpy(to, from, sizeof(*to));
}

/* ---- The lock ---- */

static bool try_lock(struct sock *sk)
{
	bool free;

	spin_lock_bh(&sk->sk_lock.slock);
	free = !sk->sk_lock.owned;
	if (free)
		sk->sk_lock.owned = 1;
	spin_unlock_bh(&sk->sk_lock.slock);
	return free;
}

int sockmi_lock(struct sock *sk, unsigned int timeout_ms)
{
	long left;

	mutex_acquire(&sk->sk_lock.dep_map, 0, 0, _RET_IP_);
	left = wait_event_killable_timeout(sk->sk_lock.wq, try_lock(sk), msecs_to_jiffies(timeout_ms));
	if (left > 0)
		return 0;
	mutex_release(&sk->sk_lock.dep_map, _RET_IP_);
	return left ? -EINTR : -EBUSY;
}

/* lockdep follows tasks; a lock that outlives a system call is nobody's in between. */
void sockmi_adopt(struct sock *sk)
{
	mutex_acquire(&sk->sk_lock.dep_map, 0, 1, _RET_IP_);
}

void sockmi_disown(struct sock *sk)
{
	mutex_release(&sk->sk_lock.dep_map, _RET_IP_);
}

void sockmi_let_go(struct sock *sk)
{
	sockmi_adopt(sk);
	release_sock(sk);
}
