// SPDX-License-Identifier: MIT
/* Serves the sysctl sockmi.export. kmod/uapi/sockmi.h is the specification of all that is asked for here. */
#include <fcntl.h>
#include <unistd.h>

#include "../../../kmod/uapi/sockmi.h"
#include "engine_internal.h"
#include "serve.h"

#define ABI_MINOR_NEEDED 2 /* says which descriptor it is */
#define EVENTS_AT_ONCE 16

static int greet(int fd)
{
	struct sockmi_ioc_hello hello = { .abi_major = SOCKMI_DEV_ABI_MAJOR, .abi_minor = SOCKMI_DEV_ABI_MINOR };

	if (ioctl(fd, SOCKMI_IOC_HELLO, &hello) < 0)
		return -errno;
	return hello.abi_minor < ABI_MINOR_NEEDED || !(hello.features & SOCKMI_FEATURE_SYSCTL) ? -EPROTONOSUPPORT : 0;
}

int sockmi_serve_open(void)
{
	struct sockmi_ioc_serve serve = { 0 };
	int fd = open(SOCKMI_DEV_PATH, O_RDWR | O_CLOEXEC | O_NONBLOCK);
	int error;

	if (fd < 0)
		return -errno;
	error = greet(fd);
	if (!error && ioctl(fd, SOCKMI_IOC_SERVE, &serve) < 0)
		error = -errno;
	if (error) {
		close(fd);
		return error;
	}
	return fd;
}

int sockmi_serve_read(int fd, struct sockmi_export_request *requests, size_t n)
{
	struct sockmi_event events[EVENTS_AT_ONCE];
	ssize_t bytes = read(fd, events, (n < EVENTS_AT_ONCE ? n : EVENTS_AT_ONCE) * sizeof(*events));
	int count = 0;

	if (bytes < 0)
		return errno == EAGAIN ? 0 : -errno;
	for (size_t i = 0; i < (size_t)bytes / sizeof(*events); i++) {
		const struct sockmi_event *event = &events[i];

		if (event->type != SOCKMI_EVENT_EXPORT_REQUEST)
			continue;
		requests[count] = (struct sockmi_export_request){
			.id = event->id,
			.inode = event->inode,
			.owner_pid = event->owner_pid,
			.owner_fd = event->owner_fd,
			.writer_pid = event->pid,
			.writer_uid = event->uid,
			.wait_ms = event->wait_ms,
			.lost = event->lost,
		};
		memcpy(requests[count++].to, event->to.address, sizeof(event->to.address));
	}
	return count;
}

int sockmi_serve_take(int fd, uint64_t id)
{
	struct sockmi_ioc_decision decision = { .id = id };

	return ioctl(fd, SOCKMI_IOC_RELEASE, &decision) < 0 ? -errno : 0;
}

int sockmi_serve_answer(int fd, uint64_t id, uint32_t error, const char *text)
{
	struct sockmi_ioc_answer answer = { .id = id, .error = error };

	strncpy(answer.text, text, sizeof(answer.text) - 1);
	return ioctl(fd, SOCKMI_IOC_ANSWER, &answer) < 0 ? -errno : 0;
}
