// SPDX-License-Identifier: MIT
/* Closes originals, for every process that holds them, without a packet. */
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "engine_internal.h"
#include "in_repair.h"

static int failed_call(struct sockmi_result *result, int step)
{
	return sockmi_fail(result, errno == EPERM ? SOCKMI_RESULT_NO_PRIVILEGE : SOCKMI_RESULT_FAILED, step, errno);
}

static int changed(struct sockmi_result *result, int step)
{
	return sockmi_fail(result, SOCKMI_RESULT_CHANGED, step, 0);
}

/* Children in a listener's queue would be reset. */
static int release_listener(int fd, struct sockmi_result *result)
{
	struct tcp_info info = { 0 };
	socklen_t length = sizeof(info);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &length) < 0)
		return sockmi_fail_access(result, SOCKMI_STEP_INFO);
	if (info.tcpi_unacked) /* of a listener: the length of its queue */
		return changed(result, SOCKMI_STEP_QUEUE_LENGTH);
	/* Wakes every accept() with EINVAL; poll() says POLLHUP. */
	if (shutdown(fd, SHUT_RDWR) < 0)
		return failed_call(result, SOCKMI_STEP_DISCONNECT);
	sockmi_deaden(fd); /* so that it cannot be made to listen again */
	return 0;
}

/* In repair: is it still what the image says? 0 or -1. */
static int compare(int fd, const struct sockmi_image *image, struct sockmi_result *result)
{
	const struct sockmi_sequence *s = &image->sequence;
	uint32_t snd_end, rcv_end;
	int outq, unsent, inq;

	if (sockmi_get_queue_seq(fd, TCP_SEND_QUEUE, &snd_end) < 0)
		return failed_call(result, SOCKMI_STEP_SEQUENCE);
	if (snd_end != s->write_seq)
		return changed(result, SOCKMI_STEP_SEQUENCE);
	if (image->identity.state == SOCKMI_SYN_SENT)
		return 0;
	if (sockmi_get_queue_seq(fd, TCP_RECV_QUEUE, &rcv_end) < 0)
		return failed_call(result, SOCKMI_STEP_SEQUENCE);
	if (ioctl(fd, SOCKMI_SIOCOUTQ, &outq) < 0 || ioctl(fd, SOCKMI_SIOCOUTQNSD, &unsent) < 0 ||
	    ioctl(fd, SOCKMI_SIOCINQ, &inq) < 0)
		return failed_call(result, SOCKMI_STEP_QUEUE_LENGTH);
	if (rcv_end != s->rcv_nxt || (uint32_t)outq != s->write_seq - s->snd_una ||
	    (uint32_t)unsent != s->write_seq - s->snd_nxt || (size_t)inq != image->receive_queue.length)
		return changed(result, SOCKMI_STEP_SEQUENCE);
	return 0;
}

/*
 * A connect() that the stop of its thread has interrupted is restarted, and would begin a new
 * connection on the disconnected socket. Now it gets ENETUNREACH: an IPv4 socket by a source route
 * whose first hop is a multicast address, an IPv6 one as it may only use the loopback device.
 */
static int forbid_connect(int fd, const struct sockmi_image *image, struct sockmi_result *result)
{
	static const char loopback[] = "lo";
	static const uint8_t nowhere[] = { 131 /* loose source route */, 7, 4, 224, 0, 0, 1, 0 };
	bool four = sockmi_endpoint_is_mapped(&image->identity.remote);

	if ((four ? setsockopt(fd, IPPROTO_IP, IP_OPTIONS, nowhere, sizeof(nowhere)) :
		    setsockopt(fd, SOL_SOCKET, SO_BINDTODEVICE, loopback, sizeof(loopback))) < 0)
		return failed_call(result, SOCKMI_STEP_DISCONNECT);
	return 0;
}

