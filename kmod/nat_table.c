// SPDX-License-Identifier: GPL-2.0
/* The NAT helper's flows: two hash tables for packets, one tree for lists, one queue of deadlines. */
#include <linux/module.h>
#include <linux/slab.h>

#include "nat_internal.h"

/* Flows that one hold of the lock ends at most. */
#define LAPSE_BATCH 256

struct sockmi_nat_flow *sockmi_nat_flow_new(const struct sockmi_nat_key *key, u32 flags)
{
	struct sockmi_nat_flow *flow = kzalloc(sizeof(*flow), GFP_KERNEL_ACCOUNT);

	if (!flow)
		return NULL;
	flow->count = kzalloc(sizeof(*flow->count), GFP_KERNEL_ACCOUNT);
	if (!flow->count) {
		kfree(flow);
		return NULL;
	}
	flow->count->last_s = ktime_get_seconds();
	sockmi_nat_kept_init(&flow->count->kept, flags & SOCKMI_NAT_HOLD);
	flow->tuple = *key;
	flow->wire = *key;
	flow->wire.kind |= flags & SOCKMI_NAT_REWRITES ? (flags & SOCKMI_NAT_REWRITES) << 16 : 0;
	flow->flags = flags;
	RB_CLEAR_NODE(&flow->by_id);
	timerqueue_init(&flow->lapse);
	return flow;
}

void sockmi_nat_flow_free(struct sockmi_nat_flow *flow)
{
	if (!flow)
		return;
	sockmi_nat_kept_drop(&flow->count->kept);
	kfree(flow->count);
	kfree(flow);
}

/* Adds @step for each number that a flow with @flags counts in. */
static void tally(struct sockmi_nat_net *nat, const struct sockmi_nat_key *key, u32 flags, int step)
{
	if (flags & SOCKMI_NAT_HOLD) {
		if (key->remote_port)
			WRITE_ONCE(nat->holds, nat->holds + step);
		else
			WRITE_ONCE(nat->ports, nat->ports + step);
	}
	if (flags & SOCKMI_NAT_REDIRECT)
		WRITE_ONCE(nat->redirects, nat->redirects + step);
	if (flags & SOCKMI_NAT_TRANSLATE)
		WRITE_ONCE(nat->translates, nat->translates + step);
	if (flags & SOCKMI_NAT_UNTRACKED)
		WRITE_ONCE(nat->untracked, nat->untracked + step);
	if (flags & (SOCKMI_NAT_MUTE | SOCKMI_NAT_REDIRECT))
		WRITE_ONCE(nat->mutes, nat->mutes + step);
	if ((u16)key->kind == AF_INET6 && key->remote_port && flags & (SOCKMI_NAT_HOLD | SOCKMI_NAT_REDIRECT))
		sockmi_nat_gather6(nat, step);
}

/* Runs the work at the earliest deadline, if there is any. */
static void plan_lapse(struct sockmi_nat_net *nat)
{
	struct timerqueue_node *next = timerqueue_getnext(&nat->lapses);
	s64 left_ns;

	if (!next)
		return;
	left_ns = max_t(s64, ktime_to_ns(ktime_sub(next->expires, ktime_get())), 0);
	cancel_delayed_work(&nat->work);
	schedule_delayed_work(&nat->work, nsecs_to_jiffies64(left_ns) + 1);
}

static void set_lapse(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow, u32 hold_ms)
{
	if (!hold_ms || !(flow->flags & SOCKMI_NAT_HOLD))
		return;
	flow->lapse.expires = ktime_add_ms(ktime_get(), hold_ms);
	if (timerqueue_add(&nat->lapses, &flow->lapse))
		plan_lapse(nat);
}

static void clear_lapse(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow)
{
	if (timerqueue_node_queued(&flow->lapse))
		timerqueue_del(&nat->lapses, &flow->lapse);
}

static void add_id(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow)
{
	struct rb_node **link = &nat->ids.rb_node, *parent = NULL;

	flow->id = ++nat->last_id;
	while (*link) {
		parent = *link;
		link = &parent->rb_right; /* ids only grow */
	}
	rb_link_node(&flow->by_id, parent, link);
	rb_insert_color(&flow->by_id, &nat->ids);
}

struct sockmi_nat_flow *sockmi_nat_find(struct sockmi_nat_net *nat, const struct sockmi_nat_key *key)
{
	lockdep_assert_held(&nat->lock);
	if (!nat->armed)
		return NULL;
	return rhashtable_lookup_fast(&nat->tuples, key, sockmi_nat_tuple_params);
}

struct sockmi_nat_flow *sockmi_nat_after(struct sockmi_nat_net *nat, u64 id)
{
	struct rb_node *node = nat->ids.rb_node;
	struct sockmi_nat_flow *flow, *found = NULL;

	lockdep_assert_held(&nat->lock);
	while (node) {
		flow = rb_entry(node, struct sockmi_nat_flow, by_id);
		if (flow->id > id) {
			found = flow;
			node = node->rb_left;
		} else {
			node = node->rb_right;
		}
	}
	return found;
}

static int insert_wire(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow)
{
	int error = rhashtable_lookup_insert_fast(&nat->wires, &flow->by_wire, sockmi_nat_wire_params);

	return error == -EEXIST ? -EADDRINUSE : error;
}

