/* SPDX-License-Identifier: MIT */
/*
 * What the tracing process has in its hands; see tracees.h.
 *
 * Reading order: time, threads, processes, strays, what is asked for.
 */
#include "tracees.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "restart.h"

#define OPTIONS (PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC)
/* Only what this thread traces, never the children of the program around us. */
#define WAIT_FLAGS (__WALL | __WNOTHREAD | WNOHANG)
#define VFORK_US 500		/* who has not stopped by then may be waiting in vfork(2) */
#define SPIN_US 40		/* waiting by sched_yield(): the usual stop takes less */
#define NAP_MIN_US 10
#define NAP_MAX_US 200
#define BUCKETS 256

/* ---- time ---- */

static uint64_t now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000 + (uint64_t)t.tv_nsec / 1000;
}

/* Wait a little for tracees to make progress; under SCHED_FIFO only sleeping lets them run. */
static void pause_briefly(uint64_t began_us, long *nap_us)
{
	if (now_us() - began_us < SPIN_US) {
		sched_yield();
		return;
	}
	struct timespec t = { .tv_nsec = *nap_us * 1000 };

	nanosleep(&t, NULL);
	*nap_us = *nap_us * 2 > NAP_MAX_US ? NAP_MAX_US : *nap_us * 2;
}

/* ---- threads and processes ---- */

enum thread_state {
	THREAD_PENDING,
	THREAD_STOPPED,
	THREAD_IN_VFORK,	/* waits for its child, and will stop before it acts again: as good as stopped */
	THREAD_GONE,
};

struct thread {
	pid_t tid;
	enum thread_state state;
	int signal;			/* met on the way; delivered by PTRACE_DETACH */
	struct sockmi_restart restart;	/* what is known of its system call */
};

struct process {
	pid_t pid;
	unsigned int count;		/* stops not yet resumed */
	pid_t adopter;			/* the process whose stop brought this child in, or 0 */
	bool settled;			/* every thread is stopped, and no other exists */
	int tasks;			/* /proc/PID/task while not settled, else -1 */
	struct sockmi_stop_result result;
	struct thread *threads;
	size_t n, room;
	struct process *next;		/* in its bucket */
	struct process *next_new;	/* in the list of the stop under way */
};

static struct process *processes[BUCKETS];
static struct process *new_processes;
static pid_t *strays;
static size_t stray_count, stray_room;

static struct process *process_find(pid_t pid)
{
	struct process *p = processes[(unsigned int)pid % BUCKETS];

	while (p && p->pid != pid)
		p = p->next;
	return p;
}

static struct process *process_new(pid_t pid)
{
	struct process **bucket = &processes[(unsigned int)pid % BUCKETS];
	struct process *p = calloc(1, sizeof(*p));

	if (!p)
		return NULL;
	p->pid = pid;
	p->tasks = -1;
	p->next = *bucket;
	*bucket = p;
	p->next_new = new_processes;
	new_processes = p;
	return p;
}

static void process_free(struct process *p)
{
	struct process **at = &processes[(unsigned int)p->pid % BUCKETS];

	while (*at != p)
		at = &(*at)->next;
	*at = p->next;
	if (p->tasks >= 0)
		close(p->tasks);
	free(p->threads);
	free(p);
}

static void process_fail(struct process *p, enum sockmi_stop_code code, int error, pid_t tid, pid_t tracer)
{
	if (p->result.code == SOCKMI_STOP_OK || p->result.code == SOCKMI_STOP_GONE)
		p->result = (struct sockmi_stop_result){ .code = (int)code, .error = error, .tid = tid,
							 .tracer = tracer };
}

static struct thread *thread_find(struct process *p, pid_t tid)
{
	for (size_t i = 0; i < p->n; i++)
		if (p->threads[i].tid == tid)
			return &p->threads[i];
	return NULL;
}

