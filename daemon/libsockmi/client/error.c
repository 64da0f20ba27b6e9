// SPDX-License-Identifier: MIT
/* Why the last call failed: errno, refusal code and sentence, per thread. */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "client.h"

static __thread struct {
	struct sockmi_error error;
	char code[64];
	char message[512];
} last;

static const struct {
	const char *code;
	int errnum;
} codes[] = {
	{ "not-tcp", EPROTOTYPE },
	{ "no-such-socket", EBADF },
	{ "no-privilege", EPERM },
	{ "state", ENOTSUP },
	{ "urgent-data", ENOTSUP },
	{ "ulp", ENOTSUP },
	{ "mptcp", ENOTSUP },
	{ "tcp-md5", ENOTSUP },
	{ "tcp-ao", ENOTSUP },
	{ "ipsec", ENOTSUP },
	{ "sockmap", ENOTSUP },
	{ "in-repair", EBUSY },
	{ "zero-copy", ENOTSUP },
	{ "too-large", EMSGSIZE },
	{ "link-local", ENOTSUP },
	{ "already-migrating", EALREADY },
	{ "no-descriptors", EMFILE },
	{ "locked", EBUSY },
	{ "owner-traced", EBUSY },
	{ "owner-io-uring", ENOTSUP },
	{ "owner-unstoppable", EBUSY },
	{ "owner-is-daemon", ENOTSUP },
	{ "changed", EAGAIN },
	{ "freeze-deadline", EAGAIN },
	{ "no-offer", EHOSTUNREACH },
	{ "no-such-host", ENOENT },
	{ "list-full", ENOBUFS },
	{ "port-taken", EADDRINUSE },
	{ "tuple-taken", EADDRINUSE },
	{ "window-scale", ENOTSUP },
	{ "timestamp-unit", ENOTSUP },
	{ "image", EBADMSG },
	{ "restore", EREMOTEIO },
	{ "no-redirect", ENETUNREACH },
	{ "redirect", EREMOTEIO },
	{ "peer-lost", EHOSTDOWN },
	{ "shutting-down", ESHUTDOWN },
	{ "timeout", ETIMEDOUT },
	{ "bad-request", EINVAL },
	{ "internal", EIO },
	{ "ended", ENOTCONN },
};

static int set(int errnum, const char *code)
{
	snprintf(last.code, sizeof(last.code), "%s", code);
	last.error.errnum = errnum;
	errno = errnum;
	return -1;
}

int fail(int errnum, const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(last.message, sizeof(last.message), format, arguments);
	va_end(arguments);
	return set(errnum, "");
}

int fail_code(const char *code, const char *message)
{
	snprintf(last.message, sizeof(last.message), "%s", message);
	for (size_t i = 0; i < sizeof(codes) / sizeof(*codes); i++)
		if (!strcmp(codes[i].code, code))
			return set(codes[i].errnum, code);
	return set(EIO, code);
}

void no_error(void)
{
	last.message[0] = 0;
	last.code[0] = 0;
	last.error.errnum = 0;
}

const struct sockmi_error *sockmi_last_error(void)
{
	last.error.code = last.code;
	last.error.message = last.message;
	return &last.error;
}

const char *sockmi_version(void)
{
	return SOCKMI_VERSION;
}

void close_all(const int *fds, unsigned int nfds)
{
	int saved = errno;

	for (unsigned int i = 0; i < nfds; i++)
		if (fds[i] >= 0)
			close(fds[i]);
	errno = saved;
}
