// SPDX-License-Identifier: GPL-2.0
/*
 * Options that hardly any program sets: what they are now is read from the socket, whose lock may be held; they are set
 * by setsockopt(), which checks the values and the caller's capabilities. Those that it cannot give to a copy are named
 * in the image's fidelity report, if they are set.
 */
#include <linux/ipv6.h>
#include <linux/net_tstamp.h>
#include <net/ipv6.h>

#include "options.h"

#define SECOND ((s64)USEC_PER_SEC)

static const struct sockmi_plain rare[] = {
	{ SOCKMI_OPT_DEBUG, SOL_SOCKET, SO_DEBUG },
	{ SOCKMI_OPT_NO_CHECK, SOL_SOCKET, SO_NO_CHECK },
	{ SOCKMI_OPT_TIMESTAMP, SOL_SOCKET, SO_TIMESTAMP_OLD },
	{ SOCKMI_OPT_TIMESTAMPNS, SOL_SOCKET, SO_TIMESTAMPNS_OLD },
	{ SOCKMI_OPT_TIMESTAMPING, SOL_SOCKET, SO_TIMESTAMPING_OLD },
	{ SOCKMI_OPT_TIMESTAMP_NEW, SOL_SOCKET, SO_TIMESTAMP_NEW },
	{ SOCKMI_OPT_TIMESTAMPNS_NEW, SOL_SOCKET, SO_TIMESTAMPNS_NEW },
	{ SOCKMI_OPT_TIMESTAMPING_NEW, SOL_SOCKET, SO_TIMESTAMPING_NEW },
	{ SOCKMI_OPT_RXQ_OVFL, SOL_SOCKET, SO_RXQ_OVFL },
	{ SOCKMI_OPT_WIFI_STATUS, SOL_SOCKET, SO_WIFI_STATUS },
	{ SOCKMI_OPT_NOFCS, SOL_SOCKET, SO_NOFCS },
	{ SOCKMI_OPT_SELECT_ERR_QUEUE, SOL_SOCKET, SO_SELECT_ERR_QUEUE },
	{ SOCKMI_OPT_BUSY_POLL_US, SOL_SOCKET, SO_BUSY_POLL, 1 },
	{ SOCKMI_OPT_PREFER_BUSY_POLL, SOL_SOCKET, SO_PREFER_BUSY_POLL },
	{ SOCKMI_OPT_BUSY_POLL_BUDGET, SOL_SOCKET, SO_BUSY_POLL_BUDGET, 0, 8 },
	{ SOCKMI_OPT_TXREHASH, SOL_SOCKET, SO_TXREHASH, 0, 1 },
	{ SOCKMI_OPT_RCVMARK, SOL_SOCKET, SO_RCVMARK },
	{ SOCKMI_OPT_RCVPRIORITY, SOL_SOCKET, SOCKMI_SO_RCVPRIORITY },
	{ SOCKMI_OPT_INCOMING_CPU, SOL_SOCKET, SO_INCOMING_CPU, 0, -1 },
	{ SOCKMI_OPT_FASTOPEN_CONNECT, SOL_TCP, TCP_FASTOPEN_CONNECT },
	{ SOCKMI_OPT_FASTOPEN_NO_COOKIE, SOL_TCP, TCP_FASTOPEN_NO_COOKIE },
	{ SOCKMI_OPT_FASTOPEN, SOL_TCP, TCP_FASTOPEN },
	{ SOCKMI_OPT_RTO_MAX_US, SOL_TCP, SOCKMI_TCP_RTO_MAX_MS, USEC_PER_MSEC, 120 * SECOND },
	{ SOCKMI_OPT_RTO_MIN_US, SOL_TCP, SOCKMI_TCP_RTO_MIN_US, 1, SECOND / 5 },
	{ SOCKMI_OPT_DELACK_MAX_US, SOL_TCP, SOCKMI_TCP_DELACK_MAX_US, 1, SECOND / 5 },
	{ SOCKMI_OPT_IP_PKTINFO, SOL_IP, IP_PKTINFO },
	{ SOCKMI_OPT_IP_RECVTTL, SOL_IP, IP_RECVTTL },
	{ SOCKMI_OPT_IP_RECVTOS, SOL_IP, IP_RECVTOS },
	{ SOCKMI_OPT_IP_RECVOPTS, SOL_IP, IP_RECVOPTS },
	{ SOCKMI_OPT_IP_RETOPTS, SOL_IP, IP_RETOPTS },
	{ SOCKMI_OPT_IP_PASSSEC, SOL_IP, IP_PASSSEC },
	{ SOCKMI_OPT_IP_CHECKSUM, SOL_IP, IP_CHECKSUM },
	{ SOCKMI_OPT_IP_RECVORIGDSTADDR, SOL_IP, IP_RECVORIGDSTADDR },
	{ SOCKMI_OPT_IP_RECVFRAGSIZE, SOL_IP, IP_RECVFRAGSIZE },
	{ SOCKMI_OPT_IP_RECVERR_RFC4884, SOL_IP, IP_RECVERR_RFC4884 },
	{ SOCKMI_OPT_IP_MULTICAST_LOOP, SOL_IP, IP_MULTICAST_LOOP, 0, 1 },
	{ SOCKMI_OPT_IP_MULTICAST_ALL, SOL_IP, IP_MULTICAST_ALL, 0, 1 },
	{ SOCKMI_OPT_IP_LOCAL_PORT_RANGE, SOL_IP, SOCKMI_IP_LOCAL_PORT_RANGE },
	{ SOCKMI_OPT_IPV6_RECVERR, SOL_IPV6, IPV6_RECVERR },
	{ SOCKMI_OPT_IPV6_RECVPKTINFO, SOL_IPV6, IPV6_RECVPKTINFO },
	{ SOCKMI_OPT_IPV6_RECVHOPLIMIT, SOL_IPV6, IPV6_RECVHOPLIMIT },
	{ SOCKMI_OPT_IPV6_RECVTCLASS, SOL_IPV6, IPV6_RECVTCLASS },
	{ SOCKMI_OPT_IPV6_RECVRTHDR, SOL_IPV6, IPV6_RECVRTHDR },
	{ SOCKMI_OPT_IPV6_RECVHOPOPTS, SOL_IPV6, IPV6_RECVHOPOPTS },
	{ SOCKMI_OPT_IPV6_RECVDSTOPTS, SOL_IPV6, IPV6_RECVDSTOPTS },
	{ SOCKMI_OPT_IPV6_RECVPATHMTU, SOL_IPV6, IPV6_RECVPATHMTU },
	{ SOCKMI_OPT_IPV6_FLOWINFO, SOL_IPV6, IPV6_FLOWINFO },
	{ SOCKMI_OPT_IPV6_FLOWINFO_SEND, SOL_IPV6, IPV6_FLOWINFO_SEND },
	{ SOCKMI_OPT_IPV6_AUTOFLOWLABEL, SOL_IPV6, IPV6_AUTOFLOWLABEL, 0, 1 },
	{ SOCKMI_OPT_IPV6_DONTFRAG, SOL_IPV6, IPV6_DONTFRAG },
	{ SOCKMI_OPT_IPV6_ADDR_PREFERENCES, SOL_IPV6, IPV6_ADDR_PREFERENCES, 0,
	  IPV6_PREFER_SRC_PUBTMP_DEFAULT | IPV6_PREFER_SRC_HOME },
	{ SOCKMI_OPT_IPV6_RECVORIGDSTADDR, SOL_IPV6, IPV6_RECVORIGDSTADDR },
	{ SOCKMI_OPT_IPV6_RECVFRAGSIZE, SOL_IPV6, IPV6_RECVFRAGSIZE },
	{ SOCKMI_OPT_IPV6_RECVERR_RFC4884, SOL_IPV6, IPV6_RECVERR_RFC4884 },
	{ SOCKMI_OPT_IPV6_2292PKTINFO, SOL_IPV6, IPV6_2292PKTINFO },
	{ SOCKMI_OPT_IPV6_2292HOPOPTS, SOL_IPV6, IPV6_2292HOPOPTS },
	{ SOCKMI_OPT_IPV6_2292DSTOPTS, SOL_IPV6, IPV6_2292DSTOPTS },
	{ SOCKMI_OPT_IPV6_2292RTHDR, SOL_IPV6, IPV6_2292RTHDR },
	{ SOCKMI_OPT_IPV6_2292HOPLIMIT, SOL_IPV6, IPV6_2292HOPLIMIT },
	{ SOCKMI_OPT_IPV6_ROUTER_ALERT_ISOLATE, SOL_IPV6, IPV6_ROUTER_ALERT_ISOLATE },
	{ SOCKMI_OPT_IPV6_MULTICAST_LOOP, SOL_IPV6, IPV6_MULTICAST_LOOP, 0, 1 },
	{ SOCKMI_OPT_IPV6_MULTICAST_ALL, SOL_IPV6, IPV6_MULTICAST_ALL, 0, 1 },
};

