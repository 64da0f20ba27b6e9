// SPDX-License-Identifier: MIT
/* Lines and descriptors over the control socket (docs/control.md, "Transport"). */
#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

#define READ_BYTES 65536u
#define CONNECT_RETRY_NS 5000000

union control {
	struct cmsghdr header;	/* for its alignment */
	char bytes[CMSG_SPACE(DESCRIPTORS_MAX * sizeof(int))];
};

static int lost(void)
{
	return fail(ECONNRESET, "The SockMi daemon closed the connection; see its log.");
}

int connection_open(struct connection *connection, const char *control, long long deadline)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	const char *path = control ? control : secure_getenv("SOCKMI_CONTROL");

	memset(connection, 0, sizeof(*connection));
	connection->fd = -1;
	if (!path || !*path)
		path = SOCKMI_CONTROL_PATH;
	if (strlen(path) >= sizeof(address.sun_path))
		return fail(ENAMETOOLONG, "The path of the control socket is too long: %s", path);
	memcpy(address.sun_path, path, strlen(path) + 1);
	connection->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (connection->fd < 0)
		return fail(errno, "socket(AF_UNIX): %m");
	while (connect(connection->fd, (struct sockaddr *)&address, sizeof(address))) {
		const struct timespec pause = { .tv_nsec = CONNECT_RETRY_NS };

		if (errno == EINTR)
			continue;
		if (errno == EAGAIN && deadline_left(deadline)) {	/* its backlog is full */
			nanosleep(&pause, NULL);
			continue;
		}
		if (errno == EAGAIN)
			fail(ETIMEDOUT, "%s: the SockMi daemon accepts no connection.", path);
		else
			fail(errno, "%s: %m. Is the SockMi daemon running, and may you use it?", path);
		connection_close(connection);
		return -1;
	}
	return 0;
}

void connection_close(struct connection *connection)
{
	int saved = errno;

	close_all(connection->descriptors, connection->ndescriptors);
	if (connection->fd >= 0) /* a child by fork(2) may have it too, and keep it open */
		shutdown(connection->fd, SHUT_RDWR);
	errno = saved;
	close_all(&connection->fd, 1);
	free(connection->line);
	memset(connection, 0, sizeof(*connection));
	connection->fd = -1;
}

int connection_send(struct connection *connection, const json_t *message, const int *fds,
		    unsigned int nfds, long long deadline)
{
	char *text = json_dumps(message, JSON_COMPACT);
	union control control;
	size_t length, sent = 0;
	int result = -1;

	if (!text)
		return fail(ENOMEM, "No memory for a request.");
	length = strlen(text) + 1;	/* the final zero becomes the newline */
	text[length - 1] = '\n';
	if (length > LINE_MAX_BYTES) {
		fail(EMSGSIZE, "The request is longer than a line of the control socket may be.");
		goto out;
	}
	while (sent < length) {
		struct iovec iov = { .iov_base = text + sent, .iov_len = length - sent };
		struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
		ssize_t n;

		if (sent == 0 && nfds) {
			struct cmsghdr *rights;

			memset(&control, 0, sizeof(control));
			header.msg_control = &control;
			header.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
			rights = CMSG_FIRSTHDR(&header);
			rights->cmsg_level = SOL_SOCKET;
			rights->cmsg_type = SCM_RIGHTS;
			rights->cmsg_len = CMSG_LEN(nfds * sizeof(int));
			memcpy(CMSG_DATA(rights), fds, nfds * sizeof(int));
		}
		n = sendmsg(connection->fd, &header, MSG_NOSIGNAL | MSG_DONTWAIT);
		if (n >= 0) {
			sent += (size_t)n;
		} else if (errno == EAGAIN) {
			if (wait_for(connection->fd, POLLOUT, deadline))
				goto out;
		} else if (errno != EINTR) {
			if (errno == EPIPE || errno == ECONNRESET)
				lost();
			else
				fail(errno, "sendmsg to the SockMi daemon: %m");
			goto out;
		}
	}
	result = 0;
out:
	free(text);
	return result;
}

