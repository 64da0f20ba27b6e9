/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the module's own files: what each of them gives the others.
 *
 * Locks, outermost first: sockmi_export.lock, the socket's lock (owned, across system calls
 * while frozen), sockmi_net.lists_lock (spinlock), sockmi_file.events_lock (spinlock). sockmi_file.lock guards
 * the making of slots alone; main.c's nets_lock is outermost, claim.c's claims_lock innermost. nat.h has the NAT
 * helper's.
 */
#ifndef SOCKMI_INTERNAL_H
#define SOCKMI_INTERNAL_H

#include <linux/fs.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/refcount.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/uidgid.h>
#include <linux/user_namespace.h>
#include <linux/wait.h>
#include <linux/workqueue.h>
#include <linux/xarray.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "compat.h"
#include "image.h"
#include "uapi/sockmi.h"

#define SOCKMI_LISTS 3
#define SOCKMI_LIST_MOST 16384 /* entries of one list, whatever its maximum */
#define SOCKMI_EVENTS_MAX 1024 /* that wait in one file */
#define SOCKMI_EXPORTS_MAX 65536 /* of one file */

/* ---- main.c: parameters ---- */

extern unsigned int sockmi_freeze_default_ms;
extern unsigned int sockmi_freeze_max_ms;
extern unsigned int sockmi_claim_max_ms;
extern unsigned int sockmi_dormant_max_ms;
extern unsigned int sockmi_slots_max;
extern unsigned int sockmi_slots_max_mb;
extern unsigned int sockmi_memory_max_mb;
extern unsigned int sockmi_memory_users_max_mb;
extern unsigned int sockmi_list_max[SOCKMI_LISTS];
extern unsigned int sockmi_sysctl_wait_ms;
extern struct workqueue_struct *sockmi_workqueue;
/* For work that may wait, for a socket's owner or for memory: no freeze waits behind it. */
extern struct workqueue_struct *sockmi_slow;

/**
 * struct sockmi_memory - a share of the memory of all buffers, images and events
 * @bytes: how much
 * @users: taken by somebody who does not administer the host
 */
struct sockmi_memory {
	u64 bytes;
	bool users;
};

/* Is the caller one who does not administer the host? */
bool sockmi_memory_users(void);
struct sockmi_file;
/* May this one keep a socket locked from one system call to the next? */
bool sockmi_may_hold(const struct sockmi_file *file);
/* Takes @bytes, or -EDQUOT; gives them back. Any context. */
int sockmi_memory_take(struct sockmi_memory *memory, u64 bytes, bool users);
void sockmi_memory_give(const struct sockmi_memory *memory);

/* ---- Per network namespace ---- */

struct sockmi_nat_net; /* nat.c's own */

/**
 * struct sockmi_net - what the module keeps for a network namespace
 * @node: in the list of all
 * @lists_lock: guards all but @node, @wait, @ctl_header, @ctl_table and @nat
 * @lists: published and reserved entries, in the order of publication
 * @counts: entries of each list, reserved ones included
 * @max: limit of each list (sysctl)
 * @next_entry: id of the latest entry
 * @published: how many entries were published
 * @waiters: import requests that wait
 * @wait: they sleep here, and so do writers of the sysctl
 * @serving: the daemon's file, or NULL
 * @requests: sysctl exports that wait for their answer
 * @requests_count: how many
 * @last_result: what reading the sysctl shows
 * @ctl_header: of the sysctl tables
 * @ctl_table: this namespace's copy
 * @nat: nat.c's
 */
struct sockmi_net {
	struct list_head node;
	spinlock_t lists_lock;
	struct list_head lists[SOCKMI_LISTS];
	unsigned int counts[SOCKMI_LISTS];
	unsigned int max[SOCKMI_LISTS];
	u64 next_entry;
	u64 published;
	struct list_head waiters;
	wait_queue_head_t wait;
	struct sockmi_file *serving;
	struct list_head requests;
	unsigned int requests_count;
	char last_result[192];
	struct ctl_table_header *ctl_header;
	struct ctl_table *ctl_table;
	struct sockmi_nat_net *nat;
};

struct sockmi_net *sockmi_net(const struct net *net);

/* May the caller administer this namespace's sockets? */
static inline bool sockmi_net_admin(const struct net *net)
{
	return ns_capable(net->user_ns, CAP_NET_ADMIN);
}

/* ---- device.c ---- */

