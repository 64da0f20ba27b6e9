// SPDX-License-Identifier: MIT
/* See in_repair.h. The records are in memory that outlives us, if there is a place for them: a file that is mapped. */
#include "in_repair.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "engine_internal.h"

#define RECORDS 1024
#define FORMAT 0x32504952494d4b53 /* "SKMIRIP2" */
#define BOOT_ID "/proc/sys/kernel/random/boot_id"
/* For a thread that is being killed to leave its last system call: then what it can have done is done. */
#define GONE_TRIES 40000
#define GONE_PAUSE_NS 50000

struct table {
	uint64_t format;
	char boot[40];	/* inodes of another one are others' */
	struct sockmi_in_repair records[RECORDS];
};

static struct table own;
static struct table *table = &own;
static _Atomic unsigned int next;
static struct sockmi_in_repair unread;

struct sockmi_in_repair *sockmi_in_repair_begin(int fd, uint64_t inode, int reuse)
{
	unsigned int first = atomic_load_explicit(&next, memory_order_relaxed);

	for (unsigned int i = 0; i < RECORDS; i++) {
		unsigned int at = (first + i) % RECORDS;
		struct sockmi_in_repair *record = &table->records[at];
		int32_t expected = SOCKMI_IN_REPAIR_FREE;

		if (!atomic_compare_exchange_strong(&record->whose, &expected, SOCKMI_IN_REPAIR_BEGUN))
			continue;
		atomic_store_explicit(&next, i ? at : at + 1, memory_order_relaxed);
		record->fd = fd;
		record->inode = inode;
		record->reuse = reuse;
		record->peek_offset = -1;
		record->inlined = 0;
		atomic_store_explicit(&record->whose, (int32_t)gettid(), memory_order_release);
		return record;
	}
	return &unread;
}

static void put_back(int fd, const struct sockmi_in_repair *record)
{
	if (record->inlined)
		sockmi_set_int(fd, SOL_SOCKET, SO_OOBINLINE, 0);
	if (record->peek_offset >= 0)
		sockmi_set_int(fd, SOL_SOCKET, SO_PEEK_OFF, record->peek_offset);
	sockmi_repair(fd, TCP_REPAIR_OFF_NO_WP);
	if (record->reuse)
		sockmi_set_int(fd, SOL_SOCKET, SO_REUSEADDR, record->reuse);
	if (sockmi_state(fd) == SOCKMI_CLOSED)
		shutdown(fd, SHUT_WR); /* as release.c does at the end */
}

static bool is_gone(pid_t tid)
{
	char path[32], text[512];
	ssize_t length;
	const char *name_end;
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/stat", (int)tid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT || errno == ESRCH;
	length = read(fd, text, sizeof(text) - 1);
	close(fd);
	if (length <= 0)
		return length == 0 || errno == ESRCH;
	text[length] = 0;
	name_end = strrchr(text, ')');
	return name_end && (name_end[2] == 'Z' || name_end[2] == 'X');
}

void sockmi_in_repair_mend(void)
{
	const struct timespec pause = { .tv_nsec = GONE_PAUSE_NS };

	for (unsigned int at = 0; at < RECORDS; at++) {
		struct sockmi_in_repair *record = &table->records[at];
		int32_t whose;

		for (int tries = 0; (whose = atomic_load(&record->whose)) > 0; tries++) {
			if (!is_gone(whose) && tries < GONE_TRIES) {
				nanosleep(&pause, NULL);
				continue;
			}
			/* Looked at once more: a child that goes on for us may have done it at the end. */
			if (atomic_load(&record->whose) == whose) {
				put_back(record->fd, record);
				sockmi_in_repair_end(record);
			}
			break;
		}
	}
}

/* ---- from one daemon to the next ---- */

static void read_boot(char boot[static 40])
{
	int fd = open(BOOT_ID, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return;
	if (read(fd, boot, 36) < 0)
		boot[0] = 0;
	close(fd);
}

int sockmi_in_repair_keep(const char *path)
{
	char boot[40] = "";
	int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600), error, left = 0;
	struct table *kept = MAP_FAILED;

	if (fd < 0)
		return -errno;
	error = posix_fallocate(fd, 0, sizeof(*kept)); /* a store must never find the disk full */
	if (!error) {
		kept = mmap(NULL, sizeof(*kept), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
		error = kept == MAP_FAILED ? errno : 0;
	}
	close(fd);
	if (error)
		return -error;
	read_boot(boot);
	if (kept->format != FORMAT || memcmp(kept->boot, boot, sizeof(boot)))
		memset(kept, 0, sizeof(*kept));
	memcpy(kept->boot, boot, sizeof(boot));
	kept->format = FORMAT;
	for (unsigned int at = 0; at < RECORDS; at++) {
		int32_t whose = atomic_load(&kept->records[at].whose);

		whose = whose > 0 ? SOCKMI_IN_REPAIR_LEFT : whose;
		whose = whose == SOCKMI_IN_REPAIR_BEGUN ? SOCKMI_IN_REPAIR_FREE : whose;
		atomic_store(&kept->records[at].whose, whose);
		left += whose == SOCKMI_IN_REPAIR_LEFT;
	}
	table = kept;
	return left;
}

size_t sockmi_in_repair_left(uint64_t *inodes, size_t room)
{
	size_t count = 0;

	for (unsigned int at = 0; at < RECORDS && count < room; at++)
		if (atomic_load(&table->records[at].whose) == SOCKMI_IN_REPAIR_LEFT)
			inodes[count++] = table->records[at].inode;
	return count;
}

int sockmi_end_repair(int fd)
{
	struct stat status = { 0 };
	int on = 0;

	if (fstat(fd, &status) < 0)
		return 0;
	for (unsigned int at = 0; at < RECORDS; at++) {
		struct sockmi_in_repair *record = &table->records[at];

		if (atomic_load(&record->whose) == SOCKMI_IN_REPAIR_LEFT && record->inode == status.st_ino) {
			put_back(fd, record);
			sockmi_in_repair_end(record);
			return 1;
		}
	}
	if (sockmi_get_int(fd, IPPROTO_TCP, TCP_REPAIR, &on) < 0 || !on)
		return 0;
	sockmi_repair(fd, TCP_REPAIR_OFF_NO_WP);
	return 1;
}

void sockmi_in_repair_forget(void)
{
	for (unsigned int at = 0; at < RECORDS; at++) {
		int32_t expected = SOCKMI_IN_REPAIR_LEFT;

		atomic_compare_exchange_strong(&table->records[at].whose, &expected, SOCKMI_IN_REPAIR_FREE);
	}
}
