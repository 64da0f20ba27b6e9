// SPDX-License-Identifier: MIT
/*
 * import_socket(): docs/control.md, "import". The caller's descriptors are touched last, once
 * the sockets that replace them are live; until then any failure leaves them as they were.
 */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client.h"

/* A request that has been sent: which one, and what its descriptor referred to then. */
struct place {
	unsigned int index;
	ino_t inode;
};

/* A socket on its way to the caller. */
struct arrival {
	struct import_req *irq;
	struct place place;		/* of irq */
	int fd;				/* our copy, dormant at first */
	int context_fd;			/* or -1 */
	bool live;
	unsigned int state;
	struct sockmi_endpoint local, remote, origin;
	unsigned char migration[16], listener[16];
	struct sockmi_context context;
};

static int compare(const void *a, const void *b)
{
	int x = *(const int *)a, y = *(const int *)b;

	return (x > y) - (x < y);
}

static int check_endpoint(unsigned int i, const char *name, const struct sockmi_endpoint *endpoint)
{
	if (endpoint->af && endpoint->af != AF_INET && endpoint->af != AF_INET6)
		return fail(EAFNOSUPPORT, "irqs[%u].%s.af is %d: use 0, AF_INET or AF_INET6.", i, name,
			    endpoint->af);
	if (endpoint->port > 65535)
		return fail(EINVAL, "irqs[%u].%s.port is %u (ports are in host byte order).", i, name,
			    endpoint->port);
	return 0;
}

static int check_socket(unsigned int i, int fd, rlim_t limit)
{
	struct tcp_info info;
	socklen_t length = sizeof(int);
	int protocol;

	if (getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &length))
		return fail(errno, "irqs[%u].fd %d: %m", i, fd);
	length = sizeof(info);
	if (protocol != IPPROTO_TCP || getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length))
		return fail(EPROTOTYPE, "irqs[%u].fd %d is not a TCP socket.", i, fd);
	if (info.tcpi_state != TCP_CLOSE)
		return fail(EISCONN, "irqs[%u].fd %d is connected or listening; give a new socket.", i, fd);
	if ((rlim_t)fd >= limit)
		return fail(EMFILE, "irqs[%u].fd %d is beyond RLIMIT_NOFILE.", i, fd);
	return 0;
}

static int check(const struct import_req *irqs, unsigned int nirqs)
{
	static const unsigned char zero[sizeof(irqs->reserved)];
	struct rlimit limit;
	int *fds;
	unsigned int n = 0;
	bool twice = false;

	if (!irqs || nirqs == 0 || nirqs > SOCKMI_REQUESTS_MAX)
		return fail(EINVAL, "%u import requests at %p: give 1 to %u.", nirqs, (const void *)irqs,
			    SOCKMI_REQUESTS_MAX);
	if (getrlimit(RLIMIT_NOFILE, &limit))
		return fail(errno, "getrlimit: %m");
	fds = malloc(nirqs * sizeof(*fds));
	if (!fds)
		return fail(ENOMEM, "No memory for %u import requests.", nirqs);
	for (unsigned int i = 0; i < nirqs; i++) {
		const struct import_req *irq = &irqs[i];

		if (irq->fd < 0)
			continue;
		fds[n++] = irq->fd;
		if (!irq->states || irq->states & ~SOCKMI_ANY_STATE)
			fail(EINVAL, "irqs[%u].states is %#x: give a mask of SOCKMI_BOUND, SOCKMI_LISTENING "
			     "and SOCKMI_CONNECTED.", i, irq->states);
		else if (irq->preferred & ~irq->states)
			fail(EINVAL, "irqs[%u].preferred %#x is no subset of states %#x.", i, irq->preferred,
			     irq->states);
		else if ((irq->remote.af || irq->remote.port) && !(irq->states & SOCKMI_CONNECTED))
			fail(EINVAL, "irqs[%u].remote: only connected sockets have a remote end.", i);
		else if (memcmp(irq->reserved, zero, sizeof(zero)))
			fail(EINVAL, "irqs[%u].reserved is not zero: start from SOCKMI_IMPORT().", i);
		else if (!check_endpoint(i, "local", &irq->local) &&
			 !check_endpoint(i, "remote", &irq->remote) &&
			 !check_socket(i, irq->fd, limit.rlim_cur))
			continue;
		free(fds);
		return -1;
	}
	qsort(fds, n, sizeof(*fds), compare);
	for (unsigned int i = 1; i < n; i++)
		twice |= fds[i] == fds[i - 1];
	free(fds);
	if (twice)
		return fail(EINVAL, "Two import requests name the same descriptor.");
	return n ? 0 : fail(EINVAL, "No import request has a descriptor.");
}

