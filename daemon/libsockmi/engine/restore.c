// SPDX-License-Identifier: MIT
/*
 * Makes dormant copies. A connection is connect()ed in repair, which sends nothing, then given its queues
 * and windows; its FINs are made anew. The order matters:
 *
 * - SO_REUSEADDR is not touched in repair: it would take away the right to share a port with any
 *   other socket, and bind() would have to look at all of them;
 * - TCP_MAXSEG before connect(), or the segment size stays at 536 until the path MTU changes;
 * - TCP_CONGESTION before connect(), or the default one is initialized;
 * - the windows after the queues and FINs (which move them), before anything can be sent; what has
 *   not been sent while the peer's window is still closed: keep_unsent().
 */
#include <time.h>
#include <unistd.h>

#include "engine_internal.h"

#define RECEIVE_CHUNK_BYTES 65536 /* tcp_send_rcvq makes one buffer of each send() */
#define SEND_CHUNK_BYTES ((size_t)1 << 20)
#define INJECT_WAIT_US 200000
#define INJECT_POLL_US 20
#define FIRST_TIMEOUT_MS 1000 /* of data that is on its way; the least that TCP_RTO_MAX_MS allows */
#define SOCKMI_TCP_RTO_MAX_MS 44
#define BUFFER_MAX (INT32_MAX / 2)

struct restore {
	int fd;
	const struct sockmi_image *image;
	const struct sockmi_fresh *fresh;
	struct sockmi_result *result;
	struct sockmi_endpoint local;
	bool transparent;
	uint32_t mark;
	struct sockmi_option_plan plan;
};

static int failed(struct restore *r, int code, int step)
{
	return sockmi_fail(r->result, code, step, errno);
}

static int failed_call(struct restore *r, int step)
{
	return failed(r, errno == EPERM || errno == EACCES ? SOCKMI_RESULT_NO_PRIVILEGE : SOCKMI_RESULT_FAILED, step);
}

static bool has_flag(const struct restore *r, uint32_t flag)
{
	return r->image->sequence.flags & flag;
}

/* ---- A socket with its name ---- */

static int make_socket(struct restore *r)
{
	const struct sockmi_identity *id = &r->image->identity;
	bool six = id->family == SOCKMI_FAMILY_INET6;

	if (six && sockmi_set_int(r->fd, IPPROTO_IPV6, IPV6_V6ONLY, id->v6only) < 0)
		return failed_call(r, SOCKMI_STEP_SOCKET);
	if (r->transparent && sockmi_set_int(r->fd, six ? IPPROTO_IPV6 : IPPROTO_IP,
					     six ? IPV6_TRANSPARENT : IP_TRANSPARENT, 1) < 0)
		return failed_call(r, SOCKMI_STEP_SOCKET);
	sockmi_options_write(r->fd, &r->plan, SOCKMI_BEFORE_BIND, r->result);
	return 0;
}

static int bind_local(struct restore *r)
{
	union sockmi_sockaddr address;
	socklen_t length = sockmi_endpoint_to_sockaddr(&r->local, r->image->identity.family, &address);

	if (bind(r->fd, &address.any, length) == 0)
		return 0;
	if (errno == EADDRNOTAVAIL || errno == ENODEV)
		return failed(r, SOCKMI_RESULT_NO_ADDRESS, SOCKMI_STEP_BIND);
	return errno == EADDRINUSE ? failed(r, SOCKMI_RESULT_PORT_TAKEN, SOCKMI_STEP_BIND) :
				     failed_call(r, SOCKMI_STEP_BIND);
}

static int connect_remote(struct restore *r)
{
	union sockmi_sockaddr address;
	socklen_t length =
		sockmi_endpoint_to_sockaddr(&r->image->identity.remote, r->image->identity.family, &address);

	if (connect(r->fd, &address.any, length) == 0 || errno == EINPROGRESS)
		return 0;
	if (errno == EADDRNOTAVAIL || errno == EADDRINUSE)
		return failed(r, SOCKMI_RESULT_TUPLE_TAKEN, SOCKMI_STEP_CONNECT);
	return errno == ENETUNREACH || errno == EHOSTUNREACH || errno == EINVAL ?
		       failed(r, SOCKMI_RESULT_NO_ADDRESS, SOCKMI_STEP_CONNECT) :
		       failed_call(r, SOCKMI_STEP_CONNECT);
}

