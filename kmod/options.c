// SPDX-License-Identifier: GPL-2.0
/*
 * Socket options. Those that have a plain setsockopt() are given to it, which checks their values; those
 * for which it would ask for capabilities that the importer need not have, or that cannot be set on a connection, are
 * assigned. An option at its default is not in the image.
 */
#include <linux/netdevice.h>
#include <linux/tcp.h>
#include <net/ipv6.h>

#include "options.h"

#define SECOND ((s64)USEC_PER_SEC)
#define LINGER_ON ((s64)1 << 62)
#define BUFFER_MAX (S32_MAX / 2)

/* ---- Dump ---- */

static void put(struct sockmi_writer *w, u16 id, s64 value, s64 otherwise)
{
	if (value != otherwise)
		sockmi_writer_option_int(w, id, 0, value);
}

/* What is longer than an image can say, some 292,000 years, is the longest that it can. */
static s64 timeout_us(long jiffies_left)
{
	if (jiffies_left == MAX_SCHEDULE_TIMEOUT)
		return 0;
	if (jiffies_left > S64_MAX / (USEC_PER_SEC / HZ))
		return S64_MAX;
	return (s64)jiffies_left * (USEC_PER_SEC / HZ);
}

static void dump_socket(const struct sock *sk, struct sockmi_writer *w)
{
	unsigned long rate = READ_ONCE(sk->sk_max_pacing_rate);
	struct net_device *dev;
	char name[IFNAMSIZ];

	put(w, SOCKMI_OPT_REUSEADDR, sk->sk_reuse == SK_CAN_REUSE, 0);
	put(w, SOCKMI_OPT_REUSEPORT, sk->sk_reuseport, 0);
	put(w, SOCKMI_OPT_KEEPALIVE, sock_flag(sk, SOCK_KEEPOPEN), 0);
	put(w, SOCKMI_OPT_BROADCAST, sock_flag(sk, SOCK_BROADCAST), 0);
	put(w, SOCKMI_OPT_OOBINLINE, sock_flag(sk, SOCK_URGINLINE), 0);
	put(w, SOCKMI_OPT_DONTROUTE, sock_flag(sk, SOCK_LOCALROUTE), 0);
	put(w, SOCKMI_OPT_LINGER,
	    sock_flag(sk, SOCK_LINGER) ? LINGER_ON + (s64)(sk->sk_lingertime / HZ) * SECOND : 0, 0);
	sockmi_writer_option_int(w, SOCKMI_OPT_SNDBUF, sk->sk_userlocks & SOCK_SNDBUF_LOCK ? SOCKMI_OPTION_LOCKED : 0,
				 READ_ONCE(sk->sk_sndbuf));
	sockmi_writer_option_int(w, SOCKMI_OPT_RCVBUF, sk->sk_userlocks & SOCK_RCVBUF_LOCK ? SOCKMI_OPTION_LOCKED : 0,
				 READ_ONCE(sk->sk_rcvbuf));
	put(w, SOCKMI_OPT_RCVLOWAT, sk->sk_rcvlowat, 1);
	put(w, SOCKMI_OPT_RCVTIMEO_US, timeout_us(sk->sk_rcvtimeo), 0);
	put(w, SOCKMI_OPT_SNDTIMEO_US, timeout_us(sk->sk_sndtimeo), 0);
	put(w, SOCKMI_OPT_PRIORITY, sk->sk_priority, 0);
	put(w, SOCKMI_OPT_MARK, sk->sk_mark, 0);
	put(w, SOCKMI_OPT_MAX_PACING_RATE, rate == ~0UL ? -1 : (s64)rate, -1);
	put(w, SOCKMI_OPT_PEEK_OFF, sk->sk_peek_off, -1);
	put(w, SOCKMI_OPT_ZEROCOPY, sock_flag(sk, SOCK_ZEROCOPY), 0);
	if (!sk->sk_bound_dev_if)
		return;
	rcu_read_lock();
	dev = dev_get_by_index_rcu(sock_net(sk), sk->sk_bound_dev_if);
	if (dev && strscpy(name, dev->name, sizeof(name)) > 0)
		sockmi_writer_option_bytes(w, SOCKMI_OPT_BINDTODEVICE, 0, name, strlen(name));
	rcu_read_unlock();
}

