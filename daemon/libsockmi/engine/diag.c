/* SPDX-License-Identifier: MIT */
/*
 * What only inet_diag tells of a socket: MD5 keys, and the length of the receive queue behind an
 * urgent mark (SIOCINQ stops at the mark). One request per connection, packed; for sockets that
 * cannot be looked up by their tuple (listeners, SYN-SENT) a dump of their states.
 */
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include "inspect.h"

#define PACK 64			/* requests in one send; their answers fit into the receive buffer */
#define ANSWER_BYTES 8192
#define RECEIVE_BUFFER (1 << 20)
#define TRIES 3
/* net/ipv4/inet_diag.c inet_sk_diag_fill(): MD5 keys come along with INET_DIAG_INFO only. */
#define EXTENSIONS (1 << (INET_DIAG_INFO - 1))

enum { SYN_SENT = 2, CLOSED = 7, LISTEN = 10 };

struct request {
	struct nlmsghdr header;
	struct inet_diag_req_v2 body;
};

static bool looked_up(const struct sockmi_facts *f)
{
	return f->state && f->state != CLOSED && f->state != LISTEN && f->state != SYN_SENT &&
	       !(f->findings & SOCKMI_OTHER_NETNS);
}

static void fill(struct request *r, const struct sockmi_facts *f, uint32_t sequence)
{
	*r = (struct request){
		.header = { .nlmsg_len = sizeof(*r), .nlmsg_type = SOCK_DIAG_BY_FAMILY,
			    .nlmsg_flags = NLM_F_REQUEST, .nlmsg_seq = sequence },
		.body = { .sdiag_family = f->version == 4 ? AF_INET : AF_INET6, .sdiag_protocol = IPPROTO_TCP,
			  .idiag_ext = EXTENSIONS, .idiag_states = ~0U,
			  .id = { .idiag_sport = htons(f->local_port), .idiag_dport = htons(f->remote_port),
				  .idiag_cookie = { (uint32_t)f->cookie, (uint32_t)(f->cookie >> 32) } } },
	};
	memcpy(r->body.id.idiag_src, f->local, sizeof(f->local));
	memcpy(r->body.id.idiag_dst, f->remote, sizeof(f->remote));
}

static bool has_md5(const struct nlmsghdr *h)
{
	const struct inet_diag_msg *m = NLMSG_DATA(h);
	const struct rtattr *a = (const struct rtattr *)(m + 1);
	long left = (long)h->nlmsg_len - (long)NLMSG_LENGTH(sizeof(*m));

	for (; left >= (long)sizeof(*a) && a->rta_len >= sizeof(*a) && a->rta_len <= left;
	     left -= (long)RTA_ALIGN(a->rta_len),
	     a = (const struct rtattr *)((const char *)a + RTA_ALIGN(a->rta_len)))
		if (a->rta_type == INET_DIAG_MD5SIG)
			return true;
	return false;
}

/*
 * More received than SIOCINQ says, even if it is asked again? Then an urgent mark lies in the
 * queue (a FIN counts one). Returns true if the two differ; data may have come in between.
 */
static bool behind_mark(int fd, const struct sockmi_facts *f, uint32_t received)
{
	int now = 0;

	if (received <= f->receive_queue + 1)
		return false;
	return !ioctl(fd, SIOCINQ, &now) && received > (uint32_t)now + 1;
}

/* In SYN-SENT getpeername(2) does not tell yet. */
static void set_remote(struct sockmi_facts *f, const struct inet_diag_msg *m)
{
	const uint8_t *address = (const uint8_t *)m->id.idiag_dst;

	f->remote_port = ntohs(m->id.idiag_dport);
	if (f->version == 6) {
		memcpy(f->remote, address, 16);
		if (IN6_IS_ADDR_LINKLOCAL((const struct in6_addr *)f->remote))
			f->findings |= SOCKMI_LINK_LOCAL;
	} else {
		memcpy(f->remote, address + (m->idiag_family == AF_INET6 ? 12 : 0), 4);
	}
}

struct check {
	const int *fds;
	struct sockmi_facts *facts;
	uint8_t *known;		/* of each: the kernel has answered */
	uint8_t *again;		/* of each: ask once more, the queue was in motion */
};

static void answered(struct check *c, size_t i, const struct nlmsghdr *h)
{
	const struct inet_diag_msg *m = NLMSG_DATA(h);

	c->known[i] = 1;
	if (c->facts[i].state == SYN_SENT)
		set_remote(&c->facts[i], m);
	if (has_md5(h))
		c->facts[i].findings |= SOCKMI_MD5;
	c->again[i] = c->facts[i].state != LISTEN && behind_mark(c->fds[i], &c->facts[i], m->idiag_rqueue);
}

