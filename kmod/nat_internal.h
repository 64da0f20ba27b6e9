/* SPDX-License-Identifier: GPL-2.0 */
/* Shared by the NAT helper's own files. */
#ifndef SOCKMI_NAT_INTERNAL_H
#define SOCKMI_NAT_INTERNAL_H

#include <linux/atomic.h>
#include <linux/mutex.h>
#include <linux/netfilter.h>
#include <linux/rbtree.h>
#include <linux/rhashtable.h>
#include <linux/skbuff.h>
#include <linux/timekeeping.h>
#include <linux/timerqueue.h>
#include <linux/workqueue.h>
#include <net/netfilter/nf_conntrack.h>

#include "internal.h"
#include "nat.h"

#define SOCKMI_NAT_REWRITES (SOCKMI_NAT_REDIRECT | SOCKMI_NAT_TRANSLATE)
#define SOCKMI_NAT_HOOKS 6

struct sockmi_nat_share;

/**
 * struct sockmi_nat_kept - packets of a held flow that wait for the hold's end
 * @open: what comes waits: the hold goes on, or what it has kept is not yet all on its way
 * @bytes: memory that they take
 * @passer: who is passing one of them on just now, with softirqs off
 * @share: of whose memory
 * @okfn: netfilter's, which takes them on
 * @packets: in the order of their coming; its lock guards all
 */
struct sockmi_nat_kept {
	bool open;
	unsigned int bytes;
	struct task_struct *passer;
	struct sockmi_nat_share *share;
	int (*okfn)(struct net *net, struct sock *sk, struct sk_buff *skb);
	struct sk_buff_head packets;
};

/**
 * struct sockmi_nat_count - what happened to a flow's packets; handed on when a flow is replaced
 * @packets: rewritten TCP packets; a GSO packet is one
 * @bytes: their length, network header included
 * @held: kept or dropped by HOLD, ICMP errors included
 * @muted: dropped on their way out by MUTE or REDIRECT
 * @errors: translated ICMP errors
 * @seen: SOCKMI_NAT_SEEN_*
 * @last_s: ktime_get_seconds() of the last packet
 * @kept: what HOLD has kept
 * @rcu: end of life
 */
struct sockmi_nat_count {
	atomic64_t packets;
	atomic64_t bytes;
	atomic64_t held;
	atomic64_t muted;
	atomic64_t errors;
	atomic_t seen;
	u32 last_s;
	struct sockmi_nat_kept kept;
	struct rcu_head rcu;
};

/**
 * struct sockmi_nat_flow - one connection's rule
 *
 * Only @flags changes while packets can see a flow; all else needs a new flow in its place.
 *
 * @by_tuple: in sockmi_nat_net.tuples
 * @tuple: the connection as this host's stack has it
 * @flags: SOCKMI_NAT_*
 * @count: counters
 * @by_wire: in sockmi_nat_net.wires, if @flags rewrites
 * @wire: @tuple with the local end replaced by that which is written into packets
 * @id: place in the list; never used again
 * @by_id: in sockmi_nat_net.ids
 * @lapse: when HOLD ends, if it does
 * @tag: the daemon's
 * @rcu: end of life
 */
struct sockmi_nat_flow {
	struct rhash_head by_tuple;
	struct sockmi_nat_key tuple;
	u32 flags;
	struct sockmi_nat_count *count;
	struct rhash_head by_wire;
	struct sockmi_nat_key wire;
	u64 id;
	struct rb_node by_id;
	struct timerqueue_node lapse;
	u8 tag[SOCKMI_NAT_TAG_BYTES];
	struct rcu_head rcu;
};

/**
 * struct sockmi_nat_net - the NAT helper of a network namespace
 * @net: the namespace
 * @lock: serialises all changes
 * @share: who pays for the packets that it keeps; set while @armed
 * @armed: tables and hooks are there; set by the first flow, cleared by the namespace's end
 * @tuples: flows by tuple
 * @wires: flows that rewrite, by wire
 * @ids: flows by id
 * @last_id: newest id
 * @flows: how many
 * @holds: flows with HOLD, listeners' ports excluded
 * @ports: listeners' ports with HOLD
 * @redirects: flows with REDIRECT
 * @translates: flows with TRANSLATE
 * @untracked: flows with UNTRACKED
 * @mutes: flows that drop what would end the connection: MUTE or REDIRECT
 * @fragile6: flows of IPv6 whose fragments must be put together: HOLD or REDIRECT
 * @gathers6: so they are
 * @lapses: flows whose HOLD ends by itself
 * @work: ends them
 * @ops: the registered hooks
 *
 * The six numbers are written under @lock before a flow is published and after it is gone, and read by the hooks
 * to skip look-ups that cannot find anything.
 */
