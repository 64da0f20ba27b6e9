// SPDX-License-Identifier: MIT
/*
 * Makes a socket that is not connected as dead as a connection that was reset: whoever holds it can neither listen
 * nor connect with it any more (EINVAL, EISCONN). The kernel has no call for that. So it becomes a connection to
 * this host itself, in repair, which sends nothing, and that connection is ended by sock_diag; the RST of that goes
 * to a port of the loopback device at which nobody looks.
 */
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <unistd.h>

#include "engine_internal.h"

#define FIRST_PORT 9 /* discard */
#define LAST_PORT 19

/* What would lead the connection elsewhere than to this host. */
struct detour {
	int level, option;
	socklen_t length;
	char value[256];
};

static void clear(int fd, struct detour *detour)
{
	detour->length = sizeof(detour->value);
	if (getsockopt(fd, detour->level, detour->option, detour->value, &detour->length) < 0)
		detour->length = 0;
	if (detour->length)
		setsockopt(fd, detour->level, detour->option, "", 0);
}

static void put_back(int fd, const struct detour *detour)
{
	if (detour->length)
		setsockopt(fd, detour->level, detour->option, detour->value, detour->length);
}

static int connect_loopback(int fd, int family, bool four)
{
	union sockmi_sockaddr to = { .any.sa_family = (sa_family_t)family };
	socklen_t length = family == AF_INET ? sizeof(to.v4) : sizeof(to.v6);

	if (family == AF_INET)
		to.v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	else
		to.v6.sin6_addr = in6addr_loopback;
	if (family == AF_INET6 && four) {
		static const uint8_t mapped[16] = { [10] = 0xff, 0xff, 127, 0, 0, 1 };

		memcpy(&to.v6.sin6_addr, mapped, sizeof(mapped));
	}
	for (int port = FIRST_PORT; port <= LAST_PORT; port++) {
		*(family == AF_INET ? &to.v4.sin_port : &to.v6.sin6_port) = htons((uint16_t)port);
		/* Connected already: an earlier run of the daemon has come that far. */
		if (connect(fd, &to.any, length) == 0 || errno == EISCONN)
			return 0;
		if (errno != EADDRNOTAVAIL)
			return -1;
	}
	return -1;
}

static int connect_self(int fd)
{
	union sockmi_sockaddr local = { 0 };
	socklen_t length = sizeof(local);
	int family, only = 1;
	bool four;

	if (getsockname(fd, &local.any, &length) < 0)
		return -1;
	family = local.any.sa_family;
	four = family == AF_INET6 && IN6_IS_ADDR_V4MAPPED(&local.v6.sin6_addr);
	/* Its address need not be this host's. */
	if (family == AF_INET || four)
		sockmi_set_int(fd, IPPROTO_IP, IP_TRANSPARENT, 1);
	else
		sockmi_set_int(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, 1);
	if (connect_loopback(fd, family, four) == 0)
		return 0;
	/* A host without IPv6 has no ::1. */
	if (family != AF_INET6 || four || !IN6_IS_ADDR_UNSPECIFIED(&local.v6.sin6_addr) ||
	    sockmi_get_int(fd, IPPROTO_IPV6, IPV6_V6ONLY, &only) < 0 || only)
		return -1;
	return connect_loopback(fd, family, true);
}

