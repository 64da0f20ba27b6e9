// SPDX-License-Identifier: MIT
/*
 * Looking at a socket takes its lock, and so waits, not to be interrupted, while one of its owner's calls keeps that: for
 * ever, if the call waits for memory that nobody serves (FUSE, userfaultfd). So it is done here, in threads of a
 * process of its own, which can be left behind: nothing of the daemon's, and nothing of other owners, is open in it then.
 *
 * As a rule one thread looks at all. When nothing moves for a while the others begin where it is stuck: at each socket alone,
 * so that only those which are locked stay unseen.
 */
#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "inspect.h"
#include "inspector.h"
#include "process.h"

#define CONTROL SOCKMI_FIRST_GIVEN
#define GROUP 64
#define THREADS_MAX 256
#define MORE_THREADS 8 /* each time */
#define TICK_NS 20000000L /* nothing has moved for so long: somebody keeps a lock, or this host is busy */
#define NS_PER_S 1000000000L

enum { WAITS, ALONE, DONE };

/* What is looked at, and by how many threads. All of it is of @lock. */
static struct {
	pthread_mutex_t lock;
	pthread_cond_t work, moved;
	struct sockmi_look looks[SOCKMI_LOOKS_MAX];
	struct sockmi_facts facts[SOCKMI_LOOKS_MAX];
	uint8_t state[SOCKMI_LOOKS_MAX];
	size_t count, next, done;
	size_t next_alone; /* when nothing moves: up to here each has been begun alone */
	bool brief, split;
	unsigned int threads, busy;
} job = { .lock = PTHREAD_MUTEX_INITIALIZER };

/* The next to look at: how many, from *@first on. */
static size_t take(size_t *first)
{
	if (job.next < job.count) {
		size_t count = job.count - job.next < GROUP ? job.count - job.next : GROUP;

		*first = job.next;
		job.next += count;
		return count;
	}
	while (job.split && job.next_alone < job.count)
		if (job.state[job.next_alone++] == WAITS) {
			*first = job.next_alone - 1;
			job.state[*first] = ALONE;
			return 1;
		}
	return 0;
}

/* One group, or one alone, on the stack of the thread that looks at it. */
struct part {
	size_t first, count;
	int fds[GROUP];
	int errors[GROUP]; /* why there is no descriptor */
	struct sockmi_facts facts[GROUP];
};

static int take_descriptor(const struct sockmi_look *look, int *process, int32_t *pid)
{
	struct stat status;
	int fd;

	if (*process < 0 || *pid != look->pid) {
		if (*process >= 0)
			close(*process);
		*pid = look->pid;
		*process = (int)syscall(SYS_pidfd_open, *pid, 0);
	}
	fd = *process < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, *process, look->fd, 0);
	if (fd >= 0 && look->inode && (fstat(fd, &status) || status.st_ino != look->inode)) {
		sockmi_close(&fd, 1);
		errno = EBADF;
		return -1;
	}
	return fd;
}

/* Descriptors of ours; and whose sockets they are, should more not come to be known. */
static void take_descriptors(struct part *part)
{
	int process = -1;
	int32_t pid = 0;

	for (size_t i = 0; i < part->count; i++) {
		struct stat status = { 0 };

		part->fds[i] = take_descriptor(&job.looks[part->first + i], &process, &pid);
		part->errors[i] = part->fds[i] < 0 ? errno : 0;
		part->facts[i] = (struct sockmi_facts){ 0 };
		if (part->fds[i] >= 0 && !fstat(part->fds[i], &status) && S_ISSOCK(status.st_mode)) {
			part->facts[i].inode = status.st_ino;
			part->facts[i].uid = status.st_uid;
		}
	}
	if (process >= 0)
		close(process);
}

static void publish(const struct part *part, uint8_t state)
{
	pthread_mutex_lock(&job.lock);
	for (size_t i = 0; i < part->count; i++) {
		size_t at = part->first + i;

		if (job.state[at] == DONE)
			continue;
		job.facts[at] = part->facts[i];
		if (state == DONE) {
			job.state[at] = DONE;
			job.done++;
		}
	}
	if (state == DONE)
		pthread_cond_signal(&job.moved);
	pthread_mutex_unlock(&job.lock);
}

