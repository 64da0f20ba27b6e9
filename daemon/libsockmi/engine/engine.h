/* SPDX-License-Identifier: MIT */
/*
 * The repair engine's hot path: TCP_REPAIR (CONFIG_CHECKPOINT_RESTORE, CAP_NET_ADMIN) over many
 * sockets a call. The caller stops the owners and holds the packets first; nothing here does that.
 *
 * Every call writes one struct sockmi_result for each socket and returns how many of them failed.
 * A socket that fails is as it was before the call (of a restore: there is none). Not thread-safe
 * for the same socket; otherwise calls may run in parallel.
 */
#ifndef SOCKMI_ENGINE_H
#define SOCKMI_ENGINE_H

#include "image.h"

enum sockmi_code {
	SOCKMI_RESULT_OK = 0,
	SOCKMI_RESULT_FAILED,		/* a system call failed: step, error */
	SOCKMI_RESULT_NOT_TCP,
	SOCKMI_RESULT_NO_SOCKET,	/* not an open descriptor of a socket */
	SOCKMI_RESULT_NO_PRIVILEGE,	/* no CAP_NET_ADMIN over the socket's network namespace */
	SOCKMI_RESULT_WRONG_STATE,	/* detail: the state (enum sockmi_state) */
	SOCKMI_RESULT_URGENT_DATA,
	SOCKMI_RESULT_IN_REPAIR,
	SOCKMI_RESULT_CHANGED,		/* it moved while it was read, or no longer equals its image */
	SOCKMI_RESULT_NO_ROOM,		/* capture: the buffer is too small; length: bytes that suffice */
	SOCKMI_RESULT_TOO_LARGE,	/* more than SOCKMI_IMAGE_LIMIT_BYTES, or the buffers of this host cannot hold it */
	SOCKMI_RESULT_BAD_IMAGE,	/* detail: enum sockmi_image_error */
	SOCKMI_RESULT_TUPLE_TAKEN,
	SOCKMI_RESULT_PORT_TAKEN,
	SOCKMI_RESULT_NO_ADDRESS,	/* the local address cannot be bound here, or there is no route */
	SOCKMI_RESULT_SCALE,		/* SYN-SENT: this host offers another window scale; detail: ours */
	SOCKMI_RESULT_UNIT,		/* this kernel has no microsecond timestamps */
	SOCKMI_RESULT_NOT_DELIVERED,	/* the FIN or ACK made for the copy did not arrive: see sockmi_restore() */
	SOCKMI_RESULT_REFUSED,		/* by the kernel module; detail: its enum sockmi_refusal */
	SOCKMI_RESULT_TOO_LATE,		/* the kernel module has discarded the copy, which was dormant for too long */
	SOCKMI_RESULT_LAPSED,		/* timers of the dormant copy have run out: see sockmi_lapsed() */
};

/* Where a call failed. */
enum sockmi_step {
	SOCKMI_STEP_NONE,
	SOCKMI_STEP_INFO,	/* TCP_INFO */
	SOCKMI_STEP_NAME,	/* getsockname(), getpeername(), sock_diag */
	SOCKMI_STEP_OPTION,	/* detail: enum sockmi_option_id */
	SOCKMI_STEP_REPAIR,
	SOCKMI_STEP_SEQUENCE,
	SOCKMI_STEP_QUEUE_LENGTH, /* SIOCINQ, SIOCOUTQ, SIOCOUTQNSD */
	SOCKMI_STEP_RECEIVE_QUEUE,
	SOCKMI_STEP_SEND_QUEUE,
	SOCKMI_STEP_WINDOW,
	SOCKMI_STEP_TIMESTAMP,
	SOCKMI_STEP_ENCODE,
	SOCKMI_STEP_SOCKET,
	SOCKMI_STEP_BIND,
	SOCKMI_STEP_CONNECT,
	SOCKMI_STEP_NEGOTIATED,	/* TCP_REPAIR_OPTIONS */
	SOCKMI_STEP_SHUTDOWN,
	SOCKMI_STEP_INJECT,
	SOCKMI_STEP_LISTEN,
	SOCKMI_STEP_DISCONNECT,
	SOCKMI_STEP_CLAIM, /* from here on the kernel module's ioctls */
	SOCKMI_STEP_FREEZE,
	SOCKMI_STEP_COMMIT,
	SOCKMI_STEP_RESTORE,
	SOCKMI_STEP_ACTIVATE,
	SOCKMI_STEP_DELIVER,
};