static int repair_on(struct restore *r)
{
	return sockmi_repair(r->fd, TCP_REPAIR_ON) < 0 ? failed_call(r, SOCKMI_STEP_REPAIR) : 0;
}

/* Bound, listening or unconnected: nothing but name and options. */
static int restore_closed(struct restore *r)
{
	if (make_socket(r) < 0)
		return -1;
	if (sockmi_options_find(r->image->socket_options, SOCKMI_OPT_REUSEADDR, 0, NULL) &&
	    sockmi_set_int(r->fd, SOL_SOCKET, SO_REUSEADDR, 1) < 0)
		return failed_call(r, SOCKMI_STEP_OPTION);
	if (!sockmi_endpoint_is_zero(&r->local) && bind_local(r) < 0)
		return -1;
	sockmi_options_write(r->fd, &r->plan, SOCKMI_BEFORE_CONNECT, r->result);
	sockmi_options_write(r->fd, &r->plan, SOCKMI_LATE, r->result);
	/* Whoever has it can see that it does not live yet: of a listener LISTEN says so. */
	return r->image->identity.kind == SOCKMI_KIND_LISTENING ? 0 : repair_on(r);
}

/* ---- Queues ---- */

/* Buffer space that @bytes may take: pages, and a header for each buffer. */
static int64_t space_for(size_t bytes)
{
	return (int64_t)bytes * 2 + 65536;
}

/* Make a buffer at least @bytes large, for now. @is: as getsockopt() tells. */
static int grow_buffer(struct restore *r, int option, int64_t is, int64_t bytes)
{
	if (bytes <= is)
		return 0;
	if (bytes > BUFFER_MAX)
		return sockmi_fail(r->result, SOCKMI_RESULT_TOO_LARGE, SOCKMI_STEP_RECEIVE_QUEUE, ENOBUFS);
	return sockmi_set_int(r->fd, SOL_SOCKET, option, (int)(bytes / 2)) < 0 ?
		       failed_call(r, SOCKMI_STEP_RECEIVE_QUEUE) : 0;
}

/* send() all of it, in repair: into the queue that is selected. */
static int fill(struct restore *r, struct sockmi_view queue, size_t chunk, int step)
{
	while (queue.length) {
		ssize_t taken = send(r->fd, queue.data, queue.length < chunk ? queue.length : chunk,
				     MSG_DONTWAIT | MSG_NOSIGNAL);

		if (taken <= 0)
			return failed(r, errno == EAGAIN || errno == ENOMEM || errno == ENOBUFS ?
						 SOCKMI_RESULT_TOO_LARGE : SOCKMI_RESULT_FAILED, step);
		queue.data += taken;
		queue.length -= (size_t)taken;
	}
	return 0;
}

static int grow_buffers(struct restore *r)
{
	const struct sockmi_image *i = r->image;
	size_t send_bytes = i->sent_queue.length + i->unsent_queue.length;
	int64_t receive, sending, wanted, was;

	sockmi_fresh_buffers(r->fresh, &receive, &sending);
	wanted = i->receive_queue.length ? space_for(i->receive_queue.length) : 0;
	was = sockmi_options_find(i->socket_options, SOCKMI_OPT_RCVBUF, 0, NULL);
	/* A larger one has been tuned: the peer may fill the window that it was told. */
	if (wanted < was)
		wanted = was;
	if (grow_buffer(r, SO_RCVBUFFORCE, receive, wanted) < 0)
		return -1;
	return send_bytes ? grow_buffer(r, SO_SNDBUFFORCE, sending, space_for(send_bytes)) : 0;
}

