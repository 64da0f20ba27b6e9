// SPDX-License-Identifier: GPL-2.0
/*
 * Writes the image of a socket whose lock is held. Nothing here sleeps or allocates: the image goes straight into
 * memory that was there before the freeze. What the queues hold must be as long as the sequence numbers say,
 * else the socket is refused.
 */
#include <linux/tcp.h>
#include <net/sock_reuseport.h>

#include "internal.h"

#define OPTIONS_ROOM 4096 /* socket options, fidelity, headers and all fixed sections */

struct dump {
	struct sock *sk;
	struct tcp_sock *tp;
	struct inet_connection_sock *icsk;
	struct sockmi_writer writer;
	struct sockmi_identity identity;
	struct sockmi_sequence sequence;
	struct sockmi_window window;
	struct sockmi_negotiated negotiated;
	u32 refusal;
	bool has_early_fin; /* in the image */
};

static bool in_states(const struct dump *d, unsigned int mask)
{
	return 1 << d->sk->sk_state & mask;
}

#define OWN_FIN (TCPF_FIN_WAIT1 | TCPF_FIN_WAIT2 | TCPF_CLOSING | TCPF_LAST_ACK)
#define PEER_FIN (TCPF_CLOSE_WAIT | TCPF_CLOSING | TCPF_LAST_ACK)

/* Microseconds until @due, in jiffies; 1 if that is past. */
static u64 until(unsigned long due)
{
	long left = due - jiffies;

	return left > 0 ? (u64)left * (USEC_PER_SEC / HZ) : 1;
}

/* ---- Sequence numbers ---- */

static void dump_sequence(struct dump *d)
{
	struct tcp_sock *tp = d->tp;
	struct sockmi_sequence *s = &d->sequence;

	*s = (struct sockmi_sequence){
		.snd_una = tp->snd_una,
		.snd_nxt = tp->snd_nxt,
		.write_seq = tp->write_seq,
		.rcv_nxt = tp->rcv_nxt,
		.copied_seq = tp->copied_seq,
	};
	if (d->sk->sk_state == TCP_SYN_SENT) {
		s->iss = tp->snd_una;
		s->rcv_nxt = 0;
		s->copied_seq = 0;
		return;
	}
	if (in_states(d, OWN_FIN)) {
		s->flags |= SOCKMI_OWN_FIN | SOCKMI_SHUT_WR;
		if (s->snd_nxt == s->write_seq)
			s->flags |= SOCKMI_OWN_FIN_SENT;
	}
	if (in_states(d, PEER_FIN)) {
		s->flags |= SOCKMI_PEER_FIN | SOCKMI_SHUT_RD;
		if (s->copied_seq == s->rcv_nxt)
			s->flags |= SOCKMI_PEER_FIN_READ;
	}
	if (d->sk->sk_shutdown & RCV_SHUTDOWN)
		s->flags |= SOCKMI_SHUT_RD;
}

/* ---- Queues ---- */

/* Sequence number of the first byte of data, and the one after the last; without SYN and FIN. */
static u32 data_start(const struct sk_buff *skb)
{
	return TCP_SKB_CB(skb)->seq + !!(TCP_SKB_CB(skb)->tcp_flags & TCPHDR_SYN);
}

static u32 data_end(const struct sk_buff *skb)
{
	return data_start(skb) + skb->len;
}

/**
 * struct filler - a queue's bytes, put together from buffers that may overlap
 * @place: where the next byte goes
 * @seq: its sequence number
 * @end: where the queue ends
 */
struct filler {
	u8 *place;
	u32 seq;
	u32 end;
};

/* What @skb adds. False: there is a hole before it, or its bytes cannot be read. */
static bool fill(struct filler *f, const struct sk_buff *skb)
{
	u32 start = data_start(skb), end = data_end(skb), offset, length;

	if (!after(end, f->seq) || !before(f->seq, f->end))
		return true;
	if (after(start, f->seq))
		return false;
	offset = f->seq - start;
	length = min(end - f->seq, f->end - f->seq);
	if (skb_copy_bits(skb, offset, f->place, length))
		return false;
	f->place += length;
	f->seq += length;
	return true;
}

static int inconsistent(struct dump *d)
{
	d->refusal = SOCKMI_REFUSAL_INCONSISTENT;
	return -EOPNOTSUPP;
}

/* A queue's section: @bytes from @seq on, by @walk, which feeds the filler. */
static int dump_queue(struct dump *d, u16 type, u32 seq, u32 bytes, bool (*walk)(struct dump *, struct filler *))
{
	struct filler f = { .seq = seq, .end = seq + bytes };

	if (!bytes)
		return 0;
	f.place = sockmi_writer_reserve(&d->writer, type, bytes);
	if (!f.place)
		return 0; /* the writer remembers it */
	if (!walk(d, &f) || f.seq != f.end)
		return d->refusal ? -EOPNOTSUPP : inconsistent(d);
	sockmi_writer_commit(&d->writer, bytes);
	return 0;
}

