/* SPDX-License-Identifier: MIT */
/* Looks at sockets without touching them: what they are, and what stands against moving them. */
#ifndef SOCKMI_ENGINE_INSPECT_H
#define SOCKMI_ENGINE_INSPECT_H

#include <stddef.h>
#include <stdint.h>

/* What stands against moving the socket; preflight.py says it in words. */
enum sockmi_finding {
	SOCKMI_NOT_TCP		= 1 << 0,
	SOCKMI_MPTCP		= 1 << 1,
	SOCKMI_BAD_DESCRIPTOR	= 1 << 2,	/* `error` */
	SOCKMI_OTHER_NETNS	= 1 << 3,	/* not in the network namespace of the caller */
	SOCKMI_URGENT_DATA	= 1 << 4,
	SOCKMI_ULP		= 1 << 5,	/* `ulp` */
	SOCKMI_MD5		= 1 << 6,
	SOCKMI_MD5_UNKNOWN	= 1 << 7,	/* inet_diag does not answer: cannot be ruled out; `error` */
	SOCKMI_AO		= 1 << 8,
	SOCKMI_SOCKMAP		= 1 << 9,
	SOCKMI_SOCKMAP_UNKNOWN	= 1 << 10,	/* there are such maps, or bpf(2) is forbidden; `error` */
	SOCKMI_IN_REPAIR	= 1 << 11,
	SOCKMI_NO_PRIVILEGE	= 1 << 12,	/* no CAP_NET_ADMIN over the socket's namespace */
	SOCKMI_ZERO_COPY	= 1 << 13,
	SOCKMI_LINK_LOCAL	= 1 << 14,
	SOCKMI_FAST_OPEN	= 1 << 15,
	SOCKMI_ENDED		= 1 << 16,	/* closed, but was a connection once */
	SOCKMI_NOT_TAKEN	= 1 << 17,	/* inspector.h: no descriptor of it could be had, `error` */
	SOCKMI_LOCKED		= 1 << 18,	/* inspector.h: some call keeps its lock */
};

/* As base.BindFlag. */
enum sockmi_bind_flag {
	SOCKMI_BIND_REUSE_ADDRESS = 1,
	SOCKMI_BIND_REUSE_PORT = 2,
	SOCKMI_BIND_V6_ONLY = 4,
	SOCKMI_BIND_DEVICE = 8,
};

struct sockmi_facts {
	uint64_t inode;			/* of sockfs */
	uint64_t cookie;		/* SO_COOKIE */
	uint32_t findings;		/* enum sockmi_finding */
	int32_t error;			/* errno of BAD_DESCRIPTOR and of the _UNKNOWN ones */
	uint32_t receive_queue;		/* bytes; of a listener: connections that wait for accept */
	uint32_t send_queue;		/* bytes unacknowledged or unsent; of a listener: its backlog */
	uint32_t receive_buffer;	/* SO_RCVBUF, bytes */
	uint32_t send_buffer;		/* SO_SNDBUF, bytes */
	uint16_t family;		/* AF_INET or AF_INET6 */
	uint16_t protocol;
	uint16_t local_port, remote_port;
	uint8_t state;			/* as in TCP_INFO */
	uint8_t send_scale, receive_scale;
	uint8_t timestamp_us;
	uint8_t version;		/* 4 (v4-mapped too) or 6: of the addresses */
	uint8_t bind_flags;		/* enum sockmi_bind_flag, unless it is connected */
	uint8_t direct;			/* its packets must not pass a router: see direct() */
	uint8_t pad;
	uint8_t local[16], remote[16];	/* network byte order; IPv4 in the first four */
	char ulp[16];
	uint64_t received;		/* bytes that have come in order */
	uint32_t sent_ms, received_ms;	/* since data last went and came */
	uint32_t uid;			/* whose socket it is */
	uint32_t pad2;
};

/*
 * Look at @n descriptors of this process; @facts in the same order. Returns 0 or -errno
 * (then nothing is known of any).
 */
int sockmi_inspect(const int *fds, size_t n, struct sockmi_facts *facts);

/*
 * How many bytes may be queued at each of @n connections, both ways: more than there are, as memory is what is
 * counted, but it takes no lock, and so waits for nobody.
 */
void sockmi_queued_at_most(const int *fds, size_t n, uint64_t *bytes);

/* Of one: only what TCP_INFO says of a connection, its state and what has come and gone. */
void sockmi_inspect_briefly(int fd, struct sockmi_facts *facts);

/* The parts of it that look at all sockets at once; for inspect.c alone. */
int sockmi_diag_check(const int *fds, struct sockmi_facts *facts, size_t n);
void sockmi_sockmap_check(struct sockmi_facts *facts, size_t n);

#endif