/* Options whose default is a sysctl of the host: a copy is to have what the original had, set or not. */
static const u16 hosts_own[] = {
	SOCKMI_OPT_KEEPIDLE_US, SOCKMI_OPT_KEEPINTVL_US, SOCKMI_OPT_KEEPCNT, SOCKMI_OPT_SYNCNT, SOCKMI_OPT_LINGER2_US,
	SOCKMI_OPT_IP_TTL, SOCKMI_OPT_IPV6_UNICAST_HOPS,
};

static s64 usual_of(u16 id);

bool sockmi_speaks_ipv4(const struct sock *sk)
{
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6) {
		if (ipv6_only_sock(sk))
			return false;
		return sk->sk_state == TCP_CLOSE || sk->sk_state == TCP_LISTEN ||
		       ipv6_addr_v4mapped(&sk->sk_v6_rcv_saddr);
	}
#endif
	return true;
}

/* One of those, as getsockopt() tells it; @usual where the socket has no such. */
static s64 host_value(const struct sock *sk, u16 id, s64 usual)
{
	const struct inet_connection_sock *icsk = inet_csk(sk);
	const struct tcp_sock *tp = tcp_sk(sk);
	const struct net *net = sock_net(sk);

	switch (id) {
	case SOCKMI_OPT_KEEPIDLE_US:
		return keepalive_time_when(tp) / HZ * SECOND;
	case SOCKMI_OPT_KEEPINTVL_US:
		return keepalive_intvl_when(tp) / HZ * SECOND;
	case SOCKMI_OPT_KEEPCNT:
		return keepalive_probes(tp);
	case SOCKMI_OPT_SYNCNT:
		return icsk->icsk_syn_retries ?: READ_ONCE(net->ipv4.sysctl_tcp_syn_retries);
	case SOCKMI_OPT_LINGER2_US:
		return tp->linger2 < 0 ? -1 : (tp->linger2 ?: READ_ONCE(net->ipv4.sysctl_tcp_fin_timeout)) / HZ * SECOND;
	case SOCKMI_OPT_IP_TTL:
		if (!sockmi_speaks_ipv4(sk))
			return usual;
		return inet_sk(sk)->uc_ttl < 0 ? READ_ONCE(net->ipv4.sysctl_ip_default_ttl) : inet_sk(sk)->uc_ttl;
#if IS_ENABLED(CONFIG_IPV6)
	case SOCKMI_OPT_IPV6_UNICAST_HOPS:
		if (sk->sk_family != AF_INET6)
			return usual;
		return inet6_sk(sk)->hop_limit < 0 ? READ_ONCE(net->ipv6.devconf_all->hop_limit) :
						     inet6_sk(sk)->hop_limit;
#endif
	default:
		return usual;
	}
}

static void dump_hosts_own(const struct sock *sk, struct sockmi_writer *w)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(hosts_own); i++)
		put(w, hosts_own[i], host_value(sk, hosts_own[i], usual_of(hosts_own[i])), usual_of(hosts_own[i]));
}

/* The kernel counts SYN-ACKs, each after twice the time of the one before. */
u64 sockmi_defer_accept_us(const struct inet_connection_sock *icsk)
{
	u64 seconds = 0, timeout = TCP_TIMEOUT_INIT / HZ;
	int left;

	for (left = icsk->icsk_accept_queue.rskq_defer_accept; left > 0; left--) {
		seconds += timeout;
		timeout = min_t(u64, timeout * 2, TCP_RTO_MAX / HZ);
	}
	return seconds * USEC_PER_SEC;
}

