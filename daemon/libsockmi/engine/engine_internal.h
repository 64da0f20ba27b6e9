/* SPDX-License-Identifier: MIT */
/* Shared by the files of the repair engine. */
#ifndef SOCKMI_ENGINE_INTERNAL_H
#define SOCKMI_ENGINE_INTERNAL_H

#include <errno.h>
#include <netinet/in.h>
#include <linux/tcp.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "engine.h"

#ifndef TCPI_OPT_USEC_TS
#define TCPI_OPT_USEC_TS 64
#endif
#define SOCKMI_SIOCINQ 0x541B
#define SOCKMI_SIOCOUTQ 0x5411
#define SOCKMI_SIOCOUTQNSD 0x894B
#define SOCKMI_SIOCATMARK 0x8905

#define SOCKMI_REUSE_FORCED 2 /* SO_REUSEADDR of a socket in repair (SK_FORCE_REUSE) */

static inline int sockmi_fail(struct sockmi_result *result, int code, int step, int error)
{
	result->code = code;
	result->step = step;
	result->error = error;
	return -1;
}

static inline int sockmi_get_int(int fd, int level, int option, int *value)
{
	socklen_t length = sizeof(*value);

	return getsockopt(fd, level, option, value, &length);
}

static inline int sockmi_set_int(int fd, int level, int option, int value)
{
	return setsockopt(fd, level, option, &value, sizeof(value));
}

static inline int sockmi_repair(int fd, int on)
{
	return sockmi_set_int(fd, IPPROTO_TCP, TCP_REPAIR, on);
}

/* enum sockmi_state, or -1 with errno. */
static inline int sockmi_state(int fd)
{
	uint8_t state;
	socklen_t length = sizeof(state); /* the first byte of TCP_INFO */

	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &state, &length) < 0 ? -1 : state;
}

/* Select TCP_RECV_QUEUE or TCP_SEND_QUEUE and read, or set, its end. */
static inline int sockmi_get_queue_seq(int fd, int queue, uint32_t *seq)
{
	if (sockmi_set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue) < 0)
		return -1;
	return sockmi_get_int(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, (int *)seq);
}

static inline int sockmi_set_queue_seq(int fd, int queue, uint32_t seq)
{
	if (sockmi_set_int(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue) < 0)
		return -1;
	return sockmi_set_int(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, (int)seq);
}

/* Whether something waits behind what has been sent: data, or our FIN. */
static inline bool sockmi_image_waits(const struct sockmi_image *image)
{
	return image->unsent_queue.length ||
	       (image->sequence.flags & SOCKMI_OWN_FIN && !(image->sequence.flags & SOCKMI_OWN_FIN_SENT));
}

/* sockmi_result for "this descriptor cannot be read at all", from errno. */
int sockmi_fail_access(struct sockmi_result *result, int step);

int sockmi_decode_own(const void *bytes, size_t length, struct sockmi_image *image, struct sockmi_result *result);

