/* SPDX-License-Identifier: MIT */
#include "inspect.h"
#include "engine.h"

#include <errno.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <net/if.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif
#ifndef SO_ZEROCOPY
#define SO_ZEROCOPY 60
#endif
#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#define TCP_AO_INFO_OPTION 40	/* TCP_AO_INFO, Linux 6.7 */
#define OPT_USEC_TS 64		/* TCPI_OPT_USEC_TS, Linux 6.11 */
#define NO_SUCH_REPAIR 0x5eed	/* no value of TCP_REPAIR: only asks for permission */
#define POLL_CHUNK 256

#define API __attribute__((visibility("default")))

enum { ESTABLISHED = 1, SYN_SENT = 2, CLOSED = 7, LISTEN = 10 };

static int int_option(int fd, int level, int name, int otherwise)
{
	int value = 0;
	socklen_t length = sizeof(value);

	return getsockopt(fd, level, name, &value, &length) ? otherwise : value;
}

static uint64_t cookie_option(int fd, int name)
{
	uint64_t value = 0;
	socklen_t length = sizeof(value);

	return getsockopt(fd, SOL_SOCKET, name, &value, &length) ? 0 : value;
}

/* One end: address and port; true if it is an IPv6 link-local address. */
static bool set_endpoint(const struct sockaddr_storage *name, uint8_t address[16], uint16_t *port, uint8_t *version)
{
	if (name->ss_family == AF_INET) {
		const struct sockaddr_in *v4 = (const struct sockaddr_in *)name;

		memcpy(address, &v4->sin_addr, 4);
		*port = ntohs(v4->sin_port);
		*version = 4;
		return false;
	}
	const struct sockaddr_in6 *v6 = (const struct sockaddr_in6 *)name;

	*port = ntohs(v6->sin6_port);
	if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
		memcpy(address, &v6->sin6_addr.s6_addr[12], 4);
		*version = 4;
		return false;
	}
	memcpy(address, &v6->sin6_addr, 16);
	*version = 6;
	return IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr);
}

static void inspect_names(int fd, struct sockmi_facts *f)
{
	struct sockaddr_storage name;
	socklen_t length = sizeof(name);
	bool link_local = false;

	f->version = f->family == AF_INET ? 4 : 6;
	if (!getsockname(fd, (struct sockaddr *)&name, &length))
		link_local = set_endpoint(&name, f->local, &f->local_port, &f->version);
	length = sizeof(name);
	if (f->state != LISTEN && f->state != CLOSED && !getpeername(fd, (struct sockaddr *)&name, &length))
		link_local |= set_endpoint(&name, f->remote, &f->remote_port, &f->version);
	if (link_local)
		f->findings |= SOCKMI_LINK_LOCAL;
}

static void inspect_queues(int fd, struct sockmi_facts *f, const struct tcp_info *info, short events)
{
	int bytes = 0, at_mark = 0;

	if (f->state == LISTEN) {
		f->receive_queue = info->tcpi_unacked;
		f->send_queue = info->tcpi_sacked;
		return;
	}
	if (!ioctl(fd, SIOCINQ, &bytes))
		f->receive_queue = (uint32_t)bytes;
	bytes = 0;
	if (!ioctl(fd, SIOCOUTQ, &bytes))
		f->send_queue = (uint32_t)bytes;
	/* POLLPRI: an unread urgent byte. At the mark: it may have been read, but not what follows. */
	if ((events & POLLPRI) || (!ioctl(fd, SIOCATMARK, &at_mark) && at_mark))
		f->findings |= SOCKMI_URGENT_DATA;
	if (int_option(fd, SOL_SOCKET, SO_ZEROCOPY, 0) && (f->send_queue || (events & POLLERR)))
		f->findings |= SOCKMI_ZERO_COPY;
	if (f->state == SYN_SENT && (int_option(fd, IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 0) ||
				     info->tcpi_notsent_bytes || info->tcpi_unacked > 1))
		f->findings |= SOCKMI_FAST_OPEN;
	if (f->state == CLOSED && (events & POLLRDHUP))
		f->findings |= SOCKMI_ENDED;
}