static void dump_tcp(const struct sock *sk, struct sockmi_writer *w)
{
	const struct inet_connection_sock *icsk = inet_csk(sk);
	const struct tcp_sock *tp = tcp_sk(sk);
	bool connected = sk->sk_state != TCP_CLOSE && sk->sk_state != TCP_LISTEN;

	put(w, SOCKMI_OPT_NODELAY, !!(tp->nonagle & TCP_NAGLE_OFF), 0);
	put(w, SOCKMI_OPT_CORK, !!(tp->nonagle & TCP_NAGLE_CORK), 0);
	put(w, SOCKMI_OPT_DEFER_ACCEPT_US, sockmi_defer_accept_us(icsk), 0);
	put(w, SOCKMI_OPT_QUICKACK, !inet_csk_in_pingpong_mode((struct sock *)sk), 1);
	put(w, SOCKMI_OPT_THIN_LINEAR_TIMEOUTS, tp->thin_lto, 0);
	put(w, SOCKMI_OPT_USER_TIMEOUT_US, (s64)icsk->icsk_user_timeout * USEC_PER_MSEC, 0);
	put(w, SOCKMI_OPT_NOTSENT_LOWAT, tp->notsent_lowat, 0);
	put(w, SOCKMI_OPT_INQ, tp->recvmsg_inq, 0);
	put(w, SOCKMI_OPT_TX_DELAY_US, tp->tcp_tx_delay, 0);
	if (!connected) {
		put(w, SOCKMI_OPT_SAVE_SYN, tp->save_syn, 0);
		put(w, SOCKMI_OPT_WINDOW_CLAMP, tp->window_clamp, 0);
		put(w, SOCKMI_OPT_MAXSEG, tp->rx_opt.user_mss ?: 536, 536);
	}
	if (icsk->icsk_ca_ops)
		sockmi_writer_option_bytes(w, SOCKMI_OPT_CONGESTION, 0, icsk->icsk_ca_ops->name,
					   strnlen(icsk->icsk_ca_ops->name, TCP_CA_NAME_MAX));
}

static void dump_ip(const struct sock *sk, struct sockmi_writer *w)
{
	const struct inet_sock *inet = inet_sk(sk);

	put(w, SOCKMI_OPT_IP_TOS, inet->tos, 0);
	put(w, SOCKMI_OPT_IP_MTU_DISCOVER, inet->pmtudisc, IP_PMTUDISC_WANT);
	put(w, SOCKMI_OPT_IP_RECVERR, sockmi_inet_flag(sk, recverr, RECVERR), 0);
	put(w, SOCKMI_OPT_IP_MINTTL, inet->min_ttl, 0);
	if (sk->sk_family == AF_INET) {
		put(w, SOCKMI_OPT_IP_FREEBIND, sockmi_inet_flag(sk, freebind, FREEBIND), 0);
		put(w, SOCKMI_OPT_IP_TRANSPARENT, sockmi_inet_flag(sk, transparent, TRANSPARENT), 0);
	}
}

#if IS_ENABLED(CONFIG_IPV6)
static void dump_ipv6(const struct sock *sk, struct sockmi_writer *w)
{
	const struct ipv6_pinfo *np = inet6_sk(sk);

	put(w, SOCKMI_OPT_IPV6_TCLASS, np->tclass, 0);
	put(w, SOCKMI_OPT_IPV6_MTU_DISCOVER, np->pmtudisc, IPV6_PMTUDISC_WANT);
	put(w, SOCKMI_OPT_IPV6_MINHOPCOUNT, np->min_hopcount, 0);
	put(w, SOCKMI_OPT_IPV6_FREEBIND, sockmi_inet_flag(sk, freebind, FREEBIND), 0);
	put(w, SOCKMI_OPT_IPV6_TRANSPARENT, sockmi_inet_flag(sk, transparent, TRANSPARENT), 0);
}
#endif

void sockmi_options_dump(const struct sock *sk, struct sockmi_writer *writer)
{
	dump_socket(sk, writer);
	dump_tcp(sk, writer);
	dump_hosts_own(sk, writer);
	sockmi_rare_dump(sk, writer);
	/* For IPv6, too. */
	put(writer, SOCKMI_OPT_IP_BIND_ADDRESS_NO_PORT,
	    sockmi_inet_flag(sk, bind_address_no_port, BIND_ADDRESS_NO_PORT), 0);
#if IS_ENABLED(CONFIG_IPV6)
	if (sk->sk_family == AF_INET6)
		dump_ipv6(sk, writer);
#endif
	if (sockmi_speaks_ipv4(sk))
		dump_ip(sk, writer);
}

/* ---- Restore ---- */

s64 sockmi_option_number(const struct sockmi_image *image, u16 id, s64 otherwise, u8 *flags)
{
	struct sockmi_view rest = image->socket_options;
	struct sockmi_option option;

	if (flags)
		*flags = 0;
	while (sockmi_option_next(&rest, &option))
		if (option.id == id) {
			if (flags)
				*flags = option.flags;
			return option.number;
		}
	return otherwise;
}

static void lose(struct sockmi_losses *losses, u16 id)
{
	if (losses->lost < SOCKMI_LOST_OPTIONS_MAX)
		losses->lost_options[losses->lost] = id;
	losses->lost++;
	losses->reset |= SOCKMI_LOSS_OPTIONS;
}