/* The silent close: in repair, disconnecting sends nothing. */
static int disconnect(int fd, struct sockmi_result *result)
{
	struct sockaddr unspecified = { .sa_family = AF_UNSPEC };

	if (connect(fd, &unspecified, sizeof(unspecified)) < 0)
		return failed_call(result, SOCKMI_STEP_DISCONNECT);
	sockmi_repair(fd, TCP_REPAIR_OFF_NO_WP);
	/*
	 * Wakes all who wait, and leaves a mark that does not go away when the first of them takes the
	 * error: later sends get EPIPE. (Not SHUT_RD: receivers would see an end of file that is none.)
	 */
	shutdown(fd, SHUT_WR);
	return 0;
}

static int reuse_of(const struct sockmi_image *image)
{
	return (int)sockmi_options_find(image->socket_options, SOCKMI_OPT_REUSEADDR, 0, NULL);
}

/* The inverse of going into repair, which takes the option away. */
static void leave_repair(int fd, const struct sockmi_image *image, struct sockmi_in_repair *record)
{
	int reuse = reuse_of(image);

	sockmi_repair(fd, TCP_REPAIR_OFF_NO_WP);
	if (reuse)
		sockmi_set_int(fd, SOL_SOCKET, SO_REUSEADDR, reuse);
	sockmi_in_repair_end(record);
}

/* In repair nobody else can change it. */
static int arrest(int fd, const struct sockmi_image *image, struct sockmi_result *result,
		  struct sockmi_in_repair **record)
{
	struct stat status = { 0 };

	if (fstat(fd, &status) < 0)
		return sockmi_fail_access(result, SOCKMI_STEP_REPAIR);
	*record = sockmi_in_repair_begin(fd, status.st_ino, reuse_of(image));
	if (sockmi_repair(fd, TCP_REPAIR_ON) < 0) {
		sockmi_fail_access(result, SOCKMI_STEP_REPAIR);
		sockmi_in_repair_end(*record);
		return -1;
	}
	if (compare(fd, image, result) == 0) {
		sockmi_reached("release.arrested");
		return 0;
	}
	leave_repair(fd, image, *record);
	return -1;
}

static int end_arrested(int fd, const struct sockmi_image *image, struct sockmi_result *result,
			struct sockmi_in_repair *record)
{
	int outcome;

	if (disconnect(fd, result) < 0) {
		leave_repair(fd, image, record);
		return -1;
	}
	outcome = image->identity.state == SOCKMI_SYN_SENT ? forbid_connect(fd, image, result) : 0;
	sockmi_in_repair_end(record);
	return outcome;
}

static int release_connection(int fd, const struct sockmi_image *image, struct sockmi_result *result)
{
	struct sockmi_in_repair *record;

	return arrest(fd, image, result, &record) < 0 ? -1 : end_arrested(fd, image, result, record);
}

static int compare_state(int fd, const struct sockmi_image *image, struct sockmi_result *result)
{
	int state = sockmi_state(fd);

	if (state < 0)
		return sockmi_fail_access(result, SOCKMI_STEP_INFO);
	if (state == image->identity.state)
		return 0;
	result->detail = state;
	return changed(result, SOCKMI_STEP_INFO);
}

static int compare_only(int fd, const struct sockmi_image *image, struct sockmi_result *result)
{
	struct sockmi_in_repair *record;

	if (compare_state(fd, image, result) < 0)
		return -1;
	if (image->identity.kind != SOCKMI_KIND_CONNECTED)
		return 0;
	if (arrest(fd, image, result, &record) < 0)
		return -1;
	leave_repair(fd, image, record);
	return 0;
}

static int release(int fd, const struct sockmi_image *image, struct sockmi_result *result)
{
	if (compare_state(fd, image, result) < 0)
		return -1;
	switch (image->identity.kind) {
	case SOCKMI_KIND_CONNECTED:
		return release_connection(fd, image, result);
	case SOCKMI_KIND_LISTENING:
		return release_listener(fd, result);
	default:
		return sockmi_deaden(fd) < 0 ? failed_call(result, SOCKMI_STEP_DISCONNECT) : 0;
	}
}

