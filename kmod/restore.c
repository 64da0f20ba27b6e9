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
#include <linux/tcp.h>
#include <linux/uio.h>
#include <net/addrconf.h>
#include <net/inet_hashtables.h>
#include <net/transp_v6.h>

#include "internal.h"
#include "trace.h"

#define CHUNK_BYTES 65536 /* the receive queue gets one buffer for each */
#define BUFFER_MAX (S32_MAX / 2)
#define MSS_LEAST 88 /* as TCP_MAXSEG */
#define RTT_MOST_US (120U * USEC_PER_SEC)
#define CWND_MOST (1U << 20)
#define PAWS_MOST_S (25U * 24 * 3600) /* after 24 days a timestamp may have wrapped: RFC 7323 section 5.5 */
#define PIECE_BYTES 16384 /* of one out-of-order buffer */

struct restore {
	struct socket *sock;
	struct sock *sk;
	struct tcp_sock *tp;
	struct inet_connection_sock *icsk;
	const struct sockmi_image *image;
	const struct sockmi_identity *id;
	const struct sockmi_sequence *seq;
	struct sockmi_endpoint local;
	u32 flags;
	u32 refusal;
	struct sockmi_losses *losses;
};

static int refuse(struct restore *r, u32 refusal)
{
	r->refusal = refusal;
	return sockmi_refusal_errno(refusal);
}

static bool has(const struct restore *r, unsigned int section)
{
	return r->image->present & SOCKMI_HAS(section);
}

static bool flag(const struct restore *r, u32 mask)
{
	return r->seq->flags & mask;
}

static bool is_mapped(const struct sockmi_endpoint *e)
{
	return ipv6_addr_v4mapped((const struct in6_addr *)e->address);
}

static __be32 address4(const struct sockmi_endpoint *e)
{
	__be32 address;

	memcpy(&address, e->address + 12, sizeof(address));
	return address;
}

/* ---- Target ---- */