const struct sockmi_plain *sockmi_rare_find(u16 id)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(rare); i++)
		if (rare[i].id == id && rare[i].option)
			return &rare[i];
	return NULL;
}

/* ---- What they are now, as getsockopt() tells it ---- */

static bool is_connected(const struct sock *sk)
{
	return sk->sk_state != TCP_CLOSE && sk->sk_state != TCP_LISTEN;
}

/*
 * SO_TIMESTAMP and SO_TIMESTAMPNS are one flag and another that chooses the unit; those of 32-bit programs with 64 bits
 * for the seconds have a third.
 */
static bool stamps(const struct sock *sk, bool nanoseconds, bool new)
{
	return sock_flag(sk, SOCK_RCVTSTAMP) && sock_flag(sk, SOCK_TSTAMP_NEW) == new &&
	       sock_flag(sk, SOCK_RCVTSTAMPNS) == nanoseconds;
}

static s64 stamping(const struct sock *sk, bool new)
{
	return sock_flag(sk, SOCK_TSTAMP_NEW) == new ? READ_ONCE(sk->sk_tsflags) & SOF_TIMESTAMPING_MASK : 0;
}

static s64 socket_value(const struct sock *sk, u16 id, s64 usual)
{
	switch (id) {
	case SOCKMI_OPT_DEBUG:
		return sock_flag(sk, SOCK_DBG);
	case SOCKMI_OPT_NO_CHECK:
		return sk->sk_no_check_tx;
	case SOCKMI_OPT_TIMESTAMP:
		return stamps(sk, false, false);
	case SOCKMI_OPT_TIMESTAMPNS:
		return stamps(sk, true, false);
	case SOCKMI_OPT_TIMESTAMPING:
		return stamping(sk, false);
	case SOCKMI_OPT_TIMESTAMP_NEW:
		return stamps(sk, false, true);
	case SOCKMI_OPT_TIMESTAMPNS_NEW:
		return stamps(sk, true, true);
	case SOCKMI_OPT_TIMESTAMPING_NEW:
		return stamping(sk, true);
	case SOCKMI_OPT_RXQ_OVFL:
		return sock_flag(sk, SOCK_RXQ_OVFL);
	case SOCKMI_OPT_WIFI_STATUS:
		return sock_flag(sk, SOCK_WIFI_STATUS);
	case SOCKMI_OPT_NOFCS:
		return sock_flag(sk, SOCK_NOFCS);
	case SOCKMI_OPT_SELECT_ERR_QUEUE:
		return sock_flag(sk, SOCK_SELECT_ERR_QUEUE);
#ifdef CONFIG_NET_RX_BUSY_POLL
	case SOCKMI_OPT_BUSY_POLL_US:
		return READ_ONCE(sk->sk_ll_usec);
	case SOCKMI_OPT_PREFER_BUSY_POLL:
		return READ_ONCE(sk->sk_prefer_busy_poll);
	case SOCKMI_OPT_BUSY_POLL_BUDGET:
		return READ_ONCE(sk->sk_busy_poll_budget) ?: usual;
#endif
	case SOCKMI_OPT_TXREHASH:
		return READ_ONCE(sk->sk_txrehash);
	case SOCKMI_OPT_RCVMARK:
		return sock_flag(sk, SOCK_RCVMARK);
	case SOCKMI_OPT_RCVPRIORITY:
		return sockmi_rcvpriority(sk);
	case SOCKMI_OPT_INCOMING_CPU: /* of a connection it tells where the last packet came in */
		return is_connected(sk) ? usual : READ_ONCE(sk->sk_incoming_cpu);
	default:
		return usual;
	}
}