struct sockmi_slots {
	struct page **pages;
	void *address; /* vmap() of them */
	unsigned long slot_pages;
	unsigned int count;
	struct sockmi_memory memory;
	unsigned long busy[BITS_TO_LONGS(256)]; /* slots that are being written */
};

/**
 * struct sockmi_file - one open device file
 * @refs: the file itself, its exports
 * @lock: serialises the making of slots
 * @net: network namespace of open()
 * @user_ns: of open()
 * @pid_ns: of open()
 * @users: opened by somebody who does not administer the host
 * @greeted: HELLO succeeded
 * @slots: by SOCKMI_SLOT_* - 1
 * @exports: by id
 * @dormants: restored, not yet decided; by id
 * @next_id: of exports and dormants
 * @exports_count: of exports and dormants
 * @events_lock: guards the events
 * @events: wait for read()
 * @events_count: how many
 * @events_lost: dropped since the last that was queued
 * @events_wait: readers and pollers
 * @fasync: who asked for a signal
 */
struct sockmi_file {
	refcount_t refs;
	struct mutex lock;
	struct net *net;
	struct user_namespace *user_ns;
	struct pid_namespace *pid_ns;
	bool users;
	bool greeted;
	struct sockmi_slots slots[2];
	struct xarray exports;
	struct xarray dormants;
	u32 next_id;
	atomic_t exports_count;
	spinlock_t events_lock;
	struct list_head events;
	unsigned int events_count;
	u32 events_lost;
	wait_queue_head_t events_wait;
	struct fasync_struct *fasync;
};

extern const struct file_operations sockmi_fops;

void sockmi_file_put(struct sockmi_file *file);

/*
 * Kernel address of slot @index of a kind, marked busy: the caller ends that with sockmi_slot_put().
 * NULL: no such slot, or it is busy.
 */
void *sockmi_slot_get(struct sockmi_file *file, unsigned int kind, u32 index, size_t *bytes);
void sockmi_slot_put(struct sockmi_file *file, unsigned int kind, u32 index);

/* Copies an ioctl's argument in and out; @size is what the caller knows, @known what the module does. */
int sockmi_arg_in(void *to, size_t known, const void __user *arg, size_t size);
int sockmi_arg_out(void __user *arg, size_t size, const void *from, size_t known);

/**
 * struct sockmi_blob - a private copy of an image, checked
 * @refs: who uses it
 * @bytes: its length
 * @memory: that it takes
 * @data: the copy
 * @image: decoded; its views point into @data
 */
struct sockmi_blob {
	refcount_t refs;
	size_t bytes;
	struct sockmi_memory memory;
	u8 *data;
	struct sockmi_image image;
};

/*
 * Copies an image once, from an import slot or from @address if @slot is SOCKMI_NO_SLOT, and checks
 * the copy. An ERR_PTR with @refusal and @image_error set, or the blob.
 */
struct sockmi_blob *sockmi_blob_get(struct sockmi_file *file, u32 slot, u64 address, u64 bytes, u32 *refusal,
				    u32 *image_error);
void sockmi_blob_put(struct sockmi_blob *blob);

/* ---- events.c ---- */

/*
 * Queues an event for @file's readers; any context. @event->lost is filled in here. If there is no room or
 * no memory the event is dropped and counted: false.
 */
bool sockmi_event(struct sockmi_file *file, const struct sockmi_event *event);
/* The same for the namespace's serving file, if there is one. */
void sockmi_event_serving(struct sockmi_net *sn, const struct sockmi_event *event);
ssize_t sockmi_events_read(struct file *file, char __user *buffer, size_t bytes, loff_t *position);
void sockmi_events_free(struct sockmi_file *file);

/* ---- preflight.c: what a socket is, and whether it can be moved ---- */

/* The file of another process's descriptor, referenced; ERR_PTR(-EBADF, -ESRCH). */
struct file *sockmi_file_of(pid_t pid, int fd);
/* The TCP socket of @file, or NULL with @refusal set. */
struct sock *sockmi_tcp_sock(struct file *file, u32 *refusal);
/* Why @sk cannot be exported; SOCKMI_REFUSAL_NONE if it can. With the socket's lock it is final. */
u32 sockmi_preflight(struct sock *sk);
/* The same for what somebody has put on @sk, whatever its state. */
u32 sockmi_layers(const struct sock *sk);
/* -errno that goes with a refusal. */
int sockmi_refusal_errno(u32 refusal);
/* @sk's name, kind, state. */
void sockmi_identify(const struct sock *sk, struct sockmi_identity *identity);
void sockmi_dev_endpoint(struct sockmi_dev_endpoint *to, const struct sockmi_endpoint *from);

