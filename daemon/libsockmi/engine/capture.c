// SPDX-License-Identifier: MIT
/*
 * Reads the whole state of sockets whose owners are stopped and whose packets are held.
 *
 * TCP_REPAIR does not stop a socket from receiving, and SIOCINQ stops at an urgent mark; so nothing is
 * believed that cannot be checked: what was peeked must be as long as the sequence numbers say,
 * and they must be the same afterwards.
 */
#include <poll.h>
#include <stddef.h>
#include <sys/stat.h>
#include <time.h>

#include "engine_internal.h"
#include "in_repair.h"

#define TRIES 3
#define ACKED_SLACK_BYTES 65536 /* the kernel may keep acknowledged bytes of the first segment */

/* What getsockopt(TCP_INFO) must at least have: up to tcpi_total_retrans. */
#define INFO_BYTES offsetof(struct tcp_info, tcpi_pacing_rate)

struct capture {
	int fd;
	bool common; /* leave rare options of connections out */
	struct sockmi_host *host;
	struct sockmi_result *result;
	struct sockmi_writer *writer;
	struct tcp_info info;
	int info_bytes;
	int reuse;	 /* SO_REUSEADDR */
	int peek_offset; /* SO_PEEK_OFF */
	uint64_t inode;
	struct sockmi_in_repair *record;
	struct sockmi_identity identity;
	struct sockmi_sequence sequence;
	struct sockmi_window window;
	struct sockmi_negotiated negotiated;
	struct sockmi_timestamp timestamp;
	/* What the kernel said before the queues were read; compared afterwards. */
	uint32_t rcv_end, snd_end;
	int inq, outq, unsent;
	uint32_t receive_memory; /* bytes that the kernel accounts for what has come and is not read */
	uint32_t shut; /* SOCKMI_SHUT_RD, by the application or a FIN */
	struct sockmi_syn syn;
};

static int fail(struct capture *c, int code, int step)
{
	return sockmi_fail(c->result, code, step, errno);
}

static int failed_call(struct capture *c, int step)
{
	return fail(c, SOCKMI_RESULT_FAILED, step);
}

/* ---- What it is ---- */

static int read_addresses(struct capture *c)
{
	union sockmi_sockaddr address;
	socklen_t length = sizeof(address);
	int v6only = 0;

	memset(&address, 0, sizeof(address));
	if (getsockname(c->fd, &address.any, &length) < 0)
		return failed_call(c, SOCKMI_STEP_NAME);
	c->identity.family = (uint16_t)address.any.sa_family;
	sockmi_endpoint_from_sockaddr(&c->identity.local, &address);
	if (c->identity.family == AF_INET6 && !sockmi_endpoint_is_mapped(&c->identity.local)) {
		if (sockmi_get_int(c->fd, IPPROTO_IPV6, IPV6_V6ONLY, &v6only) < 0)
			return failed_call(c, SOCKMI_STEP_NAME);
		c->identity.v6only = v6only != 0;
	}
	if (c->identity.kind != SOCKMI_KIND_CONNECTED)
		return 0;
	if (c->identity.state == SOCKMI_SYN_SENT) { /* has no peer name yet */
		if (sockmi_syn_find(c->fd, &c->syn) < 0)
			return fail(c, errno == ENOENT ? SOCKMI_RESULT_CHANGED : SOCKMI_RESULT_FAILED, SOCKMI_STEP_NAME);
		c->identity.remote = c->syn.remote;
		return 0;
	}
	length = sizeof(address);
	if (getpeername(c->fd, &address.any, &length) < 0)
		return fail(c, errno == ENOTCONN ? SOCKMI_RESULT_CHANGED : SOCKMI_RESULT_FAILED, SOCKMI_STEP_NAME);
	sockmi_endpoint_from_sockaddr(&c->identity.remote, &address);
	return 0;
}