/* What is any is left out: SOCKMI_REQUESTS_MAX of them shall fit into a line. */
static int put(json_t *object, const char *name, json_t *value)
{
	if (json_is_null(value))
		return 0;
	return json_object_set_new(object, name, value);
}

static json_t *port_or_null(unsigned int port)
{
	return port ? json_integer((json_int_t)port) : json_null();
}

static json_t *criteria(const struct import_req *irq)
{
	json_t *object = json_object();

	if (put(object, "states", states_list(irq->states)) ||
	    put(object, "preferred", irq->preferred ? states_list(irq->preferred) : json_null()) ||
	    put(object, "local_address", endpoint_address(&irq->local)) ||
	    put(object, "local_port", port_or_null(irq->local.port)) ||
	    put(object, "remote_address", endpoint_address(&irq->remote)) ||
	    put(object, "remote_port", port_or_null(irq->remote.port)) ||
	    put(object, "listener", id_is_zero(irq->listener) ? json_null() : id_text(irq->listener))) {
		json_decref(object);
		return NULL;
	}
	return object;
}

/* places[n] becomes the place in irqs of the n-th request sent. */
static json_t *request(const struct import_req *irqs, unsigned int nirqs, int timeout, struct place *places)
{
	json_t *list = json_array();
	unsigned int n = 0;

	for (unsigned int i = 0; i < nirqs; i++) {
		struct stat stat = { 0 };

		if (irqs[i].fd < 0)
			continue;
		fstat(irqs[i].fd, &stat);
		places[n++] = (struct place){ .index = i, .inode = stat.st_ino };
		if (json_array_append_new(list, criteria(&irqs[i]))) {
			json_decref(list);
			return NULL;
		}
	}
	return json_pack("{s:s,s:o,s:i}", "op", "import", "requests", list, "timeout_ms",
			 timeout < 0 ? -1 : timeout);
}

static int refused(const json_t *answer)
{
	const json_t *error = json_object_get(answer, "error");
	const char *code = json_string_value(json_object_get(error, "code"));
	const char *message = json_string_value(json_object_get(error, "message"));

	if (json_is_true(json_object_get(answer, "ok")))
		return 0;
	if (!code || !message)
		return fail(EPROTO, "The SockMi daemon's answer has neither ok nor an error.");
	return fail_code(code, message);
}

static int read_item(const json_t *item, struct arrival *arrival)
{
	const json_t *record = json_object_get(item, "record");

	arrival->state = state_parse(json_object_get(record, "kind"));
	if (!arrival->state || !(arrival->state & arrival->irq->states) ||
	    endpoint_parse(json_object_get(item, "local"), &arrival->local) ||
	    endpoint_parse(json_object_get(item, "remote"), &arrival->remote) ||
	    endpoint_parse(json_object_get(item, "origin"), &arrival->origin) ||
	    id_parse(json_object_get(record, "migration_id"), arrival->migration) ||
	    id_is_zero(arrival->migration) ||
	    id_parse(json_object_get(record, "listener"), arrival->listener))
		return fail(EPROTO, "The SockMi daemon describes an imported socket wrongly.");
	return 0;
}