/* The receive queue is selected. */
static int fill_queues(struct restore *r)
{
	const struct sockmi_image *i = r->image;

	if (grow_buffers(r) < 0)
		return -1;
	if (i->receive_queue.length) {
		if (fill(r, i->receive_queue, RECEIVE_CHUNK_BYTES, SOCKMI_STEP_RECEIVE_QUEUE) < 0)
			return -1;
		r->result->carried |= SOCKMI_FIDELITY_BIT(RECEIVE_QUEUE);
	}
	if (!i->sent_queue.length && !has_flag(r, SOCKMI_OWN_FIN_SENT))
		return 0;
	if (sockmi_set_int(r->fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, TCP_SEND_QUEUE) < 0)
		return failed_call(r, SOCKMI_STEP_SEND_QUEUE);
	/* Without a measured RTT the first timeout is 3 s; a lost tail need not wait for that. Linux >= 6.15. */
	sockmi_set_int(r->fd, IPPROTO_TCP, SOCKMI_TCP_RTO_MAX_MS, FIRST_TIMEOUT_MS);
	if (i->sent_queue.length) {
		if (fill(r, i->sent_queue, SEND_CHUNK_BYTES, SOCKMI_STEP_SEND_QUEUE) < 0)
			return -1;
		r->result->carried |= SOCKMI_FIDELITY_BIT(SENT_QUEUE);
	}
	return 0;
}

/* ---- FINs ---- */

/* Deliver a segment, and wait until it has changed the state. */
static int inject_now(struct restore *r, uint32_t seq, uint32_t ack, bool fin)
{
	const struct sockmi_image *i = r->image;
	uint32_t window = i->window.snd_wnd >> i->negotiated.snd_wscale;
	struct timespec pause = { .tv_nsec = INJECT_POLL_US * 1000 };
	int before = sockmi_state(r->fd);

	if (sockmi_inject(&i->identity.remote, &r->local, seq, ack, (uint16_t)(window < 65535 ? window : 65535), fin,
			  r->mark) < 0)
		return failed_call(r, SOCKMI_STEP_INJECT);
	for (int waited = 0; sockmi_state(r->fd) == before; waited += INJECT_POLL_US) {
		if (waited > INJECT_WAIT_US)
			return sockmi_fail(r->result, SOCKMI_RESULT_NOT_DELIVERED, SOCKMI_STEP_INJECT, ETIMEDOUT);
		nanosleep(&pause, NULL);
	}
	return 0;
}

/* What is injected comes by the loopback device. A copy that is bound to another one is not, for that moment. */
static int inject(struct restore *r, uint32_t seq, uint32_t ack, bool fin)
{
	int device = 0, outcome;

	if (sockmi_get_int(r->fd, SOL_SOCKET, SO_BINDTOIFINDEX, &device) < 0 || !device)
		return inject_now(r, seq, ack, fin);
	if (sockmi_set_int(r->fd, SOL_SOCKET, SO_BINDTOIFINDEX, 0) < 0)
		return failed_call(r, SOCKMI_STEP_OPTION);
	outcome = inject_now(r, seq, ack, fin);
	if (sockmi_set_int(r->fd, SOL_SOCKET, SO_BINDTOIFINDEX, device) < 0)
		return failed_call(r, SOCKMI_STEP_OPTION);
	return outcome;
}

static int close_own(struct restore *r)
{
	if (!has_flag(r, SOCKMI_OWN_FIN_SENT))
		return 0;
	/* In repair, with the send queue selected: the FIN goes to the sent data, not to the wire. */
	if (shutdown(r->fd, SHUT_WR) < 0)
		return failed_call(r, SOCKMI_STEP_SHUTDOWN);
	r->result->carried |= SOCKMI_FIDELITY_BIT(OWN_FIN);
	return 0;
}

/* A window that the receive queue has filled would shut the FIN out: Linux 6.1 drops it then. */
static int open_window(struct restore *r)
{
	const struct sockmi_image *i = r->image;
	uint32_t end = i->sequence.rcv_nxt - 1;
	struct tcp_repair_window window = { .snd_wl1 = i->window.snd_wl1, .snd_wnd = i->window.snd_wnd,
					    .max_window = i->window.max_window, .rcv_wnd = 65535, .rcv_wup = end };

	if (setsockopt(r->fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)) < 0)
		return failed_call(r, SOCKMI_STEP_WINDOW);
	return 0;
}

static int close_peer(struct restore *r)
{
	const struct sockmi_sequence *s = &r->image->sequence;

	if (!has_flag(r, SOCKMI_PEER_FIN))
		return 0;
	if (open_window(r) < 0 || inject(r, s->rcv_nxt - 1, s->snd_una, true) < 0)
		return -1;
	r->result->carried |= SOCKMI_FIDELITY_BIT(PEER_FIN);
	return 0;
}

