// SPDX-License-Identifier: MIT
/* The application's context travels as a sealed memfd. */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "client.h"

int context_seal(const void *data, size_t bytes)
{
	const char *rest = data;
	int fd = memfd_create("sockmi-context", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		return fail(errno, "memfd_create: %m");
	while (bytes) {
		ssize_t n = write(fd, rest, bytes);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			goto failed;
		rest += n;
		bytes -= (size_t)n;
	}
	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE) == 0)
		return fd;
failed:
	fail(errno, "The context cannot be put into a memfd: %m");
	close_all(&fd, 1);
	return -1;
}

int context_read(int fd, struct sockmi_context *context)
{
	struct stat stat;
	size_t done = 0;

	if (fstat(fd, &stat))
		return fail(errno, "fstat of a context: %m");
	if (stat.st_size < 0 || stat.st_size > SOCKMI_CONTEXT_MAX)
		return fail(EPROTO, "The daemon sent a context of %lld bytes.", (long long)stat.st_size);
	context->bytes = (size_t)stat.st_size;
	context->data = malloc(context->bytes ? context->bytes : 1);
	if (!context->data)
		return fail(ENOMEM, "No memory for a context of %zu bytes.", context->bytes);
	while (done < context->bytes) {
		ssize_t n = pread(fd, (char *)context->data + done, context->bytes - done, (off_t)done);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return fail(n ? errno : EPROTO, "A context cannot be read.");
		done += (size_t)n;
	}
	return 0;
}