static int keep_descriptors(struct connection *connection, struct msghdr *header)
{
	struct cmsghdr *c;
	bool too_many = header->msg_flags & MSG_CTRUNC;

	for (c = CMSG_FIRSTHDR(header); c; c = CMSG_NXTHDR(header, c)) {
		size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (size_t i = 0; i < n; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
			if (connection->ndescriptors < 2 * DESCRIPTORS_MAX) {
				connection->descriptors[connection->ndescriptors++] = fd;
			} else {
				close(fd);
				too_many = true;
			}
		}
	}
	/* The kernel truncates too when this process may open no further descriptor. */
	return too_many ? fail(EMFILE, "Not all descriptors that the daemon sent could be received.") : 0;
}

static int receive_some(struct connection *connection, long long deadline)
{
	union control control;
	struct iovec iov;
	struct msghdr header = { .msg_iov = &iov, .msg_iovlen = 1 };
	ssize_t n;

	if (connection->size - connection->used < READ_BYTES) {
		size_t size = connection->size * 2 + READ_BYTES;
		char *line = realloc(connection->line, size);

		if (!line)
			return fail(ENOMEM, "No memory for the daemon's answer.");
		connection->line = line;
		connection->size = size;
	}
	do {
		if (wait_for(connection->fd, POLLIN, deadline))
			return -1;
		iov.iov_base = connection->line + connection->used;
		iov.iov_len = READ_BYTES;
		header.msg_control = &control;
		header.msg_controllen = sizeof(control);
		n = recvmsg(connection->fd, &header, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
	} while (n < 0 && (errno == EINTR || errno == EAGAIN));
	if (n < 0 && errno != ECONNRESET)
		return fail(errno, "recvmsg from the SockMi daemon: %m");
	if (n <= 0)
		return lost();
	connection->used += (size_t)n;
	return keep_descriptors(connection, &header);
}

/* The next line, an object; NULL on failure. */
json_t *connection_receive(struct connection *connection, long long deadline)
{
	size_t searched = 0;

	if (connection->taken) {
		connection->used -= connection->taken;
		memmove(connection->line, connection->line + connection->taken, connection->used);
		connection->taken = 0;
	}
	for (;;) {
		char *newline = connection->used == searched ? NULL :
				memchr(connection->line + searched, '\n', connection->used - searched);
		json_t *message;

		if (newline && newline - connection->line < (ptrdiff_t)LINE_MAX_BYTES) {
			size_t length = (size_t)(newline - connection->line);

			connection->taken = length + 1;
			message = json_loadb(connection->line, length, JSON_REJECT_DUPLICATES, NULL);
			if (json_is_object(message))
				return message;
			json_decref(message);
			fail(EPROTO, "The SockMi daemon's answer is no JSON object.");
			return NULL;
		}
		searched = connection->used;
		if (newline || searched >= LINE_MAX_BYTES) {
			fail(EPROTO, "The SockMi daemon's answer is longer than a line may be.");
			return NULL;
		}
		if (receive_some(connection, deadline))
			return NULL;
	}
}

/* The descriptors of the line just received, which must be nfds (at most DESCRIPTORS_MAX). */
int connection_take(struct connection *connection, const json_t *message, int *fds,
		    unsigned int nfds)
{
	json_int_t said = json_integer_value(json_object_get(message, "fds"));

	if (said != (json_int_t)nfds || connection->ndescriptors < nfds)
		return fail(EPROTO, "The SockMi daemon sent %u descriptors, said %lld, and needs %u.",
			    connection->ndescriptors, (long long)said, nfds);
	memcpy(fds, connection->descriptors, nfds * sizeof(int));
	connection->ndescriptors -= nfds;
	memmove(connection->descriptors, connection->descriptors + nfds,
		connection->ndescriptors * sizeof(int));
	return 0;
}
