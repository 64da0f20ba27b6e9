/* SPDX-License-Identifier: MIT */
/*
 * Threads of other processes, stopped by ptrace(2) and let go again.
 *
 * A tracee belongs to the thread that seized it: all but sockmi_tracees_stopped() and sockmi_tracees_strays() is for the
 * tracing process (stop.c) alone. A stray is a thread that could not be let go when we wanted to: it was on its way into a stop.
 */
#ifndef SOCKMI_ENGINE_TRACEES_H
#define SOCKMI_ENGINE_TRACEES_H

#include <stddef.h>
#include <sys/types.h>

#include "stop.h"

/* As sockmi_stop(); @self is not stopped, but told as such. */
void sockmi_tracees_stop(const pid_t *pids, size_t n, unsigned int timeout_us, pid_t self,
			 struct sockmi_stop_result *results);

/* As sockmi_resume(). */
void sockmi_tracees_resume(const pid_t *pids, size_t n);

/* One look at each stray; never blocks. */
void sockmi_tracees_let_strays_go(void);

/* Let every stopped thread run. No lock, no memory: for a handler of signals. */
void sockmi_tracees_let_all_go(void);

/* In a child by fork(2): its parent's tracees are none of its own. */
void sockmi_tracees_forget(void);

/* Stopped threads in our hands. */
size_t sockmi_tracees_stopped(void);

/* Strays in our hands. */
size_t sockmi_tracees_strays(void);

#endif
