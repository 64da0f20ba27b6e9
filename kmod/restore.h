/* SPDX-License-Identifier: GPL-2.0 */
/* What the steps of a restore share; restore.c has their order. */
#ifndef SOCKMI_RESTORE_H
#define SOCKMI_RESTORE_H

#include <linux/tcp.h>

#include "internal.h"

#define MSS_LEAST 88 /* as TCP_MAXSEG */
#define RTT_MOST_US (120U * USEC_PER_SEC)
#define BUFFER_MAX (S32_MAX / 2)

struct restore {
	struct socket *sock;
	struct sock *sk;
	struct tcp_sock *tp;
	struct inet_connection_sock *icsk;
	const struct sockmi_image *image;
	const struct sockmi_identity *id;
	const struct sockmi_sequence *seq;
	struct sockmi_endpoint local;
	const struct sockmi_view *before; /* options that the socket had */
	u32 flags;
	u32 refusal;
	struct sockmi_losses *losses;
};

static inline int refuse(struct restore *r, u32 refusal)
{
	r->refusal = refusal;
	return sockmi_refusal_errno(refusal);
}

static inline bool has(const struct restore *r, unsigned int section)
{
	return r->image->present & SOCKMI_HAS(section);
}

static inline bool flag(const struct restore *r, u32 mask)
{
	return r->seq->flags & mask;
}

static inline bool is_mapped(const struct sockmi_endpoint *e)
{
	return ipv6_addr_v4mapped((const struct in6_addr *)e->address);
}

static inline __be32 address4(const struct sockmi_endpoint *e)
{
	__be32 address;

	memcpy(&address, e->address + 12, sizeof(address));
	return address;
}

/* All have the socket's lock. Those that can fail return 0, or -errno with @refusal. */

/* The address, and the port as bind() takes it. */
int sockmi_restore_bind(struct restore *r);
int sockmi_restore_connect(struct restore *r);

/* What the application has yet to read, and the peer's FIN behind it. */
int sockmi_restore_received(struct restore *r);
int sockmi_restore_sent(struct restore *r);
int sockmi_restore_unsent(struct restore *r);
/* What finds no room is a loss. */
void sockmi_restore_out_of_order(struct restore *r);

void sockmi_restore_negotiated(struct restore *r);
int sockmi_restore_timestamps(struct restore *r);
void sockmi_restore_windows(struct restore *r);
void sockmi_restore_path(struct restore *r);
void sockmi_restore_autotune(struct restore *r);
void sockmi_restore_counters(struct restore *r);
void sockmi_restore_urgent(struct restore *r);
void sockmi_restore_timers(struct restore *r);

#endif
