/* SPDX-License-Identifier: MIT */
/*
 * Keeps a stop from being seen as EINTR.
 *
 * The kernel restarts most system calls that a stop interrupts (poll, select, nanosleep, futex,
 * socket calls without a timeout); signal(7) lists those that return EINTR instead. Here their
 * result is turned into a restart, unless a real signal with a handler is delivered: then the
 * application gets the EINTR that it would have got anyway.
 *
 * Restarted: epoll_wait and its kin without a timeout, or with one of at most
 * SOCKMI_EPOLL_RESTART_MAX_MS (it then begins anew); read, write, recv*, send*, accept*, connect
 * (they give EINTR if the socket has SO_RCVTIMEO or SO_SNDTIMEO, which then begins anew); semop,
 * semtimedop and sigtimedwait without a timeout. Left alone: a longer epoll_wait, and a call that
 * returns the part done so far (a blocking send of more than fits, MSG_WAITALL): a short count cannot
 * be undone.
 *
 * Why not restart a long epoll_wait for what is left of its timeout: the kernel keeps its end on the
 * stack (no restart_block), nobody knows when it began, and the timeout is in a register that the
 * application may go on using, as system calls preserve it. To restart it in full would delay timers by
 * as much as the thread had slept, up to the whole timeout; to return 0 would say that it had elapsed.
 * EINTR is what signal(7) promises after a stop, and every event loop recomputes its timeout on it.
 */
#ifndef SOCKMI_ENGINE_RESTART_H
#define SOCKMI_ENGINE_RESTART_H

#include <stdbool.h>
#include <sys/types.h>

/* The system call in which a thread sleeps; used only where the stop itself hides it (aarch64). */
struct sockmi_restart {
	bool known;
	unsigned long number, argument[6], stack, pc;
	unsigned long switches;		/* voluntary context switches so far */
};

/* Before the thread is interrupted: take note of its system call. */
void sockmi_restart_note(pid_t pid, pid_t tid, struct sockmi_restart *note);
/* In a trap or signal-delivery stop: arrange for the restart. */
void sockmi_restart_stopped(pid_t tid);
/* In the same stop, just before the thread is let go. */
void sockmi_restart_release(pid_t tid, const struct sockmi_restart *note);

#endif