static void look_at(struct part *part)
{
	int error = 0;

	take_descriptors(part);
	publish(part, WAITS);
	if (job.brief)
		for (size_t i = 0; i < part->count; i++)
			sockmi_inspect_briefly(part->fds[i], &part->facts[i]);
	else
		error = sockmi_inspect(part->fds, part->count, part->facts);
	for (size_t i = 0; i < part->count; i++)
		if (part->errors[i] || error) {
			part->facts[i].findings = SOCKMI_NOT_TAKEN;
			part->facts[i].error = part->errors[i] ? part->errors[i] : -error;
		}
	publish(part, DONE);
	sockmi_close(part->fds, part->count);
}

static void *work(void *unused)
{
	struct part part;

	pthread_mutex_lock(&job.lock);
	for (;;) {
		part.count = take(&part.first);
		if (!part.count) {
			pthread_cond_wait(&job.work, &job.lock);
			continue;
		}
		job.busy++;
		pthread_mutex_unlock(&job.lock);
		look_at(&part);
		pthread_mutex_lock(&job.lock);
		job.busy--;
		pthread_cond_signal(&job.moved);
	}
	return unused;
}

/* So many that have nothing to do yet. */
static void add_threads(size_t wanted)
{
	pthread_t thread;

	pthread_cond_broadcast(&job.work);
	while (job.threads - job.busy < wanted && job.threads < THREADS_MAX && !pthread_create(&thread, NULL, work, NULL)) {
		pthread_detach(thread);
		job.threads++;
	}
}

static void after(struct timespec *when, long ns)
{
	clock_gettime(CLOCK_MONOTONIC, when);
	when->tv_sec += (when->tv_nsec + ns) / NS_PER_S;
	when->tv_nsec = (when->tv_nsec + ns) % NS_PER_S;
}

static bool is_over(const struct timespec *when)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec > when->tv_sec || (now.tv_sec == when->tv_sec && now.tv_nsec >= when->tv_nsec);
}

/* Have all of it looked at; how many threads are stuck when there is no patience left. */
static unsigned int carry_out(long patience_ns)
{
	struct timespec deadline, tick;
	unsigned int stuck;

	after(&deadline, patience_ns);
	pthread_mutex_lock(&job.lock);
	job.next = job.next_alone = job.done = 0;
	job.split = false;
	memset(job.facts, 0, job.count * sizeof(job.facts[0]));
	memset(job.state, WAITS, job.count);
	add_threads(1);
	while ((job.done < job.count || job.busy) && !is_over(&deadline)) {
		size_t before = job.done;

		after(&tick, TICK_NS);
		while (job.done == before && job.busy + job.count - job.done &&
		       pthread_cond_timedwait(&job.moved, &job.lock, &tick) != ETIMEDOUT)
			;
		if (job.done == before && job.done < job.count) {
			job.split = true;
			add_threads(MORE_THREADS);
		}
	}
	for (size_t i = 0; i < job.count; i++)
		if (job.state[i] != DONE) {
			job.facts[i].findings = SOCKMI_LOCKED;
			job.state[i] = DONE; /* whoever is at it goes on, without its descriptor */
		}
	stuck = job.busy;
	pthread_mutex_unlock(&job.lock);
	return stuck;
}

static bool receive(void *what, size_t length)
{
	while (length) {
		ssize_t got = recv(CONTROL, what, length, MSG_WAITALL);

		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return false;
		what = (char *)what + got;
		length -= (size_t)got;
	}
	return true;
}

static void answer(const void *what, size_t length)
{
	while (length) {
		ssize_t sent = send(CONTROL, what, length, MSG_NOSIGNAL);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0)
			_exit(0);
		what = (const char *)what + sent;
		length -= (size_t)sent;
	}
}

static void serve(void)
{
	struct sockmi_look_request request;
	pthread_condattr_t monotonic;

	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&job.moved, &monotonic);
	pthread_cond_init(&job.work, NULL);
	sockmi_hear_wake_signal();
	while (receive(&request, sizeof(request)) && request.count <= SOCKMI_LOOKS_MAX &&
	       receive(job.looks, request.count * sizeof(job.looks[0]))) {
		struct sockmi_look_answer said;

		job.count = request.count;
		job.brief = request.brief;
		said.stuck = carry_out((long)request.patience_ms * 1000000L);
		if (said.stuck) /* what others have must end when they close it */
			close_range(CONTROL + 1, ~0U, 0);
		answer(&said, sizeof(said));
		answer(job.facts, job.count * sizeof(job.facts[0]));
		if (said.stuck)
			break;
	}
	_exit(0); /* a thread that is stuck ends when it gets its lock */
}

int sockmi_inspector_start(int control)
{
	return sockmi_process_start(&control, 1, "sockmi-inspect", serve);
}
