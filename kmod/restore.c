// SPDX-License-Identifier: GPL-2.0
/*
 * Puts an image into a socket. Everything that can fail happens here, while nothing can be sent or received:
 * the socket's lock is held from before the socket gets its name until it is activated. Whatever an image says
 * is bounded before it is assigned: it may come from somebody who wants to break this kernel.
 *
 * The order matters: connect() in repair moves no packet but initializes most of the fields; what has been sent goes
 * through the repair queue; what has not been sent is queued behind a send window of zero; windows, path and timers
 * come last, because all that was before has touched them.
 */
#include <linux/net.h>
#include <net/inet_hashtables.h>

#include "restore.h"

/* Is it a socket as socket() makes them, or one that has been closed silently? The lock is held or does not matter. */
static int check_target(struct restore *r)
{
	const struct inet_sock *inet = inet_sk(r->sk);

	if (r->sk->sk_family != r->id->family)
		return refuse(r, SOCKMI_REFUSAL_FAMILY);
	if (r->sk->sk_state != TCP_CLOSE || inet->inet_num || inet->inet_dport || r->sock->state != SS_UNCONNECTED ||
	    !skb_queue_empty(&r->sk->sk_receive_queue))
		return refuse(r, SOCKMI_REFUSAL_TARGET);
	/* One that has had a v4-mapped connection sends by IPv4 for ever: nothing resets its operations. */
	if (r->id->family == AF_INET6 && r->id->kind == SOCKMI_KIND_CONNECTED && !is_mapped(&r->local) &&
	    r->icsk->icsk_af_ops->net_header_len != sizeof(struct ipv6hdr))
		return refuse(r, SOCKMI_REFUSAL_TARGET);
	r->refusal = sockmi_layers(r->sk);
	return sockmi_refusal_errno(r->refusal);
}

static int check_image(struct restore *r)
{
	if (r->image->ktls.length)
		return refuse(r, SOCKMI_REFUSAL_KTLS);
	if (r->image->negotiated.flags & SOCKMI_NEGOTIATED_ACCECN)
		return refuse(r, SOCKMI_REFUSAL_ACCECN);
	/* The kernel takes an initial sequence number of zero for none. */
	if (r->id->state == SOCKMI_SYN_SENT && !r->seq->iss)
		return refuse(r, SOCKMI_REFUSAL_STATE);
	if (r->id->kind == SOCKMI_KIND_CONNECTED && r->local.port == 0)
		return refuse(r, SOCKMI_REFUSAL_ADDRESS);
	/* A wildcard cannot replace a connection's address, nor one IP version the other. */
	if (r->id->kind == SOCKMI_KIND_CONNECTED &&
	    (is_mapped(&r->local) != is_mapped(&r->id->local) ||
	     (is_mapped(&r->local) ? !address4(&r->local) :
				     ipv6_addr_any((const struct in6_addr *)r->local.address))))
		return refuse(r, SOCKMI_REFUSAL_ADDRESS);
	if (r->id->family == AF_INET && !is_mapped(&r->local) && r->id->kind != SOCKMI_KIND_UNCONNECTED)
		return refuse(r, SOCKMI_REFUSAL_ADDRESS);
	return 0;
}

static void set_state(struct restore *r)
{
	if (flag(r, SOCKMI_SHUT_RD))
		WRITE_ONCE(r->sk->sk_shutdown, r->sk->sk_shutdown | RCV_SHUTDOWN);
	if (flag(r, SOCKMI_SHUT_WR))
		WRITE_ONCE(r->sk->sk_shutdown, r->sk->sk_shutdown | SEND_SHUTDOWN);
	/* What is counted as established: tcp_set_state() would do that, but is exported no more. */
	if (r->sk->sk_state == TCP_ESTABLISHED && r->id->state == SOCKMI_FIN_WAIT_2)
		TCP_DEC_STATS(sock_net(r->sk), TCP_MIB_CURRESTAB);
	if (r->sk->sk_state != r->id->state)
		inet_sk_set_state(r->sk, r->id->state);
	r->sock->state = SS_CONNECTED;
}