static struct thread *thread_add(struct process *p, pid_t tid)
{
	if (p->n == p->room) {
		size_t room = p->room ? p->room * 2 : 4;
		struct thread *threads = realloc(p->threads, room * sizeof(*threads));

		if (!threads)
			return NULL;
		p->threads = threads;
		p->room = room;
	}
	p->threads[p->n] = (struct thread){ .tid = tid };
	return &p->threads[p->n++];
}

static bool stray_remove(pid_t tid)
{
	for (size_t i = 0; i < stray_count; i++)
		if (strays[i] == tid) {
			strays[i] = strays[--stray_count];
			return true;
		}
	return false;
}

static void stray_add(pid_t tid)
{
	if (stray_count == stray_room) {
		size_t room = stray_room ? stray_room * 2 : 16;
		pid_t *more = realloc(strays, room * sizeof(*more));

		if (!more)
			return;	/* it is let go when this process ends */
		strays = more;
		stray_room = room;
	}
	strays[stray_count++] = tid;
}

/* ---- stopping ---- */

/* The beginning of a file of /proc, as a string; "" if it is gone. */
static const char *proc_text(const char *path, char *text, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, size - 1);

	if (fd >= 0)
		close(fd);
	text[length < 0 ? 0 : length] = 0;
	return text;
}

/* Why SEIZE was refused with EPERM: read the thread's status. */
static void seize_refused(struct process *p, pid_t tid)
{
	char path[64], text[2048];
	int tracer = 0;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/status", p->pid, tid);
	if (!*proc_text(path, text, sizeof(text)))
		return;		/* it is gone */
	const char *state = strstr(text, "\nState:\t");
	const char *tracer_at = strstr(text, "\nTracerPid:\t");

	if (state && (state[8] == 'Z' || state[8] == 'X'))
		return;		/* ended, not yet reaped */
	if (tracer_at)
		tracer = atoi(tracer_at + 12);
	if (tracer)
		process_fail(p, SOCKMI_STOP_TRACED, EPERM, tid, tracer);
	else
		process_fail(p, SOCKMI_STOP_DENIED, EPERM, tid, 0);
}

static void newborn(struct process *parent, pid_t tid);

/* Take note of one stop, @status as of waitpid(2). */
static void thread_stopped(struct process *p, pid_t tid, int status)
{
	int event = status >> 16;
	struct thread *t = thread_find(p, tid);

	t->state = THREAD_STOPPED;
	t->signal = event ? 0 : WSTOPSIG(status);
	if (event == 0 || event == PTRACE_EVENT_STOP)
		sockmi_restart_stopped(tid);
	if (event == PTRACE_EVENT_CLONE || event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK) {
		unsigned long child = 0;

		if (!ptrace(PTRACE_GETEVENTMSG, tid, NULL, &child) && child)
			newborn(p, (pid_t)child);
	}
}

/* Has the thread stopped or ended? Never blocks. @at: its index in @p (the array may move). */
static void thread_poll(struct process *p, size_t at)
{
	pid_t tid = p->threads[at].tid;
	int status;
	pid_t got = waitpid(tid, &status, WAIT_FLAGS);

	if (got == 0 || (got < 0 && errno == EINTR))
		return;
	if (got > 0 && WIFSTOPPED(status)) {
		thread_stopped(p, tid, status);
		return;
	}
	p->threads[at].state = THREAD_GONE;
	/* A thread that execs takes its leader's id; its stop is reported under that one. */
	struct thread *leader = thread_find(p, p->pid);

	if (got < 0 && tid != p->pid && leader && leader->state == THREAD_STOPPED)
		leader->state = THREAD_PENDING;
}