static int read_identity(struct capture *c)
{
	socklen_t length = sizeof(c->info);
	struct stat status;

	if (!fstat(c->fd, &status)) { /* of a socket: its user (sockfs_setattr(), net/socket.c) */
		c->identity.owner_uid = status.st_uid;
		c->inode = status.st_ino;
	}
	if (getsockopt(c->fd, IPPROTO_TCP, TCP_INFO, &c->info, &length) < 0)
		return sockmi_fail_access(c->result, SOCKMI_STEP_INFO);
	c->info_bytes = (int)length;
	if (length < INFO_BYTES)
		return fail(c, SOCKMI_RESULT_NOT_TCP, SOCKMI_STEP_INFO);
	c->identity.state = c->info.tcpi_state;
	c->result->detail = c->info.tcpi_state;
	switch (c->identity.state) {
	case SOCKMI_LISTEN:
		c->identity.kind = SOCKMI_KIND_LISTENING;
		break;
	case SOCKMI_CLOSED:
		c->identity.kind = SOCKMI_KIND_BOUND;
		break;
	case SOCKMI_SYN_RECEIVED:
	case SOCKMI_TIME_WAIT:
		return sockmi_fail(c->result, SOCKMI_RESULT_WRONG_STATE, SOCKMI_STEP_INFO, 0);
	default:
		c->identity.kind = SOCKMI_KIND_CONNECTED;
	}
	if (read_addresses(c) < 0)
		return -1;
	if (c->identity.kind == SOCKMI_KIND_BOUND && sockmi_endpoint_is_zero(&c->identity.local))
		c->identity.kind = SOCKMI_KIND_UNCONNECTED;
	if (sockmi_get_int(c->fd, SOL_SOCKET, SO_REUSEADDR, &c->reuse) < 0)
		return sockmi_fail_access(c->result, SOCKMI_STEP_OPTION);
	if (c->reuse == SOCKMI_REUSE_FORCED)
		return sockmi_fail(c->result, SOCKMI_RESULT_IN_REPAIR, SOCKMI_STEP_OPTION, 0);
	return 0;
}

/* ---- Options ---- */

static void write_buffer(struct capture *c, uint16_t id, int bytes, bool locked)
{
	sockmi_writer_option_int(c->writer, id, locked ? SOCKMI_OPTION_LOCKED : 0, bytes);
}

static int write_options(struct capture *c)
{
	struct sockmi_option_scope scope = {
		.family = c->identity.family,
		.connected = c->identity.kind == SOCKMI_KIND_CONNECTED,
		.listening = c->identity.kind == SOCKMI_KIND_LISTENING,
		.common = c->common && c->identity.kind == SOCKMI_KIND_CONNECTED,
	};
	const struct sockmi_fresh *fresh = sockmi_fresh(c->host, scope.family, c->fd);
	uint32_t memory[16];
	socklen_t length = sizeof(memory);
	int locks = 0;

	if (!fresh)
		return failed_call(c, SOCKMI_STEP_OPTION);
	scope.inet = scope.family == AF_INET || (!c->identity.v6only && (!scope.connected ||
									 sockmi_endpoint_is_mapped(&c->identity.local)));
	sockmi_writer_open(c->writer, SOCKMI_SOCKET_OPTIONS);
	if (c->reuse)
		sockmi_writer_option_int(c->writer, SOCKMI_OPT_REUSEADDR, 0, c->reuse);
	if (getsockopt(c->fd, SOL_SOCKET, SO_MEMINFO, memory, &length) < 0)
		return failed_call(c, SOCKMI_STEP_OPTION);
	c->receive_memory = memory[0];
	if (sockmi_get_int(c->fd, SOL_SOCKET, SO_BUF_LOCK, &locks) < 0)
		locks = 0; /* Linux < 5.15: sizes are carried, whether they are fixed is not known */
	write_buffer(c, SOCKMI_OPT_SNDBUF, (int)memory[3], locks & 1);
	write_buffer(c, SOCKMI_OPT_RCVBUF, (int)memory[1], locks & 2);
	if (sockmi_options_read(c->fd, &scope, fresh, c->writer, &c->peek_offset, c->result) < 0)
		return -1;
	sockmi_writer_close(c->writer);
	if (scope.common)
		c->result->reset |= SOCKMI_FIDELITY_BIT(RARE_OPTIONS);
	c->result->carried |= SOCKMI_FIDELITY_BIT(OPTIONS) | SOCKMI_FIDELITY_BIT(BUFFER_SIZES);
	return 0;
}

/* ---- Queues (in repair) ---- */

static int queue_length(struct capture *c, unsigned long request, int *length)
{
	return ioctl(c->fd, request, length) < 0 ? failed_call(c, SOCKMI_STEP_QUEUE_LENGTH) : 0;
}

/* True if the socket is in one of the states of @mask. */
static bool in_states(const struct capture *c, uint32_t mask)
{
	return mask >> c->identity.state & 1;
}

