// SPDX-License-Identifier: MIT
/*
 * The peer of the benchmark: clients that know nothing of us, and check every byte that comes back.
 *
 *	peer flow ADDRESS PORT INTERVAL_US	one connection; an 8-byte number every INTERVAL_US until SIGTERM;
 *						then a line for each echo: when it came (ns, CLOCK_MONOTONIC)
 *	peer many ADDRESS PORT COUNT BYTES	COUNT connections, BYTES sent on each; "ready" when the other host has
 *						acknowledged them; then a line for each connection: when all
 *						of its bytes had come back
 *	peer rr ADDRESS PORT			for each line "SECONDS" on stdin: how many requests were answered
 *	peer bulk ADDRESS PORT			for each line "SECONDS" on stdin: how many bytes were acknowledged
 */
#include <arpa/inet.h>
#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

#define FLOW_ECHOES_MAX 8000000u
#define MANY_BYTES_MAX (1u << 20)

static volatile sig_atomic_t stopping;

static void stop(int number)
{
	(void)number;
	stopping = 1;
}

static int dial(const char *address, const char *port)
{
	struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons((uint16_t)number(port, 65535)) };
	static const int on = 1;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (inet_pton(AF_INET, address, &to.sin_addr) != 1)
		errx(2, "%s is no IPv4 address", address);
	if (fd < 0 || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) ||
	    connect(fd, (struct sockaddr *)&to, sizeof(to)))
		err(1, "connecting to %s:%s", address, port);
	return fd;
}

static void ready(void)
{
	puts("ready");
	fflush(stdout);
}

/* Take in what has come of the echo of the numbers after *seen. */
static void receive(int fd, uint64_t *seen)
{
	static unsigned char buffer[65536];
	static size_t have;
	ssize_t got = recv(fd, buffer + have, sizeof(buffer) - have, MSG_DONTWAIT);
	size_t at = 0;

	if (got < 0 && errno == EAGAIN)
		return;
	if (got <= 0)
		errx(1, "the connection ended: %s", got ? strerror(errno) : "FIN");
	for (have += (size_t)got; have - at >= sizeof(uint64_t); at += sizeof(uint64_t)) {
		uint64_t value;

		memcpy(&value, buffer + at, sizeof(value));
		/* What the application had read and not yet answered when it was stopped, nobody answers. */
		if (value <= *seen)
			errx(1, "echo %llu after %llu", (unsigned long long)value, (unsigned long long)*seen);
		*seen = value;
	}
	have -= at;
	memmove(buffer, buffer + at, have);
}

static int flow(int fd, uint64_t interval_ns)
{
	uint64_t *times = malloc(FLOW_ECHOES_MAX * sizeof(*times));
	uint64_t sent = 0, seen = 0, echoes = 0, next = now_ns();
	char unsent[sizeof(sent)];
	size_t unsent_bytes = 0;

	if (!times)
		err(1, "malloc");
	prctl(PR_SET_TIMERSLACK, 1UL);
	ready();
	while (!stopping && echoes < FLOW_ECHOES_MAX) {
		struct pollfd poll = { .fd = fd, .events = POLLIN };
		uint64_t now = now_ns(), before = seen;
		struct timespec wait = { .tv_nsec = now < next ? (long)(next - now) : 0 };

		if (ppoll(&poll, 1, &wait, NULL) > 0) {
			receive(fd, &seen);
			if (seen != before)
				times[echoes++] = now_ns();
		}
		if (now_ns() < next)
			continue;
		next = now_ns() + interval_ns;
		if (!unsent_bytes) {
			sent++;
			memcpy(unsent, &sent, sizeof(sent));
			unsent_bytes = sizeof(sent);
		}
		ssize_t n = send(fd, unsent + sizeof(sent) - unsent_bytes, unsent_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);

		if (n < 0 && errno != EAGAIN)
			err(1, "send");
		if (n > 0)
			unsent_bytes -= (size_t)n;
	}
	for (uint64_t i = 0; i < echoes; i++)
		printf("%llu\n", (unsigned long long)times[i]);
	return 0;
}

static unsigned char pattern(size_t connection, size_t byte)
{
	return (unsigned char)(connection * 7 + byte);
}

static void check(size_t connection, size_t from, const unsigned char *bytes, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (bytes[i] != pattern(connection, from + i))
			errx(1, "connection %zu: byte %zu is wrong", connection, from + i);
}

