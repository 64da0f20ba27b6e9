// SPDX-License-Identifier: MIT
/* Names and errors of the engine's results. */
#include "engine_internal.h"

static const char *const fidelity_names[SOCKMI_FIDELITY_END] = {
	[SOCKMI_FIDELITY_RECEIVE_QUEUE] = "receive-queue",
	[SOCKMI_FIDELITY_SENT_QUEUE] = "sent-queue",
	[SOCKMI_FIDELITY_UNSENT_QUEUE] = "unsent-queue",
	[SOCKMI_FIDELITY_WINDOW] = "window",
	[SOCKMI_FIDELITY_NEGOTIATED] = "negotiated-options",
	[SOCKMI_FIDELITY_TIMESTAMP_CLOCK] = "timestamp-clock",
	[SOCKMI_FIDELITY_OPTIONS] = "socket-options",
	[SOCKMI_FIDELITY_OWN_FIN] = "own-fin",
	[SOCKMI_FIDELITY_PEER_FIN] = "peer-fin",
	[SOCKMI_FIDELITY_LISTENER] = "listener",
	[SOCKMI_FIDELITY_BUFFER_SIZES] = "buffer-sizes",
	[SOCKMI_FIDELITY_CLOSING_STATE] = "closing-state",
	[SOCKMI_FIDELITY_SYN_TIMESTAMP] = "syn-timestamp",
	[SOCKMI_FIDELITY_SYN_RETRANSMITTED] = "syn-retransmitted",
	[SOCKMI_FIDELITY_PATH_MODEL] = "path-model",
	[SOCKMI_FIDELITY_CONGESTION_STATE] = "congestion-state",
	[SOCKMI_FIDELITY_ECN] = "ecn",
	[SOCKMI_FIDELITY_TS_RECENT] = "ts-recent",
	[SOCKMI_FIDELITY_OUT_OF_ORDER] = "out-of-order-queue",
	[SOCKMI_FIDELITY_SACK_SCOREBOARD] = "sack-scoreboard",
	[SOCKMI_FIDELITY_TIMERS] = "timers",
	[SOCKMI_FIDELITY_COUNTERS] = "counters",
	[SOCKMI_FIDELITY_ERROR_QUEUE] = "error-queue",
	[SOCKMI_FIDELITY_SAVED_SYN] = "saved-syn",
	[SOCKMI_FIDELITY_FILTER] = "ebpf-filter",
	[SOCKMI_FIDELITY_RARE_OPTIONS] = "rare-options",
	[SOCKMI_FIDELITY_URGENT] = "urgent-data",
	[SOCKMI_FIDELITY_REUSEPORT_PROGRAM] = "reuseport-program",
	[SOCKMI_FIDELITY_BPF_STORAGE] = "bpf-storage",
	[SOCKMI_FIDELITY_SLOW_START_STATE] = "slow-start-state",
	[SOCKMI_FIDELITY_ZEROCOPY_COUNT] = "zerocopy-count",
};

static const char *const step_names[] = {
	[SOCKMI_STEP_NONE] = "start",
	[SOCKMI_STEP_INFO] = "TCP_INFO",
	[SOCKMI_STEP_NAME] = "reading the addresses",
	[SOCKMI_STEP_OPTION] = "reading a socket option",
	[SOCKMI_STEP_REPAIR] = "TCP_REPAIR",
	[SOCKMI_STEP_SEQUENCE] = "TCP_QUEUE_SEQ",
	[SOCKMI_STEP_QUEUE_LENGTH] = "asking for queue lengths",
	[SOCKMI_STEP_RECEIVE_QUEUE] = "the receive queue",
	[SOCKMI_STEP_SEND_QUEUE] = "the send queue",
	[SOCKMI_STEP_WINDOW] = "TCP_REPAIR_WINDOW",
	[SOCKMI_STEP_TIMESTAMP] = "TCP_TIMESTAMP",
	[SOCKMI_STEP_ENCODE] = "writing the image",
	[SOCKMI_STEP_SOCKET] = "socket()",
	[SOCKMI_STEP_BIND] = "bind()",
	[SOCKMI_STEP_CONNECT] = "connect()",
	[SOCKMI_STEP_NEGOTIATED] = "TCP_REPAIR_OPTIONS",
	[SOCKMI_STEP_SHUTDOWN] = "shutdown()",
	[SOCKMI_STEP_INJECT] = "telling the copy what its peer has closed",
	[SOCKMI_STEP_LISTEN] = "listen()",
	[SOCKMI_STEP_DISCONNECT] = "the silent close",
	[SOCKMI_STEP_CLAIM] = "claiming the socket",
	[SOCKMI_STEP_FREEZE] = "the freeze",
	[SOCKMI_STEP_COMMIT] = "the commit",
	[SOCKMI_STEP_RESTORE] = "the restore",
	[SOCKMI_STEP_ACTIVATE] = "the activation",
	[SOCKMI_STEP_DELIVER] = "the delivery",
};

const char *sockmi_fidelity_name(unsigned int bit)
{
	return bit < SOCKMI_FIDELITY_END ? fidelity_names[bit] : NULL;
}

const char *sockmi_step_name(unsigned int step)
{
	return step < sizeof(step_names) / sizeof(step_names[0]) ? step_names[step] : NULL;
}

int sockmi_fail_access(struct sockmi_result *result, int step)
{
	int error = errno;
	int code = error == EBADF || error == ENOTSOCK ? SOCKMI_RESULT_NO_SOCKET :
		   error == EPERM			? SOCKMI_RESULT_NO_PRIVILEGE :
		   error == EOPNOTSUPP || error == ENOPROTOOPT ? SOCKMI_RESULT_NOT_TCP :
							   SOCKMI_RESULT_FAILED;

	return sockmi_fail(result, code, step, error);
}

int sockmi_decode_own(const void *bytes, size_t length, struct sockmi_image *image, struct sockmi_result *result)
{
	int error = sockmi_image_decode(bytes, length, SOCKMI_IMAGE_LIMIT_BYTES, image, NULL);

	result->detail = error;
	return error ? sockmi_fail(result, SOCKMI_RESULT_BAD_IMAGE, SOCKMI_STEP_NONE, 0) : 0;
}
