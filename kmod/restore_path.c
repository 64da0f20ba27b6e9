// SPDX-License-Identifier: GPL-2.0
/* What a restored connection has negotiated, and what it knows of its peer and of the path: nothing here sends. */
#include "restore.h"

#define CWND_MOST (1U << 20)
#define PAWS_MOST_S (25U * 24 * 3600) /* after 24 days a timestamp may have wrapped: RFC 7323 section 5.5 */

/* The segment size depends on the route, on what was negotiated, and on the largest window. */
static void sync_mss(struct restore *r)
{
	struct dst_entry *dst = __sk_dst_get(r->sk);

	if (r->icsk->icsk_sync_mss && dst)
		r->icsk->icsk_sync_mss(r->sk, dst_mtu(dst));
}

void sockmi_restore_negotiated(struct restore *r)
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

int sockmi_restore_timestamps(struct restore *r)
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

void sockmi_restore_windows(struct restore *r)
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

void sockmi_restore_path(struct restore *r)
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

void sockmi_restore_autotune(struct restore *r)
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

void sockmi_restore_counters(struct restore *r)
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

void sockmi_restore_urgent(struct restore *r)
{
	const struct sockmi_urgent *u = &r->image->urgent;
	struct tcp_sock *tp = r->tp;

	tp->snd_up = u->flags & SOCKMI_URGENT_SEND ? u->snd_up : tp->snd_una;
	tp->urg_seq = u->urg_seq;
	WRITE_ONCE(tp->urg_data, u->flags & SOCKMI_URGENT_RECEIVED ? TCP_URG_VALID | u->urg_byte :
				 u->flags & SOCKMI_URGENT_READ	   ? TCP_URG_READ :
				 u->flags & SOCKMI_URGENT_ANNOUNCED ? TCP_URG_NOTYET : 0);
}
