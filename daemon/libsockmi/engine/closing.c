// SPDX-License-Identifier: MIT
/*
 * Closing sockets that others have had: with SO_LINGER close() waits until all is acknowledged, if this
 * was the last descriptor, however the socket may have been set to non-blocking (net/ipv4/af_inet.c). A
 * signal ends that wait, and nothing else: the kernel goes on closing as it does without the option.
 */
#include <pthread.h>
#include <signal.h>
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