/* A thread or a child that the kernel attached to us by itself; it stops before its first instruction. */
static void newborn(struct process *parent, pid_t tid)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/task/%d", parent->pid, tid);
	if (!access(path, F_OK)) {
		if (!thread_find(parent, tid) && !thread_add(parent, tid))
			process_fail(parent, SOCKMI_STOP_ERROR, ENOMEM, tid, 0);
		return;
	}
	if (process_find(tid))
		return;		/* asked for by name as well */
	struct process *child = process_new(tid);

	if (!child || !thread_add(child, tid)) {
		process_fail(parent, SOCKMI_STOP_ERROR, ENOMEM, tid, 0);
		stray_add(tid);
		return;
	}
	child->adopter = parent->pid;
	parent->result.adopted++;
}

static void thread_seize(struct process *p, pid_t tid)
{
	struct sockmi_restart restart = { 0 };
	int status = 0;
	pid_t got = 0;

	if (ptrace(PTRACE_SEIZE, tid, NULL, OPTIONS)) {
		if (errno == ESRCH)
			return;
		if (errno != EPERM) {
			process_fail(p, SOCKMI_STOP_ERROR, errno, tid, 0);
			return;
		}
		/* Ours already: a newborn, or left over from a stop that failed? */
		if (!stray_remove(tid)) {
			got = waitpid(tid, &status, WAIT_FLAGS);
			if (got < 0) {
				seize_refused(p, tid);
				return;
			}
			if (got > 0 && !WIFSTOPPED(status))
				return;
		}
	}
	sockmi_restart_note(p->pid, tid, &restart);
	if (ptrace(PTRACE_INTERRUPT, tid, NULL, NULL) && errno != ESRCH)
		process_fail(p, SOCKMI_STOP_ERROR, errno, tid, 0);
	struct thread *t = thread_add(p, tid);

	if (!t) {
		process_fail(p, SOCKMI_STOP_ERROR, ENOMEM, tid, 0);
		stray_add(tid);
		return;
	}
	t->restart = restart;
	if (got > 0)
		thread_stopped(p, tid, status);
}

/* Seize every thread that is not ours yet; true if there was one. */
static bool process_list(struct process *p)
{
	_Alignas(struct dirent64) char names[4096];
	size_t before = p->n;

	if (p->tasks < 0) {
		char path[32];

		snprintf(path, sizeof(path), "/proc/%d/task", p->pid);
		p->tasks = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (p->tasks < 0) {
			if (errno != ENOENT && errno != ESRCH)
				process_fail(p, SOCKMI_STOP_ERROR, errno, 0, 0);
			return false;
		}
	} else {
		lseek(p->tasks, 0, SEEK_SET);
	}
	for (;;) {
		ssize_t length = getdents64(p->tasks, names, sizeof(names));

		if (length <= 0)
			break;
		for (ssize_t at = 0; at < length;) {
			const struct dirent64 *entry = (const struct dirent64 *)(names + at);
			pid_t tid = atoi(entry->d_name);

			if (tid > 0 && !thread_find(p, tid))
				thread_seize(p, tid);
			at += entry->d_reclen;
		}
	}
	return p->n != before;
}

static void process_begin(struct process *p)
{
	/* The leader first: if it turns out to be the only thread, one look at the list is enough. */
	thread_seize(p, p->pid);
	bool alone = p->n == 1;

	if (!process_list(p))
		p->settled = alone;
}

static size_t process_count(const struct process *p, enum thread_state first, enum thread_state last)
{
	size_t count = 0;

	for (size_t i = 0; i < p->n; i++)
		count += p->threads[i].state >= first && p->threads[i].state <= last;
	return count;
}

/*
 * Does the thread sleep uninterruptibly in the creation of a child? A parent in vfork(2) does so
 * until its child execs or ends, which that cannot while it is stopped. The parent has been
 * interrupted, so it stops before its next instruction, and in there it touches no socket.
 */
static bool in_vfork(pid_t pid, pid_t tid)
{
	char path[64], text[512];
	long number = -1;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, tid);
	const char *name_end = strrchr(proc_text(path, text, sizeof(text)), ')');

	if (!name_end || strncmp(name_end, ") D", 3))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task/%d/syscall", pid, tid);
	if (sscanf(proc_text(path, text, sizeof(text)), "%ld", &number) != 1)
		return false;