/* addresses.c */
union sockmi_sockaddr {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

void sockmi_endpoint_from_sockaddr(struct sockmi_endpoint *endpoint, const union sockmi_sockaddr *address);
socklen_t sockmi_endpoint_to_sockaddr(const struct sockmi_endpoint *endpoint, int family,
				      union sockmi_sockaddr *address);
bool sockmi_endpoint_is_mapped(const struct sockmi_endpoint *endpoint);
bool sockmi_endpoint_is_zero(const struct sockmi_endpoint *endpoint);

/* options.c */

/* When an option is set on a copy. */
enum sockmi_when {
	SOCKMI_BEFORE_BIND,
	SOCKMI_BEFORE_CONNECT, /* CLOSED, bound */
	SOCKMI_LATE,	       /* the last thing before activation */
};

/* Which options a socket can have: family, and whether its packets can be IPv4. */
struct sockmi_option_scope {
	int family;
	bool inet;
	bool connected; /* SYN-SENT and later: what only means something before is left out */
	bool listening;
	bool common; /* capture: leave the rare ones of a connection out */
};

/* Options of fresh sockets, read at most once in a call for each family. Start with zeros. */
struct sockmi_fresh;
struct sockmi_host {
	const struct sockmi_fresh *fresh[2];
	struct sockmi_fresh *copy[2];
};

/* For sockets in the network namespace of @fd. NULL with errno set. */
const struct sockmi_fresh *sockmi_fresh(struct sockmi_host *host, int family, int fd);
void sockmi_fresh_buffers(const struct sockmi_fresh *fresh, int64_t *receive, int64_t *send);
/* The number that a fresh socket has of an option. */
int64_t sockmi_fresh_number(const struct sockmi_fresh *fresh, uint16_t id, int64_t otherwise);
void sockmi_host_end(struct sockmi_host *host);

/* Write the options that differ from a fresh Linux socket's; also tell SO_PEEK_OFF. */
int sockmi_options_read(int fd, const struct sockmi_option_scope *scope, const struct sockmi_fresh *fresh,
			struct sockmi_writer *writer, int *peek_offset, struct sockmi_result *result);

struct sockmi_planned {
	uint8_t row;
	uint8_t when;
	int64_t number;
	struct sockmi_view bytes;
};

/* What is to be set on a copy, in order. */
struct sockmi_option_plan {
	unsigned int n;
	struct sockmi_planned options[128];
};

/*
 * What a copy needs to be given: where the image, or what it leaves out, differs from a fresh
 * socket of this host. What this host cannot be given goes to result->lost_options, here and below.
 */
void sockmi_options_plan(struct sockmi_view options, const struct sockmi_option_scope *scope,
			 const struct sockmi_fresh *fresh, struct sockmi_option_plan *plan,
			 struct sockmi_result *result);
void sockmi_options_write(int fd, const struct sockmi_option_plan *plan, enum sockmi_when when,
			  struct sockmi_result *result);
/* One option's number, or @otherwise if it was left out. @flags may be NULL. */
int64_t sockmi_options_find(struct sockmi_view options, uint16_t id, int64_t otherwise, uint8_t *flags);
#define SOCKMI_OPTION_ID_END 400 /* beyond all ids of options */
void sockmi_lost_option(struct sockmi_result *result, uint16_t id);

/* inject.c: one TCP segment without options, as if the peer had sent it. 0 or -1 with errno. */
int sockmi_inject(const struct sockmi_endpoint *from, const struct sockmi_endpoint *to, uint32_t seq,
		  uint32_t ack, uint16_t window, bool fin, uint32_t mark);

/* A place at which a crash test may end this process: see sockmi_crash_hook. */
static inline void sockmi_reached(const char *point)
{
	if (sockmi_crash_hook)
		sockmi_crash_hook(point);
}

/* release.c: by a child that shares our memory, and goes on if this process is killed meanwhile; what @work returns. */
int sockmi_whatever_happens(int (*work)(const void *argument), const void *argument);

/* release.c: of what goes together one is closed, the others are not yet. */
void sockmi_first_closed(void);

/* deaf.c: a dormant copy takes no packet in. */
void sockmi_deafen(int fd, const struct sockmi_image *image);
void sockmi_undeafen(int fd, const struct sockmi_image *image);

/* syn_sent.c */
struct sockmi_syn {
	struct sockmi_endpoint remote;
	uint32_t first_age_ms; /* since the first SYN was sent: never too little, SLACK_MS too much at most */
	uint32_t last_age_ms;
	uint32_t tsval; /* the socket's clock (TCP_TIMESTAMP) at that age */
	uint32_t retransmissions;
	bool overdue; /* the timer has run out and has not fired yet: the ages are too little */
};

/* Timers fire late, by up to one part in eight of a long one; plus rounding. */
#define SOCKMI_SYN_SLACK_MS 12

/* By cookie, among the sockets in SYN-SENT of this namespace. -1 with errno (ENOENT: not there any more). */
int sockmi_syn_find(int fd, struct sockmi_syn *syn);
/* What the SYN of a socket in SYN-SENT offers: SOCKMI_NEGOTIATED_* flags and rcv_wscale. */
void sockmi_syn_offer(int fd, struct sockmi_negotiated *offer);
/* Whether its timestamps count microseconds. TCP_TIMESTAMP's lowest bit says so only since Linux 6.7. */
bool sockmi_counts_us(int fd);

#endif