static uint8_t bind_flags(int fd, const struct sockmi_facts *f)
{
	char device[IFNAMSIZ] = "";
	socklen_t length = sizeof(device);
	int flags = 0;

	if (int_option(fd, SOL_SOCKET, SO_REUSEADDR, 0))
		flags |= SOCKMI_BIND_REUSE_ADDRESS;
	if (int_option(fd, SOL_SOCKET, SO_REUSEPORT, 0))
		flags |= SOCKMI_BIND_REUSE_PORT;
	if (f->family == AF_INET6 && int_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0))
		flags |= SOCKMI_BIND_V6_ONLY;
	if (!getsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, device, &length) && length && device[0])
		flags |= SOCKMI_BIND_DEVICE;
	return (uint8_t)flags;
}

/*
 * Whether the application drops what a router has passed on (RFC 5082), or speaks to its neighbour alone, as the
 * peer then does, too (eBGP): a redirect that forwards lowers the TTL.
 */
static bool direct(int fd, const struct sockmi_facts *f)
{
	if (f->version == 4)
		return int_option(fd, IPPROTO_IP, IP_MINTTL, 0) > 1 || int_option(fd, IPPROTO_IP, IP_TTL, 0) == 1;
	return int_option(fd, IPPROTO_IPV6, IPV6_MINHOPCOUNT, 0) > 1 ||
	       int_option(fd, IPPROTO_IPV6, IPV6_UNICAST_HOPS, 0) == 1;
}

static void set_activity(struct sockmi_facts *f, const struct tcp_info *info)
{
	f->state = info->tcpi_state;
	f->received = info->tcpi_bytes_received;
	f->sent_ms = info->tcpi_last_data_sent;
	f->received_ms = info->tcpi_last_data_recv;
}

void sockmi_inspect_briefly(int fd, struct sockmi_facts *f)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);

	if (!getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length))
		set_activity(f, &info);
}

static bool has_ao(int fd)
{
	static bool unsupported;	/* the kernel's answer is the same for every socket */
	uint64_t info[6] = { 0 };	/* struct tcp_ao_info_opt */
	socklen_t length = sizeof(info);

	if (unsupported)
		return false;
	if (!getsockopt(fd, IPPROTO_TCP, TCP_AO_INFO_OPTION, info, &length))
		return true;
	unsupported = errno == ENOPROTOOPT;
	return false;
}

static void inspect_one(int fd, struct sockmi_facts *f, short events, uint64_t netns)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);
	struct stat status;

	if (fstat(fd, &status)) {
		f->findings = SOCKMI_BAD_DESCRIPTOR;
		f->error = errno;
		return;
	}
	f->inode = status.st_ino;
	f->uid = status.st_uid;
	f->family = (uint16_t)(S_ISSOCK(status.st_mode) ? int_option(fd, SOL_SOCKET, SO_DOMAIN, 0) : 0);
	f->protocol = (uint16_t)(f->family ? int_option(fd, SOL_SOCKET, SO_PROTOCOL, 0) : 0);
	f->cookie = f->family ? cookie_option(fd, SO_COOKIE) : 0;
	if (f->protocol == IPPROTO_MPTCP && (f->family == AF_INET || f->family == AF_INET6))
		f->findings = SOCKMI_MPTCP;
	else if (f->protocol != IPPROTO_TCP || (f->family != AF_INET && f->family != AF_INET6) ||
		 int_option(fd, SOL_SOCKET, SO_TYPE, 0) != SOCK_STREAM)
		f->findings = SOCKMI_NOT_TCP;
	if (f->findings)
		return;
	uint64_t own = netns ? cookie_option(fd, SO_NETNS_COOKIE) : 0;

	if (own && own != netns)
		f->findings |= SOCKMI_OTHER_NETNS;
	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length)) {
		f->findings |= SOCKMI_BAD_DESCRIPTOR;
		f->error = errno;
		return;
	}
	set_activity(f, &info);
	f->send_scale = info.tcpi_snd_wscale;
	f->receive_scale = info.tcpi_rcv_wscale;
	/* The low bit of TCP_TIMESTAMP says the same, but before Linux 6.7 it is part of the clock. */
	f->timestamp_us = !!(info.tcpi_options & OPT_USEC_TS);
	if (f->state == SYN_SENT) {
		int offered = sockmi_syn_offered(fd);

		f->receive_scale = (uint8_t)offered;
		f->timestamp_us = (uint8_t)(offered >> 8);
	}
	if (f->state == CLOSED || f->state == LISTEN)
		f->bind_flags = bind_flags(fd, f);
	f->receive_buffer = (uint32_t)int_option(fd, SOL_SOCKET, SO_RCVBUF, 0);
	f->send_buffer = (uint32_t)int_option(fd, SOL_SOCKET, SO_SNDBUF, 0);
	inspect_names(fd, f);
	f->direct = f->state != CLOSED && f->state != LISTEN && direct(fd, f);
	inspect_queues(fd, f, &info, events);

	length = sizeof(f->ulp);
	if (!getsockopt(fd, IPPROTO_TCP, TCP_ULP, f->ulp, &length) && length && f->ulp[0])
		f->findings |= SOCKMI_ULP;
	if (has_ao(fd))
		f->findings |= SOCKMI_AO;
	if (int_option(fd, IPPROTO_TCP, TCP_REPAIR, 0))
		f->findings |= SOCKMI_IN_REPAIR;
	/* tcp_can_repair_sock() comes before the look at the value; listeners are refused either way. */
	int value = NO_SUCH_REPAIR;

	if (f->state != LISTEN && setsockopt(fd, IPPROTO_TCP, TCP_REPAIR, &value, sizeof(value)) && errno == EPERM)
		f->findings |= SOCKMI_NO_PRIVILEGE;
}

