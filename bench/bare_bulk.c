// SPDX-License-Identifier: MIT
/*
 * The least that a drain costs: the system calls of many migrations, in chunks, and nothing else.
 *
 *	bare_bulk NETNS_A NETNS_B ADDRESS_A ADDRESS_B PORT COUNT CHUNK TABLE MARK_MOVED MARK_LOCAL MARK_INJECT
 *
 * An application at A accepts COUNT connections to ADDRESS_A:PORT and reads nothing. For a line on standard
 * input an exporter at A and an importer at B, a process each, move them in chunks of CHUNK, one chunk
 * frozen while the one before is restored, to an application at B, which echoes. Images go
 * through a socket pair. No negotiation, no journal, no TLS, no second machine.
 * Prints "ready", and for the line when the first chunk was begun (ns, CLOCK_MONOTONIC).
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "common.h"
#include "forward.h"
#include "stop.h"

#define CHUNK_MAX 126
#define DEPTH 2
#define HOLD_MS 1500
#define IMAGE_BYTES_MAX 131072 /* with 64 KiB queued */
#define COUNT_MAX 20000

/* Connections that are moved together; both sides keep one until it is done. */
struct chunk {
	size_t n;
	uint8_t keys[CHUNK_MAX][KEY_BYTES];
	int fds[CHUNK_MAX];
	const void *images[CHUNK_MAX];
	size_t lengths[CHUNK_MAX];
	struct sockmi_result results[CHUNK_MAX];
	uint8_t *buffer;
	size_t bytes;
};

struct header {
	size_t n, bytes;
	size_t offsets[CHUNK_MAX], lengths[CHUNK_MAX];
	uint8_t keys[CHUNK_MAX][KEY_BYTES];
};

static struct chunk chunks[DEPTH];
static struct batch batch;
static struct header header;

static void whole(ssize_t (*call)(int, void *, size_t), int fd, void *data, size_t bytes)
{
	uint8_t *at = data;

	while (bytes) {
		ssize_t n = call(fd, at, bytes);

		if (!n)
			_exit(0); /* the other side has ended */
		if (n < 0)
			err(1, "socket pair");
		at += n;
		bytes -= (size_t)n;
	}
}

static ssize_t put(int fd, void *data, size_t bytes)
{
	return send(fd, data, bytes, MSG_NOSIGNAL);
}

static void enter(const char *netns)
{
	int fd = open(netns, O_RDONLY | O_CLOEXEC);

	if (fd < 0 || setns(fd, CLONE_NEWNET))
		err(1, "%s", netns);
	close(fd);
}

static struct sockmi_nft *netlink_here(void)
{
	struct sockmi_nft *nft = sockmi_nft_open(0);

	if (!nft)
		err(1, "netlink");
	return nft;
}

/* Fork with one end of a new socket pair each; *channel is the caller's. True in the child. */
static bool child(int *channel, int type, pid_t *pid)
{
	int pair[2];

	if (socketpair(AF_UNIX, type | SOCK_CLOEXEC, 0, pair))
		err(1, "socketpair");
	*pid = fork();
	if (*pid < 0)
		err(1, "fork");
	if (!*pid)
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	close(pair[*pid ? 1 : 0]);
	*channel = pair[*pid ? 0 : 1];
	return !*pid;
}

static void accept_all(int channel, const char *address, uint16_t port, size_t count)
{
	struct sockaddr_in local = { .sin_family = AF_INET, .sin_port = htons(port) };
	int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	static int fds[COUNT_MAX];
	static const int on = 1;

	if (inet_pton(AF_INET, address, &local.sin_addr) != 1 || listener < 0 ||
	    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
	    bind(listener, (struct sockaddr *)&local, sizeof(local)) || listen(listener, 4096))
		err(1, "listening at %s port %u", address, port);
	puts("ready");
	fflush(stdout);
	for (size_t i = 0; i < count; i++) {
		fds[i] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
		if (fds[i] < 0)
			err(1, "accept");
	}
	whole(put, channel, fds, count * sizeof(*fds));
	for (;;)
		pause();
}

