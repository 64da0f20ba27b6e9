// SPDX-License-Identifier: MIT
/*
 * export_socket(): docs/control.md, "export". For a socket of another process the caller makes
 * the duplicate itself, so that the kernel checks whether the caller may ptrace the owner.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "client.h"

#ifndef IPPROTO_MPTCP
#define IPPROTO_MPTCP 262
#endif
#define RECONNECT_MS 10000	/* how long to ask for an outcome, of a daemon that restarts or is slow */
#define RECONNECT_PAUSE_NS 50000000

/* What is to be moved: pid's fd, or, if listed is not NULL, what waits in an import list as this migration. */
struct subject {
	int pid;
	int fd;
	const unsigned char *listed;
};

static int check_subject(const struct subject *subject, const struct sockmi_export_options *options)
{
	if (subject->listed) {
		if (options->context_bytes)
			return fail(EINVAL, "What waits in an import list keeps its context; give none.");
		return 0;
	}
	if (subject->pid == 0)
		return fail(EINVAL, "pid 0: give a process's id, or a negative one for the caller.");
	if (subject->fd < 0)
		return fail(EBADF, "fd %d is not a descriptor.", subject->fd);
	return 0;
}

static int check(int af, const void *to, const struct sockmi_export_options *options)
{
	if (to && af != AF_INET && af != AF_INET6)
		return fail(EAFNOSUPPORT, "af is %d: use AF_INET or AF_INET6, or no target.", af);
	if (to && options->host)
		return fail(EINVAL, "Both an address and options.host name the target; give one.");
	if (options->host && (!*options->host || strlen(options->host) > 255))
		return fail(EINVAL, "options.host must have 1 to 255 bytes.");
	if (options->timeout < 0)
		return fail(EINVAL, "options.timeout is %d: give milliseconds, 0 for the daemon's.",
			    options->timeout);
	if (options->flags & ~SOCKMI_DRY_RUN)
		return fail(EINVAL, "options.flags %#x has unknown bits.", options->flags);
	if (options->context_bytes > SOCKMI_CONTEXT_MAX)
		return fail(EMSGSIZE, "The context has %zu bytes; at most %u travel with a socket.",
			    options->context_bytes, SOCKMI_CONTEXT_MAX);
	if (options->context_bytes && !options->context)
		return fail(EINVAL, "options.context is NULL, its length is not 0.");
	return 0;
}

static int check_socket(int pid, int fd, int descriptor)
{
	int protocol;
	socklen_t length = sizeof(protocol);

	if (getsockopt(descriptor, SOL_SOCKET, SO_PROTOCOL, &protocol, &length))
		return fail(errno, "Descriptor %d of process %d: %m", fd, pid);
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_MPTCP) /* the daemon refuses that, in its words */
		return fail(EPROTOTYPE, "Descriptor %d of process %d is not a TCP socket.", fd, pid);
	return 0;
}

/* A duplicate of pid's fd in this process, or -1. */
static int duplicate(int pid, int fd)
{
	int pidfd = (int)syscall(SYS_pidfd_open, pid, 0);
	int copy;

	if (pidfd < 0)
		return fail(errno, "Process %d: %m", pid);
	copy = (int)syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	if (copy < 0)
		fail(errno, errno == EPERM ? "Descriptor %d of process %d: you may not trace that process." :
		     "Descriptor %d of process %d cannot be duplicated: %m", fd, pid);
	close_all(&pidfd, 1);
	return copy;
}

static int duplicate_own(int fd)
{
	int copy = fcntl(fd, F_DUPFD_CLOEXEC, 0);

	return copy < 0 ? fail(errno, "Descriptor %d: %m", fd) : copy;
}

static json_t *target(int af, const void *to, const char *host)
{
	char text[INET6_ADDRSTRLEN];

	if (host)
		return json_string(host);
	if (!to)
		return json_null();
	return json_string(inet_ntop(af, to, text, sizeof(text)));
}

static json_t *item(const struct subject *subject, const struct sockmi_export_options *options)
{
	if (subject->listed)
		return json_pack("{s:o,s:o}", "listed", id_text(subject->listed), "migration_id",
				 id_text(options->migration));
	return json_pack("{s:i,s:i,s:b,s:b,s:o}", "pid", subject->pid, "fd", subject->fd, "descriptor", 1,
			 "context", options->context_bytes > 0, "migration_id",
			 id_text(options->migration));
}