static bool walk_received(struct dump *d, struct filler *f)
{
	struct sk_buff *skb;

	skb_queue_walk(&d->sk->sk_receive_queue, skb)
		if (!fill(f, skb))
			return false;
	return true;
}

/* Sent from its owner's memory: he waits for the word that it is his again, and the copy's owner would never hear it. */
static bool is_lent(struct dump *d, struct sk_buff *skb)
{
	if (!skb_zcopy(skb))
		return false;
	d->refusal = SOCKMI_REFUSAL_ZEROCOPY;
	return true;
}

static bool walk_sent(struct dump *d, struct filler *f)
{
	struct sk_buff *skb;

	for (skb = skb_rb_first(&d->sk->tcp_rtx_queue); skb; skb = skb_rb_next(skb))
		if (is_lent(d, skb) || !fill(f, skb))
			return false;
	return true;
}

static bool walk_unsent(struct dump *d, struct filler *f)
{
	struct sk_buff *skb;

	skb_queue_walk(&d->sk->sk_write_queue, skb)
		if (is_lent(d, skb) || !fill(f, skb))
			return false;
	return true;
}

static int dump_queues(struct dump *d)
{
	const struct sockmi_sequence *s = &d->sequence;
	bool fin_sent = s->flags & SOCKMI_OWN_FIN_SENT && d->sk->sk_state != TCP_FIN_WAIT2;
	bool fin_unsent = s->flags & SOCKMI_OWN_FIN && !(s->flags & SOCKMI_OWN_FIN_SENT);
	bool fin_unread = s->flags & SOCKMI_PEER_FIN && !(s->flags & SOCKMI_PEER_FIN_READ);
	int result;

	if (d->sk->sk_state == TCP_SYN_SENT)
		return 0;
	result = dump_queue(d, SOCKMI_RECEIVE_QUEUE, s->copied_seq, s->rcv_nxt - s->copied_seq - fin_unread,
			    walk_received);
	if (!result)
		result = dump_queue(d, SOCKMI_SENT_QUEUE, s->snd_una, s->snd_nxt - s->snd_una - fin_sent, walk_sent);
	if (!result)
		result = dump_queue(d, SOCKMI_UNSENT_QUEUE, s->snd_nxt, s->write_seq - s->snd_nxt - fin_unsent,
				    walk_unsent);
	return result;
}

/**
 * struct run - what came too early, without holes and overlaps
 * @skb: buffer to be looked at next
 * @seq: end of what has been seen
 * @edge: nothing beyond it was ever allowed
 */
struct run {
	struct sk_buff *skb;
	u32 seq;
	u32 edge;
};

static struct run first_run(const struct dump *d, u32 edge)
{
	return (struct run){ skb_rb_first(&d->tp->out_of_order_queue), d->tp->rcv_nxt + 1, edge };
}

/* The next piece: a buffer's bytes from @start to @end. False: no more, or beyond the edge (sent again, then). */
static bool next_piece(struct run *run, struct sk_buff **skb, u32 *start, u32 *end)
{
	while (run->skb) {
		*skb = run->skb;
		*start = data_start(*skb);
		*end = data_end(*skb);
		if (after(*end, run->edge))
			return false;
		run->skb = skb_rb_next(run->skb);
		if (before(*start, run->seq))
			*start = run->seq;
		if (before(*start, *end)) {
			run->seq = *end;
			return true;
		}
	}
	return false;
}

/* Bytes of the section, and of the segment that begins at each of its segments' first piece. */
static size_t out_of_order_bytes(const struct dump *d, u32 edge)
{
	struct run run = first_run(d, edge);
	u32 start, end, length = 0, next = 0;
	struct sk_buff *skb;
	size_t bytes = 0;

	while (next_piece(&run, &skb, &start, &end)) {
		if (!length || start != next) {
			bytes += ALIGN((size_t)length, 8) + 8;
			length = 0;
		}
		length += end - start;
		next = end;
	}
	return bytes + ALIGN((size_t)length, 8);
}