static const struct sockmi_plain plains[] = {
	{ SOCKMI_OPT_SYNCNT, SOL_TCP, TCP_SYNCNT, 0, 6 },
	{ SOCKMI_OPT_KEEPIDLE_US, SOL_TCP, TCP_KEEPIDLE, USEC_PER_SEC, 7200 * SECOND },
	{ SOCKMI_OPT_KEEPINTVL_US, SOL_TCP, TCP_KEEPINTVL, USEC_PER_SEC, 75 * SECOND },
	{ SOCKMI_OPT_KEEPCNT, SOL_TCP, TCP_KEEPCNT, 0, 9 },
	{ SOCKMI_OPT_LINGER2_US, SOL_TCP, TCP_LINGER2, USEC_PER_SEC, 60 * SECOND },
	{ SOCKMI_OPT_DEFER_ACCEPT_US, SOL_TCP, TCP_DEFER_ACCEPT, USEC_PER_SEC },
	{ SOCKMI_OPT_WINDOW_CLAMP, SOL_TCP, TCP_WINDOW_CLAMP },
	{ SOCKMI_OPT_MAXSEG, SOL_TCP, TCP_MAXSEG },
	{ SOCKMI_OPT_THIN_LINEAR_TIMEOUTS, SOL_TCP, TCP_THIN_LINEAR_TIMEOUTS },
	{ SOCKMI_OPT_USER_TIMEOUT_US, SOL_TCP, TCP_USER_TIMEOUT, USEC_PER_MSEC },
	{ SOCKMI_OPT_NOTSENT_LOWAT, SOL_TCP, TCP_NOTSENT_LOWAT },
	{ SOCKMI_OPT_SAVE_SYN, SOL_TCP, TCP_SAVE_SYN },
	{ SOCKMI_OPT_INQ, SOL_TCP, TCP_INQ },
	{ SOCKMI_OPT_TX_DELAY_US, SOL_TCP, TCP_TX_DELAY, 1 },
	{ SOCKMI_OPT_NODELAY, SOL_TCP, TCP_NODELAY },
	{ SOCKMI_OPT_CORK, SOL_TCP, TCP_CORK },
	{ SOCKMI_OPT_IP_TOS, SOL_IP, IP_TOS },
	{ SOCKMI_OPT_IP_TTL, SOL_IP, IP_TTL, 0, 64 },
	{ SOCKMI_OPT_IP_MTU_DISCOVER, SOL_IP, IP_MTU_DISCOVER, 0, IP_PMTUDISC_WANT },
	{ SOCKMI_OPT_IP_RECVERR, SOL_IP, IP_RECVERR },
	{ SOCKMI_OPT_IP_MINTTL, SOL_IP, IP_MINTTL },
	{ SOCKMI_OPT_IP_FREEBIND, SOL_IP, IP_FREEBIND },
	{ SOCKMI_OPT_IP_BIND_ADDRESS_NO_PORT, SOL_IP, IP_BIND_ADDRESS_NO_PORT },
	{ SOCKMI_OPT_IPV6_TCLASS, SOL_IPV6, IPV6_TCLASS },
	{ SOCKMI_OPT_IPV6_UNICAST_HOPS, SOL_IPV6, IPV6_UNICAST_HOPS, 0, 64 },
	{ SOCKMI_OPT_IPV6_MTU_DISCOVER, SOL_IPV6, IPV6_MTU_DISCOVER, 0, IPV6_PMTUDISC_WANT },
	{ SOCKMI_OPT_IPV6_MINHOPCOUNT, SOL_IPV6, IPV6_MINHOPCOUNT },
	{ SOCKMI_OPT_IPV6_FREEBIND, SOL_IPV6, IPV6_FREEBIND },
};

/* Those above, and the rare ones. */
static const struct sockmi_plain *find_plain(u16 id)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(plains); i++)
		if (plains[i].id == id)
			return &plains[i];
	return sockmi_rare_find(id);
}

/* What a fresh socket has; an option that is not in an image has it. */
static s64 usual_of(u16 id)
{
	const struct sockmi_plain *plain = find_plain(id);

	switch (id) {
	case SOCKMI_OPT_RCVLOWAT:
		return 1;
	case SOCKMI_OPT_MAX_PACING_RATE:
	case SOCKMI_OPT_PEEK_OFF:
		return -1;
	default:
		return plain ? plain->usual : 0;
	}
}

