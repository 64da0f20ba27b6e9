/* SPDX-License-Identifier: MIT */
/*
 * Which originals are in repair, and what is to be put back afterwards: so that this can be done for whoever is killed
 * meanwhile, by the process that keeps the owners stopped (stop.c), or by the next daemon.
 */
#ifndef SOCKMI_ENGINE_IN_REPAIR_H
#define SOCKMI_ENGINE_IN_REPAIR_H

#include <stdatomic.h>
#include <stdint.h>

struct sockmi_in_repair {
	_Atomic int32_t whose;	/* the thread that has led it into repair, or one of those below */
	int32_t fd;
	uint64_t inode;
	int32_t reuse;		/* SO_REUSEADDR, which repair takes away */
	int32_t peek_offset;	/* SO_PEEK_OFF, if it has been changed, else -1 */
	int32_t inlined;	/* SO_OOBINLINE has been set */
	int32_t reserved;
};
#define SOCKMI_IN_REPAIR_FREE 0
#define SOCKMI_IN_REPAIR_LEFT (-1)  /* by an earlier daemon */
#define SOCKMI_IN_REPAIR_BEGUN (-2) /* is being written: the socket is not in repair yet */

/* Before the socket is led into repair. Never NULL: with no room for one more, one that nobody reads. */
struct sockmi_in_repair *sockmi_in_repair_begin(int fd, uint64_t inode, int reuse);

/* All has been put back. */
static inline void sockmi_in_repair_end(struct sockmi_in_repair *record)
{
	atomic_store_explicit(&record->whose, SOCKMI_IN_REPAIR_FREE, memory_order_release);
}

/* Put everything back, by a process with the memory and the descriptors of one that has ended. May be called by a signal's handler. */
void sockmi_in_repair_mend(void);

#endif