/* Pieces that touch each other are one segment. */
static int dump_out_of_order(struct dump *d, u32 edge)
{
	size_t bytes = out_of_order_bytes(d, edge);
	struct run run = first_run(d, edge);
	u32 start, end, length = 0, next = 0;
	u8 *place, *header = NULL, *p;
	struct sk_buff *skb;

	if (!bytes)
		return 0;
	place = sockmi_writer_reserve(&d->writer, SOCKMI_OUT_OF_ORDER, bytes);
	if (!place)
		return 0;
	memset(place, 0, bytes);
	p = place;
	while (next_piece(&run, &skb, &start, &end)) {
		if (!header || start != next) {
			header = place + ALIGN((size_t)(p - place), 8);
			put_unaligned_le32(start, header);
			p = header + 8;
			length = 0;
		}
		if (skb_copy_bits(skb, start - data_start(skb), p, end - start))
			return inconsistent(d);
		p += end - start;
		length += end - start;
		put_unaligned_le32(length, header + 4);
		next = end;
	}
	sockmi_writer_commit(&d->writer, bytes);
	return 0;
}

static u32 out_of_order_end(const struct dump *d)
{
	const struct sk_buff *skb = d->tp->ooo_last_skb;

	return RB_EMPTY_ROOT(&d->tp->out_of_order_queue) || !skb ? d->tp->rcv_nxt : TCP_SKB_CB(skb)->end_seq;
}

static bool has_fin(const struct sk_buff *skb)
{
	return TCP_SKB_CB(skb)->tcp_flags & TCPHDR_FIN;
}

/* A FIN that came too early, if nothing came that would be behind it. */
static void dump_early_fin(struct dump *d, u32 edge)
{
	struct sk_buff *skb = skb_rb_first(&d->tp->out_of_order_queue);
	struct sockmi_early_fin fin;

	while (skb && !has_fin(skb))
		skb = skb_rb_next(skb);
	if (!skb || skb_rb_next(skb) || after(TCP_SKB_CB(skb)->end_seq, edge))
		return;
	fin = (struct sockmi_early_fin){ .seq = TCP_SKB_CB(skb)->end_seq - 1 };
	sockmi_writer_put(&d->writer, SOCKMI_EARLY_FIN, &fin, sizeof(fin));
	d->has_early_fin = true;
}

/* The SACK blocks that were sent, as far as they lie within what is carried. */
static void dump_receive_sack(struct dump *d, u32 edge)
{
	struct tcp_sock *tp = d->tp;
	int i;

	if (!tp->rx_opt.num_sacks || !(d->negotiated.flags & SOCKMI_NEGOTIATED_SACK))
		return;
	sockmi_writer_open(&d->writer, SOCKMI_RECEIVE_SACK);
	for (i = 0; i < min_t(int, tp->rx_opt.num_sacks, TCP_NUM_SACKS); i++) {
		u32 start = tp->selective_acks[i].start_seq, end = tp->selective_acks[i].end_seq;

		if (after(start, tp->rcv_nxt) && before(start, end) && !after(end, edge))
			sockmi_writer_range(&d->writer, start, end);
	}
	sockmi_writer_close(&d->writer);
}

/* Marks of the sent data: only buffers that have one. */
static void dump_scoreboard(struct dump *d)
{
	const struct sockmi_sequence *s = &d->sequence;
	struct tcp_sock *tp = d->tp;
	struct sk_buff *skb;
	u64 now = sockmi_clock_us();

	if (!tp->sacked_out && !tp->lost_out && !tp->retrans_out)
		return;
	sockmi_writer_open(&d->writer, SOCKMI_SACK_SCOREBOARD);
	for (skb = skb_rb_first(&d->sk->tcp_rtx_queue); skb; skb = skb_rb_next(skb)) {
		u8 marks = TCP_SKB_CB(skb)->sacked;
		u64 sent = tcp_skb_timestamp_us(skb);
		struct sockmi_sent_range range = {
			.seq = before(data_start(skb), s->snd_una) ? s->snd_una : data_start(skb),
			.end_seq = data_end(skb),
			.sent_age_us = sent && now > sent ? now - sent : 0,
		};

		if (marks & TCPCB_SACKED_ACKED && d->negotiated.flags & SOCKMI_NEGOTIATED_SACK)
			range.flags |= SOCKMI_RANGE_SACKED;
		if (marks & TCPCB_LOST)
			range.flags |= SOCKMI_RANGE_LOST;
		if (marks & TCPCB_SACKED_RETRANS)
			range.flags |= SOCKMI_RANGE_RETRANSMITTED;
		if (marks & TCPCB_EVER_RETRANS)
			range.flags |= SOCKMI_RANGE_EVER_RETRANSMITTED;
		if (range.flags && before(range.seq, range.end_seq))
			sockmi_writer_sent_range(&d->writer, &range);
	}
	sockmi_writer_close(&d->writer);
}

/* ---- Fixed sections ---- */