static s64 tcp_value(const struct sock *sk, u16 id, s64 usual)
{
	switch (id) {
	case SOCKMI_OPT_FASTOPEN_CONNECT:
		return is_connected(sk) ? usual : tcp_sk(sk)->fastopen_connect;
	case SOCKMI_OPT_FASTOPEN_NO_COOKIE:
		return tcp_sk(sk)->fastopen_no_cookie;
	case SOCKMI_OPT_FASTOPEN: /* of a listener LISTENER has it */
		return sk->sk_state == TCP_CLOSE ? inet_csk(sk)->icsk_accept_queue.fastopenq.max_qlen : usual;
	case SOCKMI_OPT_RTO_MAX_US:
		return sockmi_rto_max_us(sk, usual);
	case SOCKMI_OPT_RTO_MIN_US:
		return sockmi_rto_min_us(sk, usual);
	case SOCKMI_OPT_DELACK_MAX_US:
		return sockmi_delack_max_us(sk, usual);
	default:
		return usual;
	}
}

static s64 ip_value(const struct sock *sk, u16 id, s64 usual)
{
	unsigned long wanted = sockmi_cmsg_flags(sk);

	if (id == SOCKMI_OPT_IP_LOCAL_PORT_RANGE) /* for IPv6, too */
		return sockmi_local_ports(sk);
	if (!sockmi_speaks_ipv4(sk))
		return usual;
	switch (id) {
	case SOCKMI_OPT_IP_PKTINFO:
		return !!(wanted & IP_CMSG_PKTINFO);
	case SOCKMI_OPT_IP_RECVTTL:
		return !!(wanted & IP_CMSG_TTL);
	case SOCKMI_OPT_IP_RECVTOS:
		return !!(wanted & IP_CMSG_TOS);
	case SOCKMI_OPT_IP_RECVOPTS:
		return !!(wanted & IP_CMSG_RECVOPTS);
	case SOCKMI_OPT_IP_RETOPTS:
		return !!(wanted & IP_CMSG_RETOPTS);
	case SOCKMI_OPT_IP_PASSSEC:
		return !!(wanted & IP_CMSG_PASSSEC);
	case SOCKMI_OPT_IP_CHECKSUM:
		return !!(wanted & IP_CMSG_CHECKSUM);
	case SOCKMI_OPT_IP_RECVORIGDSTADDR:
		return !!(wanted & IP_CMSG_ORIGDSTADDR);
	case SOCKMI_OPT_IP_RECVFRAGSIZE:
		return !!(wanted & IP_CMSG_RECVFRAGSIZE);
	case SOCKMI_OPT_IP_RECVERR_RFC4884:
		return sockmi_inet_flag(sk, recverr_rfc4884, RECVERR_RFC4884);
	case SOCKMI_OPT_IP_MULTICAST_LOOP:
		return sockmi_inet_flag(sk, mc_loop, MC_LOOP);
	case SOCKMI_OPT_IP_MULTICAST_ALL:
		return sockmi_inet_flag(sk, mc_all, MC_ALL);
	default:
		return usual;
	}
}