/* Who closed first tells the state: our FIN leads to FIN-WAIT-1, CLOSING; the peer's to CLOSE-WAIT, LAST-ACK. */
static int close_both(struct restore *r)
{
	const struct sockmi_sequence *s = &r->image->sequence;
	uint8_t state = r->image->identity.state;

	if (state == SOCKMI_LAST_ACK)
		return close_peer(r) < 0 ? -1 : close_own(r);
	if (state == SOCKMI_CLOSING && !has_flag(r, SOCKMI_OWN_FIN_SENT))
		r->result->approximated |= SOCKMI_FIDELITY_BIT(CLOSING_STATE);
	if (close_own(r) < 0 || close_peer(r) < 0)
		return -1;
	return state == SOCKMI_FIN_WAIT_2 ? inject(r, s->rcv_nxt, s->snd_una, false) : 0;
}

/* ---- What has not been sent ---- */

#define SEND_TRIES 8

/* Out of repair, the peer's window closed. */
static int queue_unsent(struct restore *r)
{
	struct sockmi_view queue = r->image->unsent_queue;
	int tries = 0, size = 0;

	while (queue.length) {
		ssize_t taken = send(r->fd, queue.data, queue.length, MSG_DONTWAIT | MSG_NOSIGNAL);

		if (taken > 0) {
			queue.data += taken;
			queue.length -= (size_t)taken;
			continue;
		}
		if (errno != EAGAIN || ++tries > SEND_TRIES ||
		    sockmi_get_int(r->fd, SOL_SOCKET, SO_SNDBUF, &size) < 0 || size > BUFFER_MAX / 2 ||
		    sockmi_set_int(r->fd, SOL_SOCKET, SO_SNDBUFFORCE, size) < 0)
			return failed_call(r, SOCKMI_STEP_SEND_QUEUE);
	}
	sockmi_reached("restore.open");
	return 0;
}

/*
 * In repair the kernel takes all that is written for sent. So the copy leaves repair for a moment, with
 * a window of nothing: what is written waits in the queue, and so does the FIN. Nothing is sent, as the
 * window is closed and no probe asked for; nothing is heard. If this process is killed just then the
 * kernel ends the copy at once, by an RST that the hold keeps in.
 */
static int keep_unsent(struct restore *r)
{
	const struct sockmi_image *i = r->image;
	struct tcp_repair_window closed = { .snd_wl1 = i->window.snd_wl1, .max_window = i->window.max_window,
					    .rcv_wnd = i->window.rcv_wnd, .rcv_wup = i->window.rcv_wup };
	struct linger at_once = { .l_onoff = 1 }, as_new = { 0 };

	if (!sockmi_image_waits(i))
		return 0;
	sockmi_deafen(r->fd, i);
	if (setsockopt(r->fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &closed, sizeof(closed)) < 0)
		return failed_call(r, SOCKMI_STEP_WINDOW);
	if (i->unsent_queue.length) /* a lower mark of this host would refuse what is more */
		sockmi_set_int(r->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, -1);
	if (setsockopt(r->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof(at_once)) < 0 ||
	    sockmi_repair(r->fd, TCP_REPAIR_OFF_NO_WP) < 0)
		return failed_call(r, SOCKMI_STEP_REPAIR);
	if (queue_unsent(r) < 0)
		return -1;
	if (has_flag(r, SOCKMI_OWN_FIN) && !has_flag(r, SOCKMI_OWN_FIN_SENT)) {
		if (shutdown(r->fd, SHUT_WR) < 0)
			return failed_call(r, SOCKMI_STEP_SHUTDOWN);
		r->result->carried |= SOCKMI_FIDELITY_BIT(OWN_FIN);
	}
	if (repair_on(r) < 0)
		return -1;
	setsockopt(r->fd, SOL_SOCKET, SO_LINGER, &as_new, sizeof(as_new));
	if (i->unsent_queue.length) {
		sockmi_set_int(r->fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT,
			       (int)sockmi_options_find(i->socket_options, SOCKMI_OPT_NOTSENT_LOWAT, 0, NULL));
		r->result->carried |= SOCKMI_FIDELITY_BIT(UNSENT_QUEUE);
	}
	return 0;
}

/* ---- A connection ---- */

