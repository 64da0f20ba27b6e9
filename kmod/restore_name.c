// SPDX-License-Identifier: GPL-2.0
/* The name of a restored socket: bound as bind() does it, but to a port in use if need be; connected without a packet. */
#include <linux/net.h>
#include <net/addrconf.h>
#include <net/inet_hashtables.h>
#include <net/transp_v6.h>

#include "restore.h"

static bool may_be_foreign(const struct restore *r)
{
	return r->flags & SOCKMI_DEV_TRANSPARENT || sockmi_inet_flag(r->sk, transparent, TRANSPARENT) ||
	       sockmi_inet_flag(r->sk, freebind, FREEBIND);
}

static int name4(struct restore *r, __be32 address)
{
	struct inet_sock *inet = inet_sk(r->sk);

	if (address && !may_be_foreign(r) && inet_addr_type(sock_net(r->sk), address) != RTN_LOCAL)
		return refuse(r, SOCKMI_REFUSAL_ADDRESS);
	inet->inet_rcv_saddr = address;
	inet->inet_saddr = address;
	return 0;
}

#if IS_ENABLED(CONFIG_IPV6)
static int name6(struct restore *r)
{
	const struct in6_addr *address = (const struct in6_addr *)r->local.address;
	struct ipv6_pinfo *np = inet6_sk(r->sk);
	int type = ipv6_addr_type(address), result = 0;

	if (type == IPV6_ADDR_MAPPED) {
		if (r->id->v6only)
			return refuse(r, SOCKMI_REFUSAL_ADDRESS);
		result = name4(r, address4(&r->local));
	} else if (type != IPV6_ADDR_ANY) {
		if (type & IPV6_ADDR_MULTICAST)
			return refuse(r, SOCKMI_REFUSAL_ADDRESS);
		if (type & IPV6_ADDR_LINKLOCAL) {
			if (r->local.scope_id)
				r->sk->sk_bound_dev_if = r->local.scope_id;
			if (!r->sk->sk_bound_dev_if)
				return refuse(r, SOCKMI_REFUSAL_ADDRESS);
		}
		if (!may_be_foreign(r)) {
			struct net_device *dev = NULL;
			bool ours;

			rcu_read_lock();
			if (r->sk->sk_bound_dev_if)
				dev = dev_get_by_index_rcu(sock_net(r->sk), r->sk->sk_bound_dev_if);
			ours = (dev || !r->sk->sk_bound_dev_if) &&
			       ipv6_chk_addr(sock_net(r->sk), address, dev, 0);
			rcu_read_unlock();
			if (!ours)
				return refuse(r, SOCKMI_REFUSAL_ADDRESS);
		}
		inet_sk(r->sk)->inet_rcv_saddr = LOOPBACK4_IPV6;
		inet_sk(r->sk)->inet_saddr = LOOPBACK4_IPV6;
	}
	if (result)
		return result;
	r->sk->sk_v6_rcv_saddr = *address;
	np->saddr = *address;
	return 0;
}
#endif

/* The address, and the port as bind() takes it. */
int sockmi_restore_bind(struct restore *r)
{
	struct inet_sock *inet = inet_sk(r->sk);
	int result;

#if IS_ENABLED(CONFIG_IPV6)
	if (r->sk->sk_family == AF_INET6) {
		r->sk->sk_ipv6only = r->id->v6only;
		result = name6(r);
	} else
#endif
		result = name4(r, address4(&r->local));
	if (result)
		return result;
	if (r->local.port && r->sk->sk_prot->get_port(r->sk, r->local.port))
		return refuse(r, SOCKMI_REFUSAL_PORT_TAKEN);
	if (r->id->bind_locks & SOCKMI_BIND_ADDRESS)
		r->sk->sk_userlocks |= SOCK_BINDADDR_LOCK;
	if (r->id->bind_locks & SOCKMI_BIND_PORT || r->id->kind != SOCKMI_KIND_CONNECTED)
		r->sk->sk_userlocks |= r->local.port ? SOCK_BINDPORT_LOCK : 0;
	inet->inet_sport = htons(inet->inet_num);
	inet->inet_dport = 0;
	inet->inet_daddr = 0;
	return 0;
}

int sockmi_restore_connect(struct restore *r)
{
	const struct sockmi_endpoint *remote = &r->id->remote;
	union {
		struct sockaddr any;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	} a = {};
	int length, result;

	if (r->sk->sk_family == AF_INET) {
		a.v4.sin_family = AF_INET;
		a.v4.sin_port = htons(remote->port);
		a.v4.sin_addr.s_addr = address4(remote);
		length = sizeof(a.v4);
	} else {
		a.v6.sin6_family = AF_INET6;
		a.v6.sin6_port = htons(remote->port);
		memcpy(&a.v6.sin6_addr, remote->address, 16);
		a.v6.sin6_scope_id = r->sk->sk_bound_dev_if ?: remote->scope_id;
		length = sizeof(a.v6);
	}
	result = r->sk->sk_prot->connect(r->sk, (struct sockmi_sockaddr *)&a, length);
	if (!result) {
		int state = r->id->state == SOCKMI_SYN_SENT ? TCP_SYN_SENT : TCP_ESTABLISHED;

		return r->sk->sk_state == state ? 0 : refuse(r, SOCKMI_REFUSAL_STATE);
	}
	if (result == -EADDRNOTAVAIL || result == -EADDRINUSE)
		return refuse(r, SOCKMI_REFUSAL_TUPLE_TAKEN);
	if (result == -ENOMEM || result == -ENOBUFS)
		return refuse(r, SOCKMI_REFUSAL_MEMORY);
	return refuse(r, SOCKMI_REFUSAL_ADDRESS);
}