/* Descriptors and descriptions of the answer; what it took it leaves in arrivals, also on failure. */
static int read_arrivals(struct connection *connection, const json_t *answer, struct import_req *irqs,
			 const struct place *places, unsigned int nsent, struct arrival *arrivals,
			 unsigned int *narrivals)
{
	const json_t *imported = json_object_get(answer, "imported");
	size_t n = json_array_size(imported);
	unsigned int ncontexts = 0, next;
	int fds[DESCRIPTORS_MAX];

	if (!json_is_array(imported) || n > nsent || n > DESCRIPTORS_MAX)
		return fail(EPROTO, "The SockMi daemon's answer has no list of sockets, or too many.");
	for (size_t i = 0; i < n; i++)
		ncontexts += json_is_true(json_object_get(json_array_get(imported, i), "context"));
	if (n + ncontexts > DESCRIPTORS_MAX)
		return fail(EPROTO, "The SockMi daemon's answer has too many descriptors.");
	if (connection_take(connection, answer, fds, (unsigned int)n + ncontexts))
		return -1;
	next = (unsigned int)n;
	for (unsigned int i = 0; i < n; i++) {
		arrivals[i].fd = fds[i];
		arrivals[i].context_fd = -1;
		if (json_is_true(json_object_get(json_array_get(imported, i), "context")))
			arrivals[i].context_fd = fds[next++];
	}
	*narrivals = (unsigned int)n;
	for (unsigned int i = 0; i < n; i++) {
		const json_t *item = json_array_get(imported, i);
		json_int_t index = json_integer_value(json_object_get(item, "request"));

		if (!json_is_integer(json_object_get(item, "request")) || index < 0 || index >= nsent)
			return fail(EPROTO, "The SockMi daemon answers a request that was not made.");
		arrivals[i].place = places[index];
		arrivals[i].irq = &irqs[places[index].index];
		for (unsigned int j = 0; j < i; j++)
			if (arrivals[j].irq == arrivals[i].irq)
				return fail(EPROTO, "The SockMi daemon answers a request twice.");
		if (read_item(item, &arrivals[i]))
			return -1;
	}
	return 0;
}

/* While we waited another thread may have connected the caller's socket, or closed it and opened something else. */
static int check_place(const struct arrival *arrival)
{
	struct stat stat;
	int fd = arrival->irq->fd;

	if (fstat(fd, &stat))
		return fail(errno, "irqs[%u].fd %d: %m", arrival->place.index, fd);
	if (stat.st_ino != arrival->place.inode)
		return fail(EBADF, "irqs[%u].fd %d is another descriptor by now.", arrival->place.index, fd);
	return check_socket(arrival->place.index, fd, RLIM_INFINITY);
}

/* All that can fail, before the sockets are taken. */
static int prepare(struct arrival *arrivals, unsigned int narrivals, bool contexts)
{
	for (unsigned int i = 0; i < narrivals; i++) {
		struct arrival *arrival = &arrivals[i];
		int flags, own;

		if (check_place(arrival))
			return -1;
		flags = fcntl(arrival->irq->fd, F_GETFL);
		own = fcntl(arrival->fd, F_GETFL);
		if (flags < 0 || own < 0 ||
		    fcntl(arrival->fd, F_SETFL, (own & ~O_NONBLOCK) | (flags & O_NONBLOCK)))
			return fail(errno, "fcntl of descriptor %d: %m", arrival->irq->fd);
		if (contexts && arrival->context_fd >= 0 &&
		    context_read(arrival->context_fd, &arrival->context))
			return -1;
	}
	return 0;
}

/* Bound, or it need not be. */
static bool has_port(const struct arrival *arrival)
{
	struct sockaddr_in6 name = { 0 }; /* the port of an IPv4 address is at the same place */
	socklen_t length = sizeof(name);

	return !arrival->local.port ||
	       (!getsockname(arrival->fd, (struct sockaddr *)&name, &length) && name.sin6_port);
}

/*
 * Whether a copy came to life although the daemon could not say so. Dormant ones are in repair, or (those of the
 * kernel engine) end with the daemon: closed, and bound no more. These are locked until the daemon's end is complete.
 * TCP_INFO reads the state first and waits for the lock then (tcp_get_info() of net/ipv4/tcp.c): what is read later is
 * final.
 */
