// SPDX-License-Identifier: MIT
/*
 * What the two engines need for one move, phase by phase, in turns and in one process.
 *
 *	engines MOVES QUEUED_BYTES
 *
 * A process owns a connection over loopback with QUEUED_BYTES unread; the mover freezes it, reads it, closes it
 * silently and restores it, once with the kernel module and once with TCP_REPAIR. What both do before
 * the freeze (finding the socket) and after the move (handing it to the owner) is not timed. Nothing is sent
 * meanwhile, so neither needs a hold. Prints for each move: engine, nanoseconds of freeze, dump,
 * release and restore. The module dumps in its freeze, so its dump is 0.
 */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "stop.h"
#include "uapi/sockmi.h"

#define SLOT_BYTES (1u << 20)
#define STOP_US 1000000
#define DEADLINE_MS 1000
#define INJECT_MARK 0x50C1

enum phase { FREEZE, DUMP, RELEASE, RESTORE, PHASES };

static int device, channel, pidfd;
static pid_t owner;
static const uint8_t *slot;
static _Alignas(8) uint8_t buffer[SLOT_BYTES];

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

static void call(unsigned long request, void *argument, const char *name)
{
	if (ioctl(device, request, argument))
		err(1, "%s", name);
}

/* ---- The owner ---- */

static void own(int socket_channel)
{
	struct pollfd idle = { .fd = -1, .events = POLLIN };

	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (;;) {
		char control[CMSG_SPACE(sizeof(int))], byte;
		struct iovec data = { &byte, 1 };
		struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
					  .msg_controllen = sizeof(control) };

		if (recvmsg(socket_channel, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
			_exit(0);
		if (idle.fd >= 0)
			close(idle.fd);
		memcpy(&idle.fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
		if (write(socket_channel, &idle.fd, sizeof(int)) != sizeof(int))
			_exit(1);
	}
}

/* Gives the owner a descriptor; which number it has there. Ours is closed. */
static int hand(int fd)
{
	char control[CMSG_SPACE(sizeof(int))] = { 0 }, byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = { .msg_iov = &data, .msg_iovlen = 1, .msg_control = control,
				  .msg_controllen = sizeof(control) };
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	int there;

	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &fd, sizeof(int));
	if (sendmsg(channel, &message, 0) != 1 || read(channel, &there, sizeof(there)) != sizeof(there))
		err(1, "handing over");
	close(fd);
	return there;
}

/* ---- The engines ---- */

/* Moves the owner's descriptor @fd; the copy, here. */
static int by_module(int fd, uint64_t *took)
{
	struct sockmi_ioc_claim claim = { .pid = owner, .fd = fd };
	struct sockmi_ioc_freeze freeze = { .deadline_ms = DEADLINE_MS };
	struct sockmi_ioc_decision decision = {};
	struct sockmi_ioc_restore restore = { .slot = SOCKMI_NO_SLOT, .flags = SOCKMI_DEV_ACTIVATE };
	uint64_t t[PHASES + 1];

	call(SOCKMI_IOC_CLAIM, &claim, "claim");
	freeze.id = claim.id;
	t[FREEZE] = now();
	call(SOCKMI_IOC_FREEZE, &freeze, "freeze");
	t[DUMP] = t[RELEASE] = now();
	decision.id = claim.id;
	decision.epoch = freeze.epoch;
	call(SOCKMI_IOC_COMMIT, &decision, "commit");
	t[RESTORE] = now();
	restore.fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	restore.image = (uintptr_t)slot;
	restore.bytes = freeze.bytes;
	call(SOCKMI_IOC_RESTORE, &restore, "restore");
	t[PHASES] = now();
	for (int phase = 0; phase < PHASES; phase++)
		took[phase] = t[phase + 1] - t[phase];
	took[FREEZE] = t[DUMP] - t[FREEZE];
	call(SOCKMI_IOC_RELEASE, &decision, "release");
	return restore.fd;
}

static int by_repair(int fd, uint64_t *took)
{
	int original = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0), copy;
	struct sockmi_stop_result stopped;
	struct sockmi_result result = { 0 };
	struct sockmi_placement placement = { 0 };
	const void *image;
	uint64_t t[PHASES + 1];
	size_t length;

	if (original < 0)
		err(1, "pidfd_getfd");
	t[FREEZE] = now();
	if (sockmi_stop(&owner, 1, STOP_US, &stopped))
		errx(1, "stop: %d", stopped.code);
	t[DUMP] = now();
	if (sockmi_capture(&original, 1, buffer, sizeof(buffer), &result))
		errx(1, "capture: %d, step %d, %s", result.code, result.step, strerror(result.error));
	t[RELEASE] = now();
	image = buffer + result.offset;
	length = result.length;
	if (sockmi_release(&original, &image, &length, 1, &result))
		errx(1, "release: %d, step %d, %s", result.code, result.step, strerror(result.error));
	sockmi_resume(&owner, 1);
	t[RESTORE] = now();
	if (sockmi_restore(&image, &length, &placement, 1, INJECT_MARK, &copy, &result) ||
	    sockmi_activate(&copy, &image, &length, 1, &result))
		errx(1, "restore: %d, step %d, %s", result.code, result.step, strerror(result.error));
	t[PHASES] = now();
	for (int phase = 0; phase < PHASES; phase++)
		took[phase] = t[phase + 1] - t[phase];
	close(original);
	return copy;
}

