/* SPDX-License-Identifier: GPL-2.0 */
/*
 * All that differs between the kernels the module is built for: 6.1, 6.12, 7.2 (Debian's).
 *
 * The version decides. Where exactly between these three something changed is not known, so a kernel of another
 * series may need another line here.
 */
#ifndef SOCKMI_COMPAT_H
#define SOCKMI_COMPAT_H

#include <linux/version.h>
#include <linux/mm.h>
#include <linux/sysctl.h>
#include <linux/tcp.h>
#include <net/inet6_hashtables.h>
#include <net/inet_connection_sock.h>
#include <net/inet_hashtables.h>
#include <net/inet_sock.h>
#include <net/ip.h>
#include <net/sock.h>
#include <net/tcp.h>

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0)
#error "sockmi needs Linux 6.1 or later"
#endif
#if LINUX_VERSION_CODE >= KERNEL_VERSION(8, 0, 0) && !defined(SOCKMI_UNKNOWN_KERNEL)
#error "sockmi does not know this kernel's TCP: build with SOCKMI_UNKNOWN_KERNEL only to port it"
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
#include <asm/unaligned.h>
#else
#include <linux/unaligned.h>
#endif

/* ---- Memory maps ---- */

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 3, 0)
static inline void sockmi_vm_clear(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags &= ~flags;
}

static inline void sockmi_vm_set(struct vm_area_struct *vma, unsigned long flags)
{
	vma->vm_flags |= flags;
}
#else
#define sockmi_vm_clear vm_flags_clear
#define sockmi_vm_set vm_flags_set
#endif

/* ---- Sockets ---- */

/* sk_wait_event() fails when the count has changed. The fix came to the stable kernels as well. */
static inline void sockmi_count_disconnect(struct sock *sk)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0) || \
	(LINUX_VERSION_CODE >= KERNEL_VERSION(6, 1, 59) && LINUX_VERSION_CODE < KERNEL_VERSION(6, 2, 0))
	sk->sk_disconnects++;
#endif
}

/*
 * disconnect(), which cannot fail: kernels of 2023 (6.1.33 to 6.1.58 and what was made beside them; Kbuild looks) refuse it
 * while somebody sleeps in a call, whom they count under the lock.
 */
static inline void sockmi_disconnect(struct sock *sk)
{
#ifdef SOCKMI_WAIT_PENDING
	int sleep = sk->sk_wait_pending;

	sk->sk_wait_pending = 0;
	WARN_ON_ONCE(sk->sk_prot->disconnect(sk, 0));
	sk->sk_wait_pending = sleep;
#else
	WARN_ON_ONCE(sk->sk_prot->disconnect(sk, 0));
#endif
}

/* ---- sysctl ---- */

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 11, 0)
#define SOCKMI_CTL_CONST
#define SOCKMI_CTL_SENTINEL 1 /* an empty row ends a table */
#else
#define SOCKMI_CTL_CONST const
#define SOCKMI_CTL_SENTINEL 0
#endif

/* A directory that is no namespace's, without files of its own. */
static inline struct ctl_table_header *sockmi_register_sysctl_dir(const char *path)
{
	static struct ctl_table empty[1];

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
	return register_sysctl(path, empty);
#else
	return register_sysctl_sz(path, empty, 0);
#endif
}

static inline struct ctl_table_header *sockmi_register_sysctl(struct net *net, const char *path,
							       struct ctl_table *table, size_t rows)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
	return register_net_sysctl(net, path, table);
#else
	return register_net_sysctl_sz(net, path, table, rows);
#endif
}

/* ---- TCP ---- */

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
#define sockmi_sockaddr sockaddr
#else
#define sockmi_sockaddr sockaddr_unsized
#endif

/* Sends an ACK that acknowledges @sk's rcv_nxt. */
static inline void sockmi_send_ack(struct sock *sk)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 12, 0)
	__tcp_send_ack(sk, tcp_sk(sk)->rcv_nxt);
#else
	__tcp_send_ack(sk, tcp_sk(sk)->rcv_nxt, 0);
#endif
}

#define SOCKMI_HAS_USEC_TS (LINUX_VERSION_CODE >= KERNEL_VERSION(6, 7, 0))

/* Does @sk count its timestamps in microseconds? */
static inline bool sockmi_ts_usec(const struct tcp_sock *tp)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	return false;
#else
	return tp->tcp_usec_ts;
#endif
}

/* The TCP timestamp clock without a socket's offset, in that socket's unit. */
static inline u32 sockmi_ts_clock(const struct tcp_sock *tp)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	return tcp_time_stamp_raw();
#else
	return tcp_clock_ts(tp->tcp_usec_ts);