/* Is it a socket as socket() makes them, or one that has been closed silently? The lock is held or does not matter. */
static int check_target(struct restore *r)
{
	const struct inet_sock *inet = inet_sk(r->sk);

	if (r->sk->sk_family != r->id->family)
		return refuse(r, SOCKMI_REFUSAL_FAMILY);
	if (r->sk->sk_state != TCP_CLOSE || inet->inet_num || inet->inet_dport || r->sock->state != SS_UNCONNECTED ||
	    !skb_queue_empty(&r->sk->sk_receive_queue))
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

/* ---- Name ---- */

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
static int bind_local(struct restore *r)
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

static int connect_remote(struct restore *r)
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

/* ---- Negotiated ---- */

/* The segment size depends on the route, on what was negotiated, and on the largest window. */
static void sync_mss(struct restore *r)
{
	struct dst_entry *dst = __sk_dst_get(r->sk);

	if (r->icsk->icsk_sync_mss && dst)
		r->icsk->icsk_sync_mss(r->sk, dst_mtu(dst));
}

static void set_negotiated(struct restore *r)
{
	const struct sockmi_negotiated *n = &r->image->negotiated;
	struct tcp_sock *tp = r->tp;

	tp->rx_opt.wscale_ok = !!(n->flags & SOCKMI_NEGOTIATED_WSCALE);
	tp->rx_opt.snd_wscale = n->snd_wscale;
	tp->rx_opt.rcv_wscale = n->rcv_wscale;
	tp->rx_opt.sack_ok = n->flags & SOCKMI_NEGOTIATED_SACK ? TCP_SACK_SEEN : 0;
	tp->rx_opt.tstamp_ok = !!(n->flags & SOCKMI_NEGOTIATED_TIMESTAMPS);
	tp->rx_opt.mss_clamp = n->mss_clamp;
	tp->tcp_header_len = sizeof(struct tcphdr) + (tp->rx_opt.tstamp_ok ? TCPOLEN_TSTAMP_ALIGNED : 0);
	tp->syn_data_acked = !!(n->flags & SOCKMI_NEGOTIATED_FASTOPEN);
	if (n->advmss >= MSS_LEAST)
		tp->advmss = n->advmss;
	if (n->rcv_mss >= MSS_LEAST)
		r->icsk->icsk_ack.rcv_mss = n->rcv_mss;
	sync_mss(r);
	tp->ecn_flags = 0;
	if (n->flags & SOCKMI_NEGOTIATED_ECN) {
		const struct sockmi_ecn *e = &r->image->ecn;

		tp->ecn_flags = SOCKMI_ECN_OK | (e->flags & SOCKMI_ECN_QUEUE_CWR ? TCP_ECN_QUEUE_CWR : 0) |
				(e->flags & SOCKMI_ECN_DEMAND_CWR ? TCP_ECN_DEMAND_CWR : 0) |
				(e->flags & SOCKMI_ECN_SEEN ? TCP_ECN_SEEN : 0);
		tp->delivered_ce = e->delivered_ce;
		if (!has(r, SOCKMI_ECN))
			r->losses->approximated |= SOCKMI_LOSS_ECN;
	}
}

static int set_timestamps(struct restore *r)
{
	const struct sockmi_timestamp *t = &r->image->timestamp;
	struct tcp_sock *tp = r->tp;

	if (!tp->rx_opt.tstamp_ok)
		return 0;
	if (!sockmi_ts_set_usec(tp, t->unit == SOCKMI_TIMESTAMP_US))
		return refuse(r, SOCKMI_REFUSAL_TS_UNIT);
	WRITE_ONCE(tp->tsoffset, t->tsval - sockmi_ts_clock(tp));
	if (t->flags & SOCKMI_TIMESTAMP_HAS_RECENT) {
		u64 age = min_t(u64, div_u64(t->ts_recent_age_us, USEC_PER_SEC), PAWS_MOST_S);
		s64 stamp = ktime_get_seconds() - (s64)age;

		tp->rx_opt.ts_recent = t->ts_recent;
		/* Older than this host: old enough for PAWS to be off. Zero would mean "none". */
		tp->rx_opt.ts_recent_stamp = stamp ?: -1;
		tp->rx_opt.rcv_tsval = t->ts_recent;
	} else {
		r->losses->reset |= SOCKMI_LOSS_TS_RECENT;
	}
	return 0;
}

/* ---- Queues ---- */

/* sendmsg() of all of it to whichever queue is chosen. */
static int queue_bytes(struct restore *r, const struct sockmi_view *queue)
{
	size_t done = 0;

	while (done < queue->length) {
		struct msghdr message = { .msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL };
		struct kvec vec = { (void *)(queue->data + done), min_t(size_t, queue->length - done, CHUNK_BYTES) };
		int taken;

		iov_iter_kvec(&message.msg_iter, WRITE, &vec, 1, vec.iov_len);
		taken = tcp_sendmsg_locked(r->sk, &message, vec.iov_len);
		if (taken <= 0)
			return refuse(r, SOCKMI_REFUSAL_MEMORY);
		done += taken;
		cond_resched();
	}
	return 0;
}

/* A FIN takes a place in the receive queue until it is read. */
static int queue_peer_fin(struct restore *r)
{
	struct tcp_sock *tp = r->tp;

	if (!flag(r, SOCKMI_PEER_FIN_READ)) {
		struct sk_buff *skb = alloc_skb(0, GFP_KERNEL);

		if (!skb)
			return refuse(r, SOCKMI_REFUSAL_MEMORY);
		if (!sk_rmem_schedule(r->sk, skb, skb->truesize)) {
			kfree_skb(skb);
			return refuse(r, SOCKMI_REFUSAL_MEMORY);
		}
		memset(skb->cb, 0, sizeof(skb->cb));
		TCP_SKB_CB(skb)->seq = tp->rcv_nxt;
		TCP_SKB_CB(skb)->end_seq = tp->rcv_nxt + 1;
		TCP_SKB_CB(skb)->ack_seq = tp->snd_una;
		TCP_SKB_CB(skb)->tcp_flags = TCPHDR_ACK | TCPHDR_FIN;
		__skb_queue_tail(&r->sk->sk_receive_queue, skb);
		skb_set_owner_r(skb, r->sk);
	} else {
		WRITE_ONCE(tp->copied_seq, tp->copied_seq + 1);
	}
	WRITE_ONCE(tp->rcv_nxt, tp->rcv_nxt + 1);
	sock_set_flag(r->sk, SOCK_DONE);
	return 0;
}

/* What has been sent and not acknowledged, an own FIN included. */
static int queue_sent(struct restore *r)
{
	int result;

	r->tp->repair_queue = TCP_SEND_QUEUE;
	result = queue_bytes(r, &r->image->sent_queue);
	if (result)
		return result;
	if (flag(r, SOCKMI_OWN_FIN_SENT) && r->id->state != SOCKMI_FIN_WAIT_2)
		r->sk->sk_prot->shutdown(r->sk, SEND_SHUTDOWN);
	r->tp->repair_queue = TCP_NO_QUEUE;
	return r->tp->snd_nxt == r->seq->snd_nxt ? 0 : refuse(r, SOCKMI_REFUSAL_MEMORY);
}

/*
 * What has not been sent. Nothing goes out as long as the send window is closed, which it is since connect(). A
 * limit on unsent data is the application's business, not that of this queue.
 */
static int queue_unsent(struct restore *r)
{
	struct tcp_sock *tp = r->tp;
	u32 limit = tp->notsent_lowat;
	int result;

	if (r->seq->write_seq == r->seq->snd_nxt)
		return 0;
	tp->repair = 0;
	tp->snd_wnd = 0;
	WRITE_ONCE(tp->notsent_lowat, U32_MAX);
	result = queue_bytes(r, &r->image->unsent_queue);
	WRITE_ONCE(tp->notsent_lowat, limit);
	if (!result && flag(r, SOCKMI_OWN_FIN) && !flag(r, SOCKMI_OWN_FIN_SENT))
		r->sk->sk_prot->shutdown(r->sk, SEND_SHUTDOWN);
	tp->repair = 1;
	if (result)
		return result;
	return tp->write_seq == r->seq->write_seq && tp->snd_nxt == r->seq->snd_nxt ?
		       0 : refuse(r, SOCKMI_REFUSAL_MEMORY);
}

/* Behind the last of the out-of-order queue. */
static bool append_early(struct restore *r, u32 seq, const u8 *data, u32 length)
{
	struct tcp_sock *tp = r->tp;
	struct rb_node **place = &tp->out_of_order_queue.rb_node, *parent = NULL;
	struct sk_buff *skb = alloc_skb(length, GFP_KERNEL | __GFP_NOWARN);

	if (!skb)
		return false;
	/* What exceeds the buffer would be the first to be dropped: reneging, but no harm (RFC 2018). */
	if (atomic_read(&r->sk->sk_rmem_alloc) > r->sk->sk_rcvbuf || !sk_rmem_schedule(r->sk, skb, skb->truesize)) {
		kfree_skb(skb);
		return false;
	}
	skb_put_data(skb, data, length);
	memset(skb->cb, 0, sizeof(skb->cb));
	TCP_SKB_CB(skb)->seq = seq;
	TCP_SKB_CB(skb)->end_seq = seq + length;
	TCP_SKB_CB(skb)->ack_seq = tp->snd_una;
	TCP_SKB_CB(skb)->tcp_flags = TCPHDR_ACK;
	if (!RB_EMPTY_ROOT(&tp->out_of_order_queue)) {
		parent = &tp->ooo_last_skb->rbnode;
		place = &parent->rb_right;
	}
	rb_link_node(&skb->rbnode, parent, place);
	rb_insert_color(&skb->rbnode, &tp->out_of_order_queue);
	tp->ooo_last_skb = skb;
	skb_set_owner_r(skb, r->sk);
	return true;
}

/* Does the image's list of blocks speak of data that is here, from @start to @end? */
static bool have_early(const struct restore *r, u32 start, u32 end)
{
	struct sk_buff *skb;

	for (skb = skb_rb_first(&r->tp->out_of_order_queue); skb && before(start, end); skb = skb_rb_next(skb))
		if (!after(TCP_SKB_CB(skb)->seq, start) && after(TCP_SKB_CB(skb)->end_seq, start))
			start = TCP_SKB_CB(skb)->end_seq;
	return !before(start, end);
}

static void set_sack_blocks(struct restore *r)
{
	struct sockmi_view rest = r->image->receive_sack;
	struct tcp_sock *tp = r->tp;
	struct sockmi_range range;
	unsigned int n = 0;

	while (n < TCP_NUM_SACKS && sockmi_range_next(&rest, &range)) {
		if (!have_early(r, range.seq, range.end_seq))
			continue;
		tp->selective_acks[n].start_seq = range.seq;
		tp->selective_acks[n].end_seq = range.end_seq;
		n++;
	}
	if (!n && !RB_EMPTY_ROOT(&tp->out_of_order_queue)) {
		struct sk_buff *skb = skb_rb_first(&tp->out_of_order_queue), *next;

		tp->selective_acks[0].start_seq = TCP_SKB_CB(skb)->seq;
		while ((next = skb_rb_next(skb)) && TCP_SKB_CB(next)->seq == TCP_SKB_CB(skb)->end_seq)
			skb = next;
		tp->selective_acks[0].end_seq = TCP_SKB_CB(skb)->end_seq;
		n = 1;
	}
	tp->rx_opt.num_sacks = n;
}

static void queue_out_of_order(struct restore *r)
{
	struct sockmi_view rest = r->image->out_of_order, bytes;
	bool room = true;
	u32 seq, done;

	if (!rest.length)
		return;
	while (room && sockmi_segment_next(&rest, &seq, &bytes))
		for (done = 0; room && done < bytes.length; done += PIECE_BYTES)
			room = append_early(r, seq + done, bytes.data + done,
					    min_t(size_t, bytes.length - done, PIECE_BYTES));
	if (!room)
		r->losses->approximated |= SOCKMI_LOSS_OUT_OF_ORDER;
	if (r->image->negotiated.flags & SOCKMI_NEGOTIATED_SACK)
		set_sack_blocks(r);
}

/* ---- Windows, path, counters ---- */

static void set_windows(struct restore *r)
{
	const struct sockmi_window *w = &r->image->window;
	struct tcp_sock *tp = r->tp;

	tp->snd_wl1 = w->snd_wl1;
	tp->snd_wnd = w->snd_wnd;
	tp->max_window = w->max_window;
	tp->rcv_wnd = w->rcv_wnd;
	tp->rcv_wup = w->rcv_wup;
	if (w->flags & SOCKMI_WINDOW_HAS_CLAMP && w->window_clamp)
		WRITE_ONCE(tp->window_clamp, min_t(u32, w->window_clamp, 65535U << r->image->negotiated.rcv_wscale));
	if (w->flags & SOCKMI_WINDOW_HAS_SSTHRESH)
		tp->rcv_ssthresh = min_t(u32, w->rcv_ssthresh, tp->window_clamp);
	sockmi_set_right_edge(tp, w->flags & SOCKMI_WINDOW_HAS_RIGHT_EDGE ? w->rcv_right_edge : w->rcv_wup + w->rcv_wnd);
	sync_mss(r);
	/* The next segment takes the slow path, which decides. */
	tp->pred_flags = 0;
	tp->pushed_seq = tp->write_seq;
}

static u32 bounded(u32 value, u32 least, u32 most)
{
	return clamp(value, least, most);
}

static void set_rtt(struct restore *r)
{
	const struct sockmi_path_model *p = &r->image->path_model;
	struct tcp_sock *tp = r->tp;

	if (!p->srtt_us)
		return;
	tp->srtt_us = bounded(p->srtt_us, 1, RTT_MOST_US) << 3;
	tp->mdev_us = bounded(p->mdev_us, 1, RTT_MOST_US) << 2;
	tp->mdev_max_us = bounded(p->mdev_max_us, 1, RTT_MOST_US) << 2;
	tp->rttvar_us = bounded(p->rttvar_us, 1, RTT_MOST_US) << 2;
	tp->rtt_seq = p->rtt_seq;
	if (p->rtt_min_us)
		minmax_reset(&tp->rtt_min, tcp_jiffies32, min(p->rtt_min_us, RTT_MOST_US));
	r->icsk->icsk_rto = clamp_t(unsigned long, usecs_to_jiffies(p->rto_us), max(HZ / 100, 1), TCP_RTO_MAX);
}

static void set_path(struct restore *r)
{
	const struct sockmi_path_model *p = &r->image->path_model;
	struct tcp_sock *tp = r->tp;
	u64 now = sockmi_clock_us();

	if (!has(r, SOCKMI_PATH_MODEL) || r->flags & SOCKMI_DEV_RESET_PATH) {
		r->losses->reset |= SOCKMI_LOSS_PATH_MODEL;
		return;
	}
	set_rtt(r);
	if (p->cwnd_clamp)
		tp->snd_cwnd_clamp = p->cwnd_clamp;
	tcp_snd_cwnd_set(tp, bounded(p->cwnd, 1, min_t(u32, CWND_MOST, max(tp->snd_cwnd_clamp, 1U))));
	tp->snd_ssthresh = bounded(p->ssthresh, 2, TCP_INFINITE_SSTHRESH);
	tp->snd_cwnd_cnt = min(p->cwnd_cnt, tcp_snd_cwnd(tp));
	tp->reordering = bounded(p->reordering, 1, READ_ONCE(sock_net(r->sk)->ipv4.sysctl_tcp_max_reordering) ?: 1);
	tp->reord_seen = p->reord_seen;
	if (p->flags & SOCKMI_PATH_HAS_RACK && p->rack_age_us < now) {
		tp->rack.mstamp = now - p->rack_age_us;
		tp->rack.rtt_us = min(p->rack_rtt_us, RTT_MOST_US);
		tp->rack.end_seq = p->rack_end_seq;
	}
	if (p->flags & SOCKMI_PATH_HAS_PACING)
		WRITE_ONCE(r->sk->sk_pacing_rate,
			   min_t(u64, p->pacing_rate_bytes_s, READ_ONCE(r->sk->sk_max_pacing_rate)));
	/* Marks of the sent data are not restored; a recovery begins anew if it is needed. */
	if (p->congestion_state != SOCKMI_CA_OPEN)
		r->losses->approximated |= SOCKMI_LOSS_CONGESTION_STATE;
	tp->high_seq = tp->snd_una;
	tp->snd_cwnd_stamp = tcp_jiffies32;
	tp->lsndtime = tcp_jiffies32;
}

static void set_autotune(struct restore *r)
{
	const struct sockmi_receive_autotune *a = &r->image->receive_autotune;
	struct inet_connection_sock *icsk = r->icsk;
	struct tcp_sock *tp = r->tp;
	u64 now = sockmi_clock_us();

	if (!has(r, SOCKMI_RECEIVE_AUTOTUNE)) {
		r->losses->approximated |= SOCKMI_LOSS_WINDOW;
		return;
	}
	/* The kernel divides by it. */
	if (a->space_bytes)
		tp->rcvq_space.space = min_t(u32, a->space_bytes, BUFFER_MAX);
	tp->rcvq_space.seq = tp->copied_seq - a->space_seq < 1U << 30 ? a->space_seq : tp->copied_seq;
	tp->rcvq_space.time = a->space_age_us < now ? now - a->space_age_us : now;
	if (a->rtt_us || a->rtt_age_us) {
		tp->rcv_rtt_est.rtt_us = min(a->rtt_us, RTT_MOST_US) << 3;
		tp->rcv_rtt_est.seq = a->rtt_seq;
		tp->rcv_rtt_est.time = a->rtt_age_us < now ? now - a->rtt_age_us : now;
	}
	if (a->ato_us)
		icsk->icsk_ack.ato = clamp_t(unsigned long, usecs_to_jiffies(a->ato_us), TCP_ATO_MIN, TCP_DELACK_MAX);
	icsk->icsk_ack.quick = a->quick;
	icsk->icsk_ack.pingpong = a->pingpong;
	sockmi_set_scaling_ratio(tp, a->scaling_ratio);
}

static void set_counters(struct restore *r)
{
	const struct sockmi_counters *c = &r->image->counters;
	struct tcp_sock *tp = r->tp;

	if (!has(r, SOCKMI_COUNTERS)) {
		r->losses->reset |= SOCKMI_LOSS_COUNTERS;
		return;
	}
	tp->bytes_acked = c->bytes_acked;
	tp->bytes_received = c->bytes_received;
	tp->bytes_sent = c->bytes_sent;
	tp->bytes_retrans = c->bytes_retransmitted;
	tp->segs_out = c->segments_out;
	tp->segs_in = c->segments_in;
	tp->data_segs_out = c->data_segments_out;
	tp->data_segs_in = c->data_segments_in;
	tp->delivered = c->delivered;
	tp->lost = c->lost;
	tp->total_retrans = c->total_retransmissions;
	tp->dsack_dups = c->duplicate_sacks;
	tp->app_limited = c->app_limited;
}

static void set_urgent(struct restore *r)
{
	const struct sockmi_urgent *u = &r->image->urgent;
	struct tcp_sock *tp = r->tp;

	tp->snd_up = u->flags & SOCKMI_URGENT_SEND ? u->snd_up : tp->snd_una;
	tp->urg_seq = u->urg_seq;
	WRITE_ONCE(tp->urg_data, u->flags & SOCKMI_URGENT_RECEIVED ? TCP_URG_VALID | u->urg_byte :
				 u->flags & SOCKMI_URGENT_READ	   ? TCP_URG_READ :
				 u->flags & SOCKMI_URGENT_ANNOUNCED ? TCP_URG_NOTYET : 0);
}

/*
 * ACKs that came in during the move are lost. A loss probe asks for a new one after two RTTs and costs no
 * congestion window (RFC 8985 section 7); without SACK there is none, and the retransmission timer must do.
 */
static void set_timers(struct restore *r)
{
	const struct sockmi_timers *t = &r->image->timers;
	struct tcp_sock *tp = r->tp;
	unsigned long rto = r->icsk->icsk_rto, probe;

	if (!tp->packets_out)
		return;
	if (t->retransmit_us)
		rto = clamp_t(unsigned long, usecs_to_jiffies(min_t(u64, t->retransmit_us, U32_MAX)), 1, rto);
	/* An RTT that was never measured is hardly longer than that. */
	probe = tp->srtt_us ? usecs_to_jiffies(tp->srtt_us >> 2) + 1 : HZ / 5;
	if (tp->rx_opt.sack_ok && READ_ONCE(sock_net(r->sk)->ipv4.sysctl_tcp_early_retrans) &&
	    probe < rto)
		inet_csk_reset_xmit_timer(r->sk, ICSK_TIME_LOSS_PROBE, probe, TCP_RTO_MAX);
	else
		inet_csk_reset_xmit_timer(r->sk, ICSK_TIME_RETRANS, rto, TCP_RTO_MAX);
}

/* ---- A connection ---- */

static void set_state(struct restore *r)
{
	if (flag(r, SOCKMI_SHUT_RD))
		WRITE_ONCE(r->sk->sk_shutdown, r->sk->sk_shutdown | RCV_SHUTDOWN);
	if (flag(r, SOCKMI_SHUT_WR))
		WRITE_ONCE(r->sk->sk_shutdown, r->sk->sk_shutdown | SEND_SHUTDOWN);
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
	result = bind_local(r);
	if (result)
		return result;
	WRITE_ONCE(tp->write_seq, r->seq->snd_una);
	WRITE_ONCE(tp->rcv_nxt, r->seq->copied_seq - (flag(r, SOCKMI_PEER_FIN_READ) ? 1 : 0));
	result = connect_remote(r);
	tp->rx_opt.user_mss = user_mss;
	if (result)
		return result;
	set_negotiated(r);
	result = set_timestamps(r);
	if (result)
		return result;
	/* Until the buffers get their sizes at the end, the only limit is TCP's memory. */
	WRITE_ONCE(r->sk->sk_rcvbuf, BUFFER_MAX);
	WRITE_ONCE(r->sk->sk_sndbuf, BUFFER_MAX);
	tp->repair_queue = TCP_RECV_QUEUE;
	result = queue_bytes(r, &r->image->receive_queue);
	tp->repair_queue = TCP_NO_QUEUE;
	if (!result && flag(r, SOCKMI_PEER_FIN))
		result = queue_peer_fin(r);
	if (!result)
		result = queue_sent(r);
	if (!result)
		result = queue_unsent(r);
	if (result)
		return result;
	if (tp->rcv_nxt != r->seq->rcv_nxt || tp->copied_seq != r->seq->copied_seq)
		return refuse(r, SOCKMI_REFUSAL_INCONSISTENT);
	set_state(r);
	set_windows(r);
	sockmi_options_late(r->sk, r->image, r->losses);
	queue_out_of_order(r);
	set_path(r);
	set_autotune(r);
	set_counters(r);
	set_urgent(r);
	set_timers(r);
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
	result = bind_local(r);
	if (result)
		return result;
	WRITE_ONCE(r->tp->write_seq, r->seq->iss);
	result = connect_remote(r);
	if (result)
		return result;
	if (r->tp->snd_una != r->seq->iss || r->tp->write_seq != r->seq->write_seq)
		return refuse(r, SOCKMI_REFUSAL_STATE);
	r->tp->rx_opt.rcv_wscale = r->image->negotiated.rcv_wscale;
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
	sockmi_options_late(r->sk, r->image, r->losses);
	r->sk->sk_reuse = sockmi_option_number(r->image, SOCKMI_OPT_REUSEADDR, 0, NULL) ? SK_CAN_REUSE : SK_NO_REUSE;
	return 0;
}

/* Bound, to listen, or nothing at all. */
static int restore_closed(struct restore *r)
{
	int result = 0;

	r->sk->sk_reuse = sockmi_option_number(r->image, SOCKMI_OPT_REUSEADDR, 0, NULL) ? SK_CAN_REUSE : SK_NO_REUSE;
	if (r->id->kind != SOCKMI_KIND_UNCONNECTED)
		result = bind_local(r);
	else if (r->sk->sk_family == AF_INET6)
		r->sk->sk_ipv6only = r->id->v6only;
	if (!result)
		sockmi_options_late(r->sk, r->image, r->losses);
	return result;
}

static void unbind(struct sock *sk)
{
	sk->sk_userlocks &= ~(SOCK_BINDADDR_LOCK | SOCK_BINDPORT_LOCK);
	if (inet_sk(sk)->inet_num && sk->sk_prot->put_port)
		sk->sk_prot->put_port(sk);
	inet_sk(sk)->inet_sport = 0;
	inet_sk(sk)->inet_daddr = 0;
	inet_sk(sk)->inet_dport = 0;
	inet_reset_saddr(sk);
}

/* Children that nobody has accepted: without this, closing the listener would send each peer a RST. */
static void mute_children(struct sock *sk)
{
	struct request_sock_queue *queue = &inet_csk(sk)->icsk_accept_queue;
	struct request_sock *request;

	spin_lock_bh(&queue->rskq_lock);
	for (request = queue->rskq_accept_head; request; request = request->dl_next)
		if (request->sk)
			tcp_sk(request->sk)->repair = 1;
	spin_unlock_bh(&queue->rskq_lock);
}

void sockmi_close_silently(struct sock *sk, int error)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (sk->sk_state == TCP_LISTEN)
		mute_children(sk);
	tp->repair = 1;
	sk->sk_userlocks &= ~(SOCK_BINDADDR_LOCK | SOCK_BINDPORT_LOCK);
	if (sk->sk_state != TCP_CLOSE)
		sk->sk_prot->disconnect(sk, 0);
	unbind(sk);
	tp->repair = 0;
	tp->repair_queue = TCP_NO_QUEUE;
	sk->sk_socket->state = SS_UNCONNECTED;
	WRITE_ONCE(sk->sk_err, error);
	if (!error)
		return;
	/* Not for reading: a recv() that found it shut would take it for the peer's FIN. */
	WRITE_ONCE(sk->sk_shutdown, SEND_SHUTDOWN);
	sk->sk_state_change(sk);
	sk_error_report(sk);
}