#if IS_ENABLED(CONFIG_IPV6)
static s64 address_preferences(const struct ipv6_pinfo *np)
{
	s64 value = np->srcprefs & IPV6_PREFER_SRC_COA ? IPV6_PREFER_SRC_COA : IPV6_PREFER_SRC_HOME;

	if (np->srcprefs & IPV6_PREFER_SRC_TMP)
		return value | IPV6_PREFER_SRC_TMP;
	return value | (np->srcprefs & IPV6_PREFER_SRC_PUBLIC ? IPV6_PREFER_SRC_PUBLIC : IPV6_PREFER_SRC_PUBTMP_DEFAULT);
}

static bool auto_flow_label(const struct sock *sk)
{
	u8 policy = READ_ONCE(sock_net(sk)->ipv6.sysctl.auto_flowlabels);

	if (sockmi_inet6_flag(sk, autoflowlabel_set, AUTOFLOWLABEL_SET))
		return sockmi_inet6_flag(sk, autoflowlabel, AUTOFLOWLABEL);
	return policy == IP6_AUTO_FLOW_LABEL_OPTOUT || policy == IP6_AUTO_FLOW_LABEL_FORCED;
}

static s64 ipv6_value(const struct sock *sk, u16 id, s64 usual)
{
	const struct ipv6_pinfo *np = inet6_sk(sk);

	if (sk->sk_family != AF_INET6)
		return usual;
	switch (id) {
	case SOCKMI_OPT_IPV6_RECVERR:
		return sockmi_inet6_flag(sk, recverr, RECVERR6);
	case SOCKMI_OPT_IPV6_RECVPKTINFO:
		return np->rxopt.bits.rxinfo;
	case SOCKMI_OPT_IPV6_RECVHOPLIMIT:
		return np->rxopt.bits.rxhlim;
	case SOCKMI_OPT_IPV6_RECVTCLASS:
		return np->rxopt.bits.rxtclass;
	case SOCKMI_OPT_IPV6_RECVRTHDR:
		return np->rxopt.bits.srcrt;
	case SOCKMI_OPT_IPV6_RECVHOPOPTS:
		return np->rxopt.bits.hopopts;
	case SOCKMI_OPT_IPV6_RECVDSTOPTS:
		return np->rxopt.bits.dstopts;
	case SOCKMI_OPT_IPV6_RECVPATHMTU:
		return np->rxopt.bits.rxpmtu;
	case SOCKMI_OPT_IPV6_FLOWINFO:
		return np->rxopt.bits.rxflow;
	case SOCKMI_OPT_IPV6_FLOWINFO_SEND:
		return sockmi_inet6_flag(sk, sndflow, SNDFLOW);
	case SOCKMI_OPT_IPV6_AUTOFLOWLABEL:
		return auto_flow_label(sk);
	case SOCKMI_OPT_IPV6_DONTFRAG:
		return sockmi_inet6_flag(sk, dontfrag, DONTFRAG);
	case SOCKMI_OPT_IPV6_ADDR_PREFERENCES:
		return address_preferences(np);
	case SOCKMI_OPT_IPV6_RECVORIGDSTADDR:
		return np->rxopt.bits.rxorigdstaddr;
	case SOCKMI_OPT_IPV6_RECVFRAGSIZE:
		return np->rxopt.bits.recvfragsize;
	case SOCKMI_OPT_IPV6_RECVERR_RFC4884:
		return sockmi_inet6_flag(sk, recverr_rfc4884, RECVERR6_RFC4884);
	case SOCKMI_OPT_IPV6_MULTICAST_LOOP:
		return sockmi_inet6_flag(sk, mc_loop, MC6_LOOP);
	case SOCKMI_OPT_IPV6_MULTICAST_ALL:
		return sockmi_inet6_flag(sk, mc_all, MC6_ALL);
	case SOCKMI_OPT_IPV6_2292PKTINFO:
		return np->rxopt.bits.rxoinfo;
	case SOCKMI_OPT_IPV6_2292HOPOPTS:
		return np->rxopt.bits.ohopopts;
	case SOCKMI_OPT_IPV6_2292DSTOPTS:
		return np->rxopt.bits.odstopts;
	case SOCKMI_OPT_IPV6_2292RTHDR:
		return np->rxopt.bits.osrcrt;
	case SOCKMI_OPT_IPV6_2292HOPLIMIT:
		return np->rxopt.bits.rxohlim;
	case SOCKMI_OPT_IPV6_ROUTER_ALERT_ISOLATE:
		return sockmi_inet6_flag(sk, rtalert_isolate, RTALERT_ISOLATE);
	default:
		return usual;
	}
}
#else
static s64 ipv6_value(const struct sock *sk, u16 id, s64 usual)
{
	return usual;
}
#endif

