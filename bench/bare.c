// SPDX-License-Identifier: MIT
/*
 * The least that a move costs: the system calls of one migration straight through, in one process.
 *
 *	bare NETNS_A NETNS_B ADDRESS_A ADDRESS_B PORT MOVES PAUSE_US TABLE MARK_MOVED MARK_LOCAL MARK_INJECT
 *
 * An application in each host's place echoes; the mover takes the connection of a client to
 * ADDRESS_A:PORT from one to the other and back, MOVES times, with the elements of the forward
 * redirect in the tables that the daemon has made. No negotiation, no journal, no TLS, no second machine.
 * Prints "ready", then for each move its begin and end (ns, CLOCK_MONOTONIC).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common.h"
#include "forward.h"
#include "stop.h"

#define IMAGE_BYTES (1u << 20)
#define HOLD_MS 1500

struct host {
	struct in_addr address;
	int netns;
	struct sockmi_nft *nft;
	pid_t pid;
	int channel;	/* to its application */
	int fd;		/* number of the connection in the application */
};

static uint8_t key[KEY_BYTES];

static void enter(const struct host *host)
{
	if (setns(host->netns, CLONE_NEWNET))
		err(1, "setns");
}

/* Give the application a descriptor; it says which number it has there. */
static void hand(struct host *host, int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 }, byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	if (sendmsg(host->channel, &message, 0) != 1 ||
	    read(host->channel, &host->fd, sizeof(host->fd)) != sizeof(host->fd))
		err(1, "handing over");
	close(fd);
}