#define OWN_FIN_STATES (1u << SOCKMI_FIN_WAIT_1 | 1u << SOCKMI_CLOSING | 1u << SOCKMI_LAST_ACK)
#define PEER_FIN_STATES (1u << SOCKMI_CLOSE_WAIT | 1u << SOCKMI_CLOSING | 1u << SOCKMI_LAST_ACK)

static int read_sequence(struct capture *c)
{
	struct sockmi_sequence *s = &c->sequence;
	bool peer_fin = in_states(c, PEER_FIN_STATES), own_fin = in_states(c, OWN_FIN_STATES);

	if (sockmi_get_queue_seq(c->fd, TCP_SEND_QUEUE, &c->snd_end) < 0)
		return failed_call(c, SOCKMI_STEP_SEQUENCE);
	if (queue_length(c, SOCKMI_SIOCOUTQ, &c->outq) < 0 || queue_length(c, SOCKMI_SIOCOUTQNSD, &c->unsent) < 0)
		return -1;
	memset(s, 0, sizeof(*s));
	s->write_seq = c->snd_end;
	s->snd_una = c->snd_end - (uint32_t)c->outq;
	s->snd_nxt = c->snd_end - (uint32_t)c->unsent;
	if (own_fin || c->identity.state == SOCKMI_FIN_WAIT_2) {
		s->flags |= SOCKMI_OWN_FIN | SOCKMI_SHUT_WR;
		if (!c->unsent)
			s->flags |= SOCKMI_OWN_FIN_SENT;
	}
	s->flags |= c->shut | (peer_fin ? SOCKMI_PEER_FIN | SOCKMI_SHUT_RD : 0);
	return 0;
}

/* recv(MSG_PEEK) with @skip bytes left aside before @place and @after behind; -1 with errno. */
static ssize_t peek_around(struct capture *c, size_t skip, uint8_t *place, size_t bytes, size_t after)
{
	uint8_t scratch[2048]; /* every piece that is left aside */
	struct iovec parts[2 * (ACKED_SLACK_BYTES / sizeof(scratch) + 1) + 1];
	struct msghdr message = { .msg_iov = parts };

	for (; skip; skip -= parts[message.msg_iovlen++].iov_len)
		parts[message.msg_iovlen] = (struct iovec){ scratch, skip < sizeof(scratch) ? skip : sizeof(scratch) };
	parts[message.msg_iovlen++] = (struct iovec){ place, bytes };
	for (; after; after -= parts[message.msg_iovlen++].iov_len)
		parts[message.msg_iovlen] = (struct iovec){ scratch, after < sizeof(scratch) ? after : sizeof(scratch) };
	return recvmsg(c->fd, &message, MSG_PEEK | MSG_DONTWAIT);
}

/* Peek at the send queue: sent, then unsent bytes, at @place. */
static int peek_send_queue(struct capture *c, uint8_t *place, size_t bytes)
{
	ssize_t got = recv(c->fd, place, bytes, MSG_PEEK | MSG_DONTWAIT);

	/*
	 * EFAULT: there are more. A first segment that is acknowledged in part is not always trimmed
	 * (tcp_clean_rtx_queue), and its acknowledged bytes come first: see how many, leave them aside.
	 */
	if (got < 0 && errno == EFAULT) {
		got = peek_around(c, 0, place, bytes, ACKED_SLACK_BYTES);
		if (got > (ssize_t)bytes) {
			size_t extra = (size_t)got - bytes;

			got = peek_around(c, extra, place, bytes, 0);
			got = got < 0 ? got : got - (ssize_t)extra;
		}
	}
	if (got < 0)
		return failed_call(c, SOCKMI_STEP_SEND_QUEUE);
	return got == (ssize_t)bytes ? 0 : 1; /* an ACK has come: try again */
}

