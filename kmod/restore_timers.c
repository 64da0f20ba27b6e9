// SPDX-License-Identifier: GPL-2.0
/* The timers of a restored connection. They go on from the restore; what had to be set anew is told. */
#include "restore.h"

#define KEEPALIVE_MOST ((u64)MAX_TCP_KEEPIDLE * HZ)
#define BACKOFF_MOST (ilog2(TCP_RTO_MAX / TCP_RTO_MIN) + 1)

/* Microseconds to jiffies, within what a timer can be set to. */
static unsigned long in_jiffies(u64 us, u64 most)
{
	return clamp_t(u64, div_u64(us, USEC_PER_SEC / HZ), 1, most);
}

/*
 * ACKs that came in during the move are lost. A loss probe asks for a new one after two RTTs and costs no
 * congestion window (RFC 8985 section 7); without SACK there is none, and the retransmission timer must do.
 */
static void restart_retransmission(struct restore *r)
{
	const struct sockmi_timers *t = &r->image->timers;
	unsigned long rto = r->icsk->icsk_rto, probe;
	struct tcp_sock *tp = r->tp;

	if (t->retransmit_us)
		rto = in_jiffies(t->retransmit_us, rto);
	/* An RTT that was never measured is hardly longer than that. */
	probe = tp->srtt_us ? usecs_to_jiffies(tp->srtt_us >> 2) + 1 : HZ / 5;
	if (tp->rx_opt.sack_ok && READ_ONCE(sock_net(r->sk)->ipv4.sysctl_tcp_early_retrans) && probe < rto) {
		inet_csk_reset_xmit_timer(r->sk, ICSK_TIME_LOSS_PROBE, probe, TCP_RTO_MAX);
		r->losses->approximated |= SOCKMI_LOSS_TIMERS;
		return;
	}
	inet_csk_reset_xmit_timer(r->sk, ICSK_TIME_RETRANS, rto, TCP_RTO_MAX);
	/* The next one comes after a plain RTO, however often there was none. */
	if (!t->retransmit_us || r->image->path_model.backoff)
		r->losses->approximated |= SOCKMI_LOSS_TIMERS;
}

/*
 * A window that opened during the move has told nobody: the first probe does not wait for longer than an RTO. Those
 * that follow are as far apart as they were.
 */
static void restore_probe(struct restore *r)
{
	unsigned long left = in_jiffies(r->image->timers.probe_us, TCP_RTO_MAX);

	if (has(r, SOCKMI_PATH_MODEL) && !(r->flags & SOCKMI_DEV_RESET_PATH))
		r->icsk->icsk_backoff = min_t(u8, r->image->path_model.backoff, BACKOFF_MOST);
	if (left > r->icsk->icsk_rto) {
		left = r->icsk->icsk_rto;
		r->losses->approximated |= SOCKMI_LOSS_TIMERS;
	}
	inet_csk_reset_xmit_timer(r->sk, ICSK_TIME_PROBE0, left, TCP_RTO_MAX);
}

/* The timer asks when something was last heard: then there are no probes before their time, and none too late. */
static void restore_keepalive(struct restore *r)
{
	unsigned long left = in_jiffies(r->image->timers.keepalive_us, KEEPALIVE_MOST);
	unsigned long silence = keepalive_time_when(r->tp);

	if (!r->tp->packets_out && tcp_write_queue_empty(r->sk) && left < silence) {
		r->tp->rcv_tstamp = tcp_jiffies32 - (silence - left);
		r->icsk->icsk_ack.lrcvtime = r->tp->rcv_tstamp;
	}
	sk_reset_timer(r->sk, sockmi_keepalive_timer(r->sk), jiffies + left);
}

/* An ACK that was delayed is sent at activation. */
void sockmi_restore_timers(struct restore *r)
{
	const struct sockmi_timers *t = &r->image->timers;

	if (!has(r, SOCKMI_TIMERS))
		r->losses->reset |= SOCKMI_LOSS_TIMERS;
	if (r->tp->packets_out)
		restart_retransmission(r);
	else if (t->probe_us && tcp_send_head(r->sk))
		restore_probe(r);
	if (sock_flag(r->sk, SOCK_KEEPOPEN) && t->keepalive_us)
		restore_keepalive(r);
}
