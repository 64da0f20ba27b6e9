// SPDX-License-Identifier: MIT
/*
 * Closing sockets that others have had: with SO_LINGER close() waits until all is acknowledged, if this
 * was the last descriptor, however the socket may have been set to non-blocking (net/ipv4/af_inet.c). A
 * signal ends that wait, and nothing else: the kernel goes on closing as it does without the option.
 */
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "process.h"

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

/* All together are closed in less than the first, if none lingers; then each that does costs the second. */
#define PATIENCE_NS 1000000
#define MORE_PATIENCE_NS 50000

/* For a thread to run that has a descriptor to close, on a busy host. */
#define ASIDE_TRIES 500
#define ASIDE_PAUSE_NS 100000
#define ASIDE_STACK_BYTES 65536

static pthread_once_t once = PTHREAD_ONCE_INIT;

static int wake_signal(void)
{
	return SIGRTMIN + 5;
}

static void woken(int number)
{
	(void)number;
}

void sockmi_hear_wake_signal(void)
{
	struct sigaction action = { .sa_handler = woken };

	sigemptyset(&action.sa_mask);
	sigaction(wake_signal(), &action, NULL);
}

void sockmi_close(const int *fds, size_t count)
{
	struct itimerspec patience = {
		.it_value = { .tv_nsec = PATIENCE_NS },
		.it_interval = { .tv_nsec = MORE_PATIENCE_NS },
	};
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = wake_signal() };
	timer_t timer;
	int armed;

	pthread_once(&once, sockmi_hear_wake_signal);
	event.sigev_notify_thread_id = (pid_t)syscall(SYS_gettid);
	armed = !timer_create(CLOCK_MONOTONIC, &event, &timer);
	if (armed)
		timer_settime(timer, 0, &patience, NULL);
	for (size_t at = 0; at < count; at++)
		close(fds[at]);
	if (armed)
		timer_delete(timer);
}

static void *close_one(void *fd)
{
	close((int)(intptr_t)fd);
	return NULL;
}

/* Or its number is another's by now: then all tries are in vain, and nothing is lost but their time. */
static void await_gone(int fd)
{
	const struct timespec pause = { .tv_nsec = ASIDE_PAUSE_NS };

	for (int tries = 0; tries < ASIDE_TRIES && fcntl(fd, F_GETFD) >= 0; tries++)
		nanosleep(&pause, NULL);
}

/*
 * Who serves a file system may keep close() for ever, but only when the number is free already: so each has a
 * thread of its own, that none stays open behind another. And this returns when they are: else a process that
 * is begun next would have them too, and wait in their place.
 */
void sockmi_close_aside(const int *fds, size_t count)
{
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, ASIDE_STACK_BYTES);
	sigfillset(&all); /* a signal for the process is not for who may never run again */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (size_t at = 0; at < count; at++)
		if (!pthread_create(&thread, &attributes, close_one, (void *)(intptr_t)fds[at]))
			await_gone(fds[at]);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
}