static noinline_for_stack void dump_negotiated(struct dump *d)
{
	const struct tcp_options_received *rx = &d->tp->rx_opt;
	struct sockmi_negotiated *n = &d->negotiated;
	struct tcp_sock *tp = d->tp;

	*n = (struct sockmi_negotiated){
		.flags = (rx->wscale_ok ? SOCKMI_NEGOTIATED_WSCALE : 0) |
			 (rx->sack_ok & TCP_SACK_SEEN ? SOCKMI_NEGOTIATED_SACK : 0) |
			 (rx->tstamp_ok ? SOCKMI_NEGOTIATED_TIMESTAMPS : 0) |
			 (tp->ecn_flags & SOCKMI_ECN_OK ? SOCKMI_NEGOTIATED_ECN : 0) |
			 (tp->syn_data_acked ? SOCKMI_NEGOTIATED_FASTOPEN : 0),
		.mss_clamp = rx->mss_clamp,
		.advmss = tp->advmss,
		.rcv_mss = d->icsk->icsk_ack.rcv_mss,
		.mss_cache = min_t(u32, tp->mss_cache, U16_MAX),
	};
	if (rx->wscale_ok) {
		n->snd_wscale = rx->snd_wscale;
		n->rcv_wscale = rx->rcv_wscale;
	}
	if (d->sk->sk_state == TCP_SYN_SENT) {
		struct net *net = sock_net(d->sk);

		/* Nothing is negotiated yet; this is what the SYN has offered. */
		n->snd_wscale = 0;
		n->mss_clamp = 0;
		n->flags = (READ_ONCE(net->ipv4.sysctl_tcp_window_scaling) ? SOCKMI_NEGOTIATED_WSCALE : 0) |
			   (READ_ONCE(net->ipv4.sysctl_tcp_sack) ? SOCKMI_NEGOTIATED_SACK : 0) |
			   (READ_ONCE(net->ipv4.sysctl_tcp_timestamps) ? SOCKMI_NEGOTIATED_TIMESTAMPS : 0) |
			   (tp->ecn_flags & SOCKMI_ECN_OK ? SOCKMI_NEGOTIATED_ECN : 0);
		n->rcv_wscale = n->flags & SOCKMI_NEGOTIATED_WSCALE ? rx->rcv_wscale : 0;
	}
	sockmi_writer_put(&d->writer, SOCKMI_NEGOTIATED, n, sizeof(*n));
}

/* The window, and the right edge that bounds what came out of order. */
static u32 dump_window(struct dump *d)
{
	struct tcp_sock *tp = d->tp;
	u32 limit = 65535u << d->negotiated.rcv_wscale, snd_limit = 65535u << d->negotiated.snd_wscale;
	struct sockmi_window w = {
		.snd_wl1 = tp->snd_wl1,
		.snd_wnd = min(tp->snd_wnd, snd_limit),
		.max_window = min(max(tp->max_window, tp->snd_wnd), snd_limit),
		.rcv_wnd = min(tp->rcv_wnd, limit),
		.rcv_wup = tp->rcv_wup,
		.flags = SOCKMI_WINDOW_HAS_SSTHRESH | SOCKMI_WINDOW_HAS_RIGHT_EDGE,
		.rcv_ssthresh = tp->rcv_ssthresh,
	};
	u32 edge = w.rcv_wup + w.rcv_wnd, remembered;

	if (tp->window_clamp) {
		w.flags |= SOCKMI_WINDOW_HAS_CLAMP;
		w.window_clamp = tp->window_clamp;
	}
	/* A window that has shrunk meanwhile was open once for what came in. */
	if (sockmi_right_edge(tp, &remembered) && after(remembered, edge))
		edge = remembered;
	if (after(out_of_order_end(d), edge))
		edge = out_of_order_end(d);
	if (edge - w.rcv_wup > 1u << 30)
		edge = w.rcv_wup + w.rcv_wnd;
	w.rcv_right_edge = edge;
	d->window = w;
	sockmi_writer_put(&d->writer, SOCKMI_WINDOW, &w, sizeof(w));
	return edge;
}

