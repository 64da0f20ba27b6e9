/* SPDX-License-Identifier: MIT */
/*
 * Stops whole processes by ptrace; see stop.h.
 *
 * Reading order: the fix for interrupted system calls, threads, processes, strays, commands, API.
 */
#include "stop.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <sys/mman.h>
#include <unistd.h>

#include "in_repair.h"
#include "restart.h"

#define API __attribute__((visibility("default")))
#define OPTIONS (PTRACE_O_TRACECLONE | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACEEXEC)
/* Only what this thread traces, never the children of the program around us. */
#define WAIT_FLAGS (__WALL | __WNOTHREAD | WNOHANG)
#define VFORK_US 500		/* who has not stopped by then may be waiting in vfork(2) */
#define SPIN_US 40		/* waiting by sched_yield(): the usual stop takes less */
#define NAP_MIN_US 10
#define NAP_MAX_US 200
#define STRAY_POLL_US 1000
#define BUCKETS 256
#define KEEPER_STACK_BYTES (512 << 10)

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

static pid_t tracing_pid;	/* for whom we stop: not ours in a child by fork(2), which has no tracing process */
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

/* Why SEIZE was refused with EPERM: read the thread's status. */
static void seize_refused(struct process *p, pid_t tid)
{
	char path[64], text[2048];
	int tracer = 0;

	snprintf(path, sizeof(path), "/proc/%d/task/%d/status", p->pid, tid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	if (length <= 0)
		return;		/* it is gone */
	text[length] = 0;
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
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (fd >= 0)
		close(fd);
	text[length < 0 ? 0 : length] = 0;
	const char *name_end = strrchr(text, ')');

	if (!name_end || strncmp(name_end, ") D", 3))
		return false;
	snprintf(path, sizeof(path), "/proc/%d/task/%d/syscall", pid, tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (fd >= 0)
		close(fd);
	text[length < 0 ? 0 : length] = 0;
	if (sscanf(text, "%ld", &number) != 1)
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
		stray_add(t->tid); /* strays_poll() lets it go */
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

/* Threads that we could not let go when we wanted to. */
static void strays_poll(void)
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

/* ---- commands, run by the tracing thread ---- */

struct command {
	const pid_t *pids;
	size_t n;
	unsigned int timeout_us;
	struct sockmi_stop_result *results;	/* NULL: resume */
};

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

static void run_stop(const struct command *c)
{
	new_processes = NULL;
	for (size_t i = 0; i < c->n; i++) {
		struct process *p = process_find(c->pids[i]);

		if (!p && c->pids[i] > 0 && c->pids[i] != tracing_pid) {
			p = process_new(c->pids[i]);
			if (p)
				process_begin(p);
		}
	}
	stop_wait(c->timeout_us);
	stop_judge();
	for (size_t i = 0; i < c->n; i++) {
		struct process *p = process_find(c->pids[i]);

		if (p)
			c->results[i] = p->result;
		else
			c->results[i] = (struct sockmi_stop_result){
				.code = c->pids[i] == tracing_pid ? SOCKMI_STOP_SELF : SOCKMI_STOP_ERROR,
				.error = c->pids[i] <= 0 ? EINVAL : c->pids[i] == tracing_pid ? 0 : ENOMEM };
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

static void run_resume(const struct command *c)
{
	for (size_t i = 0; i < c->n; i++) {
		struct process *p = process_find(c->pids[i]);

		if (p && p->count && --p->count == 0 && !p->adopter)
			process_release(p);
	}
}

/*
 * ---- the tracing process ----
 *
 * Whoever traces the owners must outlive this process: they may run again only when no socket of theirs is in repair any
 * more, whoever was killed in the middle. So it is a process of its own, that shares our memory and our descriptors; and one
 * of our threads, whose thread-local memory it has, does nothing but wait for its end.
 */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static pthread_cond_t finished = PTHREAD_COND_INITIALIZER;
static const struct command *command;
static volatile pid_t tracer;	/* the tracing process; 0: there is none */
static volatile sig_atomic_t at_work;

static int end_signal(void)
{
	return SIGRTMIN + 6;
}

/* This process has ended: nothing here may wait for what one of its threads had locked. */
static void let_all_go(int number)
{
	(void)number;
	sockmi_in_repair_mend();
	if (!at_work) /* else the kernel does it, without a restart of interrupted calls on aarch64 */
		for (size_t b = 0; b < BUCKETS; b++)
			for (struct process *p = processes[b]; p; p = p->next)
				for (size_t i = 0; i < p->n; i++)
					thread_detach(&p->threads[i]);
	_exit(0);
}

static void trace(void)
{
	pthread_mutex_lock(&lock);
	for (;;) {
		while (!command) {
			struct timespec until;

			if (!stray_count) {
				pthread_cond_wait(&wake, &lock);
				continue;
			}
			clock_gettime(CLOCK_MONOTONIC, &until);
			until.tv_nsec += STRAY_POLL_US * 1000;
			until.tv_sec += until.tv_nsec / 1000000000;
			until.tv_nsec %= 1000000000;
			pthread_cond_clockwait(&wake, &lock, CLOCK_MONOTONIC, &until);
			at_work = 1;
			strays_poll();
			at_work = 0;
		}
		at_work = 1;
		if (command->results)
			run_stop(command);
		else
			run_resume(command);
		if (stray_count)
			strays_poll();
		at_work = 0;
		command = NULL;
		pthread_cond_broadcast(&finished);
	}
}

/* Signals: none of the host program's handlers, which are for it; all but SIGCHLD are blocked, see tracing_start(). */
static int keep_tracing(void *unused)
{
	struct sigaction action = { .sa_handler = SIG_DFL };
	sigset_t end;

	(void)unused;
	tracer = getpid();
	for (int number = 1; number < NSIG; number++)
		sigaction(number, &action, NULL);
	action.sa_handler = let_all_go;
	sigfillset(&action.sa_mask);
	sigaction(end_signal(), &action, NULL);
	sigemptyset(&end);
	sigaddset(&end, end_signal());
	prctl(PR_SET_PDEATHSIG, end_signal());
	sigprocmask(SIG_UNBLOCK, &end, NULL);
	if (getppid() != tracing_pid)
		let_all_go(0);
	prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
	trace();
	return 0;
}

static void *tracing_thread(void *unused)
{
	void *stack = mmap(NULL, KEEPER_STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	pid_t child = -1;

	(void)unused;
	prctl(PR_SET_NAME, "sockmi-stop");
	if (stack != MAP_FAILED)
		child = clone(keep_tracing, (char *)stack + KEEPER_STACK_BYTES, CLONE_VM | CLONE_FILES, NULL);
	if (child < 0) { /* no room for a process: the kernel lets owners go when we end */
		prctl(PR_SET_TIMERSLACK, 1UL, 0UL, 0UL, 0UL);
		trace();
	}
	/* Not waitpid(): it would have a hand in the thread-local memory. */
	while (syscall(SYS_wait4, child, NULL, __WALL, NULL) != child)
		;
	/* It was killed, and owners run of whom somebody believes that they are stopped: the next start settles that. */
	kill(getpid(), SIGKILL);
	return NULL;
}

/* Called with the lock held. */
static int tracing_start(void)
{
	sigset_t block, before;
	pthread_t thread;

	if (tracing_pid == getpid())
		return 0;
	memset(processes, 0, sizeof(processes));
	stray_count = 0;
	tracer = 0;
	tracing_pid = getpid();
	/*
	 * No handler of the host program runs here. SIGCHLD stays open: the kernel sends one for
	 * every stop, and drops it at once if it is neither blocked nor handled.
	 */
	sigfillset(&block);
	sigdelset(&block, SIGCHLD);
	pthread_sigmask(SIG_SETMASK, &block, &before);
	int error = pthread_create(&thread, NULL, tracing_thread, NULL);

	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (error) {
		tracing_pid = 0;
		return -error;
	}
	pthread_detach(thread);
	return 0;
}

static int run(const struct command *c)
{
	pthread_mutex_lock(&lock);
	int error = tracing_start();

	if (!error) {
		while (command)
			pthread_cond_wait(&finished, &lock);
		command = c;
		pthread_cond_signal(&wake);
		while (command == c)
			pthread_cond_wait(&finished, &lock);
	}
	pthread_mutex_unlock(&lock);
	return error;
}

API int sockmi_stop(const pid_t *pids, size_t n, unsigned int timeout_us, struct sockmi_stop_result *results)
{
	struct command c = { .pids = pids, .n = n, .timeout_us = timeout_us, .results = results };
	int failed = 0;

	if (!n)
		return 0;
	if (!pids || !results || n > INT_MAX)
		return -EINVAL;
	int error = run(&c);

	if (error)
		return error;
	for (size_t i = 0; i < n; i++)
		failed += results[i].code != SOCKMI_STOP_OK;
	return failed;
}

API int sockmi_resume(const pid_t *pids, size_t n)
{
	struct command c = { .pids = pids, .n = n };

	if (!n)
		return 0;
	return pids ? run(&c) : -EINVAL;
}

API pid_t sockmi_stop_tracer(void)
{
	return tracing_pid == getpid() ? tracer : 0;
}

API void sockmi_stop_census(size_t *stopped, size_t *stray)
{
	size_t count = 0;

	pthread_mutex_lock(&lock);
	for (size_t b = 0; b < BUCKETS; b++)
		for (const struct process *p = processes[b]; p; p = p->next)
			count += process_count(p, THREAD_STOPPED, THREAD_IN_VFORK);
	if (stopped)
		*stopped = count;
	if (stray)
		*stray = stray_count;
	pthread_mutex_unlock(&lock);
}
