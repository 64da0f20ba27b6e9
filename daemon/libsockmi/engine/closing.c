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
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* For a thread to run that has a descriptor to close, on a very busy host: 10 s. */
#define ASIDE_TRIES 100000
#define ASIDE_PAUSE_NS 100000
#define ASIDE_STACK_BYTES 65536
#define NAME_BYTES 512
#define ASIDE_MAX 1024 /* counted; whoever asks refuses long before */

static pthread_mutex_t asides_lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t asides[ASIDE_MAX]; /* whose each is that is not closed yet */
static size_t n_asides;

struct aside {
	int fd;
	uint32_t whose;
};

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

static void aside_begins(uint32_t whose)
{
	pthread_mutex_lock(&asides_lock);
	if (n_asides < ASIDE_MAX)
		asides[n_asides++] = whose;
	pthread_mutex_unlock(&asides_lock);
}

static void aside_ends(uint32_t whose)
{
	pthread_mutex_lock(&asides_lock);
	for (size_t at = 0; at < n_asides; at++) {
		if (asides[at] == whose) {
			asides[at] = asides[--n_asides];
			break;
		}
	}
	pthread_mutex_unlock(&asides_lock);
}

size_t sockmi_closing_aside(uint32_t whose, size_t *all)
{
	size_t count = 0;

	pthread_mutex_lock(&asides_lock);
	for (size_t at = 0; at < n_asides; at++)
		count += asides[at] == whose;
	*all = n_asides;
	pthread_mutex_unlock(&asides_lock);
	return count;
}

static void *close_one(void *argument)
{
	struct aside aside = *(struct aside *)argument;

	free(argument);
	close(aside.fd);
	aside_ends(aside.whose);
	return NULL;
}

/* What a descriptor is of, as the kernel names it; fstat() would ask who serves it. */
static void name_of(int fd, char name[static NAME_BYTES])
{
	char path[32];
	ssize_t length;

	snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
	length = readlink(path, name, NAME_BYTES - 1);
	name[length < 0 ? 0 : length] = 0;
}

/* Or its number is another's by now. */
static void await_gone(int fd, const char *name)
{
	const struct timespec pause = { .tv_nsec = ASIDE_PAUSE_NS };
	char now[NAME_BYTES];

	for (int tries = 0; tries < ASIDE_TRIES && fcntl(fd, F_GETFD) >= 0; tries++) {
		name_of(fd, now);
		if (strcmp(now, name))
			return;
		nanosleep(&pause, NULL);
	}
}

static void begin_aside(const pthread_attr_t *attributes, int fd, uint32_t whose)
{
	struct aside *aside = malloc(sizeof(*aside));
	char name[NAME_BYTES];
	pthread_t thread;

	if (!aside)
		return;
	*aside = (struct aside){ .fd = fd, .whose = whose };
	name_of(fd, name);
	aside_begins(whose);
	if (!pthread_create(&thread, attributes, close_one, aside)) {
		await_gone(fd, name);
		return;
	}
	aside_ends(whose);
	free(aside);
}

/*
 * Who serves a file system may keep close() for ever, but only when the number is free already: so each has a
 * thread of its own, that none stays open behind another. And this returns when they are: else a process that
 * is begun next would have them too, and wait in their place.
 */
void sockmi_close_aside(const int *fds, size_t count, uint32_t whose)
{
	sigset_t all, before;
	pthread_attr_t attributes;

	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, ASIDE_STACK_BYTES);
	sigfillset(&all); /* a signal for the process is not for who may never run again */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	for (size_t at = 0; at < count; at++)
		begin_aside(&attributes, fds[at], whose);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attributes);
}