#ifdef SYS_vfork
	if (number == SYS_vfork)
		return true;
#endif
	return number == SYS_clone || number == SYS_clone3;
}

/* One look at every thread that has not stopped yet (@all: at every one). True if @p is done. */
static bool process_poll(struct process *p, bool all, bool look)
{
	if (p->result.code > SOCKMI_STOP_GONE)
		return true;
	for (size_t i = 0; i < p->n; i++) {
		if (p->threads[i].state == THREAD_PENDING || (all && p->threads[i].state != THREAD_GONE))
			thread_poll(p, i);
		if (look && p->threads[i].state == THREAD_PENDING && in_vfork(p->pid, p->threads[i].tid))
			p->threads[i].state = THREAD_IN_VFORK;
	}
	if (process_count(p, THREAD_PENDING, THREAD_PENDING))
		return false;
	if (!p->settled && process_list(p))
		return false;
	p->settled = true;
	return true;
}

/* Let one thread run; false: it is not in a stop (on its way into one, or killed). */
static bool thread_detach(const struct thread *t)
{
	if (t->state != THREAD_STOPPED)
		return t->state == THREAD_GONE;
	if (!t->signal)
		sockmi_restart_release(t->tid, &t->restart);
	return !ptrace(PTRACE_DETACH, t->tid, NULL, (long)t->signal);
}

static void thread_release(const struct thread *t)
{
	if (!thread_detach(t))
		stray_add(t->tid); /* sockmi_tracees_let_strays_go() does */
}

static struct process *process_adopted_by(pid_t pid)
{
	for (size_t b = 0; b < BUCKETS; b++)
		for (struct process *child = processes[b]; child; child = child->next)
			if (child->adopter == pid)
				return child;
	return NULL;
}

static void process_release(struct process *p)
{
	pid_t pid = p->pid;
	bool adopted = p->result.adopted;
	struct process *child;

	for (size_t i = 0; i < p->n; i++)
		thread_release(&p->threads[i]);
	process_free(p);
	while (adopted && (child = process_adopted_by(pid))) {
		child->adopter = 0;
		if (!child->count)
			process_release(child);
	}
}

void sockmi_tracees_let_strays_go(void)
{
	for (size_t i = 0; i < stray_count;) {
		pid_t tid = strays[i];
		int status, signal = 0;
		pid_t got = waitpid(tid, &status, WAIT_FLAGS);

		if (got == 0) {
			i++;
			continue;
		}
		strays[i] = strays[--stray_count];
		if (got < 0 || !WIFSTOPPED(status))
			continue;
		int event = status >> 16;
		unsigned long child = 0;

		if (!event)
			signal = WSTOPSIG(status);
		if ((event == PTRACE_EVENT_CLONE || event == PTRACE_EVENT_FORK || event == PTRACE_EVENT_VFORK) &&
		    !ptrace(PTRACE_GETEVENTMSG, tid, NULL, &child) && child)
			stray_add((pid_t)child);
		if (event == 0 || event == PTRACE_EVENT_STOP)
			sockmi_restart_stopped(tid);
		ptrace(PTRACE_DETACH, tid, NULL, (long)signal);
	}
}

/* ---- what the tracing process asks for ---- */

/* Poll the processes of this stop until each is done or the time is over. */
static void stop_wait(unsigned int timeout_us)
{
	uint64_t began = now_us();
	long nap_us = NAP_MIN_US;

	for (;;) {
		const struct process *newest = new_processes;
		uint64_t waited = now_us() - began;
		bool done = true;

		for (struct process *p = new_processes; p; p = p->next_new)
			done &= process_poll(p, waited > SPIN_US, waited > VFORK_US);
		done &= newest == new_processes;	/* a newborn is put in front */
		if (done || now_us() - began >= timeout_us)
			return;
		pause_briefly(began, &nap_us);
	}
}