int sockmi_restore(struct socket *sock, const struct sockmi_image *image, const struct sockmi_endpoint *local,
		   u32 flags, u32 *refusal, struct sockmi_losses *losses)
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
	int rcvbuf, sndbuf, result;

	memset(losses, 0, sizeof(*losses));
	result = check_target(&r);
	if (!result)
		result = check_image(&r);
	if (result)
		goto refused;
	sockmi_options_early(sock, image, losses);
	if (flags & SOCKMI_DEV_TRANSPARENT)
		sockmi_inet_set(r.sk, transparent, TRANSPARENT, 1);
	lock_sock(r.sk);
	result = check_target(&r);
	if (result)
		goto unlock;
	WRITE_ONCE(r.sk->sk_err, 0);
	WRITE_ONCE(r.sk->sk_shutdown, 0);
	rcvbuf = r.sk->sk_rcvbuf;
	sndbuf = r.sk->sk_sndbuf;
	if (image->identity.kind != SOCKMI_KIND_CONNECTED)
		result = restore_closed(&r);
	else if (image->identity.state == SOCKMI_SYN_SENT)
		result = restore_syn_sent(&r);
	else
		result = restore_connection(&r);
	if (!result) {
		sockmi_disown(r.sk);
		return 0;
	}
	sockmi_close_silently(r.sk, 0);
	WRITE_ONCE(r.sk->sk_rcvbuf, rcvbuf);
	WRITE_ONCE(r.sk->sk_sndbuf, sndbuf);
	r.sk->sk_reuse = SK_NO_REUSE;
unlock:
	release_sock(r.sk);
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

int sockmi_activate(struct socket *sock, const struct sockmi_image *image)
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
	return result;
}