static int write_send_queue(struct capture *c)
{
	const struct sockmi_sequence *s = &c->sequence;
	uint32_t fin = s->flags & SOCKMI_OWN_FIN && c->identity.state != SOCKMI_FIN_WAIT_2;
	uint32_t fin_sent = fin && s->flags & SOCKMI_OWN_FIN_SENT;
	size_t sent = s->snd_nxt - s->snd_una - fin_sent;
	size_t unsent = s->write_seq - s->snd_nxt - (fin - fin_sent);
	uint8_t *place, *unsent_place;
	int moved;

	if (!sent && !unsent)
		return 0;
	if (sent + unsent > SOCKMI_IMAGE_LIMIT_BYTES)
		return sockmi_fail(c->result, SOCKMI_RESULT_TOO_LARGE, SOCKMI_STEP_SEND_QUEUE, 0);
	/* One system call reads both; they are then moved apart by the second one's section header. */
	place = sockmi_writer_reserve(c->writer, sent ? SOCKMI_SENT_QUEUE : SOCKMI_UNSENT_QUEUE,
				      sent + unsent + 32);
	if (!place)
		return 0; /* the writer knows, finish() will tell */
	moved = peek_send_queue(c, place, sent + unsent);
	if (moved)
		return moved;
	if (sent && unsent) {
		size_t gap = ((sent + 7) & ~(size_t)7) - sent + SOCKMI_SECTION_HEADER_BYTES;

		memmove(place + sent + gap, place + sent, unsent);
		sockmi_writer_commit(c->writer, sent);
		unsent_place = sockmi_writer_reserve(c->writer, SOCKMI_UNSENT_QUEUE, unsent);
		if (unsent_place != place + sent + gap)
			return sockmi_fail(c->result, SOCKMI_RESULT_FAILED, SOCKMI_STEP_ENCODE, ENOSPC);
		sockmi_writer_commit(c->writer, unsent);
	} else {
		sockmi_writer_commit(c->writer, sent + unsent);
	}
	c->result->carried |= (sent ? SOCKMI_FIDELITY_BIT(SENT_QUEUE) : 0) |
			      (unsent ? SOCKMI_FIDELITY_BIT(UNSENT_QUEUE) : 0);
	return 0;
}

/* Has anything moved since it was read? The receive queue is selected. 1, 0, or -1. */
static int has_moved(struct capture *c)
{
	uint32_t rcv_end;
	int outq, unsent, inq;

	if (sockmi_get_int(c->fd, IPPROTO_TCP, TCP_QUEUE_SEQ, (int *)&rcv_end) < 0)
		return failed_call(c, SOCKMI_STEP_SEQUENCE);
	if (queue_length(c, SOCKMI_SIOCOUTQ, &outq) < 0 || queue_length(c, SOCKMI_SIOCOUTQNSD, &unsent) < 0 ||
	    queue_length(c, SOCKMI_SIOCINQ, &inq) < 0)
		return -1;
	if (sockmi_state(c->fd) != c->identity.state)
		return 1;
	return rcv_end != c->rcv_end || outq != c->outq || unsent != c->unsent || inq != c->inq;
}

/* Less than there should be: it has moved (1: try again), or there is urgent data. */
static int explain_mismatch(struct capture *c)
{
	int moved = has_moved(c);

	return moved ? moved :
		       sockmi_fail(c->result, SOCKMI_RESULT_URGENT_DATA, SOCKMI_STEP_RECEIVE_QUEUE, 0);
}

/* Is urgent data in the receive queue? SIOCINQ counts up to its mark, or all if it is inline. */
static int check_urgent(struct capture *c)
{
	int at_mark = 0, inlined = 0, all = c->inq, back;

	if (ioctl(c->fd, SOCKMI_SIOCATMARK, &at_mark) < 0)
		return failed_call(c, SOCKMI_STEP_QUEUE_LENGTH);
	if (!at_mark && c->inq) {
		if (sockmi_get_int(c->fd, SOL_SOCKET, SO_OOBINLINE, &inlined) < 0)
			return failed_call(c, SOCKMI_STEP_OPTION);
		if (!inlined) {
			c->record->inlined = 1;
			sockmi_set_int(c->fd, SOL_SOCKET, SO_OOBINLINE, 1);
			back = queue_length(c, SOCKMI_SIOCINQ, &all);
			sockmi_reached("capture.inlined");
			sockmi_set_int(c->fd, SOL_SOCKET, SO_OOBINLINE, 0);
			c->record->inlined = 0;
			if (back < 0)
				return -1;
		}
	}
	return at_mark || all != c->inq ? explain_mismatch(c) : 0;
}