void sockmi_rare_dump(const struct sock *sk, struct sockmi_writer *writer)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(rare); i++) {
		u16 id = rare[i].id, level = rare[i].level;
		/* The IPv4 half of an IPv6 socket has this one off from the start. */
		s64 usual = id == SOCKMI_OPT_IP_MULTICAST_ALL && sk->sk_family == AF_INET6 ? 0 : rare[i].usual;
		s64 value = level == SOL_SOCKET ? socket_value(sk, id, usual) :
			    level == SOL_TCP	? tcp_value(sk, id, usual) :
			    level == SOL_IP	? ip_value(sk, id, usual) : ipv6_value(sk, id, usual);

		if (value != usual)
			sockmi_writer_option_int(writer, id, 0, value);
	}
}

/* ---- What stays behind ---- */

static void leave(struct sockmi_writer *w, bool is_set, const char *name)
{
	if (is_set)
		sockmi_writer_fidelity(w, SOCKMI_RESET, name);
}

#if IS_ENABLED(CONFIG_IPV6)
static void leave_ipv6(const struct sock *sk, struct sockmi_writer *w)
{
	const struct ipv6_pinfo *np = inet6_sk(sk);
	const struct ipv6_txoptions *headers;

	leave(w, np->flow_label & IPV6_FLOWLABEL_MASK, "option:ipv6_flowlabel");
	leave(w, np->ucast_oif, "option:ipv6_unicast_if");
	leave(w, np->frag_size, "option:ipv6_mtu");
	rcu_read_lock();
	headers = rcu_dereference(np->opt);
	if (headers) {
		leave(w, headers->hopopt, "option:ipv6_hopopts");
		leave(w, headers->dst0opt, "option:ipv6_rthdrdstopts");
		leave(w, headers->srcrt, "option:ipv6_rthdr");
		leave(w, headers->dst1opt, "option:ipv6_dstopts");
	}
	rcu_read_unlock();
}
#endif

void sockmi_options_left_out(const struct sock *sk, struct sockmi_writer *writer)
{
	leave(writer, sock_flag(sk, SOCK_TXTIME), "option:txtime");
	leave(writer, sock_flag(sk, SOCK_FILTER_LOCKED), "option:lock_filter");
	leave(writer, sk->sk_reserved_mem, "option:reserve_mem");
	leave(writer, sk->sk_state == TCP_LISTEN && rcu_access_pointer(inet_csk(sk)->icsk_accept_queue.fastopenq.ctx),
	      "option:fastopen_key");
	if (sockmi_speaks_ipv4(sk)) {
		leave(writer, rcu_access_pointer(inet_sk(sk)->inet_opt), "option:ip_options");
		leave(writer, inet_sk(sk)->uc_index, "option:ip_unicast_if");
	}
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6)
		leave_ipv6(sk, writer);
#endif
}
