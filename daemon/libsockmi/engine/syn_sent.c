// SPDX-License-Identifier: MIT
/*
 * What no socket option tells of a socket in SYN-SENT: its remote end and its retransmission timer (from
 * sock_diag), and what its SYN has offered (which follows from the namespace's sysctls).
 */
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "engine_internal.h"

#define ANSWER_BYTES 32768
#define LINEAR_TIMER_MS 1000 /* TCP_TIMEOUT_INIT */
#define READ_MS_MAX 3 /* less than half of SOCKMI_SYN_SLACK_MS */
#define READS_MAX 8

static void fill_syn(int fd, const struct inet_diag_msg *m, struct sockmi_syn *syn)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);
	uint32_t rto_ms, left_ms, linear;
	union sockmi_sockaddr remote = { .any = { 0 } };

	if (m->idiag_family == AF_INET) {
		remote.v4.sin_family = AF_INET;
		remote.v4.sin_port = m->id.idiag_dport;
		memcpy(&remote.v4.sin_addr, m->id.idiag_dst, 4);
	} else {
		remote.v6.sin6_family = AF_INET6;
		remote.v6.sin6_port = m->id.idiag_dport;
		memcpy(&remote.v6.sin6_addr, m->id.idiag_dst, 16);
		if (IN6_IS_ADDR_LINKLOCAL(&remote.v6.sin6_addr))
			remote.v6.sin6_scope_id = m->id.idiag_if;
	}
	sockmi_endpoint_from_sockaddr(&syn->remote, &remote);
	getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length);
	rto_ms = info.tcpi_rto / 1000;
	left_ms = m->idiag_timer == 1 && m->idiag_expires < rto_ms ? m->idiag_expires : 0;
	syn->overdue = m->idiag_timer == 1 && !m->idiag_expires;
	syn->retransmissions = info.tcpi_total_retrans;
	syn->last_age_ms = rto_ms - left_ms + SOCKMI_SYN_SLACK_MS / 2;
	/* Before that, `linear` timeouts of the first length (since Linux 6.5), then doubled ones. */
	linear = syn->retransmissions > info.tcpi_backoff ? syn->retransmissions - info.tcpi_backoff : 0;
	syn->first_age_ms = syn->last_age_ms;
	if (syn->retransmissions) {
		uint32_t before = linear * LINEAR_TIMER_MS;

		for (uint32_t i = 0; i < info.tcpi_backoff && i < 16; i++)
			before += LINEAR_TIMER_MS << i;
		syn->first_age_ms += before + before / 8; /* the wheel rounds long timers up */
	}
}

/* Looks through one datagram: 1 found, 0 not here, -1 the end. */
static int search(int fd, const uint8_t *buffer, size_t bytes, uint64_t cookie, struct sockmi_syn *syn)
{
	unsigned int left = (unsigned int)bytes;

	for (const struct nlmsghdr *h = (const void *)buffer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
		const struct inet_diag_msg *m = NLMSG_DATA(h);

		if (h->nlmsg_type == NLMSG_DONE || h->nlmsg_type == NLMSG_ERROR)
			return -1;
		if (h->nlmsg_len >= NLMSG_LENGTH(sizeof(*m)) &&
		    (m->id.idiag_cookie[0] | (uint64_t)m->id.idiag_cookie[1] << 32) == cookie) {
			fill_syn(fd, m, syn);
			return 1;
		}
	}
	return 0;
}

static int search_family(int fd, int netlink, uint8_t family, uint64_t cookie, struct sockmi_syn *syn)
{
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 body;
	} request = {
		.header = { .nlmsg_len = sizeof(request), .nlmsg_type = SOCK_DIAG_BY_FAMILY,
			    .nlmsg_flags = NLM_F_REQUEST | NLM_F_DUMP },
		.body = { .sdiag_family = family, .sdiag_protocol = IPPROTO_TCP,
			  .idiag_states = 1u << SOCKMI_SYN_SENT },
	};
	uint8_t *buffer = malloc(ANSWER_BYTES);
	int found = -1;

	if (!buffer)
		return -1;
	if (send(netlink, &request, sizeof(request), 0) >= 0) {
		do {
			ssize_t bytes = recv(netlink, buffer, ANSWER_BYTES, 0);

			found = bytes <= 0 ? -1 : search(fd, buffer, (size_t)bytes, cookie, syn);
		} while (found == 0);
	}
	free(buffer);
	return found;
}