/* Bits of carried, approximated and reset; sockmi_fidelity_name() has their names. */
enum sockmi_fidelity_bit {
	SOCKMI_FIDELITY_RECEIVE_QUEUE,
	SOCKMI_FIDELITY_SENT_QUEUE,
	SOCKMI_FIDELITY_UNSENT_QUEUE,
	SOCKMI_FIDELITY_WINDOW,
	SOCKMI_FIDELITY_NEGOTIATED,
	SOCKMI_FIDELITY_TIMESTAMP_CLOCK,
	SOCKMI_FIDELITY_OPTIONS,
	SOCKMI_FIDELITY_OWN_FIN,
	SOCKMI_FIDELITY_PEER_FIN,
	SOCKMI_FIDELITY_LISTENER,
	SOCKMI_FIDELITY_BUFFER_SIZES,
	SOCKMI_FIDELITY_CLOSING_STATE,	/* CLOSING with an unsent FIN becomes LAST-ACK */
	SOCKMI_FIDELITY_SYN_TIMESTAMP,	/* SYN-SENT: first SYN's time known to some ms only */
	SOCKMI_FIDELITY_SYN_RETRANSMITTED, /* SYN-SENT: an answer to a later SYN may come too early */
	SOCKMI_FIDELITY_PATH_MODEL,	/* cwnd, ssthresh, RTT, RTO */
	SOCKMI_FIDELITY_CONGESTION_STATE,
	SOCKMI_FIDELITY_ECN,
	SOCKMI_FIDELITY_TS_RECENT,
	SOCKMI_FIDELITY_OUT_OF_ORDER,
	SOCKMI_FIDELITY_SACK_SCOREBOARD,
	SOCKMI_FIDELITY_TIMERS,
	SOCKMI_FIDELITY_COUNTERS,
	SOCKMI_FIDELITY_ERROR_QUEUE,	/* a pending error, or timestamps in the error queue */
	SOCKMI_FIDELITY_SAVED_SYN,
	SOCKMI_FIDELITY_FILTER,		/* an eBPF filter cannot be read */
	SOCKMI_FIDELITY_RARE_OPTIONS,	/* not looked at: sockmi_capture_common() */
	SOCKMI_FIDELITY_URGENT,		/* urgent pointers, and the urgent byte */
	SOCKMI_FIDELITY_REUSEPORT_PROGRAM, /* chooses among the sockets of a SO_REUSEPORT group */
	SOCKMI_FIDELITY_BPF_STORAGE,	/* what BPF programs have stored with the socket */
	SOCKMI_FIDELITY_SLOW_START_STATE, /* delays that the congestion control has seen before any loss */
	SOCKMI_FIDELITY_ZEROCOPY_COUNT,	/* the number of the next completion of MSG_ZEROCOPY */
	SOCKMI_FIDELITY_END
};
#define SOCKMI_FIDELITY_BIT(name) ((uint64_t)1 << SOCKMI_FIDELITY_##name)

#define SOCKMI_LOST_OPTIONS 6

struct sockmi_result {
	int32_t code;		/* enum sockmi_code */
	int32_t error;		/* errno, or 0 */
	int32_t step;		/* enum sockmi_step */
	int32_t detail;		/* see the codes */
	uint64_t offset;	/* capture: of the image in the buffer */
	uint64_t length;
	uint64_t carried;	/* bits of enum sockmi_fidelity_bit */
	uint64_t approximated;
	uint64_t reset;
	uint16_t lost_options[SOCKMI_LOST_OPTIONS]; /* ids that this host does not take; 0: no more */
	uint32_t lost;		/* how many there were */
};

struct sockmi_placement {
	struct sockmi_endpoint local;	/* all zero: as in the image */
	uint8_t transparent;		/* the address need not be this host's */
	uint8_t reserved[3];
};

/*
 * For crash tests: called with a name at places inside a call where this process may be killed
 * (sockmi.crashpoints). NULL, as it is at first: nothing is called.
 */
SOCKMI_EXPORT extern void (*sockmi_crash_hook)(const char *point);

/* Names for reports; NULL if there is no such. */
SOCKMI_EXPORT const char *sockmi_fidelity_name(unsigned int bit);
SOCKMI_EXPORT const char *sockmi_option_name(unsigned int id);
SOCKMI_EXPORT const char *sockmi_step_name(unsigned int step);

/*
 * Write the images of the sockets one after the other into @buffer (each at a multiple of 8), queue
 * bytes straight to their place. TCP_REPAIR is on only meanwhile: afterwards the socket is as it was, SO_REUSEADDR
 * included. One that is too large for what is left gets NO_ROOM; those after it are still tried.
 */
SOCKMI_EXPORT int sockmi_capture(const int *fds, size_t n, void *buffer, size_t capacity,
				 struct sockmi_result *results);

/* The same in about half the time: of connections only the common options; the fidelity says so. */
SOCKMI_EXPORT int sockmi_capture_common(const int *fds, size_t n, void *buffer, size_t capacity,
					struct sockmi_result *results);

/*
 * Make a dormant copy of each image: out_fds[i], close-on-exec, non-blocking, in repair (closing it
 * emits nothing); one that is to listen is bound only, and not in repair. A connection's copy holds all that
 * the image has, and only a hold keeps a process that is killed in the middle of this call from sending an RST.
 *
 * What the peer has closed, or has acknowledged of our close, is told to the copy by a TCP segment made
 * here, sent with SO_MARK @inject_mark and without timestamps: the hold of the tuple must let that
 * mark in (and nothing out), and policy routing must deliver it if the local address is not this host's.
 */