static noinline_for_stack void dump_timestamp(struct dump *d)
{
	struct tcp_sock *tp = d->tp;
	bool usec = sockmi_ts_usec(tp);
	struct sockmi_timestamp t = {
		.tsval = sockmi_ts_clock(tp) + tp->tsoffset,
		.unit = usec ? SOCKMI_TIMESTAMP_US : SOCKMI_TIMESTAMP_MS,
	};

	if (!(d->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS))
		return;
	if (d->sk->sk_state == TCP_SYN_SENT) {
		t.flags = SOCKMI_TIMESTAMP_HAS_SYN;
		t.syn_first_tsval = tp->retrans_stamp + tp->tsoffset;
		t.syn_last_tsval = t.syn_first_tsval;
		if (inet_csk(d->sk)->icsk_retransmits) {
			struct sk_buff *skb = tcp_rtx_queue_head(d->sk);
			u64 sent = skb ? tcp_skb_timestamp_us(skb) : 0;

			if (sent)
				t.syn_last_tsval = (u32)(usec ? sent : div_u64(sent, USEC_PER_MSEC)) + tp->tsoffset;
		}
	} else if (tp->rx_opt.ts_recent_stamp) {
		s64 age = ktime_get_seconds() - tp->rx_opt.ts_recent_stamp;

		t.flags = SOCKMI_TIMESTAMP_HAS_RECENT;
		t.ts_recent = tp->rx_opt.ts_recent;
		t.ts_recent_age_us = age > 0 ? (u64)age * USEC_PER_SEC : 0;
	}
	sockmi_writer_put(&d->writer, SOCKMI_TIMESTAMP, &t, sizeof(t));
}

/* The kernel doubles icsk_rto with each retransmission, but not with each window probe. */
static u32 rto_us(const struct inet_connection_sock *icsk)
{
	unsigned int doublings = icsk->icsk_pending == ICSK_TIME_PROBE0 ? 0 : min_t(unsigned int, icsk->icsk_backoff, 31);

	return max(jiffies_to_usecs(icsk->icsk_rto) >> doublings, 1U);
}

static noinline_for_stack void dump_path_model(struct dump *d)
{
	struct inet_connection_sock *icsk = d->icsk;
	struct tcp_sock *tp = d->tp;
	unsigned long pacing = READ_ONCE(d->sk->sk_pacing_rate);
	u32 rtt_min = tcp_min_rtt(tp);
	struct sockmi_path_model p = {
		.flags = (tp->undo_marker ? SOCKMI_PATH_HAS_UNDO : 0) |
			 (tp->rack.mstamp ? SOCKMI_PATH_HAS_RACK : 0) |
			 (pacing && pacing != ~0UL ? SOCKMI_PATH_HAS_PACING : 0),
		.cwnd = tcp_snd_cwnd(tp),
		.ssthresh = tp->snd_ssthresh,
		.cwnd_cnt = tp->snd_cwnd_cnt,
		.cwnd_clamp = tp->snd_cwnd_clamp == ~0U ? 0 : tp->snd_cwnd_clamp,
		.srtt_us = tp->srtt_us >> 3,
		.mdev_us = tp->mdev_us >> 2,
		.mdev_max_us = tp->mdev_max_us >> 2,
		.rttvar_us = tp->rttvar_us >> 2,
		.rtt_min_us = rtt_min == ~0U ? 0 : rtt_min,
		.rto_us = rto_us(icsk),
		.reordering = tp->reordering,
		.reord_seen = tp->reord_seen,
		.high_seq = tp->high_seq,
		.rtt_seq = tp->rtt_seq,
		.backoff = min_t(u8, icsk->icsk_backoff, 63),
		.retransmits = icsk->icsk_retransmits,
		.congestion_state = icsk->icsk_ca_state,
	};

	if (p.flags & SOCKMI_PATH_HAS_UNDO) {
		p.prior_cwnd = tp->prior_cwnd;
		p.prior_ssthresh = tp->prior_ssthresh;
		p.undo_marker = tp->undo_marker;
		p.undo_retrans = max(tp->undo_retrans, 0);
	}
	if (p.flags & SOCKMI_PATH_HAS_RACK) {
		p.rack_age_us = sockmi_mstamp_age(tp, tp->rack.mstamp);
		p.rack_rtt_us = tp->rack.rtt_us;
		p.rack_end_seq = tp->rack.end_seq;
	}
	if (p.flags & SOCKMI_PATH_HAS_PACING)
		p.pacing_rate_bytes_s = pacing;
	sockmi_writer_put(&d->writer, SOCKMI_PATH_MODEL, &p, sizeof(p));
}

static noinline_for_stack void dump_receive_autotune(struct dump *d)
{
	struct tcp_sock *tp = d->tp;
	struct sockmi_receive_autotune a = {
		.space_age_us = sockmi_mstamp_age(tp, tp->rcvq_space.time),
		.rtt_age_us = sockmi_mstamp_age(tp, tp->rcv_rtt_est.time),
		.space_bytes = tp->rcvq_space.space,
		.space_seq = tp->rcvq_space.seq,
		.rtt_us = tp->rcv_rtt_est.rtt_us >> 3,
		.rtt_seq = tp->rcv_rtt_est.seq,
		.ato_us = jiffies_to_usecs(d->icsk->icsk_ack.ato),
		.quick = d->icsk->icsk_ack.quick,
		.pingpong = d->icsk->icsk_ack.pingpong,
		.scaling_ratio = sockmi_scaling_ratio(tp),
	};

	sockmi_writer_put(&d->writer, SOCKMI_RECEIVE_AUTOTUNE, &a, sizeof(a));
}