static int restore_connection(struct restore *r)
{
	u16 user_mss = r->tp->rx_opt.user_mss;
	struct tcp_sock *tp = r->tp;
	int result;

	tp->repair = 1;
	r->sk->sk_reuse = SK_FORCE_REUSE;
	tp->rx_opt.user_mss = clamp_t(u16, r->image->negotiated.mss_clamp, MSS_LEAST, 32767);
	result = sockmi_restore_bind(r);
	if (result)
		return result;
	WRITE_ONCE(tp->write_seq, r->seq->snd_una);
	WRITE_ONCE(tp->rcv_nxt, r->seq->copied_seq - (flag(r, SOCKMI_PEER_FIN_READ) ? 1 : 0));
	result = sockmi_restore_connect(r);
	tp->rx_opt.user_mss = user_mss;
	if (result)
		return result;
	sockmi_restore_negotiated(r);
	result = sockmi_restore_timestamps(r);
	if (result)
		return result;
	/* Until the buffers get their sizes at the end, the only limit is TCP's memory. */
	WRITE_ONCE(r->sk->sk_rcvbuf, BUFFER_MAX);
	WRITE_ONCE(r->sk->sk_sndbuf, BUFFER_MAX);
	result = sockmi_restore_received(r);
	if (!result)
		result = sockmi_restore_sent(r);
	if (!result)
		result = sockmi_restore_unsent(r);
	if (result)
		return result;
	if (tp->rcv_nxt != r->seq->rcv_nxt || tp->copied_seq != r->seq->copied_seq)
		return refuse(r, SOCKMI_REFUSAL_INCONSISTENT);
	set_state(r);
	sockmi_restore_windows(r);
	sockmi_options_late(r->sk, r->image, r->before, r->flags, r->losses);
	sockmi_restore_out_of_order(r);
	sockmi_restore_path(r);
	sockmi_restore_autotune(r);
	sockmi_restore_counters(r);
	sockmi_restore_urgent(r);
	sockmi_restore_timers(r);
	if (r->image->sack_scoreboard.length)
		r->losses->reset |= SOCKMI_LOSS_SACK_SCOREBOARD;
	r->sk->sk_reuse = sockmi_option_number(r->image, SOCKMI_OPT_REUSEADDR, 0, NULL) ? SK_CAN_REUSE : SK_NO_REUSE;
	tp->repair = 0;
	return 0;
}

/* What this host's SYN offers is decided by its sysctls; what the peer has heard must be the same. */
static bool offers_the_same(const struct restore *r)
{
	const struct sockmi_negotiated *n = &r->image->negotiated;
	struct net *net = sock_net(r->sk);

	return !READ_ONCE(net->ipv4.sysctl_tcp_window_scaling) == !(n->flags & SOCKMI_NEGOTIATED_WSCALE) &&
	       !READ_ONCE(net->ipv4.sysctl_tcp_sack) == !(n->flags & SOCKMI_NEGOTIATED_SACK) &&
	       !READ_ONCE(net->ipv4.sysctl_tcp_timestamps) == !(n->flags & SOCKMI_NEGOTIATED_TIMESTAMPS);
}

#define SYN_TSVAL_ERROR_MS 100

/* The other engine, which knows no path model, has to guess when the first SYN was sent. */
static u32 syn_tsval_error(const struct restore *r)
{
	if (has(r, SOCKMI_PATH_MODEL))
		return 0;
	return SYN_TSVAL_ERROR_MS * (r->image->timestamp.unit == SOCKMI_TIMESTAMP_US ? USEC_PER_MSEC : 1);
}

/*
 * The peer's answer echoes the first SYN's timestamp: the clock has to be as it was then. An echo of before
 * retrans_stamp would be answered by a RST.
 */
static int set_syn_timestamps(struct restore *r)
{
	const struct sockmi_timestamp *t = &r->image->timestamp;
	struct tcp_sock *tp = r->tp;

	if (!(r->image->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS))
		return 0;
	if (!sockmi_ts_set_usec(tp, t->unit == SOCKMI_TIMESTAMP_US))
		return refuse(r, SOCKMI_REFUSAL_TS_UNIT);
	WRITE_ONCE(tp->tsoffset, t->tsval - sockmi_ts_clock(tp));
	if (t->flags & SOCKMI_TIMESTAMP_HAS_SYN)
		tp->retrans_stamp = t->syn_first_tsval - tp->tsoffset - syn_tsval_error(r);
	else
		r->losses->approximated |= SOCKMI_LOSS_TIMESTAMP_CLOCK;
	return 0;
}