struct sockmi_nat_net {
	struct net *net;
	struct mutex lock;
	struct sockmi_nat_share *share;
	bool armed;
	struct rhashtable tuples;
	struct rhashtable wires;
	struct rb_root ids;
	u64 last_id;
	unsigned int flows;
	unsigned int holds;
	unsigned int ports;
	unsigned int redirects;
	unsigned int translates;
	unsigned int untracked;
	unsigned int mutes;
	unsigned int fragile6;
	bool gathers6;
	struct timerqueue_head lapses;
	struct delayed_work work;
	struct nf_hook_ops ops[SOCKMI_NAT_HOOKS];
};

extern const struct rhashtable_params sockmi_nat_tuple_params;
extern const struct rhashtable_params sockmi_nat_wire_params;

/* ---- nat.c ---- */

extern unsigned int sockmi_nat_flows_max;

/* Makes tables and hooks; under the lock. 0 or -errno. */
int sockmi_nat_arm(struct sockmi_nat_net *nat);

/* @step more flows (or fewer) whose fragments must be put together; under the lock. */
void sockmi_nat_gather6(struct sockmi_nat_net *nat, int step);

/* ---- nat_table.c; all but the first two under the lock ---- */

/* A flow for @key with counters, in no table yet; NULL: no memory. And the way back. */
struct sockmi_nat_flow *sockmi_nat_flow_new(const struct sockmi_nat_key *key, u32 flags);
void sockmi_nat_flow_free(struct sockmi_nat_flow *flow);

struct sockmi_nat_flow *sockmi_nat_find(struct sockmi_nat_net *nat, const struct sockmi_nat_key *key);
/* The flow with the lowest id above @id, or NULL. */
struct sockmi_nat_flow *sockmi_nat_after(struct sockmi_nat_net *nat, u64 id);
/* Takes @flow over if it returns 0; @hold_ms: 0 for no end. */
int sockmi_nat_add(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow, u32 hold_ms);
int sockmi_nat_replace(struct sockmi_nat_net *nat, struct sockmi_nat_flow *old, struct sockmi_nat_flow *flow,
		       u32 hold_ms);
void sockmi_nat_remove(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow);

void sockmi_nat_lapse(struct work_struct *work);

/* ---- nat_kept.c ---- */

/* What becomes of a packet of a held flow: it is kept; it is lost, for want of room; it meets the rule of now. */
enum sockmi_nat_fate { SOCKMI_NAT_KEPT, SOCKMI_NAT_LOST, SOCKMI_NAT_GOES_ON };

/* Whose share of the memory @net's kept packets take; NULL: no memory. And the way back. */
struct sockmi_nat_share *sockmi_nat_share_get(const struct net *net);
void sockmi_nat_share_put(struct sockmi_nat_share *share);
/* Decides about @skb, which came in, its TCP header at @offset; it is the caller's unless it is kept. In a hook. */
enum sockmi_nat_fate sockmi_nat_keep(struct sockmi_nat_kept *all, struct sk_buff *skb, int offset,
				     const struct nf_hook_state *state);
void sockmi_nat_kept_init(struct sockmi_nat_kept *all, bool open);
/* Before a hold begins. */
void sockmi_nat_kept_open(struct sockmi_nat_kept *all);
/*
 * After a hold has ended: what it kept meets the rule that packets meet now, and whatever comes meanwhile follows
 * behind. May be repeated.
 */
void sockmi_nat_kept_hand_on(struct sockmi_nat_net *nat, const struct sockmi_nat_flow *flow);
/* Without that. */
void sockmi_nat_kept_drop(struct sockmi_nat_kept *all);

/* ---- nat_hook.c ---- */

void sockmi_nat_hooks(struct sockmi_nat_net *nat);

/* Our redirected and untracked packets are none of conntrack's business; what has an entry already keeps it. */
static inline void sockmi_nat_untrack(struct sk_buff *skb)
{
	if (!skb_nfct(skb))
		nf_ct_set(skb, NULL, IP_CT_UNTRACKED);
}

static inline void sockmi_nat_touch(struct sockmi_nat_count *count)
{
	u32 now = ktime_get_seconds();

	if (READ_ONCE(count->last_s) != now)
		WRITE_ONCE(count->last_s, now);
}

/* ---- nat_error.c: ICMP errors; @offset of the ICMP header; verdicts of netfilter ---- */

unsigned int sockmi_nat_error_in(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset);
unsigned int sockmi_nat_error_out(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset);

#endif