static int set_int(struct socket *sock, int level, int option, int value)
{
	if (level == SOL_SOCKET)
		return sock_setsockopt(sock, level, option, KERNEL_SOCKPTR(&value), sizeof(value));
	return sock->ops->setsockopt(sock, level, option, KERNEL_SOCKPTR(&value), sizeof(value));
}

static int set_plain(struct socket *sock, const struct sockmi_plain *plain, s64 value)
{
	if (plain->unit_us && value >= 0)
		value = div64_s64(value + plain->unit_us - 1, plain->unit_us);
	if (value > S32_MAX || value < S32_MIN)
		return -EINVAL;
	return set_int(sock, plain->level, plain->option, value);
}

/* By name: an interface's index is another one on another host. */
static int bind_to_device(struct sock *sk, const struct sockmi_view *view)
{
	char name[IFNAMSIZ] = {};
	struct net_device *dev;
	int index;

	if (!view->length || view->length >= sizeof(name))
		return -EINVAL;
	memcpy(name, view->data, view->length);
	rcu_read_lock();
	dev = dev_get_by_name_rcu(sock_net(sk), name);
	index = dev ? dev->ifindex : 0;
	rcu_read_unlock();
	return index ? sock_bindtoindex(sk, index, true) : -ENODEV;
}

static int set_congestion(struct socket *sock, const struct sockmi_view *view)
{
	char name[TCP_CA_NAME_MAX] = {};

	if (!view->length || view->length >= sizeof(name))
		return -EINVAL;
	memcpy(name, view->data, view->length);
	return sock->ops->setsockopt(sock, SOL_TCP, TCP_CONGESTION, KERNEL_SOCKPTR(name), view->length);
}

/* Handled by sockmi_options_late(), by the restore itself, or with another section. */
static bool is_late(u16 id)
{
	switch (id) {
	case SOCKMI_OPT_REUSEADDR:
	case SOCKMI_OPT_KEEPALIVE:
	case SOCKMI_OPT_BROADCAST:
	case SOCKMI_OPT_OOBINLINE:
	case SOCKMI_OPT_DONTROUTE:
	case SOCKMI_OPT_LINGER:
	case SOCKMI_OPT_RCVBUF:
	case SOCKMI_OPT_SNDBUF:
	case SOCKMI_OPT_RCVLOWAT:
	case SOCKMI_OPT_RCVTIMEO_US:
	case SOCKMI_OPT_SNDTIMEO_US:
	case SOCKMI_OPT_PRIORITY:
	case SOCKMI_OPT_MAX_PACING_RATE:
	case SOCKMI_OPT_PEEK_OFF:
	case SOCKMI_OPT_ZEROCOPY:
	case SOCKMI_OPT_QUICKACK:
		return true;
	default:
		return false;
	}
}

static bool is_connected(const struct sockmi_image *image)
{
	return image->identity.kind == SOCKMI_KIND_CONNECTED;
}

/* That would set SO_PRIORITY, too, which is an option of its own. */
static int set_tos(struct socket *sock, const struct sockmi_plain *plain, s64 value)
{
	u32 priority = sock->sk->sk_priority;
	int error = set_plain(sock, plain, value);

	WRITE_ONCE(sock->sk->sk_priority, priority);
	return error;
}

/* 0, or -errno if this host does not take it. */
static int set_early(struct socket *sock, const struct sockmi_image *image, const struct sockmi_option *option)
{
	const struct sockmi_plain *plain = find_plain(option->id);
	struct sock *sk = sock->sk;

	switch (option->id) {
	case SOCKMI_OPT_REUSEPORT:
		sk->sk_reuseport = !!option->number;
		return 0;
	case SOCKMI_OPT_MARK:
		WRITE_ONCE(sk->sk_mark, (u32)option->number);
		return 0;
	case SOCKMI_OPT_BINDTODEVICE:
		return bind_to_device(sk, &option->bytes);
	case SOCKMI_OPT_CONGESTION:
		return set_congestion(sock, &option->bytes);
	case SOCKMI_OPT_IP_TRANSPARENT:
	case SOCKMI_OPT_IPV6_TRANSPARENT:
		sockmi_inet_set(sk, transparent, TRANSPARENT, option->number);
		return 0;
	case SOCKMI_OPT_IP_TOS:
		return set_tos(sock, plain, option->number);
	case SOCKMI_OPT_WINDOW_CLAMP:
	case SOCKMI_OPT_MAXSEG:
	case SOCKMI_OPT_SAVE_SYN:
		if (is_connected(image))
			return 0; /* WINDOW and NEGOTIATED say it better */
		break;
	}
	if (is_late(option->id))
		return 0;
	return plain ? set_plain(sock, plain, option->number) : -ENOPROTOOPT;
}