int sockmi_nat_add(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow, u32 hold_ms)
{
	bool rewrites = flow->flags & SOCKMI_NAT_REWRITES;
	int error;

	lockdep_assert_held(&nat->lock);
	if (nat->flows >= READ_ONCE(sockmi_nat_flows_max))
		return -ENOSPC;
	error = sockmi_nat_arm(nat);
	if (error)
		return error;
	flow->count->kept.share = nat->share;
	tally(nat, &flow->tuple, flow->flags, 1);
	if (rewrites) {
		error = insert_wire(nat, flow);
		if (error)
			goto untally;
	}
	error = rhashtable_lookup_insert_fast(&nat->tuples, &flow->by_tuple, sockmi_nat_tuple_params);
	if (error)
		goto unwire;
	add_id(nat, flow);
	set_lapse(nat, flow, hold_ms);
	/* Whoever calls has the device open, so this cannot race with the module's end. */
	if (!nat->flows++)
		__module_get(THIS_MODULE);
	return 0;

unwire:
	if (rewrites) {
		rhashtable_remove_fast(&nat->wires, &flow->by_wire, sockmi_nat_wire_params);
		/* An ICMP error may have found it. */
		synchronize_rcu();
	}
untally:
	tally(nat, &flow->tuple, flow->flags, -1);
	return error;
}

int sockmi_nat_replace(struct sockmi_nat_net *nat, struct sockmi_nat_flow *old, struct sockmi_nat_flow *flow,
		       u32 hold_ms)
{
	bool old_rewrites = old->flags & SOCKMI_NAT_REWRITES, rewrites = flow->flags & SOCKMI_NAT_REWRITES;
	bool same_wire = old_rewrites && rewrites && !memcmp(&old->wire, &flow->wire, sizeof(flow->wire));
	struct sockmi_nat_count *unused = flow->count;
	int error;

	lockdep_assert_held(&nat->lock);
	tally(nat, &flow->tuple, flow->flags, 1);
	flow->count = old->count;
	if (same_wire)
		error = rhashtable_replace_fast(&nat->wires, &old->by_wire, &flow->by_wire, sockmi_nat_wire_params);
	else
		error = rewrites ? insert_wire(nat, flow) : 0;
	if (error) {
		tally(nat, &flow->tuple, flow->flags, -1);
		flow->count = unused;
		return error;
	}
	if (flow->flags & SOCKMI_NAT_HOLD)
		sockmi_nat_kept_open(&flow->count->kept);
	/* Cannot fail: @old is in the table, and only holders of the lock change that. */
	WARN_ON_ONCE(rhashtable_replace_fast(&nat->tuples, &old->by_tuple, &flow->by_tuple,
					     sockmi_nat_tuple_params));
	if (old_rewrites && !same_wire)
		rhashtable_remove_fast(&nat->wires, &old->by_wire, sockmi_nat_wire_params);
	flow->id = old->id;
	rb_replace_node(&old->by_id, &flow->by_id, &nat->ids);
	clear_lapse(nat, old);
	set_lapse(nat, flow, hold_ms);
	if (!(flow->flags & SOCKMI_NAT_HOLD))
		sockmi_nat_kept_hand_on(nat, flow);
	tally(nat, &old->tuple, old->flags, -1);
	kfree(unused);
	kfree_rcu(old, rcu);
	return 0;
}

void sockmi_nat_remove(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow)
{
	u32 flags = flow->flags;

	lockdep_assert_held(&nat->lock);
	/* A rule without effect, until all that was kept has gone on: what comes must find it, and wait behind that. */
	WRITE_ONCE(flow->flags, 0);
	sockmi_nat_kept_hand_on(nat, flow);
	rhashtable_remove_fast(&nat->tuples, &flow->by_tuple, sockmi_nat_tuple_params);
	if (flags & SOCKMI_NAT_REWRITES)
		rhashtable_remove_fast(&nat->wires, &flow->by_wire, sockmi_nat_wire_params);
	tally(nat, &flow->tuple, flags, -1);
	rb_erase(&flow->by_id, &nat->ids);
	clear_lapse(nat, flow);
	kfree_rcu(flow->count, rcu);
	kfree_rcu(flow, rcu);
	if (!--nat->flows)
		module_put(THIS_MODULE);
}

/* The end of a hold; a flow that was nothing else is removed. */
static void unhold(struct sockmi_nat_net *nat, struct sockmi_nat_flow *flow)
{
	u32 before = flow->flags, flags = before & ~SOCKMI_NAT_HOLD;

	if (!flags) {
		sockmi_nat_remove(nat, flow);
		return;
	}
	tally(nat, &flow->tuple, flags, 1);
	WRITE_ONCE(flow->flags, flags);
	clear_lapse(nat, flow);
	sockmi_nat_kept_hand_on(nat, flow);
	tally(nat, &flow->tuple, before, -1);
}

/* Ends the HOLDs whose time has come. */
void sockmi_nat_lapse(struct work_struct *work)
{
	struct sockmi_nat_net *nat = container_of(to_delayed_work(work), struct sockmi_nat_net, work);
	struct timerqueue_node *node;
	struct sockmi_nat_flow *flow;
	unsigned int ended = 0;

	mutex_lock(&nat->lock);
	while ((node = timerqueue_getnext(&nat->lapses)) && !ktime_after(node->expires, ktime_get())) {
		flow = container_of(node, struct sockmi_nat_flow, lapse);
		atomic_or(SOCKMI_NAT_SEEN_LAPSE, &flow->count->seen);
		unhold(nat, flow);
		if (++ended % LAPSE_BATCH == 0) {
			mutex_unlock(&nat->lock);
			cond_resched();
			mutex_lock(&nat->lock);
		}
	}
	plan_lapse(nat);
	mutex_unlock(&nat->lock);
}
