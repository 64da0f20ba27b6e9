/* SPDX-License-Identifier: MIT */
/* Writes to the sysctl sockmi.export, as the module hands them to this network namespace's daemon. */
#ifndef SOCKMI_SERVE_H
#define SOCKMI_SERVE_H

#include "engine.h"

/* One write, and the socket that it names. */
struct sockmi_export_request {
	uint64_t id;
	uint64_t inode;	     /* of the socket: what owner_fd is by now may be another one */
	int32_t owner_pid;   /* 0: not in our pid namespace */
	int32_t owner_fd;
	int32_t writer_pid;
	uint32_t writer_uid;
	uint32_t wait_ms;    /* how long the writer waits, from when it wrote */
	uint32_t lost;	     /* events that the module has dropped since the last one */
	uint8_t to[16];	     /* the wanted host, IPv4 as ::ffff:a.b.c.d; all zero: any */
};

/*
 * A device file (close(2) ends the service) whose requests sockmi_serve_read() reads, or -errno. EBUSY: another daemon
 * serves here. EPROTONOSUPPORT: the module is of another release.
 */
SOCKMI_EXPORT int sockmi_serve_open(void);

/* Up to @n requests that wait: how many, or -errno. The file is for poll(2). */
SOCKMI_EXPORT int sockmi_serve_read(int fd, struct sockmi_export_request *requests, size_t n);

/* From now on it is ours: 0; or -ENOENT: the writer has withdrawn it. Nothing may be moved before. */
SOCKMI_EXPORT int sockmi_serve_take(int fd, uint64_t id);

/* What came of it: @error (0 or an errno) for the writer, @text, cut to fit, for readers. 0 or -errno. */
SOCKMI_EXPORT int sockmi_serve_answer(int fd, uint64_t id, uint32_t error, const char *text);

#endif