/*
 * What the socket had before and the image does not name goes back to what a fresh one has: else a copy would have
 * options of whatever was in its descriptor. A foreign local address is the caller's to allow, so that stays; to a
 * listener's child much comes from the listener.
 */
static bool stays(u16 id, u32 flags)
{
	switch (id) {
	case SOCKMI_OPT_IP_TRANSPARENT:
	case SOCKMI_OPT_IPV6_TRANSPARENT:
	case SOCKMI_OPT_IP_FREEBIND:
	case SOCKMI_OPT_IPV6_FREEBIND:
		return !(flags & SOCKMI_RESTORE_UNDO);
	case SOCKMI_OPT_BINDTODEVICE:
	case SOCKMI_OPT_MARK:
	case SOCKMI_OPT_PRIORITY:
		return flags & SOCKMI_RESTORE_CHILD;
	case SOCKMI_OPT_CONGESTION:
		return true;
	default:
		return false;
	}
}

static bool names(const struct sockmi_image *image, u16 id)
{
	struct sockmi_view rest = image->socket_options;
	struct sockmi_option option;

	while (sockmi_option_next(&rest, &option))
		if (option.id == id)
			return true;
	return false;
}

/* What SO_BINDTODEVICE and TCP_MAXSEG take for "none" is no value of theirs. */
static int reset(struct socket *sock, const struct sockmi_image *image, u16 id)
{
	struct sockmi_option usual = { .id = id, .number = usual_of(id) };

	if (id == SOCKMI_OPT_BINDTODEVICE)
		return sock_bindtoindex(sock->sk, 0, true);
	if (is_late(id))
		return 0;
	return find_plain(id) ? set_plain(sock, find_plain(id), usual.number) : set_early(sock, image, &usual);
}

void sockmi_options_early(struct socket *sock, const struct sockmi_image *image, const struct sockmi_view *before,
			  u32 flags, struct sockmi_losses *losses)
{
	struct sockmi_view rest = *before;
	struct sockmi_option option;

	while (sockmi_option_next(&rest, &option)) {
		if (stays(option.id, flags) || names(image, option.id))
			continue;
		if (reset(sock, image, option.id))
			lose(losses, option.id);
	}
	rest = image->socket_options;
	while (sockmi_option_next(&rest, &option)) {
		if (option.id == SOCKMI_OPT_BINDTODEVICE && flags & SOCKMI_RESTORE_CHILD)
			continue;
		if (set_early(sock, image, &option))
			lose(losses, option.id);
	}
}

/* A buffer size of the image within what this host allows to the caller. */
static int buffer_size(const struct sockmi_image *image, u16 id, int now, int most, int least, u8 *flags)
{
	s64 wanted = sockmi_option_number(image, id, now, flags);

	if (!capable(CAP_NET_ADMIN))
		wanted = min_t(s64, wanted, most);
	return clamp_t(s64, wanted, least, BUFFER_MAX);
}

static void set_lock(struct sock *sk, u8 lock, u8 flags)
{
	if (flags & SOCKMI_OPTION_LOCKED)
		sk->sk_userlocks |= lock;
	else
		sk->sk_userlocks &= ~lock;
}

static void set_buffers(struct sock *sk, const struct sockmi_image *image, struct sockmi_losses *losses)
{
	struct net *net = sock_net(sk);
	u8 flags;

	WRITE_ONCE(sk->sk_rcvbuf, buffer_size(image, SOCKMI_OPT_RCVBUF, sk->sk_rcvbuf,
					      READ_ONCE(net->ipv4.sysctl_tcp_rmem[2]), SOCK_MIN_RCVBUF, &flags));
	set_lock(sk, SOCK_RCVBUF_LOCK, flags);
	WRITE_ONCE(sk->sk_sndbuf, buffer_size(image, SOCKMI_OPT_SNDBUF, sk->sk_sndbuf,
					      READ_ONCE(net->ipv4.sysctl_tcp_wmem[2]), SOCK_MIN_SNDBUF, &flags));
	set_lock(sk, SOCK_SNDBUF_LOCK, flags);
	if (sk->sk_rcvbuf != sockmi_option_number(image, SOCKMI_OPT_RCVBUF, sk->sk_rcvbuf, NULL) ||
	    sk->sk_sndbuf != sockmi_option_number(image, SOCKMI_OPT_SNDBUF, sk->sk_sndbuf, NULL))
		losses->approximated |= SOCKMI_LOSS_BUFFER_SIZES;
}