/*
 * lock_sock() of a lock that another may hold for as long as it likes: -EBUSY after @timeout_ms, -EINTR if the caller
 * is killed. It can be held after the system call; in between, any task may adopt it for lockdep's eyes.
 */
int sockmi_lock(struct sock *sk, unsigned int timeout_ms);
void sockmi_adopt(struct sock *sk);
void sockmi_disown(struct sock *sk);
void sockmi_let_go(struct sock *sk);

/* ---- claim.c ---- */

/**
 * struct sockmi_claim - a socket that is an export's or a dormant copy's
 * @node: in the table of claims
 * @sk: its socket, alive as long as @file
 * @file: of the socket, referenced
 * @put: gives @file back
 */
struct sockmi_claim {
	struct hlist_node node;
	struct sock *sk;
	struct file *file;
	struct work_struct put;
};

/* Takes a reference on the file of a socket that nobody has; ERR_PTR(-EBUSY, -ENOMEM). */
struct sockmi_claim *sockmi_claim_get(struct file *file);
/* In process context; the socket must not be touched any more. */
void sockmi_claim_put(struct sockmi_claim *claim);
int sockmi_claims_init(void);
void sockmi_claims_exit(void);

/* ---- dump.c, options.c, options_rare.c ---- */

/* Upper bound of an image of @sk, without its lock: a guess good enough to size slots. */
size_t sockmi_dump_bound(const struct sock *sk);
/*
 * Writes the image of @sk, whose lock is held, to @buffer. Length, or -errno with @refusal; -ENOSPC with @needed.
 * Does not sleep.
 */
ssize_t sockmi_dump(struct sock *sk, void *buffer, size_t capacity, u32 *refusal, size_t *needed);

void sockmi_options_dump(const struct sock *sk, struct sockmi_writer *writer);
/* Names those that are set and not among them, in the fidelity report that is open. */
void sockmi_options_left_out(const struct sock *sk, struct sockmi_writer *writer);
/* TCP_DEFER_ACCEPT, as getsockopt() tells it. */
u64 sockmi_defer_accept_us(const struct inet_connection_sock *icsk);

/* What a restore could not do. */
struct sockmi_losses {
	u64 approximated;
	u64 reset;
	u32 lost;
	u16 lost_options[SOCKMI_LOST_OPTIONS_MAX];
};

/*
 * Before bind and connect, without the socket's lock. @before: what the socket had, of which the image may know nothing.
 * @flags: of sockmi_restore().
 */
void sockmi_options_early(struct socket *sock, const struct sockmi_image *image, const struct sockmi_view *before,
			  u32 flags, struct sockmi_losses *losses);
/* At the end, with the lock. */
void sockmi_options_late(struct sock *sk, const struct sockmi_image *image, const struct sockmi_view *before, u32 flags,
			 struct sockmi_losses *losses);
/* An integer option of the image, or @otherwise. */
s64 sockmi_option_number(const struct sockmi_image *image, u16 id, s64 otherwise, u8 *flags);

/* ---- kept.c ---- */

struct sockmi_kept;

/* The options of a socket that is closed, to be put back; NULL: no memory. */
struct sockmi_kept *sockmi_keep(const struct sock *sk);
const struct sockmi_view *sockmi_kept_options(const struct sockmi_kept *kept);
/* The lock is not held. */
void sockmi_put_back(struct socket *sock, struct sockmi_kept *kept);
void sockmi_kept_free(struct sockmi_kept *kept);

/* ---- restore.c ---- */

/*
 * Flags beside SOCKMI_DEV_*. CHILD: the socket has a listener's device, which counts instead of the image's, its mark and
 * its priority. UNDO: options go back to what they were before a restore.
 */
#define SOCKMI_RESTORE_CHILD (1u << 31)
#define SOCKMI_RESTORE_UNDO (1u << 30)

/*
 * Puts the image into @sock and returns 0 with the socket's lock held (see sockmi_disown()), or -errno with @refusal
 * and the lock released; then the socket is as it was. @local: to use instead of the image's, or all zero. @kept: NULL,
 * or where to leave the options that the socket had: the caller frees them.
 */