static bool is_live(const struct arrival *arrival)
{
	int value = 0;
	socklen_t length = sizeof(value), info_length;
	struct tcp_info info;

	info_length = sizeof(info);
	if (getsockopt(arrival->fd, IPPROTO_TCP, TCP_INFO, &info, &info_length))
		return false;
	if (arrival->state == SOCKMI_LISTENING)
		return !getsockopt(arrival->fd, SOL_SOCKET, SO_ACCEPTCONN, &value, &length) && value;
	if (getsockopt(arrival->fd, IPPROTO_TCP, TCP_REPAIR, &value, &length) || value)
		return false;
	if (arrival->state != SOCKMI_CONNECTED)
		return has_port(arrival);
	info_length = sizeof(info);
	return !getsockopt(arrival->fd, IPPROTO_TCP, TCP_INFO, &info, &info_length) && info.tcpi_state != TCP_CLOSE;
}

static void mark_live(const json_t *answer, struct arrival *arrivals, unsigned int narrivals)
{
	const json_t *id;
	size_t i;

	json_array_foreach(json_object_get(answer, "live"), i, id) {
		unsigned char migration[16];

		if (id_parse(id, migration))
			continue;
		for (unsigned int j = 0; j < narrivals; j++)
			if (!memcmp(arrivals[j].migration, migration, sizeof(migration)))
				arrivals[j].live = true;
	}
}

static void note_failure(const json_t *answer)
{
	const json_t *why = json_object_get(json_array_get(json_object_get(answer, "failed"), 0), "refusal");
	const char *code = json_string_value(json_object_get(why, "code"));
	const char *message = json_string_value(json_object_get(why, "message"));

	fail_code(code ? code : "internal", message ? message : "The socket could not be activated.");
}

/*
 * Say what we take, and learn what is live; sets the error for the case that nothing is (none: the time was
 * up). True: the move was undone, and the requests wait again.
 */
static bool take(struct connection *connection, struct arrival *arrivals, unsigned int narrivals)
{
	bool waiting = false;
	json_t *ids = json_array();
	json_t *message, *answer = NULL;

	for (unsigned int i = 0; i < narrivals; i++)
		if (json_array_append_new(ids, id_text(arrivals[i].migration))) {
			fail(ENOMEM, "No memory for a request.");
			json_decref(ids);
			return false;
		}
	message = json_pack("{s:s,s:o}", "op", "taken", "migrations", ids);
	if (!message)
		fail(ENOMEM, "No memory for a request.");
	else if (!connection_send(connection, message, NULL, 0, -1))
		answer = connection_receive(connection, -1);	/* the daemon decides, or goes away */
	json_decref(message);
	if (answer && !refused(answer)) {
		mark_live(answer, arrivals, narrivals);
		waiting = json_is_true(json_object_get(answer, "waiting"));
		if (json_array_size(json_object_get(answer, "failed")))
			note_failure(answer);
		else
			no_error();
	} else if (message) {
		for (unsigned int i = 0; i < narrivals; i++)
			arrivals[i].live = is_live(&arrivals[i]);
	}
	json_decref(answer);
	return waiting;
}

/* Put a live socket in the place of the caller's; if that fails, the caller gets our descriptor. */
static void replace(struct arrival *arrival, struct sockmi_context *contexts)
{
	struct import_req *irq = arrival->irq;
	int flags = fcntl(irq->fd, F_GETFD);
	int placed = check_place(arrival);

	if (!placed)
		do
			placed = dup3(arrival->fd, irq->fd, flags >= 0 && !(flags & FD_CLOEXEC) ? 0 : O_CLOEXEC);
		while (placed < 0 && (errno == EINTR || errno == EBUSY));
	if (placed < 0)
		irq->fd = arrival->fd;
	else
		close(arrival->fd);
	arrival->fd = -1;
	irq->returned = arrival->state;
	irq->returned_local = arrival->local;
	irq->returned_remote = arrival->remote;
	irq->returned_origin = arrival->origin;
	memcpy(irq->returned_listener, arrival->listener, sizeof(irq->returned_listener));
	memcpy(irq->migration, arrival->migration, sizeof(irq->migration));
	if (contexts) {
		contexts[arrival->place.index] = arrival->context;
		arrival->context.data = NULL;
	}
}