static int each(int (*step)(int fd, const struct sockmi_image *image, struct sockmi_result *result), const int *fds,
		const void *const *images, const size_t *lengths, size_t n, struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++) {
		struct sockmi_image image;

		if (sockmi_decode_own(images[i], lengths[i], &image, &results[i]) < 0 ||
		    step(fds[i], &image, &results[i]) < 0)
			count++;
	}
	return count;
}

int sockmi_compare(const int *fds, const void *const *images, const size_t *lengths, size_t n,
		   struct sockmi_result *results)
{
	return each(compare_only, fds, images, lengths, n, results);
}

int sockmi_release(const int *fds, const void *const *images, const size_t *lengths, size_t n,
		   struct sockmi_result *results)
{
	return each(release, fds, images, lengths, n, results);
}

struct originals {
	const int *fds;
	const void *const *images;
	const size_t *lengths;
	size_t n;
	struct sockmi_result *results;
	struct sockmi_in_repair **records;
};

void sockmi_first_closed(void)
{
	sockmi_reached("release.closed");
}

/* Connections all or none; the others each for itself. */
static int release_joined(const struct originals *o)
{
	struct sockmi_image image;
	bool stay = false, begun = false;
	int count = 0;

	memset(o->results, 0, o->n * sizeof(*o->results));
	for (size_t i = 0; i < o->n; i++) {
		struct sockmi_result *result = &o->results[i];

		if (sockmi_decode_own(o->images[i], o->lengths[i], &image, result) == 0 &&
		    (image.identity.kind != SOCKMI_KIND_CONNECTED ||
		     (compare_state(o->fds[i], &image, result) == 0 && arrest(o->fds[i], &image, result, &o->records[i]) == 0)))
			continue;
		stay = true;
		count++;
	}
	for (size_t i = 0; i < o->n; i++) {
		struct sockmi_result *result = &o->results[i];
		int outcome;

		if (result->code != SOCKMI_RESULT_OK || sockmi_decode_own(o->images[i], o->lengths[i], &image, result) < 0)
			continue;
		if (image.identity.kind != SOCKMI_KIND_CONNECTED) {
			outcome = release(o->fds[i], &image, result);
		} else if (stay) {
			leave_repair(o->fds[i], &image, o->records[i]);
			outcome = changed(result, SOCKMI_STEP_SEQUENCE);
		} else {
			outcome = end_arrested(o->fds[i], &image, result, o->records[i]);
			if (!begun)
				sockmi_first_closed();
			begun = true;
		}
		count += outcome < 0;
	}
	return count;
}

static int release_all(const void *argument)
{
	return release_joined(argument);
}

/*
 * By a child that shares our memory, and goes on if this process is killed meanwhile: nothing can be undone of
 * what goes together when some of it is closed. This thread goes on when it has ended.
 */
int sockmi_whatever_happens(int (*work)(const void *argument), const void *argument)
{
	volatile int outcome = 0;
	sigset_t all, before;
	pid_t child;

	sigfillset(&all); /* a handler of ours has no business there */
	pthread_sigmask(SIG_SETMASK, &all, &before);
	child = vfork();
	if (child == 0) {
		outcome = work(argument);
		_exit(0);
	}
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (child < 0)
		return work(argument);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return outcome;
}

int sockmi_release_together(const int *fds, const void *const *images, const size_t *lengths, size_t n,
			    struct sockmi_result *results)
{
	struct sockmi_in_repair **records = calloc(n ? n : 1, sizeof(*records));
	const struct originals originals = { fds, images, lengths, n, results, records };
	int count;

	if (!records) {
		memset(results, 0, n * sizeof(*results));
		for (size_t i = 0; i < n; i++)
			sockmi_fail(&results[i], SOCKMI_RESULT_FAILED, SOCKMI_STEP_DISCONNECT, ENOMEM);
		return (int)n;
	}
	count = sockmi_whatever_happens(release_all, &originals);
	free(records);
	return count;
}
