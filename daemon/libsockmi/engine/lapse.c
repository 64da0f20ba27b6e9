// SPDX-License-Identifier: MIT
/*
 * Which dormant copies have waited for too long. Timers run in repair as well: what is repeated then is lost in the
 * hold, but counts, and in the end the kernel gives the connection up. A copy none of whose timers has run out
 * is as good as new: all that is limited (user timeout, keepalive, retries) counts from the first repetition.
 */
#include <stddef.h>

#include "engine_internal.h"

static int lapsed(struct sockmi_result *result)
{
	return sockmi_fail(result, SOCKMI_RESULT_LAPSED, SOCKMI_STEP_INFO, 0);
}

static int look(int fd, const void *bytes, size_t length, struct sockmi_result *result)
{
	struct sockmi_image image;
	struct tcp_info info = { 0 };
	socklen_t info_length = offsetof(struct tcp_info, tcpi_options);

	if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &info, &info_length) < 0)
		return sockmi_fail_access(result, SOCKMI_STEP_INFO);
	if (info.tcpi_retransmits || info.tcpi_probes || info.tcpi_backoff)
		return lapsed(result);
	if (info.tcpi_state != SOCKMI_CLOSED)
		return 0;
	/* What was never connected is closed as long as it is dormant. */
	if (sockmi_decode_own(bytes, length, &image, result) < 0)
		return -1;
	return image.identity.kind == SOCKMI_KIND_CONNECTED ? lapsed(result) : 0;
}

int sockmi_lapsed(const int *fds, const void *const *images, const size_t *lengths, size_t n,
		  struct sockmi_result *results)
{
	int count = 0;

	memset(results, 0, n * sizeof(*results));
	for (size_t i = 0; i < n; i++)
		count += look(fds[i], images[i], lengths[i], &results[i]) < 0;
	return count;
}