static int many(const char *address, const char *port, size_t count, size_t bytes)
{
	static unsigned char buffer[65536];
	int *fds = calloc(count, sizeof(*fds));
	size_t *got = calloc(count, sizeof(*got)), left = count;
	uint64_t *done = calloc(count, sizeof(*done));
	unsigned char *message = malloc(bytes);
	int epoll = epoll_create1(EPOLL_CLOEXEC), room = (int)(2 * bytes);

	if (!fds || !got || !done || !message || epoll < 0)
		err(1, "starting");
	for (size_t i = 0; i < count; i++) {
		struct epoll_event event = { .events = EPOLLIN, .data.u64 = i };

		fds[i] = dial(address, port);
		setsockopt(fds[i], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
		for (size_t j = 0; j < bytes; j++)
			message[j] = pattern(i, j);
		if (send(fds[i], message, bytes, MSG_NOSIGNAL) != (ssize_t)bytes)
			err(1, "send");
		if (epoll_ctl(epoll, EPOLL_CTL_ADD, fds[i], &event))
			err(1, "epoll_ctl");
	}
	for (size_t i = 0; i < count; i++) {
		int unacknowledged = 1;

		while (!ioctl(fds[i], SIOCOUTQ, &unacknowledged) && unacknowledged)
			usleep(1000);
	}
	ready();
	while (left && !stopping) {
		struct epoll_event events[256];
		int n = epoll_wait(epoll, events, 256, 1000);

		for (int k = 0; k < n; k++) {
			size_t i = events[k].data.u64;
			ssize_t more = recv(fds[i], buffer, sizeof(buffer), MSG_DONTWAIT);

			if (more <= 0 && !(more < 0 && errno == EAGAIN))
				errx(1, "connection %zu ended: %s", i, more ? strerror(errno) : "FIN");
			if (more <= 0)
				continue;
			check(i, got[i], buffer, (size_t)more);
			got[i] += (size_t)more;
			if (got[i] > bytes)
				errx(1, "connection %zu: too many bytes", i);
			if (got[i] == bytes) {
				done[i] = now_ns();
				left--;
			}
		}
	}
	for (size_t i = 0; i < count; i++)
		printf("%llu\n", (unsigned long long)done[i]);
	fflush(stdout);
	pause(); /* the connections stay: redirects are measured with them */
	return 0;
}

static uint64_t ask(int fd, uint64_t until)
{
	static char request[64], answer[64];
	uint64_t count = 0;

	for (; now_ns() < until; count++) {
		size_t got = 0;

		if (send(fd, request, sizeof(request), MSG_NOSIGNAL) != (ssize_t)sizeof(request))
			err(1, "send");
		while (got < sizeof(answer)) {
			ssize_t n = recv(fd, answer + got, sizeof(answer) - got, 0);

			if (n <= 0)
				err(1, "recv");
			got += (size_t)n;
		}
	}
	return count;
}

static uint64_t upload(int fd, uint64_t until)
{
	static char block[1 << 18];
	uint64_t sent = 0;
	int before = 0, after = 0;

	ioctl(fd, SIOCOUTQ, &before);
	while (now_ns() < until) {
		ssize_t n = send(fd, block, sizeof(block), MSG_NOSIGNAL);

		if (n < 0)
			err(1, "send");
		sent += (uint64_t)n;
	}
	ioctl(fd, SIOCOUTQ, &after);
	return sent + (uint64_t)before - (uint64_t)after;
}

static int measure(int fd, uint64_t (*work)(int, uint64_t))
{
	char line[64];

	ready();
	while (fgets(line, sizeof(line), stdin)) {
		uint64_t start = now_ns(), count = work(fd, start + (uint64_t)(atof(line) * 1e9));

		printf("%llu %llu\n", (unsigned long long)count, (unsigned long long)(now_ns() - start));
		fflush(stdout);
	}
	return 0;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_handler = stop };
	struct rlimit limit;

	sigaction(SIGTERM, &action, NULL);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	if (argc == 5 && !strcmp(argv[1], "flow"))
		return flow(dial(argv[2], argv[3]), number(argv[4], 1000000) * 1000);
	if (argc == 6 && !strcmp(argv[1], "many"))
		return many(argv[2], argv[3], number(argv[4], 20000), number(argv[5], MANY_BYTES_MAX));
	if (argc == 4 && !strcmp(argv[1], "rr"))
		return measure(dial(argv[2], argv[3]), ask);
	if (argc == 4 && !strcmp(argv[1], "bulk"))
		return measure(dial(argv[2], argv[3]), upload);
	errx(2, "usage: peer flow|many|rr|bulk ADDRESS PORT ...");
}