static int set_negotiated(struct restore *r)
{
	const struct sockmi_negotiated *n = &r->image->negotiated;
	struct tcp_repair_opt options[4] = { { .opt_code = 2 /* MSS */, .opt_val = n->mss_clamp } };
	unsigned int count = 1;

	if (n->flags & SOCKMI_NEGOTIATED_WSCALE)
		options[count++] = (struct tcp_repair_opt){
			.opt_code = 3, .opt_val = n->snd_wscale | (uint32_t)n->rcv_wscale << 16 };
	if (n->flags & SOCKMI_NEGOTIATED_SACK)
		options[count++] = (struct tcp_repair_opt){ .opt_code = 4 };
	if (n->flags & SOCKMI_NEGOTIATED_TIMESTAMPS)
		options[count++] = (struct tcp_repair_opt){ .opt_code = 8 };
	if (setsockopt(r->fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options,
		       (socklen_t)(count * sizeof(options[0]))) < 0)
		return failed_call(r, SOCKMI_STEP_NEGOTIATED);
	r->result->carried |= SOCKMI_FIDELITY_BIT(NEGOTIATED);
	if (n->flags & SOCKMI_NEGOTIATED_ECN)
		r->result->reset |= SOCKMI_FIDELITY_BIT(ECN);
	return 0;
}

/* The clock goes on from @tsval. The lowest bit is not time but the unit. */
static int set_clock(struct restore *r, uint32_t tsval)
{
	bool us = r->image->timestamp.unit == SOCKMI_TIMESTAMP_US;
	int back = 0;

	if (sockmi_set_int(r->fd, IPPROTO_TCP, TCP_TIMESTAMP, (int)((tsval & ~1u) | us)) < 0)
		return failed_call(r, SOCKMI_STEP_TIMESTAMP);
	/* Before Linux 6.7 there is no other unit than ms, and the bit is just a bit. */
	if (us && (sockmi_get_int(r->fd, IPPROTO_TCP, TCP_TIMESTAMP, &back) < 0 || !(back & 1)))
		return sockmi_fail(r->result, SOCKMI_RESULT_UNIT, SOCKMI_STEP_TIMESTAMP, 0);
	r->result->carried |= SOCKMI_FIDELITY_BIT(TIMESTAMP_CLOCK);
	return 0;
}

static void restore_clamp(int fd, const struct sockmi_window *w)
{
	bool grown = w->flags & SOCKMI_WINDOW_HAS_SSTHRESH && w->rcv_ssthresh > 65535;
	int clamp = 0;

	if (!(w->flags & SOCKMI_WINDOW_HAS_CLAMP) || w->window_clamp >= INT32_MAX)
		return;
	/*
	 * A new socket offers 64 KiB until it has seen data. Lowering the clamp to what it was, from just above,
	 * makes the kernel believe in the window that the peer has been told (tcp_set_window_clamp).
	 */
	if (grown)
		sockmi_set_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (int)w->window_clamp + 1);
	else if (sockmi_get_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, &clamp) < 0 || clamp == (int)w->window_clamp)
		return;
	sockmi_set_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (int)w->window_clamp);
}

static int set_window(struct restore *r)
{
	const struct sockmi_window *w = &r->image->window;
	struct tcp_repair_window window = {
		.snd_wl1 = w->snd_wl1,
		.snd_wnd = w->snd_wnd,
		.max_window = w->max_window,
		.rcv_wnd = w->rcv_wnd,
		.rcv_wup = w->rcv_wup,
	};

	if (setsockopt(r->fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &window, sizeof(window)) < 0)
		return failed_call(r, SOCKMI_STEP_WINDOW);
	r->result->carried |= SOCKMI_FIDELITY_BIT(WINDOW);
	restore_clamp(r->fd, w);
	return 0;
}

