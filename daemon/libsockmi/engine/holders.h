/* SPDX-License-Identifier: MIT */
/* Which processes hold which sockets: a scan of /proc/PID/fd. */
#ifndef SOCKMI_ENGINE_HOLDERS_H
#define SOCKMI_ENGINE_HOLDERS_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* One descriptor of a socket. @fd is -1 if an io_uring of @pid holds the socket as a registered file. */
struct sockmi_holder {
	uint64_t inode;		/* of sockfs */
	int32_t pid;
	int32_t fd;
};

/*
 * Find the descriptors of the @n_inodes sockets in @inodes (sorted; 0: of all sockets) in the
 * @n_pids processes of @pids (0: in all; ids of
 * threads are passed over), the process @except left out. Writes at most @room
 * holders. Returns how many there are (more than @room: call again with more), or -errno.
 *
 * The pids of those among the holders that have an io_uring go to @rings, at most @rings_room,
 * their number to @n_rings: operations that such a process has under way do not stop with it.
 */
ssize_t sockmi_find_holders(const uint64_t *inodes, size_t n_inodes, const pid_t *pids, size_t n_pids,
			    pid_t except, struct sockmi_holder *holders, size_t room,
			    pid_t *rings, size_t rings_room, size_t *n_rings);

#endif
