// SPDX-License-Identifier: MIT
/*
 * A process of its own takes what waits in a listener's queue: whoever has accepted a connection cannot
 * put it back, so it must not go with the daemon.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "engine.h"
#include "process.h"

#define LISTENER SOCKMI_FIRST_GIVEN
#define CONTROL (SOCKMI_FIRST_GIVEN + 1)

/* The next connection of the queue, or -1: it is empty. */
static int take(uid_t owner)
{
	for (;;) {
		int child = accept4(LISTENER, NULL, NULL, SOCK_CLOEXEC);

		if (child >= 0) {
			/* Accepted by us, it would be ours: it is whose the listener is. */
			int refused = fchown(child, owner, (gid_t)-1);

			(void)refused; /* without the right to: then only root may import it */
			return child;
		}
		if (errno != ECONNABORTED && errno != EINTR && errno != EPROTO)
			return -1;
	}
}

/* Everything that waits; how many. */
static uint32_t take_all(void)
{
	int flags = fcntl(LISTENER, F_GETFL);
	struct stat listener = { 0 };
	uint32_t n = 0;

	/* The file is the owner's too, but the owner is stopped. */
	if (flags < 0 || fstat(LISTENER, &listener) < 0 || fcntl(LISTENER, F_SETFL, flags | O_NONBLOCK) < 0)
		return 0;
	while (take(listener.st_uid) >= 0)
		n++;
	fcntl(LISTENER, F_SETFL, flags);
	return n;
}

__attribute__((noreturn)) static void keep(void)
{
	uint32_t kept = 0;
	char word;

	for (;;) {
		ssize_t got = recv(CONTROL, &word, 1, 0);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			break;
		if (word == SOCKMI_KEEPER_TAKE) {
			kept += take_all();
			send(CONTROL, &kept, sizeof(kept), MSG_NOSIGNAL);
		} else if (word == SOCKMI_KEEPER_LISTENER_GONE) {
			close(LISTENER);
		}
	}
	if (!kept)
		_exit(0);
	for (;;)
		pause(); /* the daemon has gone; the next one will find us */
}

int sockmi_keeper_start(int listener, int control)
{
	const int given[] = { listener, control };

	return sockmi_process_start(given, 2, "sockmi-keeper", keep);
}
