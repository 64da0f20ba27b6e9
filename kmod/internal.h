/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Shared by the module's own files: what each of them gives the others.
 *
 * Locks, outermost first: sockmi_file.lock, sockmi_export.lock, the socket's lock (owned, across system calls while
 * frozen), sockmi_net.lists_lock (spinlock), sockmi_file.events_lock (spinlock).
 */
#ifndef SOCKMI_INTERNAL_H
#define SOCKMI_INTERNAL_H

#include <linux/fs.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/spinlock.h>
#include <linux/types.h>
#include <linux/wait.h>
#include <linux/xarray.h>
#include <net/net_namespace.h>
#include <net/sock.h>

#include "compat.h"
#include "image.h"
#include "uapi/sockmi.h"

#define SOCKMI_LISTS 3
#define SOCKMI_EVENTS_MAX 1024 /* that wait in one file */

/* ---- main.c: parameters ---- */

extern unsigned int sockmi_freeze_default_ms;
extern unsigned int sockmi_freeze_max_ms;
extern unsigned int sockmi_claim_max_ms;
extern unsigned int sockmi_slots_max;
extern unsigned int sockmi_slots_max_mb;
extern unsigned int sockmi_memory_max_mb;
extern unsigned int sockmi_list_max[SOCKMI_LISTS];
extern unsigned int sockmi_sysctl_wait_ms;
extern struct workqueue_struct *sockmi_workqueue;

/* Reserves @bytes of the module's memory, or -EDQUOT; and gives them back. */
int sockmi_memory_take(u64 bytes);
void sockmi_memory_give(u64 bytes);

/* ---- Per network namespace ---- */

struct sockmi_nat_net; /* nat.c's own */

/**
 * struct sockmi_net - what the module keeps for a network namespace
 * @lists_lock: guards the lists, their counts and the waiters
 * @lists: published and reserved entries, in the order of publication
 * @counts: entries of each list, reserved ones included
 * @max: limit of each list (sysctl)
 * @waiters: import requests that wait
 * @wait: they sleep here
 * @serving: the daemon's file, or NULL; under lists_lock
 * @requests: sysctl exports that wait for their answer
 * @last_result: what reading the sysctl shows; under lists_lock
 * @ctl_header: of the sysctl tables
 * @ctl_table: this namespace's copy
 * @nat: nat.c's
 */
struct sockmi_net {
	spinlock_t lists_lock;
	struct list_head lists[SOCKMI_LISTS];
	unsigned int counts[SOCKMI_LISTS];
	unsigned int max[SOCKMI_LISTS];
	struct list_head waiters;
	wait_queue_head_t wait;
	struct sockmi_file *serving;
	struct list_head requests;
	char last_result[160];
	struct ctl_table_header *ctl_header;
	struct ctl_table *ctl_table;
	struct sockmi_nat_net *nat;
};

struct sockmi_net *sockmi_net(const struct net *net);

/* ---- device.c ---- */

struct sockmi_slots {
	struct page **pages;
	void *address; /* vmap() of them */
	unsigned long slot_pages;
	unsigned int count;
};

/**
 * struct sockmi_file - one open device file
 * @lock: serialises the making of slots, and claim, release and close
 * @net: network namespace of open()
 * @user_ns: of open()
 * @pid_ns: of open()
 * @greeted: HELLO succeeded
 * @slots: by SOCKMI_SLOT_* - 1
 * @exports: by id
 * @dormants: restored, not yet decided; by id
 * @events_lock: guards the events
 * @events: wait for read()
 * @events_count: how many
 * @events_lost: dropped since the last that was queued
 * @events_wait: readers and pollers
 * @fasync: who asked for a signal
 */
struct sockmi_file {
	struct mutex lock;
	struct net *net;
	struct user_namespace *user_ns;
	struct pid_namespace *pid_ns;
	bool greeted;
	struct sockmi_slots slots[2];
	struct xarray exports;
	struct xarray dormants;
	spinlock_t events_lock;
	struct list_head events;
	unsigned int events_count;
	u32 events_lost;
	wait_queue_head_t events_wait;
	struct fasync_struct *fasync;
};

extern const struct file_operations sockmi_fops;

/* May the caller administer this namespace's sockets? */
static inline bool sockmi_net_admin(const struct net *net)
{
	return ns_capable(net->user_ns, CAP_NET_ADMIN);
}

/*
 * Queues an event for @file's readers; any context. @event->lost is filled in here. If there is no room or
 * no memory the event is dropped and counted.
 */
void sockmi_event(struct sockmi_file *file, const struct sockmi_event *event);

/*
 * Copies the ioctl's argument in: @size bytes of @arg (what the caller knows) to the @known bytes of @to. And
 * back out. 0 or -errno.
 */
int sockmi_arg_in(void *to, size_t known, const void __user *arg, size_t size);
int sockmi_arg_out(void __user *arg, size_t size, const void *from, size_t known);

/* ---- nat.c (built if it is there) ---- */

#ifdef SOCKMI_HAVE_NAT
int sockmi_nat_init(void);
void sockmi_nat_exit(void);
int sockmi_nat_net_init(struct net *net, struct sockmi_net *sn);
void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn);
/* Ordinals 0x40..0x5f: @arg has @size bytes. -ENOTTY: unknown. */
long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size);
#else
static inline int sockmi_nat_init(void) { return 0; }
static inline void sockmi_nat_exit(void) { }
static inline int sockmi_nat_net_init(struct net *net, struct sockmi_net *sn) { return 0; }
static inline void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn) { }
static inline long sockmi_nat_ioctl(struct sockmi_file *file, unsigned int nr, void __user *arg, size_t size)
{
	return -ENOTTY;
}
#endif

#endif