static int finish(struct arrival *arrivals, unsigned int narrivals, struct sockmi_context *contexts)
{
	int nlive = 0;

	for (unsigned int i = 0; i < narrivals; i++) {
		struct arrival *arrival = &arrivals[i];

		if (arrival->live) {
			replace(arrival, contexts);
			nlive++;
		}
		close_all(&arrival->fd, 1);
		close_all(&arrival->context_fd, 1);
		free(arrival->context.data);
	}
	if (nlive)
		no_error();
	return nlive;
}

/* One answer, and what becomes of it. *@waiting: of nothing, and there will be another answer. */
static int once(struct connection *connection, long long deadline, struct import_req *irqs,
		const struct place *places, unsigned int nsent, const struct sockmi_import_options *options,
		struct arrival *arrivals, bool *waiting)
{
	json_t *answer = connection_receive(connection, deadline);
	unsigned int narrivals = 0;
	int result = -1;

	*waiting = false;
	memset(arrivals, 0, DESCRIPTORS_MAX * sizeof(*arrivals));
	if (answer && !refused(answer) &&
	    !read_arrivals(connection, answer, irqs, places, nsent, arrivals, &narrivals)) {
		if (narrivals == 0)
			result = 0;
		else if (!prepare(arrivals, narrivals, options->contexts))
			*waiting = take(connection, arrivals, narrivals);
	}
	if (narrivals) {
		int failure = errno;

		result = finish(arrivals, narrivals, options->contexts);
		if (result == 0 && sockmi_last_error()->errnum) {
			errno = failure;
			result = -1;
		}
	}
	json_decref(answer);
	return result;
}

static int run(struct import_req *irqs, unsigned int nirqs, int timeout,
	       const struct sockmi_import_options *options, struct arrival *arrivals,
	       struct place *places)
{
	long long deadline = deadline_after(timeout);
	struct connection connection;
	unsigned int nsent;
	json_t *message;
	int result = -1;
	bool waiting;

	if (deadline >= 0)
		deadline += GRACE_MS;
	message = request(irqs, nirqs, timeout, places);
	if (!message)
		return fail(ENOMEM, "No memory for %u import requests.", nirqs);
	nsent = (unsigned int)json_array_size(json_object_get(message, "requests"));
	if (!connection_open(&connection, options->control, deadline) &&
	    !connection_send(&connection, message, NULL, 0, deadline))
		do
			result = once(&connection, deadline, irqs, places, nsent, options, arrivals, &waiting);
		while (waiting);
	if (result >= 0)
		no_error();
	connection_close(&connection);
	json_decref(message);
	return result;
}

int import_socket_ex(struct import_req *irqs, unsigned int nirqs, int timeout,
		     const struct sockmi_import_options *given)
{
	struct sockmi_import_options options;
	struct arrival *arrivals;
	struct place *places;
	int result = -1;
	int saved = errno;

	if (options_copy(&options, sizeof(options), given, "options") || check(irqs, nirqs))
		return -1;
	for (unsigned int i = 0; i < nirqs; i++) {
		irqs[i].returned = 0;
		if (options.contexts)
			memset(&options.contexts[i], 0, sizeof(options.contexts[i]));
	}
	arrivals = calloc(DESCRIPTORS_MAX, sizeof(*arrivals));
	places = calloc(nirqs, sizeof(*places));
	if (arrivals && places)
		result = run(irqs, nirqs, timeout, &options, arrivals, places);
	else
		fail(ENOMEM, "No memory for %u import requests.", nirqs);
	if (result >= 0)
		errno = saved;
	else
		saved = errno;
	free(arrivals);
	free(places);
	errno = saved;
	return result;
}

int import_socket(struct import_req *irqs, unsigned int nirqs, int timeout)
{
	return import_socket_ex(irqs, nirqs, timeout, NULL);
}
