// SPDX-License-Identifier: MIT
/*
 * The application of the benchmark: echoes (or swallows) what clients send, and imports connections.
 *
 *	server [-l] [-p] [-t threads] [-n requests] ECHO_PORT SINK_PORT
 *
 * -l listens; -p does not read from what it accepts (it stays queued, and moves with the connection);
 * -t threads wait for imports, each with -n requests. What came in to SINK_PORT is swallowed.
 */
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"
#include "sockmi.h"

#define BUFFER_BYTES 65536

struct connection {
	char *unsent; /* what the peer has no room for */
	size_t unsent_bytes;
	bool sink;
};

static struct connection *connections; /* by descriptor */
static size_t connections_max;
static int epoll;
static unsigned int echo_port, sink_port, batch = 32;

static void watch(int fd, bool sink, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if ((size_t)fd >= connections_max)
		errx(1, "descriptor %d is beyond RLIMIT_NOFILE", fd);
	connections[fd] = (struct connection){ .sink = sink };
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event))
		err(1, "epoll_ctl");
}

static void forget(int fd)
{
	free(connections[fd].unsent);
	connections[fd].unsent = NULL;
	close(fd);
}

static void interest(int fd, uint32_t events)
{
	struct epoll_event event = { .events = events, .data.fd = fd };

	if (epoll_ctl(epoll, EPOLL_CTL_MOD, fd, &event))
		err(1, "epoll_ctl");
}

static void flush(int fd)
{
	struct connection *c = &connections[fd];
	ssize_t sent = send(fd, c->unsent, c->unsent_bytes, MSG_NOSIGNAL | MSG_DONTWAIT);

	if (sent < 0) {
		if (errno != EAGAIN)
			forget(fd);
		return;
	}
	c->unsent_bytes -= (size_t)sent;
	memmove(c->unsent, c->unsent + sent, c->unsent_bytes);
	if (!c->unsent_bytes) {
		free(c->unsent);
		c->unsent = NULL;
		interest(fd, EPOLLIN);
	}
}

/* False: the connection has ended. */
static bool serve(int fd)
{
	static __thread char buffer[BUFFER_BYTES];
	struct connection *c = &connections[fd];
	ssize_t got = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT), sent;

	if (got <= 0) {
		if (got < 0 && errno == EAGAIN)
			return true;
		forget(fd);
		return false;
	}
	if (c->sink)
		return true;
	sent = send(fd, buffer, (size_t)got, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent < 0 && errno != EAGAIN) {
		forget(fd);
		return false;
	}
	if (sent < 0)
		sent = 0;
	if (sent < got) {
		c->unsent_bytes = (size_t)(got - sent);
		c->unsent = malloc(c->unsent_bytes);
		if (!c->unsent)
			err(1, "malloc");
		memcpy(c->unsent, buffer + sent, c->unsent_bytes);
		interest(fd, EPOLLOUT);
	}
	return true;
}

/* What came in meanwhile is answered at once, as an application would that has just got its connection. */
static void adopt(int fd, bool sink)
{
	static const int on = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	watch(fd, sink, 0); /* ours until we say what the other thread shall wait for */
	if (serve(fd) && !connections[fd].unsent_bytes)
		interest(fd, EPOLLIN);
}

static int fresh(void)
{
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0)
		err(1, "socket");
	return fd;
}

static void *import(void *unused)
{
	struct import_req *requests = calloc(batch, sizeof(*requests));

	(void)unused;
	if (!requests)
		err(1, "calloc");
	for (unsigned int i = 0; i < batch; i++) {
		requests[i] = SOCKMI_IMPORT(fresh(), SOCKMI_CONNECTED);
		requests[i].local.port = 0;
	}
	for (;;) {
		if (import_socket(requests, batch, -1) < 0)
			errx(1, "import_socket: %s", sockmi_last_error()->message);
		for (unsigned int i = 0; i < batch; i++) {
			if (!requests[i].returned)
				continue;
			adopt(requests[i].fd, requests[i].returned_origin.port == sink_port);
			requests[i] = SOCKMI_IMPORT(fresh(), SOCKMI_CONNECTED);
		}
	}
	return NULL;
}

static int listen_at(unsigned int port)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
	static const int on = 1, room = 1 << 18;
	int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);

	if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
	    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, sizeof(room)) ||
	    bind(fd, (struct sockaddr *)&address, sizeof(address)) || listen(fd, 4096))
		err(1, "listening at port %u", port);
	watch(fd, false, EPOLLIN);
	return fd;
}

int main(int argc, char **argv)
{
	bool listening = false, paused = false;
	unsigned long threads = 0;
	struct rlimit limit;
	int option, echo = -1, sink = -1;

	while ((option = getopt(argc, argv, "lpt:n:")) != -1) {
		switch (option) {
		case 'l':
			listening = true;
			break;
		case 'p':
			paused = true;
			break;
		case 't':
			threads = number(optarg, 64);
			break;
		case 'n':
			batch = (unsigned int)number(optarg, 253);
			break;
		default:
			return 2;
		}
	}
	if (argc - optind != 2 || !batch)
		errx(2, "usage: server [-l] [-p] [-t threads] [-n requests] ECHO_PORT SINK_PORT");
	echo_port = (unsigned int)number(argv[optind], 65535);
	sink_port = (unsigned int)number(argv[optind + 1], 65535);
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	connections_max = limit.rlim_cur;
	connections = calloc(connections_max, sizeof(*connections));
	epoll = epoll_create1(EPOLL_CLOEXEC);
	if (!connections || epoll < 0)
		err(1, "starting");
	if (listening) {
		echo = listen_at(echo_port);
		sink = listen_at(sink_port);
	}
	for (unsigned long i = 0; i < threads; i++) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, import, NULL))
			errx(1, "no thread");
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		struct epoll_event events[256];
		int n = epoll_wait(epoll, events, 256, -1);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;

			if (fd == echo || fd == sink) {
				int one = accept4(fd, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);

				if (one >= 0 && !paused)
					watch(one, fd == sink, EPOLLIN);
			} else if (connections[fd].unsent_bytes) {
				flush(fd);
			} else {
				serve(fd);
			}
		}
	}
}