/* Ask for @n (at most PACK) sockets by tuple, whose indices are @which. Returns 0 or errno. */
static int ask(int netlink, struct check *c, const size_t *which, size_t n)
{
	struct request requests[PACK] = { 0 };
	_Alignas(struct nlmsghdr) char answer[ANSWER_BYTES];

	for (size_t i = 0; i < n; i++)
		fill(&requests[i], &c->facts[which[i]], (uint32_t)i);
	if (send(netlink, requests, n * sizeof(*requests), 0) < 0)
		return errno;
	/* Each request has one answer: the socket, or an error. All are there when send() returns. */
	for (size_t got = 0; got < n;) {
		ssize_t length = recv(netlink, answer, sizeof(answer), MSG_DONTWAIT);

		if (length < 0)
			return errno == EAGAIN ? 0 : errno;
		unsigned int left = (unsigned int)length;

		for (struct nlmsghdr *h = (struct nlmsghdr *)answer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
			got++;
			if (h->nlmsg_type == SOCK_DIAG_BY_FAMILY && h->nlmsg_seq < n)
				answered(c, which[h->nlmsg_seq], h);
		}
	}
	return 0;
}

/* Dump the sockets of one family in @states and look for the @n ones in @which. Returns 0 or errno. */
static int dump(int netlink, struct check *c, const size_t *which, size_t n, int family, uint32_t states)
{
	struct request r = {
		.header = { .nlmsg_len = sizeof(r), .nlmsg_type = SOCK_DIAG_BY_FAMILY,
			    .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP },
		.body = { .sdiag_family = (uint8_t)family, .sdiag_protocol = IPPROTO_TCP,
			  .idiag_ext = EXTENSIONS, .idiag_states = states },
	};
	_Alignas(struct nlmsghdr) char answer[4 * ANSWER_BYTES];

	if (send(netlink, &r, sizeof(r), 0) < 0)
		return errno;
	for (;;) {
		ssize_t length = recv(netlink, answer, sizeof(answer), 0);

		if (length < 0)
			return errno;
		unsigned int left = (unsigned int)length;

		for (struct nlmsghdr *h = (struct nlmsghdr *)answer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
			if (h->nlmsg_type == NLMSG_DONE)
				return 0;
			if (h->nlmsg_type == NLMSG_ERROR)
				return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
			const struct inet_diag_msg *m = NLMSG_DATA(h);
			uint64_t cookie = m->id.idiag_cookie[0] | (uint64_t)m->id.idiag_cookie[1] << 32;

			for (size_t i = 0; i < n; i++)
				if (c->facts[which[i]].cookie == cookie)
					answered(c, which[i], h);
		}
	}
}

static int check_connections(int netlink, struct check *c, size_t n, bool first)
{
	size_t which[PACK], count = 0;

	for (size_t i = 0; i < n; i++) {
		if (looked_up(&c->facts[i]) && (first || c->again[i]))
			which[count++] = i;
		if (count == PACK || (count && i + 1 == n)) {
			int error = ask(netlink, c, which, count);

			if (error)
				return error;
			count = 0;
		}
	}
	return 0;
}

static int check_others(int netlink, struct check *c, size_t n)
{
	size_t *which = calloc(n, sizeof(*which)), count = 0;
	uint32_t states = 0;
	int error = which ? 0 : ENOMEM;

	for (size_t i = 0; which && i < n; i++)
		if (c->facts[i].state && c->facts[i].state != CLOSED && !c->known[i] &&
		    !(c->facts[i].findings & SOCKMI_OTHER_NETNS)) {
			states |= 1U << c->facts[i].state;
			which[count++] = i;
		}
	if (states)
		error = dump(netlink, c, which, count, AF_INET, states);
	if (states && !error)
		error = dump(netlink, c, which, count, AF_INET6, states);
	free(which);
	return error;
}

int sockmi_diag_check(const int *fds, struct sockmi_facts *facts, size_t n)
{
	struct check c = { .fds = fds, .facts = facts, .known = calloc(n, 1), .again = calloc(n, 1) };
	int netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	int error = netlink < 0 ? errno : c.known && c.again ? 0 : ENOMEM;
	int bytes = RECEIVE_BUFFER;

	if (!error) {
		setsockopt(netlink, SOL_SOCKET, SO_RCVBUFFORCE, &bytes, sizeof(bytes));
		error = check_connections(netlink, &c, n, true);
	}
	for (int i = 1; !error && i < TRIES && memchr(c.again, 1, n); i++)
		error = check_connections(netlink, &c, n, false);
	if (!error)
		error = check_others(netlink, &c, n);
	for (size_t i = 0; i < n; i++) {
		if (c.again && c.again[i])
			facts[i].findings |= SOCKMI_URGENT_DATA;
		/* Of a socket that is neither connected nor listening the kernel tells no keys. */
		if (facts[i].state && (error || (!c.known[i] && facts[i].state != CLOSED)) &&
		    !(facts[i].findings & SOCKMI_OTHER_NETNS)) {
			facts[i].findings |= SOCKMI_MD5_UNKNOWN;
			facts[i].error = error ? error : ENOENT;
		}
	}
	if (netlink >= 0)
		close(netlink);
	free(c.known);
	free(c.again);
	return 0;
}