static int write_receive_queue(struct capture *c)
{
	struct sockmi_sequence *s = &c->sequence;
	uint32_t fin = s->flags & SOCKMI_PEER_FIN ? 1 : 0;
	uint8_t *place;
	ssize_t got = 0;
	int urgent;

	if (sockmi_get_queue_seq(c->fd, TCP_RECV_QUEUE, &c->rcv_end) < 0)
		return failed_call(c, SOCKMI_STEP_SEQUENCE);
	if (queue_length(c, SOCKMI_SIOCINQ, &c->inq) < 0)
		return -1;
	s->rcv_nxt = c->rcv_end;
	s->copied_seq = c->rcv_end - fin - (uint32_t)c->inq;
	if ((size_t)c->inq > SOCKMI_IMAGE_LIMIT_BYTES)
		return sockmi_fail(c->result, SOCKMI_RESULT_TOO_LARGE, SOCKMI_STEP_RECEIVE_QUEUE, 0);
	urgent = check_urgent(c);
	if (urgent)
		return urgent;
	if (!c->inq)
		return 0;
	place = sockmi_writer_reserve(c->writer, SOCKMI_RECEIVE_QUEUE, (size_t)c->inq);
	if (!place)
		return 0;
	if (c->peek_offset >= 0) {
		c->record->peek_offset = c->peek_offset;
		sockmi_set_int(c->fd, SOL_SOCKET, SO_PEEK_OFF, -1);
	}
	got = recv(c->fd, place, (size_t)c->inq, MSG_PEEK | MSG_DONTWAIT);
	sockmi_reached("capture.peeked");
	if (c->peek_offset >= 0) {
		sockmi_set_int(c->fd, SOL_SOCKET, SO_PEEK_OFF, c->peek_offset);
		c->record->peek_offset = -1;
	}
	if (got < 0)
		return failed_call(c, SOCKMI_STEP_RECEIVE_QUEUE);
	if (got != c->inq)
		return explain_mismatch(c);
	sockmi_writer_commit(c->writer, (size_t)got);
	c->result->carried |= SOCKMI_FIDELITY_BIT(RECEIVE_QUEUE);
	return 0;
}

/* ---- The rest of a connection ---- */

static int read_window(struct capture *c)
{
	struct tcp_repair_window w;
	socklen_t length = sizeof(w);
	uint32_t limit = 65535u << c->negotiated.rcv_wscale;

	if (getsockopt(c->fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &w, &length) < 0)
		return failed_call(c, SOCKMI_STEP_WINDOW);
	c->window = (struct sockmi_window){
		.snd_wl1 = w.snd_wl1,
		.snd_wnd = w.snd_wnd,
		.max_window = w.max_window,
		.rcv_wnd = w.rcv_wnd < limit ? w.rcv_wnd : limit,
		.rcv_wup = w.rcv_wup,
		.flags = SOCKMI_WINDOW_HAS_SSTHRESH,
		.rcv_ssthresh = c->info.tcpi_rcv_ssthresh,
	};
	if (sockmi_get_int(c->fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, (int *)&c->window.window_clamp) == 0)
		c->window.flags |= SOCKMI_WINDOW_HAS_CLAMP;
	return 0;
}

static uint16_t clip16(uint32_t value)
{
	return value > 65535 ? 65535 : (uint16_t)value;
}

static void read_negotiated(struct capture *c)
{
	const struct tcp_info *i = &c->info;

	c->negotiated = (struct sockmi_negotiated){
		.flags = (i->tcpi_options & TCPI_OPT_TIMESTAMPS ? SOCKMI_NEGOTIATED_TIMESTAMPS : 0) |
			 (i->tcpi_options & TCPI_OPT_SACK ? SOCKMI_NEGOTIATED_SACK : 0) |
			 (i->tcpi_options & TCPI_OPT_WSCALE ? SOCKMI_NEGOTIATED_WSCALE : 0) |
			 (i->tcpi_options & TCPI_OPT_ECN ? SOCKMI_NEGOTIATED_ECN : 0) |
			 (i->tcpi_options & TCPI_OPT_SYN_DATA ? SOCKMI_NEGOTIATED_FASTOPEN : 0),
		.advmss = clip16(i->tcpi_advmss),
		.rcv_mss = clip16(i->tcpi_rcv_mss),
		.mss_cache = clip16(i->tcpi_snd_mss),
	};
	if (i->tcpi_options & TCPI_OPT_WSCALE) {
		c->negotiated.snd_wscale = i->tcpi_snd_wscale;
		c->negotiated.rcv_wscale = i->tcpi_rcv_wscale;
	}
}