/* Whatever this host's SYN offers: what the peer answers depends on what it has heard. */
static void set_syn_ecn(struct restore *r)
{
	bool offered = r->image->negotiated.flags & SOCKMI_NEGOTIATED_ECN;
	struct sk_buff *syn = tcp_rtx_queue_head(r->sk);

	r->tp->ecn_flags = offered ? SOCKMI_ECN_OK : 0;
	if (!syn)
		return;
	TCP_SKB_CB(syn)->tcp_flags &= ~SOCKMI_SYN_ECN;
	if (offered)
		TCP_SKB_CB(syn)->tcp_flags |= TCPHDR_ECE | TCPHDR_CWR;
}

/*
 * SYN-SENT: connect() in earnest, with the same initial sequence number. Its SYN is dropped by the hold that
 * the caller has put on the tuple; if there is none it is a retransmission, as the peer sees it.
 */
static int restore_syn_sent(struct restore *r)
{
	const struct sockmi_path_model *p = &r->image->path_model;
	struct inet_connection_sock *icsk = r->icsk;
	unsigned long left;
	int result;

	if (!offers_the_same(r))
		return refuse(r, SOCKMI_REFUSAL_SCALE);
	r->sk->sk_reuse = SK_FORCE_REUSE;
	result = sockmi_restore_bind(r);
	if (result)
		return result;
	WRITE_ONCE(r->tp->write_seq, r->seq->iss);
	result = sockmi_restore_connect(r);
	if (result)
		return result;
	if (r->tp->snd_una != r->seq->iss || r->tp->write_seq != r->seq->write_seq)
		return refuse(r, SOCKMI_REFUSAL_STATE);
	r->tp->rx_opt.rcv_wscale = r->image->negotiated.rcv_wscale;
	set_syn_ecn(r);
	result = set_syn_timestamps(r);
	if (result)
		return result;
	if (has(r, SOCKMI_PATH_MODEL)) {
		icsk->icsk_backoff = min_t(u8, p->backoff, 6);
		icsk->icsk_retransmits = p->retransmits;
		icsk->icsk_rto = clamp_t(unsigned long, usecs_to_jiffies(min(p->rto_us, RTT_MOST_US)) << icsk->icsk_backoff,
					 HZ / 5, TCP_RTO_MAX);
	}
	left = r->image->timers.retransmit_us ?
		       usecs_to_jiffies(min_t(u64, r->image->timers.retransmit_us, RTT_MOST_US)) : icsk->icsk_rto;
	inet_csk_reset_xmit_timer(r->sk, ICSK_TIME_RETRANS, max(left, 1UL), TCP_RTO_MAX);
	r->sock->state = SS_CONNECTING;
	sockmi_options_late(r->sk, r->image, r->before, r->flags, r->losses);
	r->sk->sk_reuse = sockmi_option_number(r->image, SOCKMI_OPT_REUSEADDR, 0, NULL) ? SK_CAN_REUSE : SK_NO_REUSE;
	return 0;
}

/* Bound, to listen, or nothing at all. */
static int restore_closed(struct restore *r)
{
	int result = 0;

	r->sk->sk_reuse = sockmi_option_number(r->image, SOCKMI_OPT_REUSEADDR, 0, NULL) ? SK_CAN_REUSE : SK_NO_REUSE;
	if (r->id->kind != SOCKMI_KIND_UNCONNECTED)
		result = sockmi_restore_bind(r);
	else if (r->sk->sk_family == AF_INET6)
		r->sk->sk_ipv6only = r->id->v6only;
	if (!result)
		sockmi_options_late(r->sk, r->image, r->before, r->flags, r->losses);
	return result;
}

