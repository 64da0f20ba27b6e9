/* SPDX-License-Identifier: MIT */
/*
 * Stops whole processes while the sockets that they hold are read, and lets them run again.
 *
 * Every thread is stopped by ptrace(2) (SEIZE, INTERRUPT); what a stopped process forks or clones
 * while it is being stopped is stopped with it. All ptrace calls are made by one process of our own, which
 * shares our memory and our descriptors, so the functions may be called from any thread, one at a time. If this
 * process dies, that one leads sockets out of repair (in_repair.h) and lets every stopped process run again. If it
 * dies, this process ends as well: nothing that was frozen is.
 */
#ifndef SOCKMI_ENGINE_STOP_H
#define SOCKMI_ENGINE_STOP_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* An epoll_wait with a timeout up to this many milliseconds is restarted in full; a longer one gets EINTR. */
#define SOCKMI_EPOLL_RESTART_MAX_MS 1000

enum sockmi_stop_code {
	SOCKMI_STOP_OK,
	SOCKMI_STOP_GONE,	/* no such process (any more): nothing to stop */
	SOCKMI_STOP_TRACED,	/* a debugger is there already: `tracer` */
	SOCKMI_STOP_TIMEOUT,	/* thread `tid` did not stop in time (uninterruptible sleep) */
	SOCKMI_STOP_DENIED,	/* the kernel forbids it (no CAP_SYS_PTRACE, a kernel thread) */
	SOCKMI_STOP_SELF,	/* the process is this one */
	SOCKMI_STOP_ERROR,	/* anything else: `error` */
};

struct sockmi_stop_result {
	int32_t code;		/* enum sockmi_stop_code */
	int32_t error;		/* errno, or 0 */
	int32_t tid;		/* the thread that made it fail, or 0 */
	int32_t tracer;		/* who traces it, or 0 */
	uint32_t threads;	/* stopped threads of the process */
	uint32_t adopted;	/* children that it made while being stopped, stopped with it */
};

/*
 * Stop @n processes; @timeout_us is for all of them together. Each success counts once and
 * needs one sockmi_resume(). A process that fails runs on as before.
 * Returns the number that failed (GONE included), or -errno if nothing could be done.
 */
int sockmi_stop(const pid_t *pids, size_t n, unsigned int timeout_us, struct sockmi_stop_result *results);

/* The inverse of sockmi_stop(); pids that are not stopped are ignored. Returns 0 or -errno. */
int sockmi_resume(const pid_t *pids, size_t n);

/* The process that traces for us, or 0: there is none yet. */
pid_t sockmi_stop_tracer(void);

/*
 * How many threads are in our hands: stopped ones (@stopped), and those of a failed stop which
 * will be let go as soon as the kernel allows (@strays). Either may be NULL.
 */
void sockmi_stop_census(size_t *stopped, size_t *strays);

#endif
