// SPDX-License-Identifier: MIT
/*
 * Waiting with a deadline. poll(2) and no SO_RCVTIMEO: while a socket of the caller is exported
 * the daemon stops the caller's threads, and poll goes on undisturbed after that.
 */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <time.h>

#include "client.h"

static long long now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (long long)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

long long deadline_after(int timeout_ms)
{
	return timeout_ms < 0 ? -1 : now_ms() + timeout_ms;
}

/* Milliseconds that are left, as poll(2) wants them. */
int deadline_left(long long deadline)
{
	long long left;

	if (deadline < 0)
		return -1;
	left = deadline - now_ms();
	return left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
}

int wait_for(int fd, short events, long long deadline)
{
	struct pollfd pollfd = { .fd = fd, .events = events };

	for (;;) {
		int left = deadline_left(deadline);
		int n = poll(&pollfd, 1, left);

		if (n > 0)
			return 0;
		if (n == 0 && deadline >= 0 && deadline_left(deadline) == 0)
			return fail(ETIMEDOUT, "The SockMi daemon does not answer; see its log.");
		if (n < 0 && errno != EINTR)
			return fail(errno, "poll: %m");
	}
}
