// SPDX-License-Identifier: MIT
/* Brings dormant copies to life. From the first step on the copy may send. */
#include <time.h>

#include "engine_internal.h"

#define SOCKMI_TCP_RTO_MAX_MS 44

void (*sockmi_crash_hook)(const char *point);

struct activate {
	int fd;
	const struct sockmi_image *image;
	const struct sockmi_fresh *fresh;
	struct sockmi_result *result;
};

static int failed_call(struct activate *a, int step)
{
	return sockmi_fail(a->result, errno == EPERM ? SOCKMI_RESULT_NO_PRIVILEGE : SOCKMI_RESULT_FAILED, step, errno);
}

static int64_t option(const struct activate *a, uint16_t id, int64_t otherwise, uint8_t *flags)
{
	return sockmi_options_find(a->image->socket_options, id, otherwise, flags);
}

/* One buffer at the size it had, and tuned by the kernel again unless the application had fixed it. */
static void set_buffer(struct activate *a, uint16_t id, int force, int64_t fresh, bool grown, bool *locked)
{
	uint8_t flags = 0;
	int64_t size = option(a, id, fresh, &flags);

	*locked = flags & SOCKMI_OPTION_LOCKED;
	if (!*locked && !grown)
		return;
	if (!*locked && size < fresh)
		size = fresh;
	if (sockmi_set_int(a->fd, SOL_SOCKET, force, (int)(size / 2)) < 0)
		sockmi_lost_option(a->result, id);
}

static void set_buffers(struct activate *a)
{
	const struct sockmi_image *i = a->image;
	int64_t receive, sending;
	bool receive_locked, send_locked, receive_grown, send_grown;

	sockmi_fresh_buffers(a->fresh, &receive, &sending);
	receive_grown = i->receive_queue.length || option(a, SOCKMI_OPT_RCVBUF, 0, NULL) > receive;
	send_grown = i->sent_queue.length || i->unsent_queue.length;
	set_buffer(a, SOCKMI_OPT_SNDBUF, SO_SNDBUFFORCE, sending, send_grown, &send_locked);
	set_buffer(a, SOCKMI_OPT_RCVBUF, SO_RCVBUFFORCE, receive, receive_grown, &receive_locked);
	a->result->carried |= SOCKMI_FIDELITY_BIT(BUFFER_SIZES);
	if (!receive_grown && !send_grown && !receive_locked && !send_locked)
		return;
	/* Linux < 5.15 cannot unlock: sizes stay fixed there. */
	if (sockmi_set_int(a->fd, SOL_SOCKET, SO_BUF_LOCK, (send_locked ? 1 : 0) | (receive_locked ? 2 : 0)) < 0)
		a->result->approximated |= SOCKMI_FIDELITY_BIT(BUFFER_SIZES);
}

/* The answer to the first SYN may say that it was sent up to SLACK_MS after what our clock was set to. */
static void wait_for_clock(struct activate *a)
{
	uint32_t unit = a->image->timestamp.unit == SOCKMI_TIMESTAMP_US ? 1000 : 1;
	int now;

	if (!(a->image->timestamp.flags & SOCKMI_TIMESTAMP_HAS_SYN) ||
	    sockmi_get_int(a->fd, IPPROTO_TCP, TCP_TIMESTAMP, &now) < 0)
		return;
	int64_t age_ms = (int32_t)((uint32_t)now - a->image->timestamp.syn_first_tsval) / (int32_t)unit;
	if (age_ms >= 0 && age_ms < SOCKMI_SYN_SLACK_MS) {
		struct timespec pause = { .tv_nsec = (SOCKMI_SYN_SLACK_MS - age_ms) * 1000000 };

		nanosleep(&pause, NULL);
	}
}

/* Repair mode has taken it away. Nothing that the peer could notice, and so no failure any more. */
static void restore_reuse(struct activate *a)
{
	if (option(a, SOCKMI_OPT_REUSEADDR, 0, NULL) && sockmi_set_int(a->fd, SOL_SOCKET, SO_REUSEADDR, 1) < 0)
		sockmi_lost_option(a->result, SOCKMI_OPT_REUSEADDR);
}