int sockmi_restore(struct socket *sock, const struct sockmi_image *image, const struct sockmi_endpoint *local,
		   u32 flags, u32 *refusal, struct sockmi_losses *losses, struct sockmi_kept **kept);
/* Brings a connection to life and releases the lock; its socket may have no struct socket. */
void sockmi_activate_sock(struct sock *sk);
/*
 * The same for a socket of any kind. 0 or -errno, and then it is as it was before the restore, which left @kept; of a
 * connection it cannot fail.
 */
int sockmi_activate(struct socket *sock, const struct sockmi_image *image, struct sockmi_kept *kept);

/* ---- close.c ---- */

/* Closes it without a packet. The lock is held before and after; @error is what its user gets. */
void sockmi_close_silently(struct sock *sk, int error);

/* ---- export.c, import.c, deliver.c, list.c, sysctl.c: the ioctls ---- */

typedef long sockmi_ioctl(struct sockmi_file *file, void __user *arg, size_t size);

sockmi_ioctl sockmi_ioctl_claim, sockmi_ioctl_freeze, sockmi_ioctl_commit, sockmi_ioctl_abort, sockmi_ioctl_release,
	sockmi_ioctl_export_info;
sockmi_ioctl sockmi_ioctl_restore, sockmi_ioctl_activate, sockmi_ioctl_discard;
sockmi_ioctl sockmi_ioctl_deliver;
sockmi_ioctl sockmi_ioctl_list_add, sockmi_ioctl_publish, sockmi_ioctl_remove, sockmi_ioctl_list_info,
	sockmi_ioctl_list_next, sockmi_ioctl_match, sockmi_ioctl_import;
sockmi_ioctl sockmi_ioctl_serve, sockmi_ioctl_answer, sockmi_ioctl_forget;

/* What closing the file undoes. */
void sockmi_exports_end(struct sockmi_file *file);
void sockmi_dormants_end(struct sockmi_file *file);
void sockmi_reserved_end(struct sockmi_file *file);
void sockmi_serve_end(struct sockmi_file *file);

/*
 * Claims the socket of @socket_file, on which it takes a reference, for @owner. The id, or
 * -errno with @refusal.
 */
s64 sockmi_claim(struct sockmi_file *owner, struct file *socket_file, unsigned int lifetime_ms, u32 *refusal);
/* Forgets it again. */
int sockmi_unclaim(struct sockmi_file *owner, u64 id);
/* The same, if nothing has been done with it yet. -EBUSY: something has; -ENOENT: there is none. */
int sockmi_withdraw(struct sockmi_file *owner, u64 id);

void sockmi_lists_init(struct sockmi_net *sn);
void sockmi_lists_exit(struct sockmi_net *sn);
/* Drops published entries; how many. */
unsigned int sockmi_lists_forget(struct sockmi_net *sn);
int sockmi_sysctl_init(void);
void sockmi_sysctl_exit(void);
int sockmi_sysctl_net_init(struct net *net, struct sockmi_net *sn);
void sockmi_sysctl_net_exit(struct sockmi_net *sn);

/* ---- nat.c (built if it is there) ---- */

#ifdef SOCKMI_HAVE_NAT
#define SOCKMI_NAT_FEATURE SOCKMI_FEATURE_NAT
int sockmi_nat_init(void);
void sockmi_nat_exit(void);
int sockmi_nat_net_init(struct net *net, struct sockmi_net *sn);
/* Drops the packets that wait; afterwards nobody but net_exit() touches a flow. */
void sockmi_nat_net_pre_exit(struct sockmi_net *sn);
void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn);
/* Removes all flows and counts them; -EINTR. */
int sockmi_nat_forget(struct sockmi_net *sn, u32 *removed);
/* Ordinals 0x40..0x5f: @arg has @size bytes. -ENOTTY: unknown. */
long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size);
#else
#define SOCKMI_NAT_FEATURE 0
static inline int sockmi_nat_init(void) { return 0; }
static inline void sockmi_nat_exit(void) { }
static inline int sockmi_nat_net_init(struct net *net, struct sockmi_net *sn) { return 0; }
static inline void sockmi_nat_net_pre_exit(struct sockmi_net *sn) { }
static inline void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn) { }
static inline int sockmi_nat_forget(struct sockmi_net *sn, u32 *removed) { return 0; }
static inline long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size)
{
	return -ENOTTY;
}
#endif

#endif