/* The verdict on each process of this stop; what failed is let go. */
static void stop_judge(void)
{
	for (struct process *p = new_processes; p; p = p->next_new) {
		for (size_t i = 0; i < p->n; i++)
			if (p->threads[i].state == THREAD_PENDING)
				process_fail(p, SOCKMI_STOP_TIMEOUT, ETIMEDOUT, p->threads[i].tid, 0);
		if (!p->settled && p->n)
			process_fail(p, SOCKMI_STOP_TIMEOUT, ETIMEDOUT, p->pid, 0);
		p->result.threads = (uint32_t)process_count(p, THREAD_STOPPED, THREAD_IN_VFORK);
		if (p->result.code == SOCKMI_STOP_OK && !p->result.threads)
			p->result.code = SOCKMI_STOP_GONE;
		if (p->tasks >= 0)
			close(p->tasks);
		p->tasks = -1;
	}
	/* A child that could not be stopped means that its parent's socket is not at rest. */
	for (struct process *p = new_processes; p; p = p->next_new)
		for (struct process *c = p; c->adopter && c->result.code > SOCKMI_STOP_GONE;) {
			struct process *parent = process_find(c->adopter);

			if (!parent)
				break;
			process_fail(parent, (enum sockmi_stop_code)c->result.code, c->result.error,
				     c->result.tid, c->result.tracer);
			c = parent;
		}
}

void sockmi_tracees_stop(const pid_t *pids, size_t n, unsigned int timeout_us, pid_t self,
			 struct sockmi_stop_result *results)
{
	new_processes = NULL;
	for (size_t i = 0; i < n; i++) {
		struct process *p = process_find(pids[i]);

		if (!p && pids[i] > 0 && pids[i] != self) {
			p = process_new(pids[i]);
			if (p)
				process_begin(p);
		}
	}
	stop_wait(timeout_us);
	stop_judge();
	for (size_t i = 0; i < n; i++) {
		struct process *p = process_find(pids[i]);

		if (p)
			results[i] = p->result;
		else
			results[i] = (struct sockmi_stop_result){
				.code = pids[i] == self ? SOCKMI_STOP_SELF : SOCKMI_STOP_ERROR,
				.error = pids[i] <= 0 ? EINVAL : pids[i] == self ? 0 : ENOMEM };
		if (p && p->result.code == SOCKMI_STOP_OK)
			p->count++;
	}
	/* Releasing one may release its children too, so start over after each. */
	for (bool again = true; again;) {
		again = false;
		for (struct process **at = &new_processes; *at; at = &(*at)->next_new)
			if (!(*at)->count && !(*at)->adopter) {
				struct process *failed = *at;

				*at = failed->next_new;
				for (struct process *p = new_processes; p; p = p->next_new)
					if (p->adopter == failed->pid)
						p->adopter = 0;
				failed->result.adopted = 0;
				process_release(failed);
				again = true;
				break;
			}
	}
	new_processes = NULL;
}

void sockmi_tracees_resume(const pid_t *pids, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		struct process *p = process_find(pids[i]);

		if (p && p->count && --p->count == 0 && !p->adopter)
			process_release(p);
	}
}

void sockmi_tracees_let_all_go(void)
{
	for (size_t b = 0; b < BUCKETS; b++)
		for (struct process *p = processes[b]; p; p = p->next)
			for (size_t i = 0; i < p->n; i++)
				thread_detach(&p->threads[i]);
}

void sockmi_tracees_forget(void)
{
	memset(processes, 0, sizeof(processes));
	stray_count = 0;
}

size_t sockmi_tracees_stopped(void)
{
	size_t count = 0;

	for (size_t b = 0; b < BUCKETS; b++)
		for (const struct process *p = processes[b]; p; p = p->next)
			count += process_count(p, THREAD_STOPPED, THREAD_IN_VFORK);
	return count;
}

size_t sockmi_tracees_strays(void)
{
	return stray_count;
}