static int restore_connection(struct restore *r)
{
	const struct sockmi_image *i = r->image;
	const struct sockmi_sequence *s = &i->sequence;
	uint32_t mss = i->negotiated.mss_clamp;

	/* In repair no mark can be set, and the bytes around it would be read as others. */
	if (i->present & SOCKMI_HAS(SOCKMI_URGENT))
		return sockmi_fail(r->result, SOCKMI_RESULT_URGENT_DATA, SOCKMI_STEP_RECEIVE_QUEUE, 0);
	if (make_socket(r) < 0 || repair_on(r) < 0 || bind_local(r) < 0)
		return -1;
	/* In FIN-WAIT-2 the FIN is acknowledged, but has to be made first. */
	if (sockmi_set_queue_seq(r->fd, TCP_SEND_QUEUE,
				 s->snd_una - (i->identity.state == SOCKMI_FIN_WAIT_2)) < 0 ||
	    sockmi_set_queue_seq(r->fd, TCP_RECV_QUEUE, s->copied_seq - has_flag(r, SOCKMI_PEER_FIN_READ)) < 0)
		return failed_call(r, SOCKMI_STEP_SEQUENCE);
	sockmi_options_write(r->fd, &r->plan, SOCKMI_BEFORE_CONNECT, r->result);
	if (sockmi_set_int(r->fd, IPPROTO_TCP, TCP_MAXSEG, (int)(mss < 88 ? 88 : mss > 32767 ? 32767 : mss)) < 0)
		return failed_call(r, SOCKMI_STEP_NEGOTIATED);
	if (connect_remote(r) < 0 || set_negotiated(r) < 0)
		return -1;
	if (i->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS) {
		/* Two more: what was read may be one too small, and a clock must not go back (RFC 7323 section 5). */
		if (set_clock(r, i->timestamp.tsval + 3) < 0)
			return -1;
		r->result->reset |= SOCKMI_FIDELITY_BIT(TS_RECENT);
	}
	if (fill_queues(r) < 0 || close_both(r) < 0 || keep_unsent(r) < 0)
		return -1;
	if (has_flag(r, SOCKMI_SHUT_RD) && !has_flag(r, SOCKMI_PEER_FIN) && shutdown(r->fd, SHUT_RD) < 0)
		return failed_call(r, SOCKMI_STEP_SHUTDOWN);
	sockmi_options_write(r->fd, &r->plan, SOCKMI_LATE, r->result); /* some push what waits */
	if (set_window(r) < 0)
		return -1;
	r->result->reset |= SOCKMI_FIDELITY_BIT(PATH_MODEL) | SOCKMI_FIDELITY_BIT(CONGESTION_STATE) |
			    SOCKMI_FIDELITY_BIT(TIMERS) | SOCKMI_FIDELITY_BIT(COUNTERS);
	if (i->out_of_order.length || i->present & SOCKMI_HAS(SOCKMI_EARLY_FIN))
		r->result->reset |= SOCKMI_FIDELITY_BIT(OUT_OF_ORDER);
	if (i->sack_scoreboard.length)
		r->result->reset |= SOCKMI_FIDELITY_BIT(SACK_SCOREBOARD);
	return 0;
}

/*
 * SYN-SENT: connect() in earnest, with the same initial sequence number; the hold drops this SYN. The
 * peer's answer echoes the first SYN's timestamp, and a socket takes no echo from before its own first
 * SYN (tcp_rcv_synsent_state_process): so the clock is set as it was then.
 */
static int restore_syn_sent(struct restore *r)
{
	const struct sockmi_image *i = r->image;
	struct sockmi_negotiated offer;
	uint32_t seq = 0;

	if (make_socket(r) < 0 || repair_on(r) < 0 || bind_local(r) < 0)
		return -1;
	if (sockmi_set_queue_seq(r->fd, TCP_SEND_QUEUE, i->sequence.iss) < 0)
		return failed_call(r, SOCKMI_STEP_SEQUENCE);
	if (sockmi_repair(r->fd, TCP_REPAIR_OFF_NO_WP) < 0)
		return failed_call(r, SOCKMI_STEP_REPAIR);
	sockmi_options_write(r->fd, &r->plan, SOCKMI_BEFORE_CONNECT, r->result);
	sockmi_options_write(r->fd, &r->plan, SOCKMI_LATE, r->result);
	if (grow_buffers(r) < 0)
		return -1;
	/* A smaller scale than this host's own is offered by who wants no larger window. */
	sockmi_syn_offer(r->fd, &offer);
	if (offer.rcv_wscale > i->negotiated.rcv_wscale)
		sockmi_set_int(r->fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (65536 << i->negotiated.rcv_wscale) - 1);
	if (connect_remote(r) < 0 || repair_on(r) < 0)
		return -1;
	if (sockmi_get_queue_seq(r->fd, TCP_SEND_QUEUE, &seq) < 0)
		return failed_call(r, SOCKMI_STEP_SEQUENCE);
	if (seq != i->sequence.write_seq) /* an ISN of 0 means "choose one" */
		return sockmi_fail(r->result, SOCKMI_RESULT_FAILED, SOCKMI_STEP_SEQUENCE, ERANGE);
	sockmi_syn_offer(r->fd, &offer);
	if (offer.rcv_wscale != i->negotiated.rcv_wscale) {
		r->result->detail = offer.rcv_wscale;
		return sockmi_fail(r->result, SOCKMI_RESULT_SCALE, SOCKMI_STEP_NEGOTIATED, 0);
	}
	if (i->negotiated.flags & ~offer.flags & SOCKMI_NEGOTIATED_ECN)
		r->result->reset |= SOCKMI_FIDELITY_BIT(ECN);
	if (i->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS) {
		/* The time of a SYN is kept in the unit that connect() found: it cannot be changed any more. */
		if (sockmi_counts_us(r->fd) != (i->timestamp.unit == SOCKMI_TIMESTAMP_US))
			return sockmi_fail(r->result, SOCKMI_RESULT_UNIT, SOCKMI_STEP_TIMESTAMP, 0);
		if (set_clock(r, i->timestamp.syn_first_tsval) < 0)
			return -1;
		r->result->approximated |= SOCKMI_FIDELITY_BIT(SYN_TIMESTAMP);
		if (i->timestamp.syn_last_tsval != i->timestamp.syn_first_tsval)
			r->result->approximated |= SOCKMI_FIDELITY_BIT(SYN_RETRANSMITTED);
	}
	return 0;
}

