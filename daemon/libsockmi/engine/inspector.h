/* SPDX-License-Identifier: MIT */
/* A process that looks at sockets for the daemon, which never waits for the lock of one. */
#ifndef SOCKMI_ENGINE_INSPECTOR_H
#define SOCKMI_ENGINE_INSPECTOR_H

#include <stdint.h>

#include "engine.h"

/* One descriptor of some process; with @inode not 0: only if that is still what it is. */
struct sockmi_look {
	int32_t pid, fd;
	uint64_t inode;
};

/* What comes before @count looks (at most SOCKMI_LOOKS_MAX). */
struct sockmi_look_request {
	uint32_t count;
	uint32_t brief;		/* not 0: of each only what TCP_INFO says */
	uint32_t patience_ms;	/* for all of them together */
};

/* What comes before as many facts (inspect.h). Of what took too long, SOCKMI_LOCKED is one of the findings. */
struct sockmi_look_answer {
	uint32_t stuck;		/* calls that go on; not 0: this inspector ends as soon as they do, and takes no more requests */
};

#define SOCKMI_LOOKS_MAX 4096

/*
 * Start one, no child of this process, that serves requests on @control (one end of a SOCK_STREAM pair, and both stay
 * ours) until the other end is closed. It must be allowed to take descriptors of the processes concerned. Its pid, or -errno.
 */
SOCKMI_EXPORT int sockmi_inspector_start(int control);

#endif