#endif
}

/* Chooses the unit; false if this kernel has not got it. */
static inline bool sockmi_ts_set_usec(struct tcp_sock *tp, bool usec)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	return !usec;
#else
	tp->tcp_usec_ts = usec;
	return true;
#endif
}

#ifdef TCP_ECN_OK
#define SOCKMI_ECN_OK TCP_ECN_OK
#else
#define SOCKMI_ECN_OK TCP_ECN_MODE_RFC3168
#endif

/* What a SYN says of ECN (RFC 3168, and RFC 9768 where the kernel knows it). */
#ifdef TCPHDR_ACE
#define SOCKMI_SYN_ECN TCPHDR_ACE
#else
#define SOCKMI_SYN_ECN (TCPHDR_ECE | TCPHDR_CWR)
#endif

/* Accurate ECN (RFC 9768) negotiated, or offered by a SYN? */
static inline bool sockmi_accecn(const struct tcp_sock *tp)
{
#ifdef TCP_ECN_MODE_ACCECN
	return tp->ecn_flags & TCP_ECN_MODE_ACCECN;
#else
	return false;
#endif
}

/* Highest right edge of the window ever advertised, where the kernel remembers it. */
static inline bool sockmi_right_edge(const struct tcp_sock *tp, u32 *edge)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(7, 0, 0)
	return false;
#else
	*edge = tp->rcv_mwnd_seq;
	return true;
#endif
}

static inline void sockmi_set_right_edge(struct tcp_sock *tp, u32 edge)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(7, 0, 0)
	tp->rcv_mwnd_seq = edge;
#endif
}

/* MD5 or AO keys? */
static inline bool sockmi_authenticated(const struct tcp_sock *tp)
{
#ifdef CONFIG_TCP_MD5SIG
	if (rcu_access_pointer(tp->md5sig_info))
		return true;
#endif
#ifdef CONFIG_TCP_AO
	if (rcu_access_pointer(tp->ao_info))
		return true;
#endif
	return false;
}

/* Who listens for what comes from @remote to @local by interface @dif; under rcu_read_lock(), not referenced. */
static inline struct sock *sockmi_listener4(struct net *net, __be32 remote, __be16 remote_port, __be32 local,
					    u16 local_port, int dif)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 18, 0)
	return __inet_lookup_listener(net, net->ipv4.tcp_death_row.hashinfo, NULL, 0, remote, remote_port, local,
				      local_port, dif, 0);
#else
	return __inet_lookup_listener(net, NULL, 0, remote, remote_port, local, local_port, dif, 0);
#endif
}

#if IS_ENABLED(CONFIG_IPV6)
static inline struct sock *sockmi_listener6(struct net *net, const struct in6_addr *remote, __be16 remote_port,
					    const struct in6_addr *local, u16 local_port, int dif)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 18, 0)
	return inet6_lookup_listener(net, net->ipv4.tcp_death_row.hashinfo, NULL, 0, remote, remote_port, local,
				     local_port, dif, 0);
#else
	return inet6_lookup_listener(net, NULL, 0, remote, remote_port, local, local_port, dif, 0);
#endif
}
#endif

/* Jiffies at which the pending transmit timer (icsk_pending says which) and the delayed ACK are due. */
static inline unsigned long sockmi_xmit_due(const struct sock *sk)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 19, 0)
	return inet_csk(sk)->icsk_timeout;
#else
	return tcp_timeout_expires(sk);
#endif
}

static inline unsigned long sockmi_delack_due(const struct sock *sk)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 15, 0)
	return inet_csk(sk)->icsk_ack.timeout;
#else
	return icsk_delack_timeout(inet_csk(sk));
#endif
}

/* Stable series have moved it, so the version does not tell: Kbuild looks. */
static inline struct timer_list *sockmi_keepalive_timer(struct sock *sk)
{
#ifdef SOCKMI_KEEPALIVE_IN_ICSK
	return &inet_csk(sk)->icsk_keepalive_timer;
#else
	return &sk->sk_timer;
#endif
}

