// SPDX-License-Identifier: MIT
/*
 * A process of its own, by fork(2). Until @run nothing here may use malloc() or stdio: it is the copy of one
 * thread of a process with many.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "process.h"

/* @told is known as the number behind those that are given. */
static int only_what_is_needed(const int *given, int count, int told)
{
	int first_free = SOCKMI_FIRST_GIVEN + count + 1, null = open("/dev/null", O_RDWR);
	int high[SOCKMI_MOST_GIVEN + 1];

	if (null < 0 || count > SOCKMI_MOST_GIVEN)
		return -1;
	/* First out of each other's way. */
	for (int i = 0; i <= count; i++) {
		high[i] = fcntl(i < count ? given[i] : told, F_DUPFD, first_free);
		if (high[i] < 0)
			return -1;
	}
	for (int fd = 0; fd < SOCKMI_FIRST_GIVEN; fd++)
		if (dup2(null, fd) < 0)
			return -1;
	for (int i = 0; i <= count; i++)
		if (dup2(high[i], SOCKMI_FIRST_GIVEN + i) < 0)
			return -1;
	return close_range((unsigned int)first_free, ~0U, 0);
}

/* The daemon's handlers are not ours; whoever wants us to end sends SIGTERM. */
static void own_signals(void)
{
	struct sigaction as_usual = { .sa_handler = SIG_DFL };
	sigset_t none;

	for (int number = 1; number < NSIG; number++)
		sigaction(number, &as_usual, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

__attribute__((noreturn)) static void start(const int *given, int count, int told, const char *name,
					     void (*run)(void))
{
	pid_t pid;

	if (only_what_is_needed(given, count, told) < 0)
		_exit(1);
	told = SOCKMI_FIRST_GIVEN + count;
	pid = fork();
	if (pid == 0) {
		close(told);
		setsid();
		prctl(PR_SET_NAME, name);
		own_signals();
		run();
		_exit(0);
	}
	while (write(told, &pid, sizeof(pid)) < 0 && errno == EINTR)
		;
	_exit(0);
}

int sockmi_process_start(const int *given, int count, const char *name, void (*run)(void))
{
	pid_t pid = -1, middle;
	int told[2], error;

	if (pipe2(told, O_CLOEXEC) < 0)
		return -errno;
	middle = fork();
	error = middle < 0 ? errno : 0;
	if (middle == 0)
		start(given, count, told[1], name, run);
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