/*
 * Does the mark lie where the image has no place for it? Beyond what is in order, if its segment came too early, or at a byte
 * that had come before its mark. What lies behind the reader, or at the peer's FIN, is over.
 */
static bool urgent_elsewhere(const struct dump *d)
{
	const struct sockmi_sequence *s = &d->sequence;
	const struct tcp_sock *tp = d->tp;

	if (!tp->urg_data || before(tp->urg_seq, s->copied_seq))
		return false;
	if (tp->urg_data & TCP_URG_NOTYET)
		return tp->urg_seq - s->rcv_nxt > 65535 &&
		       !(s->flags & SOCKMI_PEER_FIN && tp->urg_seq + 1 == s->rcv_nxt);
	return !before(tp->urg_seq, s->rcv_nxt);
}

static int dump_urgent(struct dump *d)
{
	const struct sockmi_sequence *s = &d->sequence;
	struct tcp_sock *tp = d->tp;
	struct sockmi_urgent u = {};

	if (urgent_elsewhere(d)) {
		d->refusal = SOCKMI_REFUSAL_URGENT;
		return -EOPNOTSUPP;
	}
	if (tp->snd_una != tp->snd_up && before(tp->snd_una, tp->snd_up) && !after(tp->snd_up, tp->write_seq)) {
		u.flags |= SOCKMI_URGENT_SEND;
		u.snd_up = tp->snd_up;
	}
	if (tp->urg_data & TCP_URG_NOTYET) {
		if (tp->urg_seq - s->rcv_nxt <= 65535) {
			u.flags |= SOCKMI_URGENT_ANNOUNCED;
			u.urg_seq = tp->urg_seq;
		}
	} else if (tp->urg_data && !before(tp->urg_seq, s->copied_seq) && before(tp->urg_seq, s->rcv_nxt)) {
		u.flags |= tp->urg_data & TCP_URG_VALID ? SOCKMI_URGENT_RECEIVED : SOCKMI_URGENT_READ;
		u.urg_seq = tp->urg_seq;
		u.urg_byte = tp->urg_data & 0xff;
	}
	if (u.flags)
		sockmi_writer_put(&d->writer, SOCKMI_URGENT, &u, sizeof(u));
	return 0;
}

static void dump_ecn(struct dump *d)
{
	struct tcp_sock *tp = d->tp;
	struct sockmi_ecn e = {
		.flags = (tp->ecn_flags & TCP_ECN_QUEUE_CWR ? SOCKMI_ECN_QUEUE_CWR : 0) |
			 (tp->ecn_flags & TCP_ECN_DEMAND_CWR ? SOCKMI_ECN_DEMAND_CWR : 0) |
			 (tp->ecn_flags & TCP_ECN_SEEN ? SOCKMI_ECN_SEEN : 0),
		.delivered_ce = tp->delivered_ce,
	};

	if (d->negotiated.flags & SOCKMI_NEGOTIATED_ECN)
		sockmi_writer_put(&d->writer, SOCKMI_ECN, &e, sizeof(e));
}

/* Until a probe is due. The kernel leaves the timer alone when something comes in, and looks again when it expires. */
static u64 keepalive_us(const struct dump *d)
{
	unsigned long due = sockmi_keepalive_timer(d->sk)->expires;
	u32 silence = keepalive_time_elapsed(d->tp), most = keepalive_time_when(d->tp);

	if (!d->icsk->icsk_probes_out && !d->tp->packets_out && tcp_write_queue_empty(d->sk) && silence < most &&
	    time_before(due, jiffies + most - silence))
		due = jiffies + most - silence;
	return until(due);
}

static noinline_for_stack void dump_timers(struct dump *d)
{
	struct inet_connection_sock *icsk = d->icsk;
	struct sockmi_timers t = {};
	u64 left = until(sockmi_xmit_due(d->sk));

	switch (icsk->icsk_pending) {
	case ICSK_TIME_RETRANS:
		t.retransmit_us = left;
		break;
	case ICSK_TIME_PROBE0:
		t.probe_us = left;
		break;
	case ICSK_TIME_LOSS_PROBE:
		t.loss_probe_us = left;
		break;
	case ICSK_TIME_REO_TIMEOUT:
		t.reorder_us = left;
		break;
	}
	if (icsk->icsk_ack.pending & ICSK_ACK_TIMER)
		t.delayed_ack_us = until(sockmi_delack_due(d->sk));
	if (timer_pending(sockmi_keepalive_timer(d->sk)))
		t.keepalive_us = keepalive_us(d);
	sockmi_writer_put(&d->writer, SOCKMI_TIMERS, &t, sizeof(t));
}

