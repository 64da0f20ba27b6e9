/* SPDX-License-Identifier: MIT */
/*
 * The process that traces the owners of sockets, and how it is asked; see stop.h.
 *
 * Whoever traces the owners must outlive this process: they may run again only when no socket of theirs is in repair any
 * more, whoever was killed in the middle. So it is a process of its own, that shares our memory and our descriptors; and one
 * of our threads, whose thread-local memory it has, does nothing but wait for its end.
 */
#include "stop.h"

#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "in_repair.h"
#include "tracees.h"

#define API __attribute__((visibility("default")))
#define STRAY_POLL_US 1000
#define KEEPER_STACK_BYTES (512 << 10)

struct command {
	const pid_t *pids;
	size_t n;
	unsigned int timeout_us;
	struct sockmi_stop_result *results;	/* NULL: resume */
};

static pid_t tracing_pid;	/* for whom we stop: not ours in a child by fork(2), which has no tracing process */
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
		sockmi_tracees_let_all_go();
	_exit(0);
}

static void trace(void)
{
	pthread_mutex_lock(&lock);
	for (;;) {
		while (!command) {
			struct timespec until;

			if (!sockmi_tracees_strays()) {
				pthread_cond_wait(&wake, &lock);
				continue;
			}
			clock_gettime(CLOCK_MONOTONIC, &until);
			until.tv_nsec += STRAY_POLL_US * 1000;
			until.tv_sec += until.tv_nsec / 1000000000;
			until.tv_nsec %= 1000000000;
			pthread_cond_clockwait(&wake, &lock, CLOCK_MONOTONIC, &until);
			at_work = 1;
			sockmi_tracees_let_strays_go();
			at_work = 0;
		}
		at_work = 1;
		if (command->results)
			sockmi_tracees_stop(command->pids, command->n, command->timeout_us, tracing_pid, command->results);
		else
			sockmi_tracees_resume(command->pids, command->n);
		if (sockmi_tracees_strays())
			sockmi_tracees_let_strays_go();
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
	sockmi_tracees_forget();
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
	pthread_mutex_lock(&lock);
	if (stopped)
		*stopped = sockmi_tracees_stopped();
	if (stray)
		*stray = sockmi_tracees_strays();
	pthread_mutex_unlock(&lock);
}