/* ---- */

static int connected(int *peer)
{
	struct sockaddr_in name = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t length = sizeof(name);
	int listener = socket(AF_INET, SOCK_STREAM, 0), fd;

	*peer = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (bind(listener, (struct sockaddr *)&name, length) || listen(listener, 1) ||
	    getsockname(listener, (struct sockaddr *)&name, &length) ||
	    connect(*peer, (struct sockaddr *)&name, length))
		err(1, "connecting");
	fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	if (fd < 0)
		err(1, "accept");
	close(listener);
	return fd;
}

static void prepare(void)
{
	struct sockmi_ioc_hello hello = { .abi_major = SOCKMI_DEV_ABI_MAJOR };
	struct sockmi_ioc_slots slots = { .kind = SOCKMI_SLOT_EXPORT, .count = 1, .bytes = SLOT_BYTES };
	int pair[2];

	device = open(SOCKMI_DEV_PATH, O_RDWR | O_CLOEXEC);
	if (device < 0)
		err(1, "%s", SOCKMI_DEV_PATH);
	call(SOCKMI_IOC_HELLO, &hello, "hello");
	call(SOCKMI_IOC_SLOTS, &slots, "slots");
	slot = mmap(NULL, SLOT_BYTES, PROT_READ, MAP_SHARED, device, (off_t)slots.offset);
	if (slot == MAP_FAILED)
		err(1, "mmap");
	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
		err(1, "socketpair");
	owner = fork();
	if (owner < 0)
		err(1, "fork");
	if (!owner)
		own(pair[1]);
	close(pair[1]);
	channel = pair[0];
	pidfd = (int)syscall(SYS_pidfd_open, owner, 0);
	if (pidfd < 0)
		err(1, "pidfd_open");
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*move)(int fd, uint64_t *took);
	} engines[] = { { "kernel", by_module }, { "repair", by_repair } };
	int moves, queued, peer, fd, there;
	char byte;

	if (argc != 3 || (moves = atoi(argv[1])) <= 0 || (queued = atoi(argv[2])) < 0 || queued > 65536)
		errx(2, "usage: engines MOVES QUEUED_BYTES");
	prepare();
	fd = connected(&peer);
	if (queued && send(peer, buffer, (size_t)queued, 0) != queued)
		err(1, "send");
	while (queued && recv(fd, buffer, (size_t)queued, MSG_PEEK) != queued)
		usleep(1000);
	there = hand(fd);
	for (int i = 0; i < 2 * moves; i++) {
		uint64_t took[PHASES];

		fd = engines[i % 2].move(there, took);
		printf("%s %" PRIu64 " %" PRIu64 " %" PRIu64 " %" PRIu64 "\n", engines[i % 2].name, took[FREEZE],
		       took[DUMP], took[RELEASE], took[RESTORE]);
		/* It lives: the peer hears from it. */
		if (send(fd, "x", 1, MSG_NOSIGNAL) != 1 || recv(peer, &byte, 1, 0) != 1 || byte != 'x')
			errx(1, "%s: the moved connection is dead", engines[i % 2].name);
		there = hand(fd);
	}
	return 0;
}