static noinline_for_stack void dump_counters(struct dump *d)
{
	struct tcp_sock *tp = d->tp;
	struct sockmi_counters c = {
		.bytes_acked = tp->bytes_acked,
		.bytes_received = tp->bytes_received,
		.bytes_sent = tp->bytes_sent,
		.bytes_retransmitted = tp->bytes_retrans,
		.segments_out = tp->segs_out,
		.segments_in = tp->segs_in,
		.data_segments_out = tp->data_segs_out,
		.data_segments_in = tp->data_segs_in,
		.delivered = tp->delivered,
		.lost = tp->lost,
		.total_retransmissions = tp->total_retrans,
		.duplicate_sacks = tp->dsack_dups,
		.app_limited = tp->app_limited,
	};

	sockmi_writer_put(&d->writer, SOCKMI_COUNTERS, &c, sizeof(c));
}

static void dump_listener(struct dump *d)
{
	struct sockmi_listener l = {
		.backlog = min_t(u32, d->sk->sk_max_ack_backlog, S32_MAX),
		.fastopen_qlen = max(d->icsk->icsk_accept_queue.fastopenq.max_qlen, 0),
		.defer_accept_us = sockmi_defer_accept_us(d->icsk),
	};

	sockmi_writer_put(&d->writer, SOCKMI_LISTENER, &l, sizeof(l));
}

/* Did a FIN come too early that the image has no place for? The peer sends it again. */
static bool lost_early_fin(const struct dump *d)
{
	struct sk_buff *skb;

	for (skb = skb_rb_first(&d->tp->out_of_order_queue); skb; skb = skb_rb_next(skb))
		if (has_fin(skb))
			return !d->has_early_fin;
	return false;
}

static bool has_private_state(const struct dump *d)
{
	return memchr_inv(d->icsk->icsk_ca_priv, 0, sizeof(d->icsk->icsk_ca_priv));
}

/*
 * Has the congestion control more than a window and a threshold? BBR has a model of the path; CUBIC, once it has left the
 * first slow start, knows the window at which data was lost, and when that was.
 */
static bool has_model(const struct dump *d)
{
	const struct tcp_congestion_ops *algorithm = d->icsk->icsk_ca_ops;

	return (algorithm && algorithm->cong_control) || (!tcp_in_initial_slowstart(d->tp) && has_private_state(d));
}

/*
 * Before that, what it has seen since data was acknowledged: CUBIC's HyStart ends slow start by the least delay and that of the
 * latest round. The handshake counts as the first delivery, and what was set up with it is nothing seen.
 */
static bool has_seen_delays(const struct dump *d)
{
	return d->tp->delivered > 1 && has_private_state(d);
}

/* What the copy of a connection begins anew, though the image tells something of it. */
static void dump_approximations(struct dump *d)
{
	/* Marks of lost data, and what is the algorithm's own. */
	if (d->icsk->icsk_ca_state != TCP_CA_Open || has_model(d))
		sockmi_writer_fidelity(&d->writer, SOCKMI_APPROXIMATED, "congestion-state");
	else if (has_seen_delays(d))
		sockmi_writer_fidelity(&d->writer, SOCKMI_APPROXIMATED, "slow-start-state");
	if (lost_early_fin(d))
		sockmi_writer_fidelity(&d->writer, SOCKMI_APPROXIMATED, "out-of-order-queue");
	/* How many probes were in vain: the copy counts from zero. */
	if (d->icsk->icsk_probes_out)
		sockmi_writer_fidelity(&d->writer, SOCKMI_APPROXIMATED, "timers");
}

/* Does a program choose among the sockets of its SO_REUSEPORT group? */
static bool has_group_program(const struct sock *sk)
{
	const struct sock_reuseport *group;
	bool has;

	rcu_read_lock();
	group = rcu_dereference(sk->sk_reuseport_cb);
	has = group && rcu_access_pointer(group->prog);
	rcu_read_unlock();
	return has;
}

/* Have BPF programs stored something with it (BPF_MAP_TYPE_SK_STORAGE)? */
static bool has_bpf_storage(const struct sock *sk)
{
#ifdef CONFIG_BPF_SYSCALL
	return rcu_access_pointer(sk->sk_bpf_storage);
#else
	return false;
#endif
}