static long timeout_jiffies(s64 us)
{
	if (us <= 0)
		return MAX_SCHEDULE_TIMEOUT;
	us = div_u64((u64)us + USEC_PER_SEC / HZ - 1, USEC_PER_SEC / HZ);
	return us >= MAX_SCHEDULE_TIMEOUT ? MAX_SCHEDULE_TIMEOUT - 1 : (long)us;
}

/* A pacing rate or a low mark that cannot be is as good as none. */
static void set_late(struct sock *sk, const struct sockmi_image *image, struct sockmi_option o)
{
	switch (o.id) {
	case SOCKMI_OPT_KEEPALIVE:
		if (sk->sk_prot->keepalive)
			sk->sk_prot->keepalive(sk, !!o.number);
		sock_valbool_flag(sk, SOCK_KEEPOPEN, !!o.number);
		break;
	case SOCKMI_OPT_BROADCAST:
		sock_valbool_flag(sk, SOCK_BROADCAST, !!o.number);
		break;
	case SOCKMI_OPT_OOBINLINE:
		sock_valbool_flag(sk, SOCK_URGINLINE, !!o.number);
		break;
	case SOCKMI_OPT_DONTROUTE:
		sock_valbool_flag(sk, SOCK_LOCALROUTE, !!o.number);
		break;
	case SOCKMI_OPT_LINGER:
		sock_valbool_flag(sk, SOCK_LINGER, !!(o.number & LINGER_ON));
		o.number = div64_s64(o.number & (LINGER_ON - 1), SECOND);
		WRITE_ONCE(sk->sk_lingertime, min_t(s64, o.number, MAX_SCHEDULE_TIMEOUT / HZ - 1) * HZ);
		break;
	case SOCKMI_OPT_RCVLOWAT:
		WRITE_ONCE(sk->sk_rcvlowat, clamp_t(s64, o.number, 1, sk->sk_rcvbuf / 2));
		break;
	case SOCKMI_OPT_RCVTIMEO_US:
		WRITE_ONCE(sk->sk_rcvtimeo, timeout_jiffies(o.number));
		break;
	case SOCKMI_OPT_SNDTIMEO_US:
		WRITE_ONCE(sk->sk_sndtimeo, timeout_jiffies(o.number));
		break;
	case SOCKMI_OPT_PRIORITY:
		WRITE_ONCE(sk->sk_priority, (u32)o.number);
		break;
	case SOCKMI_OPT_MAX_PACING_RATE:
		if (!o.number || o.number < -1)
			break;
		WRITE_ONCE(sk->sk_max_pacing_rate, o.number);
		if (o.number < 0)
			break;
		cmpxchg(&sk->sk_pacing_status, SK_PACING_NONE, SK_PACING_NEEDED);
		break;
	case SOCKMI_OPT_PEEK_OFF:
		if (o.number >= -1 && o.number <= S32_MAX)
			WRITE_ONCE(sk->sk_peek_off, (int)o.number);
		break;
	case SOCKMI_OPT_ZEROCOPY:
		sock_valbool_flag(sk, SOCK_ZEROCOPY, !!o.number);
		break;
	case SOCKMI_OPT_QUICKACK:
		if (!(image->present & SOCKMI_HAS(SOCKMI_RECEIVE_AUTOTUNE)) && !o.number)
			inet_csk_enter_pingpong_mode(sk);
		break;
	}
}

void sockmi_options_late(struct sock *sk, const struct sockmi_image *image, const struct sockmi_view *before, u32 flags,
			 struct sockmi_losses *losses)
{
	struct sockmi_view rest = *before;
	struct sockmi_option option;

	set_buffers(sk, image, losses);
	while (sockmi_option_next(&rest, &option))
		if (!stays(option.id, flags) && !names(image, option.id))
			set_late(sk, image, (struct sockmi_option){ .id = option.id, .number = usual_of(option.id) });
	rest = image->socket_options;
	while (sockmi_option_next(&rest, &option))
		set_late(sk, image, option);
}