int sockmi_restore(struct socket *sock, const struct sockmi_image *image, const struct sockmi_endpoint *local,
		   u32 flags, u32 *refusal, struct sockmi_losses *losses, struct sockmi_kept **kept)
{
	static const struct sockmi_endpoint none;
	struct restore r = {
		.sock = sock,
		.sk = sock->sk,
		.tp = tcp_sk(sock->sk),
		.icsk = inet_csk(sock->sk),
		.image = image,
		.id = &image->identity,
		.seq = &image->sequence,
		.local = memcmp(local, &none, sizeof(none)) ? *local : image->identity.local,
		.flags = flags,
		.losses = losses,
	};
	struct sockmi_kept *options;
	int result;

	memset(losses, 0, sizeof(*losses));
	result = check_target(&r);
	if (!result)
		result = check_image(&r);
	if (result)
		goto refused;
	options = sockmi_keep(r.sk);
	if (!options) {
		result = refuse(&r, SOCKMI_REFUSAL_MEMORY);
		goto refused;
	}
	r.before = sockmi_kept_options(options);
	sockmi_options_early(sock, image, r.before, flags, losses);
	if (flags & SOCKMI_DEV_TRANSPARENT)
		sockmi_inet_set(r.sk, transparent, TRANSPARENT, 1);
	lock_sock(r.sk);
	result = check_target(&r);
	if (result) {
		/* Somebody else has begun to use it: what options it has now is their business. */
		release_sock(r.sk);
		goto free;
	}
	/* Who still sleeps in a call of its former life must not go on with it in this one. */
	sockmi_count_disconnect(r.sk);
	WRITE_ONCE(r.sk->sk_err, 0);
	WRITE_ONCE(r.sk->sk_shutdown, 0);
	if (image->identity.kind != SOCKMI_KIND_CONNECTED)
		result = restore_closed(&r);
	else if (image->identity.state == SOCKMI_SYN_SENT)
		result = restore_syn_sent(&r);
	else
		result = restore_connection(&r);
	if (!result) {
		sockmi_disown(r.sk);
		if (kept)
			*kept = options;
		else
			sockmi_kept_free(options);
		return 0;
	}
	sockmi_close_silently(r.sk, 0);
	release_sock(r.sk);
	sockmi_put_back(sock, options);
free:
	sockmi_kept_free(options);
refused:
	*refusal = r.refusal;
	return result;
}

/* ---- Activation ---- */

/* Has release_sock() send what may be sent. */
static void send_when_released(struct sock *sk)
{
	if (!test_and_set_bit(TCP_TSQ_DEFERRED, &sk->sk_tsq_flags))
		sock_hold(sk);
}

void sockmi_activate_sock(struct sock *sk)
{
	sockmi_adopt(sk);
	if (sk->sk_state != TCP_CLOSE && sk->sk_state != TCP_SYN_SENT) {
		/* The peer may have missed an answer; this one has what it needs. */
		sockmi_send_ack(sk);
		if (!tcp_write_queue_empty(sk))
			send_when_released(sk);
	}
	release_sock(sk);
}

/* What cannot listen goes back to what it was, unless its owner has made something else of it meanwhile. */
static void undo(struct socket *sock, struct sockmi_kept *kept)
{
	struct sock *sk = sock->sk;
	bool ours;

	lock_sock(sk);
	ours = sk->sk_state == TCP_CLOSE && sock->state == SS_UNCONNECTED && !inet_sk(sk)->inet_dport;
	if (ours) {
		inet_csk(sk)->icsk_accept_queue.fastopenq.max_qlen = 0;
		sockmi_close_silently(sk, 0);
	}
	release_sock(sk);
	if (ours)
		sockmi_put_back(sock, kept);
}

int sockmi_activate(struct socket *sock, const struct sockmi_image *image, struct sockmi_kept *kept)
{
	int result;

	sockmi_activate_sock(sock->sk);
	if (!image || image->identity.kind != SOCKMI_KIND_LISTENING)
		return 0;
	if (image->listener.fastopen_qlen) {
		int length = image->listener.fastopen_qlen;

		sock->ops->setsockopt(sock, SOL_TCP, TCP_FASTOPEN, KERNEL_SOCKPTR(&length), sizeof(length));
	}
	result = sock->ops->listen(sock, image->listener.backlog);
	if (result)
		undo(sock, kept);
	return result;
}