static json_t *request(const struct subject *subject, unsigned int nfds, int af, const void *to,
		       const struct sockmi_export_options *options)
{
	return json_pack("{s:s,s:i,s:[o],s:o,s:o,s:b}", "op", "export", "fds", (int)nfds, "sockets",
			 item(subject, options),
			 "to", target(af, to, options->host), "timeout_s",
			 options->timeout ? json_real(options->timeout / 1000.0) : json_null(), "dry_run",
			 (options->flags & SOCKMI_DRY_RUN) != 0);
}

static void copy_text(char *to, size_t size, const json_t *text)
{
	snprintf(to, size, "%s", json_string_value(text) ? json_string_value(text) : "");
}

static uint64_t number(const json_t *record, const char *name)
{
	json_int_t value = json_integer_value(json_object_get(record, name));

	return value < 0 ? 0 : (uint64_t)value;
}

static int conclude(const json_t *record, struct sockmi_result *result)
{
	const json_t *why = json_object_get(record, "refusal");
	const char *outcome = json_string_value(json_object_get(record, "outcome"));
	const char *code = json_string_value(json_object_get(why, "code"));
	const char *message = json_string_value(json_object_get(why, "message"));

	copy_text(result->host, sizeof(result->host), json_object_get(record, "to"));
	copy_text(result->mode, sizeof(result->mode), json_object_get(record, "mode"));
	result->blackout_us = number(record, "blackout_us");
	result->receive_queue_bytes = number(record, "receive_queue_bytes");
	result->sent_bytes = number(record, "sent_bytes");
	result->unsent_bytes = number(record, "unsent_bytes");
	result->hop = (unsigned int)number(record, "hop");
	if (outcome && (!strcmp(outcome, "moved") || !strcmp(outcome, "planned")))
		return 0;
	if (!outcome)
		return fail(ECONNRESET, "The migration is still under way.");
	if (!code || !message)
		return fail(EPROTO, "The SockMi daemon's record has neither a good outcome nor a refusal.");
	return fail_code(code, message);
}

/* 0 or -1: concluded from the answer's record. 1: there is none of this migration. */
static int read_answer(const json_t *answer, const unsigned char id[16], struct sockmi_result *result)
{
	const json_t *error = json_object_get(answer, "error");
	const char *code = json_string_value(json_object_get(error, "code"));
	const char *message = json_string_value(json_object_get(error, "message"));
	const json_t *record;
	size_t i;

	if (!json_is_true(json_object_get(answer, "ok"))) {
		if (!code || !message)
			return fail(EPROTO, "The SockMi daemon's answer has neither ok nor an error.");
		return fail_code(code, message);
	}
	json_array_foreach(json_object_get(answer, "migrations"), i, record) {
		unsigned char found[16];

		if (!id_parse(json_object_get(record, "migration_id"), found) && !memcmp(found, id, 16))
			return conclude(record, result);
	}
	return 1;
}

/* One request, one answer (which may come in several lines); as read_answer(). */
static int converse(struct connection *connection, const json_t *message, const int *fds,
		    unsigned int nfds, long long deadline, const unsigned char id[16],
		    struct sockmi_result *result)
{
	int done = connection_send(connection, message, fds, nfds, deadline);
	bool more = true;

	/* Else the daemon would find us among the socket's owners. */
	if (nfds)
		close_all(fds, nfds);
	if (done)
		return -1;
	for (done = 1; more && done == 1;) {
		json_t *answer = connection_receive(connection, deadline);

		if (!answer)
			return -1;
		more = json_is_true(json_object_get(answer, "more"));
		done = read_answer(answer, id, result);
		json_decref(answer);
	}
	return done;
}

/*
 * The daemon went away (why: ECONNRESET) or did not answer in time (ETIMEDOUT), and our connection is closed,
 * which cancels what is not committed: ask it, or the one that comes after it, what became of the migration.
 */
static int ask(const struct sockmi_export_options *options, int why, struct sockmi_result *result)
{
	const struct timespec pause = { .tv_nsec = RECONNECT_PAUSE_NS };
	long long deadline = deadline_after(RECONNECT_MS);

	while (deadline_left(deadline)) {
		struct connection connection;
		json_t *message;
		int done = -1;

		errno = 0;
		if (!connection_open(&connection, options->control, deadline)) {
			message = json_pack("{s:s,s:[o],s:f}", "op", "info", "migration_ids",
					    id_text(options->migration), "wait_s",
					    deadline_left(deadline) / 1000.0);
			done = message ? converse(&connection, message, NULL, 0, deadline,
						  options->migration, result) : fail(ENOMEM, "No memory.");
			json_decref(message);
		}
		connection_close(&connection);
		if (done == 1)
			return fail(why, why == ETIMEDOUT ?
				    "The SockMi daemon has not begun in time; the socket is as it was." :
				    "The SockMi daemon went away before it began; the socket is as it was.");
		if (done == 0 || sockmi_last_error()->code[0])
			return done;
		if (errno != ECONNRESET && errno != ECONNREFUSED && errno != ENOENT && errno != ETIMEDOUT)
			return -1;
		nanosleep(&pause, NULL);
	}
	return fail(ECONNRESET, "The SockMi daemon %s; whether the socket has moved is not known. "
		    "Ask `sockmi history` when it answers again.",
		    why == ETIMEDOUT ? "does not answer" : "went away and does not come back");
}