/* End a connection by sock_diag: 0, or -1 with errno (EOPNOTSUPP: this kernel cannot). */
static int destroy(int fd)
{
	union sockmi_sockaddr local = { 0 }, remote = { 0 };
	socklen_t local_length = sizeof(local), remote_length = sizeof(remote);
	struct {
		struct nlmsghdr header;
		struct inet_diag_req_v2 body;
	} request = {
		.header = { .nlmsg_len = sizeof(request), .nlmsg_type = SOCK_DESTROY,
			    .nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK },
		.body = { .sdiag_protocol = IPPROTO_TCP, .idiag_states = ~0U,
			  .id.idiag_cookie = { INET_DIAG_NOCOOKIE, INET_DIAG_NOCOOKIE } },
	};
	struct {
		struct nlmsghdr header;
		struct nlmsgerr error;
		char rest[512];
	} answer;
	int netlink;

	if (getsockname(fd, &local.any, &local_length) < 0 || getpeername(fd, &remote.any, &remote_length) < 0)
		return -1;
	request.body.sdiag_family = (uint8_t)local.any.sa_family;
	if (local.any.sa_family == AF_INET) {
		request.body.id.idiag_sport = local.v4.sin_port;
		request.body.id.idiag_dport = remote.v4.sin_port;
		memcpy(request.body.id.idiag_src, &local.v4.sin_addr, 4);
		memcpy(request.body.id.idiag_dst, &remote.v4.sin_addr, 4);
	} else {
		request.body.id.idiag_sport = local.v6.sin6_port;
		request.body.id.idiag_dport = remote.v6.sin6_port;
		memcpy(request.body.id.idiag_src, &local.v6.sin6_addr, 16);
		memcpy(request.body.id.idiag_dst, &remote.v6.sin6_addr, 16);
	}
	netlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
	if (netlink < 0)
		return -1;
	/* The answer is there when send() returns. */
	if (send(netlink, &request, sizeof(request), 0) < 0 ||
	    recv(netlink, &answer, sizeof(answer), MSG_DONTWAIT) < (ssize_t)NLMSG_LENGTH(sizeof(answer.error)) ||
	    answer.header.nlmsg_type != NLMSG_ERROR) {
		close(netlink);
		return -1;
	}
	close(netlink);
	errno = -answer.error.error;
	return errno ? -1 : 0;
}

/* As before: in repair a disconnect sends nothing. */
static void revive(int fd, int reuse)
{
	struct sockaddr unspecified = { .sa_family = AF_UNSPEC };
	int error;

	sockmi_repair(fd, TCP_REPAIR_ON);
	connect(fd, &unspecified, sizeof(unspecified));
	sockmi_repair(fd, TCP_REPAIR_OFF_NO_WP);
	sockmi_get_int(fd, SOL_SOCKET, SO_ERROR, &error);
	if (reuse)
		sockmi_set_int(fd, SOL_SOCKET, SO_REUSEADDR, reuse);
}

int sockmi_deaden(int fd)
{
	struct detour detours[] = {
		{ .level = SOL_SOCKET, .option = SO_BINDTODEVICE },
		{ .level = IPPROTO_IP, .option = IP_OPTIONS },
		{ .level = IPPROTO_IPV6, .option = IPV6_RTHDR },
	};
	int four = 0, six = 0, reuse = 0, deferred = 0, error;

	sockmi_get_int(fd, SOL_SOCKET, SO_REUSEADDR, &reuse);
	sockmi_get_int(fd, IPPROTO_IP, IP_TRANSPARENT, &four);
	sockmi_get_int(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, &six);
	sockmi_get_int(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, &deferred);
	if (deferred) /* connect() would do nothing yet */
		sockmi_set_int(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 0);
	for (size_t i = 0; i < sizeof(detours) / sizeof(detours[0]); i++)
		clear(fd, &detours[i]);
	if (sockmi_repair(fd, TCP_REPAIR_ON) == 0 && connect_self(fd) == 0 &&
	    sockmi_repair(fd, TCP_REPAIR_OFF_NO_WP) == 0 &&
	    (sockmi_state(fd) == SOCKMI_CLOSED || destroy(fd) == 0))
		return 0;
	error = errno;
	revive(fd, reuse == SOCKMI_REUSE_FORCED ? 0 : reuse);
	if (deferred)
		sockmi_set_int(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, deferred);
	sockmi_set_int(fd, IPPROTO_IP, IP_TRANSPARENT, four);
	sockmi_set_int(fd, IPPROTO_IPV6, IPV6_TRANSPARENT, six);
	for (size_t i = 0; i < sizeof(detours) / sizeof(detours[0]); i++)
		put_back(fd, &detours[i]);
	errno = error;
	return -1;
}
