/* SPDX-License-Identifier: MIT */
/* Processes of their own, for what must not happen in the daemon's. */
#ifndef SOCKMI_ENGINE_PROCESS_H
#define SOCKMI_ENGINE_PROCESS_H

#define SOCKMI_FIRST_GIVEN 3
#define SOCKMI_MOST_GIVEN 4

/*
 * A process that does @run, which does not return, and is no child of this one, where nobody waits for its end.
 * It has the @count descriptors @given, from number SOCKMI_FIRST_GIVEN on, and nothing else of ours is open
 * in it. They stay ours. Its pid, or -errno.
 */
int sockmi_process_start(const int *given, int count, const char *name, void (*run)(void));

/* For @run, if it calls sockmi_close(), which ends a wait by a signal: in a new process signals are as usual. */
void sockmi_hear_wake_signal(void);

#endif