static void echo(int channel)
{
	static char buffer[65536];
	int epoll = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event events[256], event = { .events = EPOLLIN, .data.fd = channel };

	epoll_ctl(epoll, EPOLL_CTL_ADD, channel, &event);
	for (;;) {
		int n = epoll_wait(epoll, events, 256, -1);

		for (int i = 0; i < n; i++) {
			int fd = events[i].data.fd;
			ssize_t got;

			if (fd != channel) {
				got = recv(fd, buffer, sizeof(buffer), MSG_DONTWAIT);
				if (got > 0)
					send(fd, buffer, (size_t)got, MSG_NOSIGNAL);
				else if (!got || errno != EAGAIN)
					close(fd);
				continue;
			}
			char control[CMSG_SPACE(sizeof(int) * CHUNK_MAX)], byte;
			struct iovec data = { &byte, 1 };
			struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
						  .msg_controllen = sizeof(control) };
			struct cmsghdr *rights;

			if (recvmsg(channel, &message, MSG_CMSG_CLOEXEC) != 1)
				_exit(0);
			rights = CMSG_FIRSTHDR(&message);
			for (size_t k = 0; rights && k < (rights->cmsg_len - CMSG_LEN(0)) / sizeof(int); k++) {
				memcpy(&event.data.fd, CMSG_DATA(rights) + k * sizeof(int), sizeof(int));
				if (epoll_ctl(epoll, EPOLL_CTL_ADD, event.data.fd, &event))
					err(1, "epoll_ctl");
			}
		}
	}
}

static void hand(int channel, const int *fds, size_t n)
{
	char control[CMSG_SPACE(sizeof(int) * CHUNK_MAX)] = { 0 }, byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = CMSG_SPACE(sizeof(int) * n) };
	struct cmsghdr *rights = CMSG_FIRSTHDR(&message);

	rights->cmsg_level = SOL_SOCKET;
	rights->cmsg_type = SCM_RIGHTS;
	rights->cmsg_len = CMSG_LEN(sizeof(int) * n);
	memcpy(CMSG_DATA(rights), fds, sizeof(int) * n);
	if (sendmsg(channel, &message, MSG_NOSIGNAL) != 1)
		err(1, "handing over");
	for (size_t i = 0; i < n; i++)
		close(fds[i]);
}

static void remove_all(const struct chunk *chunk, enum set set)
{
	for (size_t i = 0; i < chunk->n; i++)
		removing(&batch, set, chunk->keys[i]);
}

static void add_all(const struct chunk *chunk, enum set set, const void *data, size_t bytes, uint32_t timeout_ms)
{
	for (size_t i = 0; i < chunk->n; i++)
		add(&batch, SOCKMI_NFT_ADD, set, chunk->keys[i], data, bytes, timeout_ms);
}

static void freeze(struct chunk *chunk, struct sockmi_nft *nft, int pidfd, const int *wanted, size_t n, int importer)
{
	chunk->n = n;
	for (size_t i = 0; i < n; i++) {
		struct sockaddr_in peer, local;
		socklen_t length = sizeof(peer);

		chunk->fds[i] = (int)syscall(SYS_pidfd_getfd, pidfd, wanted[i], 0);
		if (chunk->fds[i] < 0 || getpeername(chunk->fds[i], (struct sockaddr *)&peer, &length) ||
		    getsockname(chunk->fds[i], (struct sockaddr *)&local, &length))
			err(1, "descriptor %d of the application", wanted[i]);
		make_key(chunk->keys[i], &peer, &local);
	}
	batch.n = 0;
	add_all(chunk, HOLD, NULL, 0, HOLD_MS);
	commit(nft, &batch);
	must(sockmi_capture(chunk->fds, n, chunk->buffer, chunk->bytes, chunk->results), chunk->results, "capture");
	header.n = n;
	memcpy(header.keys, chunk->keys, sizeof(header.keys));
	for (size_t i = 0; i < n; i++) {
		chunk->images[i] = chunk->buffer + chunk->results[i].offset;
		header.offsets[i] = chunk->results[i].offset;
		header.lengths[i] = chunk->lengths[i] = chunk->results[i].length;
	}
	header.bytes = header.offsets[n - 1] + header.lengths[n - 1];
	whole(put, importer, &header, sizeof(header));
	whole(put, importer, chunk->buffer, header.bytes);
}

static void commit_chunk(struct chunk *chunk, struct sockmi_nft *nft, struct in_addr to, int importer)
{
	char word;

	whole((ssize_t (*)(int, void *, size_t))read, importer, &word, 1); /* restored */
	batch.n = 0;
	add_all(chunk, NEXT, &to, sizeof(to), 0);
	add_all(chunk, FLOW, &mark_moved, sizeof(mark_moved), 0);
	remove_all(chunk, HOLD);
	commit(nft, &batch);
	must(sockmi_release(chunk->fds, chunk->images, chunk->lengths, chunk->n, chunk->results), chunk->results,
	     "release");
	whole(put, importer, &word, 1);
	for (size_t i = 0; i < chunk->n; i++)
		close(chunk->fds[i]);
}