/* May this process repair sockets at all? Asked of a new one, for the listeners. */
static bool privileged(int unconnected)
{
	int value = NO_SUCH_REPAIR;

	return !(setsockopt(unconnected, IPPROTO_TCP, TCP_REPAIR, &value, sizeof(value)) && errno == EPERM);
}

API int sockmi_inspect(const int *fds, size_t n, struct sockmi_facts *facts)
{
	bool listeners = false;

	if (!n)
		return 0;
	if (!fds || !facts)
		return -EINVAL;
	memset(facts, 0, n * sizeof(*facts));
	int own = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, IPPROTO_TCP);

	if (own < 0)
		return -errno;
	uint64_t netns = cookie_option(own, SO_NETNS_COOKIE);

	for (size_t first = 0; first < n; first += POLL_CHUNK) {
		size_t count = n - first < POLL_CHUNK ? n - first : POLL_CHUNK;
		struct pollfd polled[POLL_CHUNK];

		for (size_t i = 0; i < count; i++)
			polled[i] = (struct pollfd){ .fd = fds[first + i], .events = POLLPRI | POLLRDHUP };
		if (poll(polled, count, 0) < 0) {
			int error = errno;

			close(own);
			return -error;
		}
		for (size_t i = 0; i < count; i++) {
			inspect_one(fds[first + i], &facts[first + i], polled[i].revents, netns);
			listeners |= facts[first + i].state == LISTEN;
		}
	}
	if (listeners && !privileged(own))
		for (size_t i = 0; i < n; i++)
			if (facts[i].state == LISTEN)
				facts[i].findings |= SOCKMI_NO_PRIVILEGE;
	close(own);
	sockmi_sockmap_check(facts, n);
	return sockmi_diag_check(fds, facts, n);
}

API void sockmi_queued_at_most(const int *fds, size_t n, uint64_t *bytes)
{
	for (size_t i = 0; i < n; i++) {
		uint32_t memory[SK_MEMINFO_VARS] = { 0 };
		socklen_t length = sizeof(memory);
		int unsent = 0;

		getsockopt(fds[i], SOL_SOCKET, SO_MEMINFO, memory, &length);
		ioctl(fds[i], SIOCOUTQ, &unsent);
		bytes[i] = (uint64_t)memory[SK_MEMINFO_RMEM_ALLOC] + memory[SK_MEMINFO_BACKLOG] + (uint32_t)unsent;
	}
}