/* What goes with the request: the socket and its context, into fds. */
static int descriptors(const struct subject *subject, const struct sockmi_export_options *options, int fds[2])
{
	fds[0] = subject->pid == getpid() ? duplicate_own(subject->fd) : duplicate(subject->pid, subject->fd);
	if (fds[0] < 0 || check_socket(subject->pid, subject->fd, fds[0]))
		return -1;
	if (options->context_bytes)
		fds[1] = context_seal(options->context, options->context_bytes);
	return options->context_bytes && fds[1] < 0 ? -1 : 0;
}

static int run(const struct subject *subject, int af, const void *to,
	       const struct sockmi_export_options *options, struct sockmi_result *result)
{
	long long deadline = options->timeout ? deadline_after(options->timeout) : -1;
	struct connection connection;
	json_t *message;
	int fds[2] = { -1, -1 };
	unsigned int nfds;
	int done;

	if (deadline >= 0)
		deadline += GRACE_MS;
	/* Connect first: descriptors are duplicated as shortly as can be. */
	if (connection_open(&connection, options->control, deadline))
		return -1;
	if (!subject->listed && descriptors(subject, options, fds))
		goto failed;
	nfds = (fds[0] >= 0 ? 1U : 0U) + (fds[1] >= 0 ? 1U : 0U);
	message = request(subject, nfds, af, to, options);
	if (!message) {
		fail(ENOMEM, "No memory for a request.");
		goto failed;
	}
	done = converse(&connection, message, fds, nfds, deadline, options->migration, result);
	json_decref(message);
	connection_close(&connection);
	if (done == 1)
		return fail(EPROTO, "The SockMi daemon's answer has no record of the migration.");
	if (done == 0 || sockmi_last_error()->code[0])
		return done;
	if (errno == ECONNRESET || (errno == ETIMEDOUT && !(options->flags & SOCKMI_DRY_RUN)))
		return ask(options, errno, result);
	return -1;
failed:
	close_all(fds, 2);
	connection_close(&connection);
	return -1;
}

static int export_subject(const struct subject *subject, int af, const void *to,
			  const struct sockmi_export_options *given, struct sockmi_result *wanted)
{
	struct sockmi_export_options options;
	struct sockmi_result result = { .size = sizeof(result) };
	int saved = errno;
	int done;

	if (wanted && wanted->size < sizeof(wanted->size))
		return fail(EINVAL, "result.size is %zu: set it to sizeof(the struct).", wanted->size);
	if (options_copy(&options, sizeof(options), given, "options") || check_subject(subject, &options) ||
	    check(af, to, &options))
		return -1;
	if (id_is_zero(options.migration))
		id_new(options.migration);
	memcpy(result.migration, options.migration, sizeof(result.migration));
	done = run(subject, af, to, &options, &result);
	if (wanted) {
		size_t size = wanted->size < sizeof(result) ? wanted->size : sizeof(result);

		result.size = wanted->size;
		memcpy(wanted, &result, size);
	}
	if (done == 0) {
		no_error();
		errno = saved;
	}
	return done;
}

int export_socket_ex(int pid, int fd, int af, const void *to,
		     const struct sockmi_export_options *options, struct sockmi_result *result)
{
	const struct subject subject = { .pid = pid < 0 ? getpid() : pid, .fd = fd };

	return export_subject(&subject, af, to, options, result);
}

int export_listed(const unsigned char listed[16], int af, const void *to,
		  const struct sockmi_export_options *options, struct sockmi_result *result)
{
	const struct subject subject = { .listed = listed };

	if (!listed)
		return fail(EINVAL, "listed is NULL: give the id of a migration.");
	return export_subject(&subject, af, to, options, result);
}

int export_socket(int pid, int fd, int af, const void *to)
{
	return export_socket_ex(pid, fd, af, to, NULL, NULL);
}