static void receive(struct chunk *chunk, struct sockmi_nft *nft, int exporter)
{
	static struct sockmi_placement placements[CHUNK_MAX];
	char word = 0;

	whole((ssize_t (*)(int, void *, size_t))read, exporter, &header, sizeof(header));
	whole((ssize_t (*)(int, void *, size_t))read, exporter, chunk->buffer, header.bytes);
	chunk->n = header.n;
	memcpy(chunk->keys, header.keys, sizeof(header.keys));
	for (size_t i = 0; i < chunk->n; i++) {
		chunk->images[i] = chunk->buffer + header.offsets[i];
		chunk->lengths[i] = header.lengths[i];
		placements[i].transparent = 1;
	}
	batch.n = 0;
	add_all(chunk, HOLD, NULL, 0, 0);
	commit(nft, &batch);
	must(sockmi_restore(chunk->images, chunk->lengths, placements, chunk->n, mark_inject, chunk->fds,
			    chunk->results), chunk->results, "restore");
	whole(put, exporter, &word, 1);
}

static void activate(struct chunk *chunk, struct sockmi_nft *nft, int application)
{
	batch.n = 0;
	add_all(chunk, FLOW, &mark_local, sizeof(mark_local), 0);
	remove_all(chunk, HOLD);
	commit(nft, &batch);
	must(sockmi_activate(chunk->fds, chunk->images, chunk->lengths, chunk->n, chunk->results), chunk->results,
	     "activate");
	hand(application, chunk->fds, chunk->n);
}

/* What comes is in turn an image of a chunk or the word for the oldest one; the exporter keeps that order. */
static void importer(int exporter, int application, size_t turns)
{
	struct sockmi_nft *nft = netlink_here();
	char word;

	for (size_t i = 0; i <= turns; i++) {
		if (i < turns)
			receive(&chunks[i % DEPTH], nft, exporter);
		if (!i)
			continue;
		whole((ssize_t (*)(int, void *, size_t))read, exporter, &word, 1);
		activate(&chunks[(i - 1) % DEPTH], nft, application);
	}
	pause();
}

static void exporter(int channel, pid_t owner, const int *fds, size_t count, size_t size, struct in_addr to)
{
	struct sockmi_nft *nft = netlink_here();
	int pidfd = (int)syscall(SYS_pidfd_open, owner, 0);
	size_t turns = (count + size - 1) / size;
	struct sockmi_stop_result stopped;

	printf("%llu\n", (unsigned long long)now_ns());
	fflush(stdout);
	if (sockmi_stop(&owner, 1, 100000, &stopped))
		errx(1, "the application cannot be stopped");
	for (size_t i = 0; i <= turns; i++) {
		if (i < turns)
			freeze(&chunks[i % DEPTH], nft, pidfd, fds + i * size,
			       i + 1 < turns ? size : count - i * size, channel);
		if (i)
			commit_chunk(&chunks[(i - 1) % DEPTH], nft, to, channel);
	}
	sockmi_resume(&owner, 1);
}

int main(int argc, char **argv)
{
	int holder, application, importing;
	static int fds[COUNT_MAX];
	struct rlimit limit;
	struct in_addr to;
	pid_t owner, other;
	size_t count, size;
	char word;

	if (argc != 12 || inet_pton(AF_INET, argv[4], &to) != 1)
		errx(2, "see the start of bare_bulk.c");
	getrlimit(RLIMIT_NOFILE, &limit);
	limit.rlim_cur = limit.rlim_max;
	setrlimit(RLIMIT_NOFILE, &limit);
	count = number(argv[6], COUNT_MAX);
	size = number(argv[7], CHUNK_MAX);
	mark_moved = (uint32_t)number(argv[9], UINT32_MAX);
	mark_local = (uint32_t)number(argv[10], UINT32_MAX);
	mark_inject = (uint32_t)number(argv[11], UINT32_MAX);
	make_sets(argv[8]);
	for (int i = 0; i < DEPTH; i++) {
		chunks[i].bytes = size * IMAGE_BYTES_MAX;
		chunks[i].buffer = malloc(chunks[i].bytes);
		if (!chunks[i].buffer)
			err(1, "malloc");
	}
	enter(argv[2]);
	if (child(&application, SOCK_STREAM, &other))
		echo(application);
	if (child(&importing, SOCK_STREAM, &other))
		importer(importing, application, (count + size - 1) / size);
	enter(argv[1]);
	if (child(&holder, SOCK_STREAM, &owner))
		accept_all(holder, argv[3], (uint16_t)number(argv[5], 65535), count);
	whole((ssize_t (*)(int, void *, size_t))read, holder, fds, count * sizeof(*fds));
	if (read(STDIN_FILENO, &word, 1) != 1)
		errx(1, "nobody says when");
	exporter(importing, owner, fds, count, size, to);
	pause();
	return 0;
}