static int read_clock(struct capture *c)
{
	uint32_t tsval;

	if (sockmi_get_int(c->fd, IPPROTO_TCP, TCP_TIMESTAMP, (int *)&tsval) < 0)
		return failed_call(c, SOCKMI_STEP_TIMESTAMP);
	/* The lowest bit is no time: it says the unit (since Linux 6.7; before, it is always ms). */
	c->timestamp = (struct sockmi_timestamp){
		.tsval = tsval,
		.unit = c->info.tcpi_options & TCPI_OPT_USEC_TS ? SOCKMI_TIMESTAMP_US : SOCKMI_TIMESTAMP_MS,
	};
	return 0;
}

/* In repair, TCP_MAXSEG is the peer's MSS (mss_clamp), not the current one. */
static int read_peer_mss(struct capture *c)
{
	int mss;

	if (sockmi_get_int(c->fd, IPPROTO_TCP, TCP_MAXSEG, &mss) < 0)
		return failed_call(c, SOCKMI_STEP_NEGOTIATED);
	c->negotiated.mss_clamp = clip16((uint32_t)mss);
	return 0;
}

static void write_path_model(struct capture *c)
{
	const struct tcp_info *i = &c->info;
	bool pacing = c->info_bytes >= (int)(offsetof(struct tcp_info, tcpi_max_pacing_rate));
	struct sockmi_path_model p = {
		.cwnd = i->tcpi_snd_cwnd ? i->tcpi_snd_cwnd : 1,
		.ssthresh = i->tcpi_snd_ssthresh,
		.srtt_us = i->tcpi_rtt,
		.mdev_us = i->tcpi_rttvar,
		.rto_us = i->tcpi_rto ? i->tcpi_rto : 1,
		.reordering = i->tcpi_reordering,
		.backoff = i->tcpi_backoff < 64 ? i->tcpi_backoff : 63,
		.retransmits = i->tcpi_retransmits,
		.congestion_state = i->tcpi_ca_state <= SOCKMI_CA_LOSS ? i->tcpi_ca_state : SOCKMI_CA_OPEN,
	};

	if (pacing && i->tcpi_pacing_rate != UINT64_MAX && i->tcpi_pacing_rate) {
		p.flags |= SOCKMI_PATH_HAS_PACING;
		p.pacing_rate_bytes_s = i->tcpi_pacing_rate;
	}
	sockmi_writer_put(c->writer, SOCKMI_PATH_MODEL, &p, sizeof(p));
}

/* What this engine cannot read. */
static void note_losses(struct capture *c)
{
	struct sockmi_result *r = c->result;

	r->reset |= SOCKMI_FIDELITY_BIT(CONGESTION_STATE) | SOCKMI_FIDELITY_BIT(TIMERS) |
		    SOCKMI_FIDELITY_BIT(COUNTERS);
	if (c->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS)
		r->reset |= SOCKMI_FIDELITY_BIT(TS_RECENT);
	if (c->negotiated.flags & SOCKMI_NEGOTIATED_SACK && c->info.tcpi_sacked)
		r->reset |= SOCKMI_FIDELITY_BIT(SACK_SCOREBOARD);
	/* That counts all that ever came out of order. With nothing to be read, the memory is what still waits. */
	if (c->info_bytes >= (int)(offsetof(struct tcp_info, tcpi_rcv_ooopack) + 4) && c->info.tcpi_rcv_ooopack &&
	    (c->inq || c->receive_memory))
		r->reset |= SOCKMI_FIDELITY_BIT(OUT_OF_ORDER);
	if (c->negotiated.flags & SOCKMI_NEGOTIATED_ECN)
		r->reset |= SOCKMI_FIDELITY_BIT(ECN);
	r->approximated |= SOCKMI_FIDELITY_BIT(PATH_MODEL);
	r->carried |= SOCKMI_FIDELITY_BIT(WINDOW) | SOCKMI_FIDELITY_BIT(NEGOTIATED) |
		      (c->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS ? SOCKMI_FIDELITY_BIT(TIMESTAMP_CLOCK) : 0) |
		      (c->sequence.flags & SOCKMI_OWN_FIN ? SOCKMI_FIDELITY_BIT(OWN_FIN) : 0) |
		      (c->sequence.flags & SOCKMI_PEER_FIN ? SOCKMI_FIDELITY_BIT(PEER_FIN) : 0);
}