/* What this image leaves out. */
static void dump_fidelity(struct dump *d)
{
	struct sockmi_writer *w = &d->writer;

	sockmi_writer_open(w, SOCKMI_FIDELITY);
	if (d->sk->sk_err || !skb_queue_empty(&d->sk->sk_error_queue))
		sockmi_writer_fidelity(w, SOCKMI_RESET, "error-queue");
	if (d->tp->saved_syn)
		sockmi_writer_fidelity(w, SOCKMI_RESET, "saved-syn");
	if (rcu_access_pointer(d->sk->sk_filter))
		sockmi_writer_fidelity(w, SOCKMI_RESET, "ebpf-filter");
	if (has_group_program(d->sk))
		sockmi_writer_fidelity(w, SOCKMI_RESET, "reuseport-program");
	if (has_bpf_storage(d->sk))
		sockmi_writer_fidelity(w, SOCKMI_RESET, "bpf-storage");
	/* Completions of MSG_ZEROCOPY are numbered; the copy's begin at 0. */
	if (atomic_read(&d->sk->sk_zckey))
		sockmi_writer_fidelity(w, SOCKMI_RESET, "zerocopy-count");
	if (d->identity.kind == SOCKMI_KIND_CONNECTED)
		dump_approximations(d);
	sockmi_options_left_out(d->sk, w);
	sockmi_writer_close(w);
}

/* ---- All of it ---- */

static int dump_connection(struct dump *d)
{
	u32 edge;
	int result;

	dump_sequence(d);
	sockmi_writer_put(&d->writer, SOCKMI_SEQUENCE, &d->sequence, sizeof(d->sequence));
	dump_negotiated(d);
	dump_timestamp(d);
	if (d->sk->sk_state != TCP_SYN_SENT) {
		edge = dump_window(d);
		result = dump_queues(d);
		if (!result && !(d->sequence.flags & SOCKMI_PEER_FIN))
			result = dump_out_of_order(d, edge);
		if (result)
			return result;
		if (!(d->sequence.flags & SOCKMI_PEER_FIN)) {
			dump_early_fin(d, edge);
			dump_receive_sack(d, edge);
		}
		dump_scoreboard(d);
		result = dump_urgent(d);
		if (result)
			return result;
		dump_receive_autotune(d);
	}
	dump_path_model(d);
	dump_ecn(d);
	dump_timers(d);
	dump_counters(d);
	return 0;
}

size_t sockmi_dump_bound(const struct sock *sk)
{
	const struct tcp_sock *tp = tcp_sk(sk);
	size_t bytes = OPTIONS_ROOM;

	if (sk->sk_state == TCP_LISTEN || sk->sk_state == TCP_CLOSE || sk->sk_state == TCP_SYN_SENT)
		return bytes;
	bytes += READ_ONCE(tp->write_seq) - READ_ONCE(tp->snd_una);
	bytes += READ_ONCE(tp->rcv_nxt) - READ_ONCE(tp->copied_seq);
	/* Out of order, headers included: every buffer costs more memory than its entry. */
	if (!RB_EMPTY_ROOT(&tp->out_of_order_queue))
		bytes += atomic_read(&sk->sk_rmem_alloc);
	if (tp->sacked_out || tp->lost_out || tp->retrans_out)
		bytes += tp->packets_out * sizeof(struct sockmi_sent_range);
	return min_t(size_t, bytes, SOCKMI_IMAGE_LIMIT_BYTES);
}

ssize_t sockmi_dump(struct sock *sk, void *buffer, size_t capacity, u32 *refusal, size_t *needed)
{
	struct dump d = { .sk = sk, .tp = tcp_sk(sk), .icsk = inet_csk(sk) };
	ssize_t length = 0;

	sockmi_identify(sk, &d.identity);
	sockmi_writer_start(&d.writer, buffer, capacity);
	sockmi_writer_put(&d.writer, SOCKMI_IDENTITY, &d.identity, sizeof(d.identity));
	if (d.identity.kind == SOCKMI_KIND_CONNECTED)
		length = dump_connection(&d);
	else if (d.identity.kind == SOCKMI_KIND_LISTENING)
		dump_listener(&d);
	*refusal = d.refusal;
	if (length)
		return length;
	sockmi_writer_open(&d.writer, SOCKMI_SOCKET_OPTIONS);
	sockmi_options_dump(sk, &d.writer);
	sockmi_writer_close(&d.writer);
	dump_fidelity(&d);
	length = sockmi_writer_finish(&d.writer);
	if (length == -ENOSPC) {
		*refusal = SOCKMI_REFUSAL_TOO_LARGE;
		*needed = sockmi_dump_bound(sk);
	} else if (length < 0) {
		*refusal = SOCKMI_REFUSAL_INCONSISTENT;
	}
	return length;
}