/* ---- Entry points ---- */

static int restore(struct restore *r, struct sockmi_host *host)
{
	const struct sockmi_identity *id = &r->image->identity;
	struct sockmi_option_scope scope = {
		.family = id->family,
		.connected = id->kind == SOCKMI_KIND_CONNECTED,
		.listening = id->kind == SOCKMI_KIND_LISTENING,
	};
	int error;

	scope.inet = scope.family == AF_INET ||
		     (!id->v6only && (!scope.connected || sockmi_endpoint_is_mapped(&id->local)));
	r->fd = socket(id->family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (r->fd < 0)
		return failed_call(r, SOCKMI_STEP_SOCKET);
	r->fresh = sockmi_fresh(host, id->family, r->fd);
	if (!r->fresh) {
		failed_call(r, SOCKMI_STEP_OPTION);
		goto discard;
	}
	sockmi_options_plan(r->image->socket_options, &scope, r->fresh, &r->plan, r->result);
	r->result->carried |= SOCKMI_FIDELITY_BIT(OPTIONS);
	error = id->kind != SOCKMI_KIND_CONNECTED ? restore_closed(r) :
		id->state == SOCKMI_SYN_SENT	  ? restore_syn_sent(r) :
						    restore_connection(r);
	if (error == 0) {
		sockmi_deafen(r->fd, r->image);
		return 0;
	}
discard:
	sockmi_discard(&r->fd, 1);
	return -1;
}

int sockmi_restore(const void *const *images, const size_t *lengths, const struct sockmi_placement *placements,
		   size_t n, uint32_t inject_mark, int *out_fds, struct sockmi_result *results)
{
	struct sockmi_host host = { 0 };
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_image image;
		struct restore r = { .fd = -1, .image = &image, .result = &results[i], .mark = inject_mark,
				     .transparent = placements[i].transparent, .local = placements[i].local };

		out_fds[i] = -1;
		if (sockmi_decode_own(images[i], lengths[i], &image, &results[i]) < 0) {
			count++;
			continue;
		}
		if (sockmi_endpoint_is_zero(&r.local))
			r.local = image.identity.local;
		if (restore(&r, &host) < 0)
			count++;
		else
			out_fds[i] = r.fd;
	}
	sockmi_host_end(&host);
	return count;
}

void sockmi_discard(const int *fds, size_t n)
{
	struct sockaddr unspecified = { .sa_family = AF_UNSPEC };

	for (size_t i = 0; i < n; i++) {
		if (fds[i] < 0)
			continue;
		/* A copy that failed between two steps may not be in repair; closing must not send. */
		sockmi_repair(fds[i], TCP_REPAIR_ON);
		/* An application may have it too, or it is on its way there: its place must be free now. */
		connect(fds[i], &unspecified, sizeof(unspecified));
		close(fds[i]);
	}
}
