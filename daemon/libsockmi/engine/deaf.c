// SPDX-License-Identifier: MIT
/*
 * A dormant copy hears nothing, whatever its hold says: a socket in repair goes on receiving and
 * acknowledging, and what it took would be lost if the daemon died before it could be activated.
 */
#include <linux/bpf.h>
#include <linux/filter.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "engine_internal.h"

static int program = -1;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* "Return 0" (drop), loaded once: to attach it costs less than to have a classic filter translated each time. */
static void load(void)
{
	static const struct bpf_insn drop[] = {
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	union bpf_attr attributes = {
		.prog_type = BPF_PROG_TYPE_SOCKET_FILTER,
		.insn_cnt = sizeof(drop) / sizeof(drop[0]),
		.insns = (uintptr_t)drop,
		.license = (uintptr_t)"MIT",
	};

	program = (int)syscall(SYS_bpf, BPF_PROG_LOAD, &attributes, sizeof(attributes));
}

/* An application's own filter has that place; then the hold alone has to do. */
static bool may(const struct sockmi_image *image)
{
	return image->identity.kind == SOCKMI_KIND_CONNECTED &&
	       sockmi_options_find(image->socket_options, SOCKMI_OPT_FILTER, -1, NULL) == -1 &&
	       !sockmi_options_find(image->socket_options, SOCKMI_OPT_LOCK_FILTER, 0, NULL);
}

void sockmi_deafen(int fd, const struct sockmi_image *image)
{
	struct sock_filter drop = { .code = BPF_RET | BPF_K };
	struct sock_fprog classic = { .len = 1, .filter = &drop };

	if (!may(image))
		return;
	pthread_once(&once, load);
	if (program < 0 || sockmi_set_int(fd, SOL_SOCKET, SO_ATTACH_BPF, program) < 0)
		setsockopt(fd, SOL_SOCKET, SO_ATTACH_FILTER, &classic, sizeof(classic));
}

void sockmi_undeafen(int fd, const struct sockmi_image *image)
{
	if (may(image))
		sockmi_set_int(fd, SOL_SOCKET, SO_DETACH_FILTER, 0);
}