static int find_once(int fd, int domain, uint64_t cookie, struct sockmi_syn *syn)
{
	int found, netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);

	memset(syn, 0, sizeof(*syn));
	if (netlink < 0)
		return -1;
	found = search_family(fd, netlink, (uint8_t)domain, cookie, syn);
	close(netlink);
	if (found > 0)
		return sockmi_get_int(fd, IPPROTO_TCP, TCP_TIMESTAMP, (int *)&syn->tsval);
	errno = ENOENT;
	return -1;
}

static int64_t monotonic_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/*
 * An age is of the moment at which the clock was read with it: if we, or the timer, were kept from running
 * meanwhile, both are read again.
 */
int sockmi_syn_find(int fd, struct sockmi_syn *syn)
{
	const struct timespec pause = { .tv_nsec = 1000000 };
	uint64_t cookie = 0;
	socklen_t length = sizeof(cookie);
	int64_t begun;
	int domain = 0;

	if (getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &length) < 0 ||
	    sockmi_get_int(fd, SOL_SOCKET, SO_DOMAIN, &domain) < 0)
		return -1;
	for (int i = 0; i < READS_MAX; i++) {
		if (i)
			nanosleep(&pause, NULL);
		begun = monotonic_ms();
		if (find_once(fd, domain, cookie, syn) < 0)
			return -1;
		if (!syn->overdue && monotonic_ms() - begun <= READ_MS_MAX)
			break;
	}
	return 0;
}

/* The numbers of a sysctl of this namespace; how many there were. */
static int read_sysctl(const char *path, long values[3])
{
	char text[128];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return 0;
	text[length] = 0;
	return sscanf(text, "%ld %ld %ld", &values[0], &values[1], &values[2]);
}

static long sysctl_or(const char *path, long otherwise)
{
	long values[3];

	return read_sysctl(path, values) >= 1 ? values[0] : otherwise;
}

/* RFC 7323 section 2.3; the largest window this host could ever want (tcp_select_initial_window). */
static uint8_t offered_scale(uint32_t clamp)
{
	long rmem[3] = { 4096, 131072, 6291456 }, space, limit;
	uint8_t scale = 0;

	read_sysctl("/proc/sys/net/ipv4/tcp_rmem", rmem);
	space = rmem[2];
	limit = sysctl_or("/proc/sys/net/core/rmem_max", 212992);
	if (limit > space)
		space = limit;
	if (clamp && clamp < space)
		space = clamp;
	while (space > 65535 && scale < 14) {
		space >>= 1;
		scale++;
	}
	return scale;
}

void sockmi_syn_offer(int fd, struct sockmi_negotiated *offer)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);
	int clamp = 0;

	memset(offer, 0, sizeof(*offer));
	getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length);
	if (info.tcpi_options & TCPI_OPT_ECN)
		offer->flags |= SOCKMI_NEGOTIATED_ECN;
	sockmi_get_int(fd, IPPROTO_TCP, TCP_WINDOW_CLAMP, &clamp);
	if (sysctl_or("/proc/sys/net/ipv4/tcp_timestamps", 1))
		offer->flags |= SOCKMI_NEGOTIATED_TIMESTAMPS;
	if (sysctl_or("/proc/sys/net/ipv4/tcp_sack", 1))
		offer->flags |= SOCKMI_NEGOTIATED_SACK;
	if (sysctl_or("/proc/sys/net/ipv4/tcp_window_scaling", 1)) {
		offer->flags |= SOCKMI_NEGOTIATED_WSCALE;
		offer->rcv_wscale = offered_scale((uint32_t)clamp);
	}
}

bool sockmi_counts_us(int fd)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);

	return getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) == 0 && info.tcpi_options & TCPI_OPT_USEC_TS;
}

int sockmi_syn_offered(int fd)
{
	struct sockmi_negotiated offer;

	sockmi_syn_offer(fd, &offer);
	return offer.rcv_wscale | sockmi_counts_us(fd) << 8;
}