/*
 * Have the kernel send what waits: these options do so when they are set. If this process dies before, the
 * kernel's window probe does it. A corked part of a segment goes too.
 */
static void push(struct activate *a)
{
	int nodelay = (int)option(a, SOCKMI_OPT_NODELAY, 0, NULL);

	if (!option(a, SOCKMI_OPT_CORK, 0, NULL)) {
		sockmi_set_int(a->fd, IPPROTO_TCP, TCP_CORK, 0);
		return;
	}
	sockmi_set_int(a->fd, IPPROTO_TCP, TCP_NODELAY, 1);
	if (!nodelay)
		sockmi_set_int(a->fd, IPPROTO_TCP, TCP_NODELAY, 0);
}

static int activate_connection(struct activate *a)
{
	const struct sockmi_image *i = a->image;
	bool waits = sockmi_image_waits(i);

	if (i->identity.state == SOCKMI_SYN_SENT)
		wait_for_clock(a);
	else if (i->sent_queue.length || i->sequence.flags & SOCKMI_OWN_FIN_SENT)
		sockmi_set_int(a->fd, IPPROTO_TCP, SOCKMI_TCP_RTO_MAX_MS,
			       (int)(option(a, SOCKMI_OPT_RTO_MAX_US,
					    sockmi_fresh_number(a->fresh, SOCKMI_OPT_RTO_MAX_US, 120000000), NULL) / 1000));
	set_buffers(a);
	sockmi_undeafen(a->fd, i); /* before it lives: the peer's answer may come at once */
	sockmi_reached("alive.hearing");
	/* A window probe tells the peer; unsent data does so too. */
	if (sockmi_repair(a->fd, waits ? TCP_REPAIR_OFF_NO_WP : TCP_REPAIR_OFF) < 0)
		return failed_call(a, SOCKMI_STEP_REPAIR);
	sockmi_reached("alive.begun");
	if (waits)
		push(a);
	restore_reuse(a);
	return 0;
}

static int activate_listener(struct activate *a)
{
	const struct sockmi_listener *l = &a->image->listener;
	int fastopen = (int)l->fastopen_qlen;

	set_buffers(a);
	if (fastopen && sockmi_set_int(a->fd, IPPROTO_TCP, TCP_FASTOPEN, fastopen) < 0)
		a->result->approximated |= SOCKMI_FIDELITY_BIT(LISTENER);
	if (listen(a->fd, (int)l->backlog) < 0)
		return sockmi_fail(a->result, errno == EADDRINUSE ? SOCKMI_RESULT_PORT_TAKEN : SOCKMI_RESULT_FAILED,
				   SOCKMI_STEP_LISTEN, errno);
	a->result->carried |= SOCKMI_FIDELITY_BIT(LISTENER);
	return 0;
}

static int activate(struct activate *a, struct sockmi_host *host)
{
	a->fresh = sockmi_fresh(host, a->image->identity.family, a->fd);
	if (!a->fresh)
		return failed_call(a, SOCKMI_STEP_OPTION);
	switch (a->image->identity.kind) {
	case SOCKMI_KIND_CONNECTED:
		return activate_connection(a);
	case SOCKMI_KIND_LISTENING:
		return activate_listener(a);
	default:
		set_buffers(a);
		if (sockmi_repair(a->fd, TCP_REPAIR_OFF_NO_WP) < 0)
			return failed_call(a, SOCKMI_STEP_REPAIR);
		restore_reuse(a);
		return 0;
	}
}

int sockmi_activate(const int *fds, const void *const *images, const size_t *lengths, size_t n,
		    struct sockmi_result *results)
{
	struct sockmi_host host = { 0 };
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_image image;
		struct activate a = { .fd = fds[i], .image = &image, .result = &results[i] };

		if (sockmi_decode_own(images[i], lengths[i], &image, &results[i]) < 0 || activate(&a, &host) < 0)
			count++;
	}
	sockmi_host_end(&host);
	return count;
}