static void write_connection(struct capture *c)
{
	sockmi_writer_put(c->writer, SOCKMI_SEQUENCE, &c->sequence, sizeof(c->sequence));
	if (c->identity.state != SOCKMI_SYN_SENT) {
		sockmi_writer_put(c->writer, SOCKMI_WINDOW, &c->window, sizeof(c->window));
		write_path_model(c);
	}
	sockmi_writer_put(c->writer, SOCKMI_NEGOTIATED, &c->negotiated, sizeof(c->negotiated));
	if (c->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS)
		sockmi_writer_put(c->writer, SOCKMI_TIMESTAMP, &c->timestamp, sizeof(c->timestamp));
	note_losses(c);
}

/* In repair. 1: it moved, try again. */
static int read_connection(struct capture *c)
{
	int moved;

	read_negotiated(c);
	if (read_sequence(c) < 0)
		return -1;
	moved = write_send_queue(c);
	if (!moved)
		moved = write_receive_queue(c);
	if (moved)
		return moved;
	if (read_window(c) < 0 || read_clock(c) < 0 || read_peer_mss(c) < 0)
		return -1;
	moved = has_moved(c);
	if (moved)
		return moved;
	write_connection(c);
	return 0;
}

/* In repair. The times of the SYNs are reckoned from the retransmission timer. */
static int read_syn_sent(struct capture *c)
{
	struct sockmi_sequence *s = &c->sequence;
	uint32_t unit;

	sockmi_syn_offer(c->fd, &c->negotiated);
	if (read_clock(c) < 0 || read_peer_mss(c) < 0)
		return -1;
	if (sockmi_get_queue_seq(c->fd, TCP_SEND_QUEUE, &s->write_seq) < 0)
		return failed_call(c, SOCKMI_STEP_SEQUENCE);
	s->snd_nxt = s->write_seq;
	s->iss = s->snd_una = s->write_seq - 1;
	unit = c->timestamp.unit == SOCKMI_TIMESTAMP_US ? 1000 : 1;
	c->timestamp.flags = SOCKMI_TIMESTAMP_HAS_SYN;
	c->timestamp.syn_first_tsval = c->syn.tsval - c->syn.first_age_ms * unit;
	c->timestamp.syn_last_tsval = c->syn.tsval - c->syn.last_age_ms * unit;
	if (c->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS) {
		c->result->approximated |= SOCKMI_FIDELITY_BIT(SYN_TIMESTAMP);
		if (c->syn.retransmissions)
			c->result->approximated |= SOCKMI_FIDELITY_BIT(SYN_RETRANSMITTED);
	}
	write_connection(c);
	return 0;
}

static int in_repair(struct capture *c)
{
	struct sockmi_writer before = *c->writer;
	socklen_t length = sizeof(c->info);
	int outcome = 1;

	for (int i = 0; outcome > 0 && i < TRIES; i++) {
		*c->writer = before;
		/* The first time, TCP_INFO has just been read; it must be of the state that is written. */
		if (i && getsockopt(c->fd, IPPROTO_TCP, TCP_INFO, &c->info, &length) < 0)
			return failed_call(c, SOCKMI_STEP_INFO);
		if (c->info.tcpi_state != c->identity.state)
			break;
		outcome = c->identity.state == SOCKMI_SYN_SENT ? read_syn_sent(c) : read_connection(c);
	}
	return outcome > 0 ? sockmi_fail(c->result, SOCKMI_RESULT_CHANGED, SOCKMI_STEP_SEQUENCE, 0) : outcome;
}

/* Pending events that queues do not show: SHUT_RD by the application, an error, an error queue. */
static void read_events(struct capture *c)
{
	struct pollfd p = { .fd = c->fd, .events = POLLRDHUP };

	if (poll(&p, 1, 0) <= 0)
		return;
	if (p.revents & POLLERR)
		c->result->reset |= SOCKMI_FIDELITY_BIT(ERROR_QUEUE);
	if (p.revents & POLLRDHUP)
		c->shut = SOCKMI_SHUT_RD;
}

/* Reading it would take it away from the application; with no room for it the kernel only says that it is there. */
static void note_saved_syn(struct capture *c)
{
	socklen_t length = 0;

	if (!c->common && getsockopt(c->fd, IPPROTO_TCP, TCP_SAVED_SYN, NULL, &length) < 0 && errno == EINVAL && length)
		c->result->reset |= SOCKMI_FIDELITY_BIT(SAVED_SYN);
}