/* ---- Flags of an inet socket that became bits of one word in 6.6 ---- */

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
#define sockmi_inet_flag(sk, field, BIT) (inet_sk(sk)->field)
#define sockmi_inet_set(sk, field, BIT, value) (inet_sk(sk)->field = !!(value))
#define sockmi_defer_connect(sk) (inet_sk(sk)->defer_connect)
#else
#define sockmi_inet_flag(sk, field, BIT) inet_test_bit(BIT, sk)
#define sockmi_inet_set(sk, field, BIT, value) inet_assign_bit(BIT, sk, value)
#define sockmi_defer_connect(sk) inet_test_bit(DEFER_CONNECT, sk)
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 8, 0)
#define sockmi_inet6_flag(sk, field, BIT) (inet6_sk(sk)->field)
#else
#define sockmi_inet6_flag(sk, field, BIT) inet6_test_bit(BIT, sk)
#endif

/* Options that not every kernel knows: where it does not, their number is 0, which no option has. */

#ifdef SO_RCVPRIORITY
#define SOCKMI_SO_RCVPRIORITY SO_RCVPRIORITY
static inline s64 sockmi_rcvpriority(const struct sock *sk)
{
	return sock_flag(sk, SOCK_RCVPRIORITY);
}
#else
#define SOCKMI_SO_RCVPRIORITY 0
static inline s64 sockmi_rcvpriority(const struct sock *sk)
{
	return 0;
}
#endif

#ifdef TCP_RTO_MAX_MS
#define SOCKMI_TCP_RTO_MAX_MS TCP_RTO_MAX_MS
static inline s64 sockmi_rto_max_us(const struct sock *sk, s64 usual)
{
	return (s64)jiffies_to_msecs(tcp_rto_max(sk)) * USEC_PER_MSEC;
}
#else
#define SOCKMI_TCP_RTO_MAX_MS 0
static inline s64 sockmi_rto_max_us(const struct sock *sk, s64 usual)
{
	return usual;
}
#endif

#ifdef TCP_RTO_MIN_US /* and TCP_DELACK_MAX_US */
#define SOCKMI_TCP_RTO_MIN_US TCP_RTO_MIN_US
#define SOCKMI_TCP_DELACK_MAX_US TCP_DELACK_MAX_US
static inline s64 sockmi_rto_min_us(const struct sock *sk, s64 usual)
{
	return jiffies_to_usecs(READ_ONCE(inet_csk(sk)->icsk_rto_min));
}

static inline s64 sockmi_delack_max_us(const struct sock *sk, s64 usual)
{
	return jiffies_to_usecs(READ_ONCE(inet_csk(sk)->icsk_delack_max));
}
#else
#define SOCKMI_TCP_RTO_MIN_US 0
#define SOCKMI_TCP_DELACK_MAX_US 0
static inline s64 sockmi_rto_min_us(const struct sock *sk, s64 usual)
{
	return usual;
}

static inline s64 sockmi_delack_max_us(const struct sock *sk, s64 usual)
{
	return usual;
}
#endif

/* The highest port in the upper half, the lowest in the lower; 0: the host's. */
#ifdef IP_LOCAL_PORT_RANGE
#define SOCKMI_IP_LOCAL_PORT_RANGE IP_LOCAL_PORT_RANGE
static inline s32 sockmi_local_ports(const struct sock *sk)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 8, 0)
	return (s32)((u32)inet_sk(sk)->local_port_range.hi << 16 | inet_sk(sk)->local_port_range.lo);
#else
	return (s32)READ_ONCE(inet_sk(sk)->local_port_range);
#endif
}
#else
#define SOCKMI_IP_LOCAL_PORT_RANGE 0
static inline s32 sockmi_local_ports(const struct sock *sk)
{
	return 0;
}
#endif

/* IP_CMSG_*: what recvmsg() is to tell of IPv4 packets. */
static inline unsigned long sockmi_cmsg_flags(const struct sock *sk)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
	return inet_sk(sk)->cmsg_flags;
#else
	return inet_cmsg_flags(inet_sk(sk));
#endif
}

/* Payload share of receive buffer space, of 256; 0: this kernel does not estimate it. */
static inline u8 sockmi_scaling_ratio(const struct tcp_sock *tp)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 6, 0)
	return 0;
#else
	return tp->scaling_ratio;
#endif
}

static inline void sockmi_set_scaling_ratio(struct tcp_sock *tp, u8 ratio)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
	if (ratio)
		tp->scaling_ratio = ratio;
#endif
}

/* The clock of TCP's own time stamps, in microseconds. */
static inline u64 sockmi_clock_us(void)
{
	return div_u64(ktime_get_ns(), NSEC_PER_USEC);
}

/* Microseconds since tcp_mstamp @then (0: unknown, then 0). */
static inline u64 sockmi_mstamp_age(const struct tcp_sock *tp, u64 then)
{
	u64 now = sockmi_clock_us();

	return then && now > then ? now - then : 0;
}

#endif