static int accept_from(int channel)
{
	char control[CMSG_SPACE(sizeof(int))], byte;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	int fd;

	if (recvmsg(channel, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
		_exit(0); /* the mover has ended */
	memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
	if (write(channel, &fd, sizeof(fd)) != sizeof(fd))
		_exit(1);
	return fd;
}

static void application(int channel)
{
	static char buffer[65536];
	struct pollfd polls[2] = { { .fd = channel, .events = POLLIN }, { .fd = -1, .events = POLLIN } };

	for (;;) {
		if (poll(polls, 2, -1) < 0 && errno != EINTR)
			_exit(1);
		if (polls[1].revents) {
			ssize_t n = recv(polls[1].fd, buffer, sizeof(buffer), MSG_DONTWAIT);

			if (n > 0)
				n = send(polls[1].fd, buffer, (size_t)n, MSG_NOSIGNAL);
			if (!n || (n < 0 && errno != EAGAIN)) {
				close(polls[1].fd);
				polls[1].fd = -1;
			}
		}
		if (polls[0].revents) {
			if (polls[1].fd >= 0)
				close(polls[1].fd);
			polls[1].fd = accept_from(channel);
			polls[1].revents = 0;
		}
	}
}

static void start(struct host *host, const char *netns, const char *address)
{
	int pair[2];

	host->netns = open(netns, O_RDONLY | O_CLOEXEC);
	if (host->netns < 0 || inet_pton(AF_INET, address, &host->address) != 1)
		err(1, "%s, %s", netns, address);
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		err(1, "socketpair");
	host->pid = fork();
	if (host->pid < 0)
		err(1, "fork");
	if (!host->pid) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(pair[0]);
		application(pair[1]);
	}
	close(pair[1]);
	host->channel = pair[0];
	enter(host);
	host->nft = sockmi_nft_open(0);
	if (!host->nft)
		err(1, "netlink");
}

static void hold(const struct host *host, uint32_t timeout_ms, bool was_home)
{
	static struct batch batch;

	batch.n = 0;

	putting(&batch, HOLD, key, NULL, 0, timeout_ms);
	if (was_home) { /* the redirect that led it away from here */
		removing(&batch, NEXT, key);
		removing(&batch, FLOW, key);
	}
	commit(host->nft, &batch);
}

static void send_away(const struct host *host, const struct host *to)
{
	static struct batch batch;

	batch.n = 0;

	putting(&batch, NEXT, key, &to->address, sizeof(to->address), 0);
	putting(&batch, FLOW, key, &mark_moved, sizeof(mark_moved), 0);
	removing(&batch, HOLD, key);
	commit(host->nft, &batch);
}

static void admit(const struct host *host)
{
	static struct batch batch;

	batch.n = 0;

	removing(&batch, NEXT, key);
	putting(&batch, FLOW, key, &mark_local, sizeof(mark_local), 0);
	removing(&batch, HOLD, key);
	commit(host->nft, &batch);
}

static void move(struct host *from, struct host *to, bool homewards)
{
	static uint8_t buffer[IMAGE_BYTES];
	const void *image = buffer;
	struct sockmi_placement placement = { .transparent = !homewards };
	struct sockmi_stop_result stopped;
	struct sockmi_result result;
	uint64_t begin = now_ns(), end;
	int pidfd, fd, copy;
	size_t length;

	enter(to);
	pidfd = (int)syscall(SYS_pidfd_open, from->pid, 0);
	fd = (int)syscall(SYS_pidfd_getfd, pidfd, from->fd, 0);
	if (fd < 0)
		err(1, "pidfd_getfd");
	close(pidfd);
	if (sockmi_stop(&from->pid, 1, 100000, &stopped))
		errx(1, "the application cannot be stopped");
	hold(from, HOLD_MS, false);
	must(sockmi_capture(&fd, 1, buffer, sizeof(buffer), &result), &result, "capture");
	length = (size_t)result.length;
	if (result.offset)
		errx(1, "the image is not at the start of the buffer");
	hold(to, 0, homewards);
	must(sockmi_restore(&image, &length, &placement, 1, mark_inject, &copy, &result), &result, "restore");
	send_away(from, to);
	must(sockmi_release(&fd, &image, &length, 1, &result), &result, "release");
	sockmi_resume(&from->pid, 1);
	admit(to);
	must(sockmi_activate(&copy, &image, &length, 1, &result), &result, "activate");
	hand(to, copy);
	end = now_ns();
	close(fd);
	printf("%llu %llu\n", (unsigned long long)begin, (unsigned long long)end);
}

static int accept_one(const struct host *host, uint16_t port, struct sockaddr_in *peer)
{
	struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr = host->address };
	static const int on = 1;
	socklen_t length = sizeof(*peer);
	int listener, fd;

	enter(host);
	listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
	    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on)) ||
	    bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1))
		err(1, "listening at port %u", port);
	puts("ready");
	fflush(stdout);
	fd = accept4(listener, (struct sockaddr *)peer, &length, SOCK_CLOEXEC);
	if (fd < 0)
		err(1, "accept");
	close(listener);
	return fd;
}

int main(int argc, char **argv)
{
	struct host hosts[2];
	struct sockaddr_in peer;
	unsigned long moves, pause_us;
	uint16_t port;

	if (argc != 12)
		errx(2, "see the start of bare.c");
	port = (uint16_t)number(argv[5], 65535);
	moves = number(argv[6], 1000000);
	pause_us = number(argv[7], 10000000);
	mark_moved = (uint32_t)number(argv[9], UINT32_MAX);
	mark_local = (uint32_t)number(argv[10], UINT32_MAX);
	mark_inject = (uint32_t)number(argv[11], UINT32_MAX);
	make_sets(argv[8]);
	start(&hosts[0], argv[1], argv[3]);
	start(&hosts[1], argv[2], argv[4]);
	hand(&hosts[0], accept_one(&hosts[0], port, &peer));
	make_key(key, &peer, &(struct sockaddr_in){ .sin_addr = hosts[0].address, .sin_port = htons(port) });
	usleep((useconds_t)pause_us);
	for (unsigned long i = 0; i < moves; i++) {
		move(&hosts[i & 1], &hosts[~i & 1], i & 1);
		usleep((useconds_t)pause_us);
	}
	/* The client goes first; until then somebody has to answer it. */
	fflush(stdout);
	pause();
	return 0;
}
