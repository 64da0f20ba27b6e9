/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/sockmi: what the sockmi kernel module promises to programs. This file is the specification.
 *
 * The module freezes, dumps, restores and silently closes TCP sockets. The bytes that it writes and
 * reads are images as specified in docs/image.md, the same as the repair engine's: little-endian,
 * independent of the kernel's version, checked by one codec on both sides.
 *
 * Conventions
 * -----------
 * Every ioctl takes one struct. Its size is part of the ioctl's number, and only the ordinal
 * (_IOC_NR) selects the operation: a caller built for an older header passes less (the rest counts as
 * zero), one built for a newer header passes more (accepted if the rest is zero, else -E2BIG).
 * On return the struct is written back as far as the caller's size goes, also when the
 * call fails; so `refusal` and the like can be read after an error. Members that are not said
 * to be set by the caller ("in") are ignored. Reserved members and unknown flags must be zero (-EINVAL).
 * Times are in ms or us as named, sizes in bytes, ports are numbers, not network order.
 *
 * SOCKMI_IOC_HELLO comes first; until it has succeeded all others fail with -EPROTO.
 *
 * Beside what is said of a call, any may fail: -ENOTTY there is no such operation; -EINVAL an argument is not as described;
 * -EPERM, -EFAULT, -ENOMEM. Where a process or a descriptor is named: -ESRCH, -EBADF, -ENOTSOCK; where a slot is: -ENXIO
 * there is none, or another call uses it; where an image is given: -EDQUOT (SOCKMI_REFUSAL_MEMORY) the module's memory
 * is used up. CLAIM and RESTORE: -EMFILE the file has 65536 claims and copies. IMPORT: -EXDEV its sockets are of several
 * network namespaces.
 *
 * Who may
 * -------
 * Everybody may open the device, say hello and IMPORT. All else needs CAP_NET_ADMIN in the user namespace
 * that owns the network namespace concerned (that of the socket, or for lists that in which the
 * device was opened): -EPERM. CLAIM of another process's descriptor needs CAP_SYS_PTRACE and
 * CAP_NET_ADMIN in the initial user namespace; others get a duplicate by pidfd_getfd(2) and claim that.
 * What a claim or a restore has begun is decided by whoever has the device file, whatever his capabilities are.
 *
 * An export
 * ---------
 *
 *   CLAIM --> CLAIMED --FREEZE--> FROZEN --COMMIT--> COMMITTING --> COMMITTED
 *                ^                  |
 *                |                  | ABORT, the deadline, close of the device
 *              FREEZE               v
 *                +------------- THAWED
 *
 *   RELEASE (or the end of the claim's lifetime, if it is not frozen) forgets an export in any state;
 *   one that is FROZEN is thawed before.
 *
 * CLAIM pins the open file and reserves the socket: a second claim of it fails with -EBUSY, and so does RESTORE into
 * it; nor can a dormant copy be claimed. The connection goes on undisturbed; only the effect of a last close() waits
 * for the claim's end, which is why a claim has a lifetime. If that end comes by itself, it does not wait as SO_LINGER
 * would have it. FREEZE takes the socket's own lock and keeps it after the call
 * has returned: packets that come in wait in the backlog (about 2 * rcvbuf + sndbuf / 2 + 64 KiB; what
 * exceeds it is lost like on the wire), timers wait, system calls of the owner block, non-blocking
 * ones too. The image is in the slot when FREEZE returns. If neither COMMIT nor ABORT comes
 * before the deadline, the kernel thaws by itself; a COMMIT after that fails with -ETIMEDOUT and changes
 * nothing. A thaw replays what came in meanwhile, in order; nothing is lost and nothing sent twice.
 * COMMIT names the `epoch` that FREEZE returned: an image of an earlier freeze cannot be
 * committed (-ESTALE). COMMIT closes the original without a packet: its owner sees ECONNABORTED once, then
 * ENOTCONN (recv) or EPIPE (send), and EPOLLHUP; one that was not connected can neither listen (EINVAL) nor
 * connect (EISCONN) any more; what the peer sends afterwards would be answered with a RST
 * by the host, so the tuple must be held (NAT helper, or other means) before COMMIT.
 *
 * Locking the socket does not stop SYNs to a listener: hold its port before FREEZE. Connections in its
 * accept queue travel as exports of their own, accepted before; COMMIT drops those left without a packet, but for what the
 * kernel gives to another of its SO_REUSEPORT group (net.ipv4.tcp_migrate_req). Handshakes that are half done cannot
 * travel: when the listener is gone, the host answers the peer's last ACK with a RST. They go on in
 * spite of the lock, so either wait for them (SOCKMI_COMMIT_SETTLED), or hold their tuples too.
 *
 * An import
 * ---------
 * RESTORE puts an image into the caller's own unconnected, unbound TCP socket and leaves it DORMANT:
 * complete, hashed, and frozen like an exported one, mute and deaf. ACTIVATE brings it to life (what came in meanwhile
 * is processed, unsent data is sent, the peer gets an ACK); DISCARD closes it without a packet, and so do the end of the
 * device file and a deadline (a process that blocks on a dormant socket cannot be killed): keep the image until
 * ACTIVATE has succeeded, it can be restored again. Of a connection ACTIVATE cannot fail for another reason than that
 * (-ENOENT); of a listener it can (-EADDRINUSE). With SOCKMI_DEV_ACTIVATE in flags both happen in one call.
 * A connection in SYN-SENT sends a SYN when it is restored, the same as its first: hold the tuple.
 *
 * Lists are for applications that wait for sockets: LIST_ADD stores an image in one of the three lists of
 * the network namespace (reserved, not visible), PUBLISH makes it visible, REMOVE takes it back, IMPORT takes a
 * published entry into the caller's socket. Entries that are published outlive the device file.
 *
 * A delivery
 * ----------
 * DELIVER gives a connection to a program that has never heard of this module: to whoever listens, in the network
 * namespace of the device, for what the peer sends. The socket is made, restored, and put at the end of the
 * listener's accept queue; accept(2) returns it with the peer's address, and with its sequence numbers and queues.
 * There is no handshake: no packet but those of the connection itself is made, so SYN cookies, TCP_FASTOPEN and
 * TCP_DEFER_ACCEPT are not concerned. The listener is chosen as for a SYN of that peer (the most specific address,
 * SO_BINDTODEVICE, one of a SO_REUSEPORT group, BPF programs of sk_lookup and SO_REUSEPORT, which see no packet). IPv4
 * images can be delivered to IPv6 listeners, and v4-mapped ones to IPv4 listeners. The socket's options are the image's;
 * but SO_REUSEADDR, SO_REUSEPORT, the device it is bound to, its owner, cgroup and security label are those of a child
 * of the listener's, and so are SO_MARK and SO_PRIORITY if the image does not name them. Until it is in the queue nobody can see it; when it is, it is complete. Nothing of it is
 * left after an error, and nothing has been sent: the image can be delivered again, or restored. (As with all calls, -EFAULT may
 * also mean that the answer could not be written back to what was writable before: then it is done.)
 *
 * Slots
 * -----
 * Kernel memory that the caller maps. Export slots can be mapped for reading only. Import slots are writable;
 * an image is copied out of them once and checked in the copy. SLOTS creates them, mmap() at the offset that it
 * returned maps them. The memory is charged to the caller (memory cgroup), and
 * bounded for each file and for the module.
 *
 * Events
 * ------
 * read(2) returns whole struct sockmi_event records, blocking unless O_NONBLOCK; poll(2) says EPOLLIN, and with
 * O_ASYNC the signal chosen by F_SETSIG (the paper's SIGUSR1) is sent to the F_SETOWN owner. When too
 * many wait, new ones are dropped and counted in `lost`, first those about import requests. Their memory counts as that
 * of slots does; who causes one is charged for it.
 */
#ifndef _UAPI_SOCKMI_H
#define _UAPI_SOCKMI_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define SOCKMI_DEV_PATH "/dev/sockmi"
#define SOCKMI_DEV_ABI_MAJOR 1
/*
 * 2: who owns the socket of an EXPORT_REQUEST; ANSWER says if nobody asks. 3: HOLD keeps packets, `kept`.
 * 5: SOCKMI_COMMIT_OWNED. 6: SOCKMI_COMMIT_SETTLED
 */
#define SOCKMI_DEV_ABI_MINOR 6

/* An end of a connection; IPv4 addresses are v4-mapped (::ffff:a.b.c.d); all zero: none. */
struct sockmi_dev_endpoint {
	__u8 address[16];
	__u16 port;
	__u16 reserved;
	__u32 scope_id;
};

/* ---- HELLO ---- */

/* Bits of features. */
#define SOCKMI_FEATURE_EXPORT (1u << 0)
#define SOCKMI_FEATURE_RESTORE (1u << 1)
#define SOCKMI_FEATURE_LISTS (1u << 2)
#define SOCKMI_FEATURE_SYSCTL (1u << 3)
#define SOCKMI_FEATURE_NAT (1u << 4)
#define SOCKMI_FEATURE_USEC_TS (1u << 5) /* this kernel knows TCP timestamps in microseconds */
#define SOCKMI_FEATURE_DELIVER (1u << 6)

/**
 * struct sockmi_ioc_hello - versions and limits
 * @abi_major: in: what the caller was built for, another is refused with -EPROTONOSUPPORT; out: the module's
 * @abi_minor: out: ordinals and members are only added within a major
 * @features: out: SOCKMI_FEATURE_*
 * @image_major: out: version of the image format that FREEZE writes
 * @image_minor: out
 * @slots_max: out: slots of one kind for a file
 * @image_max_bytes: out: largest image
 * @slots_max_bytes: out: all slots of a file together
 * @freeze_default_ms: out: deadline of FREEZE if none is asked for
 * @freeze_max_ms: out: largest deadline
 * @claim_max_ms: out: largest lifetime of a claim
 * @dormant_max_ms: out: largest lifetime of a dormant copy
 */
struct sockmi_ioc_hello {
	__u16 abi_major;
	__u16 abi_minor;
	__u32 features;
	__u16 image_major;
	__u16 image_minor;
	__u32 slots_max;
	__aligned_u64 image_max_bytes;
	__aligned_u64 slots_max_bytes;
	__u32 freeze_default_ms;
	__u32 freeze_max_ms;
	__u32 claim_max_ms;
	__u32 dormant_max_ms;
};

/* ---- Slots ---- */

#define SOCKMI_SLOT_EXPORT 1
#define SOCKMI_SLOT_IMPORT 2

/**
 * struct sockmi_ioc_slots - make this file's slots of one kind, once
 * @kind: in: SOCKMI_SLOT_*
 * @count: in: 1..slots_max
 * @bytes: in: of each; out: rounded up to pages
 * @offset: out: of slot 0 for mmap(); slot i is at offset + i * bytes
 *
 * -EBUSY: they are there; -EDQUOT: more than a file, or all files together, or those of all who do not administer the
 * host, may have.
 */
struct sockmi_ioc_slots {
	__u32 kind;
	__u32 count;
	__aligned_u64 bytes;
	__aligned_u64 offset;
};

/* ---- Why not ---- */

/**
 * enum sockmi_refusal - why a socket or an image cannot be moved
 *
 * Goes with -EOPNOTSUPP unless another error is said.
 */
enum sockmi_refusal {
	SOCKMI_REFUSAL_NONE = 0,
	SOCKMI_REFUSAL_NO_SOCKET = 1,	    /* -EBADF, -ENOTSOCK: no such descriptor, or not a socket */
	SOCKMI_REFUSAL_NOT_TCP = 2,	    /* not a TCP socket over IPv4 or IPv6 */
	SOCKMI_REFUSAL_MPTCP = 3,	    /* part of a multipath connection */
	SOCKMI_REFUSAL_ULP = 4,		    /* kernel TLS or another upper layer protocol */
	SOCKMI_REFUSAL_USER_DATA = 5,	    /* a kernel service (sockmap, NFS, ...) owns it */
	SOCKMI_REFUSAL_REPAIR = 6,	    /* somebody has it in TCP_REPAIR */
	SOCKMI_REFUSAL_STATE = 7,	    /* SYN-RECEIVED, TIME-WAIT, or a state this call does not take */
	SOCKMI_REFUSAL_AUTHENTICATED = 8,   /* TCP MD5 or TCP-AO keys */
	SOCKMI_REFUSAL_FASTOPEN = 9,	    /* a fast open is under way, or a child without its ACK */
	SOCKMI_REFUSAL_ACCECN = 10,	    /* accurate ECN is negotiated, and this kernel cannot carry it */
	SOCKMI_REFUSAL_URGENT = 11,	    /* urgent data whose mark is not in what has come in order */
	SOCKMI_REFUSAL_BUSY = 12,	    /* -EBUSY: claimed by somebody else */
	SOCKMI_REFUSAL_INCONSISTENT = 13,   /* queues and sequence numbers do not fit each other: a bug, or memory not readable */
	SOCKMI_REFUSAL_TOO_LARGE = 14,	    /* -ENOSPC: `bytes` says how large the slot must be */
	SOCKMI_REFUSAL_IMAGE = 15,	    /* -EBADMSG: see image_error (enum sockmi_image_error) */
	SOCKMI_REFUSAL_FAMILY = 16,	    /* -EAFNOSUPPORT: the target socket's family is not the image's */
	SOCKMI_REFUSAL_TARGET = 17,	    /* -EISCONN: the target is bound, connected or listening */
	SOCKMI_REFUSAL_ADDRESS = 18,	    /* -EADDRNOTAVAIL: the local address is not this host's, or there is no route */
	SOCKMI_REFUSAL_PORT_TAKEN = 19,	    /* -EADDRINUSE */
	SOCKMI_REFUSAL_TUPLE_TAKEN = 20,    /* -EADDRINUSE: the very connection exists here */
	SOCKMI_REFUSAL_TS_UNIT = 21,	    /* its timestamps have a unit that this kernel has not */
	SOCKMI_REFUSAL_SCALE = 22,	    /* SYN-SENT: this host would offer another window scale */
	SOCKMI_REFUSAL_MEMORY = 23,	    /* -ENOMEM, -ENOBUFS */
	SOCKMI_REFUSAL_NAMESPACE = 24,	    /* -EXDEV: the socket is of another network namespace than the device file */
	SOCKMI_REFUSAL_LIST_FULL = 25,	    /* -ENOSPC */
	SOCKMI_REFUSAL_KTLS = 26,	    /* the image has kernel TLS keys */
	SOCKMI_REFUSAL_ZEROCOPY = 27,	    /* sends of MSG_ZEROCOPY are under way, or their completions not read */
	SOCKMI_REFUSAL_ERROR = 28,	    /* never given: a pending error is lost, and named in the image's fidelity report */
	SOCKMI_REFUSAL_NO_LISTENER = 29,    /* -ECONNREFUSED: nobody here listens for that connection */
	SOCKMI_REFUSAL_LISTENER = 30,	    /* whoever listens is multipath TCP, has keys, a filter or an IPsec policy, or is the kernel's own */
	SOCKMI_REFUSAL_OWNER = 31,	    /* -EACCES: the listener is another user's */
	SOCKMI_REFUSAL_ACCEPT_QUEUE = 32,   /* -EAGAIN: the listener's accept queue is full */
	SOCKMI_REFUSAL_LOCKED = 33,	    /* -EBUSY: a system call keeps its lock; it may wait for memory that somebody withholds */
	SOCKMI_REFUSAL_IPSEC = 34,	    /* it has an IPsec policy of its own (IP_XFRM_POLICY) */
};

/* ---- Exports ---- */

enum sockmi_export_state {
	SOCKMI_EXPORT_CLAIMED = 1,
	SOCKMI_EXPORT_FROZEN = 2,
	SOCKMI_EXPORT_COMMITTING = 3,
	SOCKMI_EXPORT_COMMITTED = 4,
	SOCKMI_EXPORT_THAWING = 5,
	SOCKMI_EXPORT_THAWED = 6,
};

/**
 * struct sockmi_ioc_claim - pin a socket, look at it, promise nothing yet
 * @pid: in: process in the caller's pid namespace; 0: the caller
 * @fd: in: its descriptor
 * @flags: in: 0
 * @lifetime_ms: in: how long the claim may last while it is not frozen; 0: the maximum
 * @id: out: names the export in later calls on this file
 * @refusal: out: enum sockmi_refusal
 * @owner_uid: out: user id of the socket's owner in the caller's user namespace
 * @local: out
 * @remote: out
 * @family: out: 2 IPv4 socket, 10 IPv6 socket
 * @kind: out: as in the image: 1 bound, 2 listening, 3 connected, 4 unconnected
 * @state: out: as in the image
 * @bytes: out: an image made now would need at most so many
 */
struct sockmi_ioc_claim {
	__s32 pid;
	__s32 fd;
	__u32 flags;
	__u32 lifetime_ms;
	__aligned_u64 id;
	__u32 refusal;
	__u32 owner_uid;
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
	__u16 family;
	__u8 kind;
	__u8 state;
	__u32 reserved;
	__aligned_u64 bytes;
};

/**
 * struct sockmi_ioc_freeze - freeze and dump
 * @id: in
 * @slot: in: export slot that gets the image
 * @deadline_ms: in: 0: the default; above the maximum: -EINVAL
 * @flags: in: 0
 * @refusal: out
 * @epoch: out: number of this freeze
 * @reserved: 0
 * @bytes: out: of the image; with -ENOSPC: that would have been needed (and the socket is thawed)
 *
 * From CLAIMED or THAWED; -EBUSY in other states, and (SOCKMI_REFUSAL_LOCKED) if a system call on the socket has not
 * ended within 250 ms, or within deadline_ms if that is less. A refusal leaves the socket thawed. -EPERM: the file was opened
 * by somebody who lacks CAP_NET_ADMIN in the initial user namespace, and the parameter users_may_hold is not set.
 */
struct sockmi_ioc_freeze {
	__aligned_u64 id;
	__u32 slot;
	__u32 deadline_ms;
	__u32 flags;
	__u32 refusal;
	__u32 epoch;
	__u32 reserved;
	__aligned_u64 bytes;
};

/*
 * Flag of COMMIT: not if the caller has the only descriptor of it: its owner has closed his then, and an end of which the
 * peer has to hear must not move. The caller has exactly one. Whoever closes later closes what has moved.
 */
#define SOCKMI_COMMIT_OWNED (1u << 0)
/*
 * Flag of COMMIT: not if handshakes with the listener are half done, TCP_DEFER_ACCEPT's included, which wait for data. Who gets
 * -EAGAIN can ABORT, accept what has come, and try again; how long is the caller's choice. A SYN that comes between the
 * look and the close is not seen: hold the port.
 */
#define SOCKMI_COMMIT_SETTLED (1u << 1)

/**
 * struct sockmi_ioc_decision - COMMIT, ABORT, RELEASE, ACTIVATE, DISCARD, PUBLISH, REMOVE
 * @id: in
 * @epoch: in: of FREEZE, for COMMIT and ABORT
 * @flags: in: SOCKMI_COMMIT_*, for COMMIT; else 0
 *
 * -ENOENT: no such id on this file; -EBUSY: wrong state; COMMIT, ABORT: -ETIMEDOUT the deadline was
 * first, -ESTALE another epoch; COMMIT: -EBADF its owner has closed it, -EAGAIN handshakes are half done; it stays frozen. REMOVE
 * takes entries of the namespace, also those that another file has published or reserved; -EBUSY: an import is trying
 * this one right now, and if it fails the entry stays: ask again. PUBLISH: -EPERM another file has reserved it, -EBUSY
 * it is published.
 */
struct sockmi_ioc_decision {
	__aligned_u64 id;
	__u32 epoch;
	__u32 flags;
};

/**
 * struct sockmi_ioc_export_info - look at an export
 * @id: in
 * @state: out: enum sockmi_export_state
 * @epoch: out: of the last freeze
 * @left_ms: out: until the deadline (FROZEN) or the end of the lifetime
 * @timed_out: out: 1 if the last thaw was the deadline's doing
 * @frozen_us: out: how long the last freeze lasted, or has lasted so far
 */
struct sockmi_ioc_export_info {
	__aligned_u64 id;
	__u32 state;
	__u32 epoch;
	__u32 left_ms;
	__u32 timed_out;
	__aligned_u64 frozen_us;
};

/* ---- Imports ---- */

#define SOCKMI_NO_SLOT 0xffffffffu

/* Flags of RESTORE and IMPORT. */
#define SOCKMI_DEV_ACTIVATE (1u << 0)	 /* RESTORE: do not stop at dormant */
#define SOCKMI_DEV_TRANSPARENT (1u << 1) /* the local address need not be this host's */
#define SOCKMI_DEV_RESET_PATH (1u << 2)	 /* another path: start with this host's congestion window and RTT */

/*
 * Bits of `approximated` and `reset`: what of the image the restored socket has not exactly, or not at all.
 * The numbers are those of enum sockmi_fidelity_bit of the repair engine.
 */
#define SOCKMI_LOSS_WINDOW (1ull << 3)
#define SOCKMI_LOSS_NEGOTIATED (1ull << 4)
#define SOCKMI_LOSS_TIMESTAMP_CLOCK (1ull << 5)
#define SOCKMI_LOSS_OPTIONS (1ull << 6)
#define SOCKMI_LOSS_LISTENER (1ull << 9)
#define SOCKMI_LOSS_BUFFER_SIZES (1ull << 10)
#define SOCKMI_LOSS_PATH_MODEL (1ull << 14)
#define SOCKMI_LOSS_CONGESTION_STATE (1ull << 15)
#define SOCKMI_LOSS_ECN (1ull << 16)
#define SOCKMI_LOSS_TS_RECENT (1ull << 17)
#define SOCKMI_LOSS_OUT_OF_ORDER (1ull << 18)
#define SOCKMI_LOSS_SACK_SCOREBOARD (1ull << 19)
#define SOCKMI_LOSS_TIMERS (1ull << 20)
#define SOCKMI_LOSS_COUNTERS (1ull << 21)
#define SOCKMI_LOSS_ERROR_QUEUE (1ull << 22)
#define SOCKMI_LOSS_SAVED_SYN (1ull << 23)
#define SOCKMI_LOSS_FILTER (1ull << 24)

#define SOCKMI_LOST_OPTIONS_MAX 6

/**
 * struct sockmi_ioc_restore - an image into the caller's socket
 * @fd: in: unconnected, unbound TCP socket of the caller, of the image's family
 * @slot: in: import slot that holds the image, or SOCKMI_NO_SLOT
 * @image: in: address of the image if there is no slot
 * @bytes: in: its length
 * @flags: in: SOCKMI_DEV_*
 * @refusal: out
 * @image_error: out: enum sockmi_image_error if the image is refused
 * @lost: out: how many socket options of the image this host did not take
 * @id: out: for ACTIVATE and DISCARD; 0 if activated at once
 * @local: in: local endpoint to use instead of the image's; zero: as in the image
 * @approximated: out: SOCKMI_LOSS_*
 * @reset: out: SOCKMI_LOSS_*
 * @lost_options: out: the first of them (ids of docs/image.md)
 * @deadline_ms: in: how long it may be dormant; 0: the maximum
 *
 * The socket's options become the image's, whatever it had; only IP_TRANSPARENT, IP_FREEBIND and their like for IPv6 stay
 * set if they were, for they are the caller's consent to a foreign address. After an error, and after DISCARD, it is
 * closed again, unbound, with the options that it had before, and nothing was sent. (An IPv6 socket that has had an
 * IPv4-mapped connection takes no other IPv6 one after that: TARGET.) Without SOCKMI_DEV_ACTIVATE -EPERM as FREEZE has it.
 */
struct sockmi_ioc_restore {
	__s32 fd;
	__u32 slot;
	__aligned_u64 image;
	__aligned_u64 bytes;
	__u32 flags;
	__u32 refusal;
	__u32 image_error;
	__u32 lost;
	__aligned_u64 id;
	struct sockmi_dev_endpoint local;
	__aligned_u64 approximated;
	__aligned_u64 reset;
	__u16 lost_options[SOCKMI_LOST_OPTIONS_MAX];
	__u32 deadline_ms;
};

/* Flags of DELIVER. */
#define SOCKMI_DELIVER_ANY_UID (1u << 0) /* whoever owns the listener; else only @uid */
#define SOCKMI_DELIVER_PROBE (1u << 1)	 /* only ask who would get it, and whether there is room */

/**
 * struct sockmi_ioc_deliver - a connection into the accept queue of whoever listens for it
 * @slot: in: import slot that holds the image, or SOCKMI_NO_SLOT; ignored by PROBE
 * @flags: in: SOCKMI_DELIVER_*
 * @image: in: address of the image if there is no slot
 * @bytes: in: its length
 * @uid: in: user (in the caller's user namespace) to whom the listener must belong
 * @restore_flags: in: SOCKMI_DEV_TRANSPARENT, SOCKMI_DEV_RESET_PATH
 * @local: in: local endpoint to use instead of the image's; zero: as in the image; PROBE: the local endpoint
 * @remote: PROBE, in: the peer; else out: as in the image
 * @ifindex: in: interface by which the peer's packets come in: listeners that are bound to it, or to none, are
 *	asked; 0: only those that are bound to none
 * @refusal: out
 * @image_error: out: enum sockmi_image_error if the image is refused
 * @lost: out: how many socket options of the image this host did not take
 * @approximated: out: SOCKMI_LOSS_*
 * @reset: out: SOCKMI_LOSS_*
 * @lost_options: out: the first of them (ids of docs/image.md)
 * @listener_uid: out: who owns the listener, in the caller's user namespace
 * @listener_family: out: 2 IPv4 socket, 10 IPv6 socket; 0: there is none
 * @reserved: in: 0
 * @queued: out: connections in its accept queue, this one included
 * @queue_max: out: how many it may have
 * @reserved2: in: 0
 *
 * Needs CAP_NET_ADMIN. Connections that are ESTABLISHED or in CLOSE_WAIT; the others are refused with STATE. -EAGAIN
 * with ACCEPT_QUEUE: full, now. -EBUSY with LOCKED: its owner keeps the listener's lock. A listener that is closed after the delivery resets the connection, as it does with all
 * that it has not accepted.
 */
struct sockmi_ioc_deliver {
	__u32 slot;
	__u32 flags;
	__aligned_u64 image;
	__aligned_u64 bytes;
	__u32 uid;
	__u32 restore_flags;
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
	__u32 ifindex;
	__u32 refusal;
	__u32 image_error;
	__u32 lost;
	__aligned_u64 approximated;
	__aligned_u64 reset;
	__u16 lost_options[SOCKMI_LOST_OPTIONS_MAX];
	__u32 listener_uid;
	__u16 listener_family;
	__u16 reserved;
	__u32 queued;
	__u32 queue_max;
	__u32 reserved2;
};

enum sockmi_list {
	SOCKMI_LIST_BOUND = 1,	   /* bound and unconnected sockets */
	SOCKMI_LIST_LISTENING = 2,
	SOCKMI_LIST_CONNECTED = 3,
};

/* Flags of LIST_ADD. */
#define SOCKMI_ENTRY_ANY_UID (1u << 0) /* any user may take it; else only @uid and CAP_NET_ADMIN */
#define SOCKMI_ENTRY_PUBLISH (1u << 1) /* at once */

/**
 * struct sockmi_ioc_list_add - an image into the list that its kind selects
 * @slot: in: import slot or SOCKMI_NO_SLOT
 * @flags: in: SOCKMI_ENTRY_*
 * @image: in: address if there is no slot
 * @bytes: in
 * @uid: in: user (in the caller's user namespace) who may take it
 * @restore_flags: in: SOCKMI_DEV_TRANSPARENT, SOCKMI_DEV_RESET_PATH: how it shall be restored
 * @local: in: local endpoint to use instead of the image's; zero: as in the image
 * @id: out
 * @refusal: out
 * @image_error: out
 *
 * -ENOSPC with LIST_FULL: the list's maximum is reached; nothing is queued instead.
 */
struct sockmi_ioc_list_add {
	__u32 slot;
	__u32 flags;
	__aligned_u64 image;
	__aligned_u64 bytes;
	__u32 uid;
	__u32 restore_flags;
	struct sockmi_dev_endpoint local;
	__aligned_u64 id;
	__u32 refusal;
	__u32 image_error;
};

/**
 * struct sockmi_ioc_list_info - how full, who waits
 * @list: in: enum sockmi_list
 * @max: out
 * @entries: out: published
 * @reserved: out: added, not yet published
 * @waiting: out: import requests that wait for this list
 */
struct sockmi_ioc_list_info {
	__u32 list;
	__u32 max;
	__u32 entries;
	__u32 reserved;
	__u32 waiting;
	__u32 pad;
};

/**
 * struct sockmi_ioc_list_next - walk through a list in the order of LIST_ADD
 * @list: in
 * @published: out: 1, or 0 if it is only reserved
 * @after: in: id of the entry before, which may be gone, 0: the first; -ENOENT at the end
 * @id: out
 * @bytes: out: of the image
 * @migration_id: out: as in the image
 * @local: out: as in the image
 * @remote: out
 * @age_ms: out: since LIST_ADD
 */
struct sockmi_ioc_list_next {
	__u32 list;
	__u32 published;
	__aligned_u64 after;
	__aligned_u64 id;
	__aligned_u64 bytes;
	__u8 migration_id[16];
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
	__aligned_u64 age_ms;
};

/**
 * struct sockmi_ioc_match - would a waiting import request take this?
 * @family: in: as in an image; 0: any
 * @kind: in
 * @state: in
 * @pad: in: 0
 * @waiting: out: number of waiting requests that fit
 * @local: in
 * @remote: in
 * @uid: in: user who may take it, or with @flags SOCKMI_ENTRY_ANY_UID anybody
 * @flags: in
 */
struct sockmi_ioc_match {
	__u16 family;
	__u8 kind;
	__u8 state;
	__u32 pad;
	__u32 waiting;
	__u32 uid;
	__u32 flags;
	__u32 pad2;
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
};

/**
 * struct sockmi_ioc_request - one socket that waits for an import
 * @fd: in: unconnected, unbound TCP socket, for images of its family; negative: skipped, as poll() does
 * @list: in: enum sockmi_list
 * @states: in: bit 1 << state for each that is wanted; 0: all
 * @local_prefix: in: bits of @local.address that must agree, 0..128 (IPv4: 96 + n)
 * @remote_prefix: in: likewise
 * @flags: in: 0
 * @local: in: port 0: any
 * @remote: in: port 0: any
 * @result: out: 1 imported, 0 not, or a negative errno for this request alone
 * @refusal: out
 * @id: out: of the entry
 * @migration_id: out
 * @approximated: out
 * @reset: out
 * @context: in: address of a buffer for the image's CONTEXT, or 0
 * @context_room: in: its size
 * @context_bytes: out: length of the CONTEXT; what exceeds the room is cut off
 */
struct sockmi_ioc_request {
	__s32 fd;
	__u32 list;
	__u32 states;
	__u16 local_prefix;
	__u16 remote_prefix;
	__u32 flags;
	__s32 result;
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
	__u32 refusal;
	__u32 context_room;
	__aligned_u64 id;
	__u8 migration_id[16];
	__aligned_u64 approximated;
	__aligned_u64 reset;
	__aligned_u64 context;
	__u32 context_bytes;
	__u32 reserved;
};

#define SOCKMI_REQUESTS_MAX 64
#define SOCKMI_WAITERS_MAX 64 /* calls of a user that wait, in a network namespace */

/**
 * struct sockmi_ioc_import - the paper's import_socket(): wait for entries, take them
 * @requests: in: address of an array of struct sockmi_ioc_request
 * @count: in: 1..SOCKMI_REQUESTS_MAX
 * @request_bytes: in: sizeof(struct sockmi_ioc_request) of the caller
 * @timeout_ms: in: negative: for ever; 0: do not wait
 * @flags: in: 0
 *
 * Returns how many were imported, 0 after the timeout, -EINTR after a signal. The lists are those of the
 * sockets' network namespace. Like poll(): it returns as soon as at least one was imported or has failed. An entry
 * whose address this host has not, or has in use, is left for others, and the next one tried: such a failure is
 * told if none of them does. -EBUSY: SOCKMI_WAITERS_MAX calls of this user wait, who does not administer the namespace.
 */
struct sockmi_ioc_import {
	__aligned_u64 requests;
	__u32 count;
	__u32 request_bytes;
	__s32 timeout_ms;
	__u32 flags;
};

/* ---- Daemon ---- */

/**
 * struct sockmi_ioc_serve - be this network namespace's daemon: get its events
 * @flags: in: 0
 * @reserved: 0
 *
 * -EBUSY: another file serves. Ends with the file.
 */
struct sockmi_ioc_serve {
	__u32 flags;
	__u32 reserved;
};

#define SOCKMI_ANSWER_TEXT 96

/**
 * struct sockmi_ioc_answer - how an EXPORT_REQUEST ended
 * @id: in: of the event
 * @error: in: 0 or a positive errno, which the writer of the sysctl gets
 * @reserved: 0
 * @text: in: one line for the sysctl's reader, ended by a zero
 *
 * An answer is due for each request, also if its writer has gone meanwhile: then it is for the readers alone.
 * -ENOENT: there is no such request (any more).
 */
struct sockmi_ioc_answer {
	__aligned_u64 id;
	__u32 error;
	__u32 reserved;
	char text[SOCKMI_ANSWER_TEXT];
};

/**
 * struct sockmi_ioc_forget - drop what keeps the module loaded when no device file is open, in all network namespaces
 * @flags: in: 0
 * @reserved: 0
 * @flows: out: flows of the NAT helper that are gone
 * @entries: out: published entries that are gone; those that an import is trying stay
 *
 * Connections that depend on a flow, or of which an entry is the only copy, are lost. For who administers the host's
 * network (CAP_NET_ADMIN in the initial user namespace), before the module is unloaded. -EINTR: a fatal signal.
 */
struct sockmi_ioc_forget {
	__u32 flags;
	__u32 reserved;
	__u32 flows;
	__u32 entries;
};

/*
 * An export by the sysctl
 * -----------------------
 * A write to sockmi.export claims the socket for the serving file (-ENOTCONN: there is none) and waits for `wait_ms`.
 * Whoever serves duplicates descriptor `owner_fd` of process `owner_pid` (pidfd_getfd(2)), checks that it is `inode`,
 * RELEASEs the claim, moves the socket like any other, and ANSWERs. (Or it freezes and commits the claim itself.)
 *
 * RELEASE decides between the two sides. The writer that gives up takes the claim back if nothing has been done with it
 * (-ETIMEDOUT, or -EINTR after a signal): RELEASE is then -ENOENT, and nothing may be moved. If the claim has been
 * released or frozen by then, the move goes on: the writer gets -EINPROGRESS (-EINTR), and readers of the sysctl learn
 * from the answer what came of it. So who serves ends or undoes the move before `wait_ms` have passed if it can.
 */

/**
 * enum sockmi_event_type - what read() tells
 * @SOCKMI_EVENT_EXPORT_REQUEST: somebody wrote to the sysctl sockmi.export: process `pid` of user `uid`; `id` is a claim
 *	that now belongs to this file; `remote`, `local` and `state` are the socket's, `to` the wanted target or all zero;
 *	`owner_pid`, `owner_fd` and `inode` say which socket, `wait_ms` how long the writer waits from now on
 * @SOCKMI_EVENT_THAWED: the deadline of export `id` has thawed it
 * @SOCKMI_EVENT_CLAIM_ENDED: the lifetime of claim `id` is over, it is forgotten
 * @SOCKMI_EVENT_TAKEN: entry `id` was imported by `pid`, `uid`; this event goes to the serving file
 * @SOCKMI_EVENT_DISCARDED: the deadline of the dormant copy `id` has discarded it
 * @SOCKMI_EVENT_WAITING: an import request began to wait for `list`; goes to the serving file
 *
 * From 32 on: NAT helper.
 */
enum sockmi_event_type {
	SOCKMI_EVENT_EXPORT_REQUEST = 1,
	SOCKMI_EVENT_THAWED = 2,
	SOCKMI_EVENT_CLAIM_ENDED = 3,
	SOCKMI_EVENT_TAKEN = 4,
	SOCKMI_EVENT_WAITING = 5,
	SOCKMI_EVENT_DISCARDED = 6,
};

/**
 * struct sockmi_event - one record of read(); 128 bytes
 * @type: enum sockmi_event_type; readers skip those that they do not know
 * @lost: events dropped before this one
 * @id: see the type
 * @pid: in the reader's pid namespace at open
 * @uid: in the user namespace of the file's opener
 * @list: enum sockmi_list
 * @state: as in an image
 * @kind: as in an image
 * @wait_ms: see the type
 * @local: see the type
 * @remote: see the type
 * @to: see the type
 * @bytes: of the image
 * @owner_pid: in the reader's pid namespace at open; 0: the process is not in it
 * @owner_fd: see the type
 * @inode: of the socket, as fstat(2) tells it
 */
struct sockmi_event {
	__u32 type;
	__u32 lost;
	__aligned_u64 id;
	__s32 pid;
	__u32 uid;
	__u16 list;
	__u8 state;
	__u8 kind;
	__u32 wait_ms;
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
	struct sockmi_dev_endpoint to;
	__aligned_u64 bytes;
	__s32 owner_pid;
	__s32 owner_fd;
	__aligned_u64 inode;
};

/* ---- Ordinals ---- */

#define SOCKMI_IOC_MAGIC 0xB9

#define SOCKMI_IOC_HELLO _IOWR(SOCKMI_IOC_MAGIC, 0x00, struct sockmi_ioc_hello)
#define SOCKMI_IOC_SLOTS _IOWR(SOCKMI_IOC_MAGIC, 0x01, struct sockmi_ioc_slots)
#define SOCKMI_IOC_SERVE _IOWR(SOCKMI_IOC_MAGIC, 0x02, struct sockmi_ioc_serve)
#define SOCKMI_IOC_ANSWER _IOWR(SOCKMI_IOC_MAGIC, 0x03, struct sockmi_ioc_answer)
#define SOCKMI_IOC_FORGET _IOWR(SOCKMI_IOC_MAGIC, 0x04, struct sockmi_ioc_forget)

#define SOCKMI_IOC_CLAIM _IOWR(SOCKMI_IOC_MAGIC, 0x10, struct sockmi_ioc_claim)
#define SOCKMI_IOC_FREEZE _IOWR(SOCKMI_IOC_MAGIC, 0x11, struct sockmi_ioc_freeze)
#define SOCKMI_IOC_COMMIT _IOWR(SOCKMI_IOC_MAGIC, 0x12, struct sockmi_ioc_decision)
#define SOCKMI_IOC_ABORT _IOWR(SOCKMI_IOC_MAGIC, 0x13, struct sockmi_ioc_decision)
#define SOCKMI_IOC_RELEASE _IOWR(SOCKMI_IOC_MAGIC, 0x14, struct sockmi_ioc_decision)
#define SOCKMI_IOC_EXPORT_INFO _IOWR(SOCKMI_IOC_MAGIC, 0x15, struct sockmi_ioc_export_info)

#define SOCKMI_IOC_RESTORE _IOWR(SOCKMI_IOC_MAGIC, 0x20, struct sockmi_ioc_restore)
#define SOCKMI_IOC_ACTIVATE _IOWR(SOCKMI_IOC_MAGIC, 0x21, struct sockmi_ioc_decision)
#define SOCKMI_IOC_DISCARD _IOWR(SOCKMI_IOC_MAGIC, 0x22, struct sockmi_ioc_decision)
#define SOCKMI_IOC_DELIVER _IOWR(SOCKMI_IOC_MAGIC, 0x23, struct sockmi_ioc_deliver)

#define SOCKMI_IOC_LIST_ADD _IOWR(SOCKMI_IOC_MAGIC, 0x30, struct sockmi_ioc_list_add)
#define SOCKMI_IOC_PUBLISH _IOWR(SOCKMI_IOC_MAGIC, 0x31, struct sockmi_ioc_decision)
#define SOCKMI_IOC_REMOVE _IOWR(SOCKMI_IOC_MAGIC, 0x32, struct sockmi_ioc_decision)
#define SOCKMI_IOC_LIST_INFO _IOWR(SOCKMI_IOC_MAGIC, 0x33, struct sockmi_ioc_list_info)
#define SOCKMI_IOC_LIST_NEXT _IOWR(SOCKMI_IOC_MAGIC, 0x34, struct sockmi_ioc_list_next)
#define SOCKMI_IOC_MATCH _IOWR(SOCKMI_IOC_MAGIC, 0x35, struct sockmi_ioc_match)
#define SOCKMI_IOC_IMPORT _IOWR(SOCKMI_IOC_MAGIC, 0x36, struct sockmi_ioc_import)

/* ======== NAT helper: ordinals 0x40..0x5f, events 32..63 (nat.c) ======== */

/*
 * Packets of a connection that has moved, or is moving. Stateless: each flow is a rule for one connection, found by one
 * look-up in a hash table of the network namespace in which the device was opened. Flows outlive the
 * device file; while any exists the module cannot be unloaded. All calls need CAP_NET_ADMIN in the user namespace
 * that owns the network namespace.
 *
 * Flows are charged to the caller (memory cgroup) and bounded by the module's parameter nat_flows_max. Their hash tables
 * are not charged, as rhashtable allocates them by itself: at most 27 bytes for each flow at rest, 40 while they are
 * resized, and twice that for flows that rewrite. Nor are packets that HOLD keeps.
 *
 *   exporter:	HOLD|MUTE -> REDIRECT|MUTE, `to` is the importer's end. What the peer sends is kept, then
 *		redirected. Needs forwarding (net.ipv4.ip_forward, net.ipv6.conf.all.forwarding), and a forward policy
 *		that admits what conntrack calls untracked.
 *   importer:	HOLD -> TRANSLATE, `local` is its own end, `to` the exporter's, as the peer knows it. What the
 *		socket sends gets that source after conntrack has seen it under the importer's name.
 *   next hop:	an importer that exports again replaces TRANSLATE by REDIRECT; the last importer translates
 *		to the first exporter's end.
 *
 * HOLD keeps the latest of what comes in for a connection, in order, at most 256 packets or 1 MiB of it, and for all
 * flows as much as the module's parameter nat_kept_max_mb says, of which nobody gets more than he leaves free (one alone a
 * half, each of two a third): a network namespace of the host, a container, or all namespaces of a user; of bare
 * ACKs that acknowledge more and more only the last. However a HOLD ends (replaced, removed, flushed, by its time),
 * these packets go through netfilter anew, and meet the rule that holds then: REDIRECT leads them to the importer, and
 * without a flow the socket gets them. What comes before all of them have gone follows behind them. If the socket is
 * gone, the host answers with a RST, as to all that would come after: MUTE it. Lost are: what finds no room, ICMP
 * errors, what goes out, SYNs to a listener's port, packets of a device that is gone or down, and those that a bridge
 * hands up (br_netfilter) or VRF shows a second time.
 *
 * Errors of ICMP and ICMPv6 about the connection are translated with it. Fragments are put together while anything of their
 * IP version is held or redirected; those of IPv6 by the kernel's nf_defrag_ipv6, which is loaded with this module. On a
 * kernel without it the first of them is held or redirected alone, so that the packet is lost, and the peer must send
 * smaller ones. Packets between a peer and a socket on one and the same host are held and muted,
 * but not redirected.
 */
#define SOCKMI_NAT_HOLD (1u << 0)      /* nothing comes in or goes out, ICMP errors about it included */
#define SOCKMI_NAT_MUTE (1u << 1)      /* no RST and no FIN goes out */
#define SOCKMI_NAT_REDIRECT (1u << 2)  /* in: destination becomes `to`, untracked; out: no SYN, RST, FIN */
#define SOCKMI_NAT_TRANSLATE (1u << 3) /* out: source becomes `to`; not together with REDIRECT */
/*
 * Conntrack does not see the flow, in and out. For importers with net.netfilter.nf_conntrack_tcp_loose=0, which
 * calls a connection that it has not seen begin invalid: their firewall must admit what is untracked.
 * (Or an entry for it is made by ctnetlink first; then this flag is not needed.)
 */
#define SOCKMI_NAT_UNTRACKED (1u << 4)

/* Bits of `seen`: TCP flags of packets that the flow met, and whether its HOLD has ended by itself. */
#define SOCKMI_NAT_SEEN_SYN_IN (1u << 0) /* without ACK: the peer began anew, the old connection is over */
#define SOCKMI_NAT_SEEN_FIN_IN (1u << 1)
#define SOCKMI_NAT_SEEN_RST_IN (1u << 2)
#define SOCKMI_NAT_SEEN_FIN_OUT (1u << 3) /* TRANSLATE only, like the next */
#define SOCKMI_NAT_SEEN_RST_OUT (1u << 4)
#define SOCKMI_NAT_SEEN_LAPSE (1u << 5)

#define SOCKMI_NAT_TAG_BYTES 16

/**
 * struct sockmi_ioc_nat_flow - one connection's rule and what became of its packets
 * @local: in: this host's end, as its own stack has it
 * @remote: in: the peer's end; all zero with HOLD alone: new connections to the listener's port @local are dropped
 *	(the address may be the unspecified one: any)
 * @to: in: replaces the local end, for REDIRECT and TRANSLATE; else all zero. For one peer's end it must be unique
 *	among the flows that redirect, and among those that translate
 * @flags: in: SOCKMI_NAT_*; at least one
 * @hold_ms: in: HOLD ends after so many ms, counted from now, and a flow without other flags with it; 0: it
 *	does not end by itself; out: what is left, at least 1 if it ends
 * @tag: in: the caller's, for example a migration id
 * @id: out: names the flow as long as it lives, replaced or not
 * @packets: out: packets rewritten; what the network card or the stack coalesced counts once
 * @bytes: out: their length, network header included
 * @held: out: kept or dropped by HOLD
 * @muted: out: dropped on their way out by MUTE or REDIRECT
 * @errors: out: ICMP errors translated
 * @seen: out: SOCKMI_NAT_SEEN_*
 * @idle_s: out: seconds since the last packet that it changed or dropped, or since its making
 * @kept: out: packets that wait for the end of HOLD
 * @reserved: out: 0
 *
 * A flow that is replaced keeps its counters. Link-local addresses match on every interface: their scope_id is ignored.
 */
struct sockmi_ioc_nat_flow {
	struct sockmi_dev_endpoint local;
	struct sockmi_dev_endpoint remote;
	struct sockmi_dev_endpoint to;
	__u32 flags;
	__u32 hold_ms;
	__u8 tag[SOCKMI_NAT_TAG_BYTES];
	__aligned_u64 id;
	__aligned_u64 packets;
	__aligned_u64 bytes;
	__aligned_u64 held;
	__aligned_u64 muted;
	__aligned_u64 errors;
	__u32 seen;
	__u32 idle_s;
	__u32 kept;
	__u32 reserved;
};

/**
 * enum sockmi_nat_action - what NAT_CHANGE does with each flow
 * @SOCKMI_NAT_ADD: -EEXIST if there is one for the tuple
 * @SOCKMI_NAT_REPLACE: -ENOENT if there is none
 * @SOCKMI_NAT_SET: whichever of the two fits
 * @SOCKMI_NAT_REMOVE: only the tuple counts; -ENOENT
 */
enum sockmi_nat_action {
	SOCKMI_NAT_ADD = 1,
	SOCKMI_NAT_REPLACE = 2,
	SOCKMI_NAT_SET = 3,
	SOCKMI_NAT_REMOVE = 4,
};

#define SOCKMI_NAT_BATCH_MAX 65536

/**
 * struct sockmi_ioc_nat_change - add, replace or remove flows, in order, up to the first that fails
 * @flows: in: address of an array of struct sockmi_ioc_nat_flow
 * @count: in: its length, 0..SOCKMI_NAT_BATCH_MAX
 * @flow_bytes: in: sizeof(struct sockmi_ioc_nat_flow) of the caller
 * @action: in: enum sockmi_nat_action
 * @done: out: how many took effect; on an error the index of the flow that did not
 *
 * Each flow changes at once: every packet meets the old rule or the new one.
 * -EINVAL: flags or addresses that do not fit each other; -EAFNOSUPPORT: IPv4 and IPv6 mixed; -EADDRNOTAVAIL: `to`
 * is no address that packets can be sent to or from; -EADDRINUSE: `to` is another flow's for this peer; -ENOSPC: more
 * flows than the module's parameter nat_flows_max; -EINTR: a fatal signal.
 */
struct sockmi_ioc_nat_change {
	__aligned_u64 flows;
	__u32 count;
	__u32 flow_bytes;
	__u32 action;
	__u32 done;
};

/**
 * struct sockmi_ioc_nat_read - read flows: those named, or the next of all
 * @flows: in: address of an array of struct sockmi_ioc_nat_flow; NAT_READ: the tuples are read, the rest is written
 * @count: in: its length, 0..SOCKMI_NAT_BATCH_MAX; NAT_LIST, out: how many were written, fewer than asked for
 *	at the end
 * @flow_bytes: in: sizeof(struct sockmi_ioc_nat_flow) of the caller
 * @after: NAT_LIST, in: 0, or the last id of the call before; out: the last id written
 * @done: NAT_READ, out: how many were found; on an error the index of the flow that failed (-ENOENT)
 * @total: out: flows in the namespace
 */
struct sockmi_ioc_nat_read {
	__aligned_u64 flows;
	__u32 count;
	__u32 flow_bytes;
	__aligned_u64 after;
	__u32 done;
	__u32 total;
};

/**
 * struct sockmi_ioc_nat_flush - remove flows
 * @flags: in: those that have any of these SOCKMI_NAT_* flags; 0: all
 * @removed: out: how many
 */
struct sockmi_ioc_nat_flush {
	__u32 flags;
	__u32 removed;
};

#define SOCKMI_IOC_NAT_CHANGE _IOWR(SOCKMI_IOC_MAGIC, 0x40, struct sockmi_ioc_nat_change)
#define SOCKMI_IOC_NAT_READ _IOWR(SOCKMI_IOC_MAGIC, 0x41, struct sockmi_ioc_nat_read)
#define SOCKMI_IOC_NAT_LIST _IOWR(SOCKMI_IOC_MAGIC, 0x42, struct sockmi_ioc_nat_read)
#define SOCKMI_IOC_NAT_FLUSH _IOWR(SOCKMI_IOC_MAGIC, 0x43, struct sockmi_ioc_nat_flush)

/* ======== end of NAT helper ======== */

#endif
