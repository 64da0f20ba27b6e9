/* SPDX-License-Identifier: MIT */
#include "holders.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

#include "stop.h"

#define API __attribute__((visibility("default")))
#define NAMES_BYTES 32768

struct scan {
	const uint64_t *inodes;
	size_t n_inodes;
	pid_t except, tracer; /* the second has the first's descriptors */
	struct sockmi_holder *holders;
	size_t room, found;
	pid_t *rings;
	size_t rings_room, n_rings;
	int proc;
};

static bool wanted(const struct scan *s, uint64_t inode)
{
	size_t low = 0, high = s->n_inodes;

	if (!s->n_inodes)
		return true;
	while (low < high) {
		size_t middle = low + (high - low) / 2;

		if (s->inodes[middle] == inode)
			return true;
		if (s->inodes[middle] < inode)
			low = middle + 1;
		else
			high = middle;
	}
	return false;
}

static bool note(struct scan *s, uint64_t inode, pid_t pid, int fd)
{
	if (!wanted(s, inode))
		return false;
	if (s->found < s->room)
		s->holders[s->found] = (struct sockmi_holder){ .inode = inode, .pid = pid, .fd = fd };
	s->found++;
	return true;
}

/* Sockets that a ring holds as registered files: "    0: socket:[123]" lines of its fdinfo. */
static bool scan_ring(struct scan *s, pid_t pid, const char *task, int fd)
{
	char path[96], line[512];
	bool found = false;

	snprintf(path, sizeof(path), "%s/fdinfo/%d", task, fd);
	int info = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
	FILE *file = info < 0 ? NULL : fdopen(info, "re");

	if (!file) {
		if (info >= 0)
			close(info);
		return false;
	}
	while (fgets(line, sizeof(line), file)) {
		const char *at = strstr(line, "socket:[");

		if (at)
			found |= note(s, strtoull(at + 8, NULL, 10), pid, -1);
	}
	fclose(file);
	return found;
}

/* A ring may live on as a mapping, without a descriptor (IORING_REGISTER_RING_FDS). */
static bool ring_mapped(const struct scan *s, const char *task)
{
	char path[64], line[1024];
	bool found = false;

	snprintf(path, sizeof(path), "%s/maps", task);
	int maps = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
	FILE *file = maps < 0 ? NULL : fdopen(maps, "re");

	if (!file) {
		if (maps >= 0)
			close(maps);
		return false;
	}
	while (!found && fgets(line, sizeof(line), file))
		found = strstr(line, "anon_inode:[io_uring]");
	fclose(file);
	return found;
}

/* One descriptor table. Returns the number of its descriptors, or -1. */
static long scan_table(struct scan *s, pid_t pid, const char *task)
{
	static __thread _Alignas(struct dirent64) char names[NAMES_BYTES];
	bool holder = false, ring = false;
	char path[64], target[64];
	long count = 0;

	snprintf(path, sizeof(path), "%s/fd", task);
	int dir = openat(s->proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);

	if (dir < 0)
		return -1;
	for (;;) {
		ssize_t length = getdents64(dir, names, sizeof(names));

		if (length <= 0)
			break;
		for (ssize_t at = 0; at < length;) {
			const struct dirent64 *entry = (const struct dirent64 *)(names + at);

			at += entry->d_reclen;
			if (entry->d_name[0] == '.')
				continue;
			count++;
			ssize_t size = readlinkat(dir, entry->d_name, target, sizeof(target) - 1);

			if (size <= 0)
				continue;
			target[size] = 0;
			if (!strncmp(target, "socket:[", 8)) {
				holder |= note(s, strtoull(target + 8, NULL, 10), pid, atoi(entry->d_name));
			} else if (!strcmp(target, "anon_inode:[io_uring]")) {
				ring = true;
				holder |= scan_ring(s, pid, task, atoi(entry->d_name));
			}
		}
	}
	close(dir);
	if (holder && s->rings && (ring || ring_mapped(s, task))) {
		if (s->n_rings < s->rings_room)
			s->rings[s->n_rings] = pid;
		s->n_rings++;
	}
	return count;
}

static void scan_process(struct scan *s, pid_t pid)
{
	char task[48];

	if (pid == s->except || pid == s->tracer)
		return;
	snprintf(task, sizeof(task), "%d", pid);
	if (scan_table(s, pid, task))
		return;
	/* Nothing: a kernel thread, or a main thread that has ended while others live. */
	snprintf(task, sizeof(task), "%d/task", pid);
	int fd = openat(s->proc, task, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *dir = fd < 0 ? NULL : fdopendir(fd);

	if (!dir) {
		if (fd >= 0)
			close(fd);
		return;
	}
	for (const struct dirent *entry; (entry = readdir(dir));) {
		pid_t tid = atoi(entry->d_name);

		if (tid <= 0 || tid == pid)
			continue;
		snprintf(task, sizeof(task), "%d/task/%d", pid, tid);
		if (scan_table(s, pid, task) > 0)
			break;
	}
	closedir(dir);
}

/* /proc answers to the ids of threads too; a pidfd is given for a process only (kernel/pid.c). */
static bool is_process(pid_t pid)
{
	int fd = (int)syscall(SYS_pidfd_open, pid, 0);

	if (fd >= 0)
		close(fd);
	return fd >= 0 || errno == ENOSYS || errno == EMFILE || errno == ENFILE;
}

API ssize_t sockmi_find_holders(const uint64_t *inodes, size_t n_inodes, const pid_t *pids, size_t n_pids,
				pid_t except, struct sockmi_holder *holders, size_t room,
				pid_t *rings, size_t rings_room, size_t *n_rings)
{
	struct scan s = { .inodes = inodes, .n_inodes = n_inodes, .except = except, .tracer = sockmi_stop_tracer(),
			  .holders = holders,
			  .room = room, .rings = rings, .rings_room = rings_room };

	s.proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (s.proc < 0)
		return -errno;
	if (n_pids) {
		for (size_t i = 0; i < n_pids; i++)
			if (is_process(pids[i]))
				scan_process(&s, pids[i]);
		close(s.proc);
	} else {
		DIR *dir = fdopendir(s.proc);

		if (!dir) {
			close(s.proc);
			return -ENOMEM;
		}
		for (const struct dirent *entry; (entry = readdir(dir));)
			if (entry->d_name[0] >= '1' && entry->d_name[0] <= '9')
				scan_process(&s, atoi(entry->d_name));
		closedir(dir);
	}
	if (n_rings)
		*n_rings = s.n_rings;
	return (ssize_t)s.found;
}