static int capture_connected(struct capture *c)
{
	int outcome;

	note_saved_syn(c);

	if (c->identity.state != SOCKMI_SYN_SENT)
		read_events(c);
	c->record = sockmi_in_repair_begin(c->fd, c->inode, c->reuse);
	if (sockmi_repair(c->fd, TCP_REPAIR_ON) < 0) {
		outcome = sockmi_fail_access(c->result, SOCKMI_STEP_REPAIR);
		sockmi_in_repair_end(c->record);
		return outcome;
	}
	outcome = in_repair(c);
	sockmi_reached("capture.in-repair");
	/* Off without a window probe; that clears SO_REUSEADDR. */
	if (sockmi_repair(c->fd, TCP_REPAIR_OFF_NO_WP) < 0 && outcome == 0)
		outcome = failed_call(c, SOCKMI_STEP_REPAIR);
	if (c->reuse && sockmi_set_int(c->fd, SOL_SOCKET, SO_REUSEADDR, c->reuse) < 0 && outcome == 0)
		outcome = failed_call(c, SOCKMI_STEP_OPTION);
	sockmi_in_repair_end(c->record);
	return outcome;
}

static int capture_listener(struct capture *c)
{
	struct sockmi_listener l = { .backlog = c->info.tcpi_sacked };
	int value = 0;

	/* Of a listener, TCP_INFO tells the backlog in tcpi_sacked. */
	if (sockmi_get_int(c->fd, IPPROTO_TCP, TCP_FASTOPEN, &value) == 0 && value > 0)
		l.fastopen_qlen = (uint32_t)value;
	if (sockmi_get_int(c->fd, IPPROTO_TCP, TCP_DEFER_ACCEPT, &value) == 0 && value > 0)
		l.defer_accept_us = (uint64_t)value * 1000000;
	sockmi_writer_put(c->writer, SOCKMI_LISTENER, &l, sizeof(l));
	c->result->carried |= SOCKMI_FIDELITY_BIT(LISTENER);
	return 0;
}

/* A closed socket: nothing may be left of a connection that it once was. */
static int check_closed(struct capture *c)
{
	int unread = 0;

	if (queue_length(c, SOCKMI_SIOCINQ, &unread) < 0)
		return -1;
	return unread ? sockmi_fail(c->result, SOCKMI_RESULT_WRONG_STATE, SOCKMI_STEP_QUEUE_LENGTH, 0) : 0;
}

static int capture(struct capture *c)
{
	if (read_identity(c) < 0)
		return -1;
	sockmi_writer_put(c->writer, SOCKMI_IDENTITY, &c->identity, sizeof(c->identity));
	if (write_options(c) < 0)
		return -1;
	switch (c->identity.kind) {
	case SOCKMI_KIND_LISTENING:
		return capture_listener(c);
	case SOCKMI_KIND_CONNECTED:
		return capture_connected(c);
	default:
		return check_closed(c);
	}
}

/* The least room that is tried; what else is needed is known only when the queues have been seen. */
#define SMALL_IMAGE_BYTES 65536

static int capture_all(const int *fds, size_t n, bool common, void *buffer, size_t capacity,
		       struct sockmi_result *results)
{
	struct sockmi_host host = { 0 };
	size_t used = 0;
	int failed = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_writer writer;
		struct capture c = { .fd = fds[i], .common = common, .host = &host, .result = &results[i], .writer = &writer };
		ssize_t length;

		sockmi_writer_start(&writer, (uint8_t *)buffer + used, capacity - used);
		if (capture(&c) < 0) {
			failed++;
			continue;
		}
		length = sockmi_writer_finish(&writer);
		if (length < 0) {
			bool no_room = length == -ENOSPC;

			results[i].length = no_room ? SMALL_IMAGE_BYTES + (size_t)c.inq + (size_t)c.outq : 0;
			sockmi_fail(&results[i], no_room ? SOCKMI_RESULT_NO_ROOM : SOCKMI_RESULT_FAILED,
				    SOCKMI_STEP_ENCODE, (int)-length);
			failed++;
			continue;
		}
		results[i].offset = used;
		results[i].length = (uint64_t)length;
		used += ((size_t)length + 7) & ~(size_t)7;
		if (used > capacity)
			used = capacity;
	}
	sockmi_host_end(&host);
	return failed;
}

int sockmi_capture(const int *fds, size_t n, void *buffer, size_t capacity, struct sockmi_result *results)
{
	return capture_all(fds, n, false, buffer, capacity, results);
}

int sockmi_capture_common(const int *fds, size_t n, void *buffer, size_t capacity, struct sockmi_result *results)
{
	return capture_all(fds, n, true, buffer, capacity, results);
}