SOCKMI_EXPORT int sockmi_restore(const void *const *images, const size_t *lengths,
				 const struct sockmi_placement *placements, size_t n, uint32_t inject_mark,
				 int *out_fds, struct sockmi_result *results);

/*
 * Which dormant copies have waited for so long that a timer of theirs has run out (result LAPSED), or the kernel has given
 * them up: they must be made anew. It takes a second until the first one can.
 */
SOCKMI_EXPORT int sockmi_lapsed(const int *fds, const void *const *images, const size_t *lengths, size_t n,
				struct sockmi_result *results);

/*
 * Bring dormant copies to life: sizes, repair off, which makes the kernel tell the peer, or listen(). That is
 * the last step that can fail: a copy that fails has never lived, and its image is as good as before. From
 * repair off on the copy is whole, whoever dies: its unsent data and its FIN have been in it since the restore.
 */
SOCKMI_EXPORT int sockmi_activate(const int *fds, const void *const *images, const size_t *lengths, size_t n,
				  struct sockmi_result *results);

/* Which originals do not equal their images any more: sockmi_release() would refuse them. Changes nothing. */
SOCKMI_EXPORT int sockmi_compare(const int *fds, const void *const *images, const size_t *lengths, size_t n,
				 struct sockmi_result *results);

/*
 * Close originals for every holder, without a packet, if they still equal their images: the next
 * call of a holder gets ECONNABORTED, later ones ENOTCONN or EPIPE; a listener's accept EINVAL. Of one
 * that was not connected listen() gets EINVAL and connect() EISCONN; that needs CONFIG_INET_DIAG_DESTROY, and the
 * caller in the socket's network namespace. Without, a listener is only closed.
 * What waits in a listener's queue must have been taken before (sockmi_keeper_start). The descriptors stay open.
 */
SOCKMI_EXPORT int sockmi_release(const int *fds, const void *const *images, const size_t *lengths, size_t n,
				 struct sockmi_result *results);

/*
 * As sockmi_release(), but connections all or none: also if this process is killed when some are closed.
 */
SOCKMI_EXPORT int sockmi_release_together(const int *fds, const void *const *images, const size_t *lengths, size_t n,
					  struct sockmi_result *results);

/* As sockmi_release(), for one that does not listen any more, or is bound or unconnected; also if it is dead already. 0, or -1 with errno. */
SOCKMI_EXPORT int sockmi_deaden(int fd);

/*
 * Keep in the file @path which originals are in repair, and what is to be put back: for the daemon that starts after this
 * one was killed. At the start, before any other call. How many were left by the last one, or -errno: then it is kept in memory.
 */
SOCKMI_EXPORT int sockmi_in_repair_keep(const char *path);

/* The inodes of those that were left; how many (never more than @room). */
SOCKMI_EXPORT size_t sockmi_in_repair_left(uint64_t *inodes, size_t room);

/* Lead an original that was left in repair out of it, and put its options back. 1, or 0: it was not. */
SOCKMI_EXPORT int sockmi_end_repair(int fd);

/* What is still left has no owner any more. */
SOCKMI_EXPORT void sockmi_in_repair_forget(void);

/* Close dormant copies without a packet. */
SOCKMI_EXPORT void sockmi_discard(const int *fds, size_t n);

/* Close descriptors of sockets that others have had; what SO_LINGER says is not waited for, and stays as it is. */
SOCKMI_EXPORT void sockmi_close(const int *fds, size_t count);

/*
 * Close what is no socket, in threads: who serves its file system (FUSE) may keep close() for ever. @whose: the
 * user of whom they are, for whom they count.
 */
SOCKMI_EXPORT void sockmi_close_aside(const int *fds, size_t count, uint32_t whose);

/* How many of them are not closed yet; @all: of all users. */
SOCKMI_EXPORT size_t sockmi_closing_aside(uint32_t whose, size_t *all);

/* What a keeper is told, an octet each. */
#define SOCKMI_KEEPER_TAKE 't'
#define SOCKMI_KEEPER_LISTENER_GONE 'g'

/*
 * Start a process, no child of this one, that can take what waits in a listener's queue and outlives us.
 * Its pid, or -errno. @control: one end of a SOCK_SEQPACKET pair; both it and @listener stay ours.
 *
 * Told to take (its owner must be stopped), it accepts all that waits, and answers how much it keeps by
 * now (uint32_t). Told that the listener has gone, it lets go of that. When the other end is closed it ends
 * if it keeps nothing, else it sleeps until it is killed.
 */
SOCKMI_EXPORT int sockmi_keeper_start(int listener, int control);

/* What the SYN of a connecting socket offers: its window scale, and 256 if its timestamps count microseconds. */
SOCKMI_EXPORT int sockmi_syn_offered(int fd);

#endif
