// SPDX-License-Identifier: MIT
/*
 * A process of its own takes what waits in a listener's queue: whoever has accepted a connection cannot
 * put it back, so it must not go with the daemon.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine.h"

#define LISTENER 3
#define CONTROL 4
#define TOLD 5 /* only while it starts */
#define FIRST_FREE 6

/* Between fork() and _exit() of a process with threads: nothing here may use malloc() or stdio. */

static int only_what_is_needed(int listener, int control, int told)
{
	/* First out of each other's way. */
	int high_listener = fcntl(listener, F_DUPFD, FIRST_FREE);
	int high_control = fcntl(control, F_DUPFD, FIRST_FREE);
	int high_told = fcntl(told, F_DUPFD, FIRST_FREE);
	int null = open("/dev/null", O_RDWR);

	if (high_listener < 0 || high_control < 0 || high_told < 0 || null < 0)
		return -1;
	for (int fd = 0; fd < LISTENER; fd++)
		if (dup2(null, fd) < 0)
			return -1;
	if (dup2(high_listener, LISTENER) < 0 || dup2(high_control, CONTROL) < 0 || dup2(high_told, TOLD) < 0)
		return -1;
	return close_range(FIRST_FREE, ~0U, 0);
}

/* The daemon's handlers are not ours; whoever wants the queue to be given up sends SIGTERM. */
static void own_signals(void)
{
	struct sigaction as_usual = { .sa_handler = SIG_DFL };
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		sigaction(number, &as_usual, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

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

/* No child of the daemon's, where nobody waits for its end; and nothing of the daemon's is open in it. */
__attribute__((noreturn)) static void start(int listener, int control, int told)
{
	pid_t pid;

	if (only_what_is_needed(listener, control, told) < 0)
		_exit(1);
	pid = fork();
	if (pid == 0) {
		close(TOLD);
		setsid();
		prctl(PR_SET_NAME, "sockmi-keeper");
		own_signals();
		keep();
	}
	while (write(TOLD, &pid, sizeof(pid)) < 0 && errno == EINTR)
		;
	_exit(0);
}

int sockmi_keeper_start(int listener, int control)
{
	pid_t pid = -1, middle;
	int told[2], error;

	if (pipe2(told, O_CLOEXEC) < 0)
		return -errno;
	middle = fork();
	error = middle < 0 ? errno : 0;
	if (middle == 0)
		start(listener, control, told[1]);
	close(told[1]);
	if (!error) {
		while (waitpid(middle, NULL, 0) < 0 && errno == EINTR)
			;
		if (read(told[0], &pid, sizeof(pid)) != sizeof(pid) || pid < 0)
			error = EAGAIN;
	}
	close(told[0]);
	return error ? -error : (int)pid;
}
