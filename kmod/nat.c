// SPDX-License-Identifier: GPL-2.0
/* The NAT helper of a network namespace: its beginning and its end. */
#include <linux/kmod.h>
#include <linux/module.h>
#include <linux/slab.h>
#include <net/netfilter/ipv6/nf_defrag_ipv6.h>

#include "nat_internal.h"

unsigned int sockmi_nat_flows_max = 262144;
module_param_named(nat_flows_max, sockmi_nat_flows_max, uint, 0644);
MODULE_PARM_DESC(nat_flows_max, "NAT helper: flows of a network namespace at most (262144, about 400 bytes each)");

const struct rhashtable_params sockmi_nat_tuple_params = {
	.key_len = sizeof(struct sockmi_nat_key),
	.key_offset = offsetof(struct sockmi_nat_flow, tuple),
	.head_offset = offsetof(struct sockmi_nat_flow, by_tuple),
	.automatic_shrinking = true,
};

const struct rhashtable_params sockmi_nat_wire_params = {
	.key_len = sizeof(struct sockmi_nat_key),
	.key_offset = offsetof(struct sockmi_nat_flow, wire),
	.head_offset = offsetof(struct sockmi_nat_flow, by_wire),
	.automatic_shrinking = true,
};

/* What puts fragments of IPv6 together: a module of the kernel's own, used if it can be had. */
static typeof(&nf_defrag_ipv6_enable) gather6;
static typeof(&nf_defrag_ipv6_disable) let_go6;

void sockmi_nat_gather6(struct sockmi_nat_net *nat, int step)
{
	lockdep_assert_held(&nat->lock);
	nat->fragile6 += step;
	/* Without memory for it fragments are lost; the next flow tries again. */
	if (nat->fragile6 && !nat->gathers6 && gather6)
		nat->gathers6 = !gather6(nat->net);
	if (nat->fragile6 || !nat->gathers6)
		return;
	let_go6(nat->net);
	nat->gathers6 = false;
}

int sockmi_nat_init(void)
{
	/* A hole in the key would be hashed with whatever a stack held before. */
	BUILD_BUG_ON(sizeof(struct sockmi_nat_key) != 2 * 16 + 2 * 2 + 4);
	gather6 = symbol_get(nf_defrag_ipv6_enable);
	if (!gather6) {
		request_module("nf_defrag_ipv6");
		gather6 = symbol_get(nf_defrag_ipv6_enable);
	}
	if (gather6)
		let_go6 = symbol_get(nf_defrag_ipv6_disable);
	return 0;
}

void sockmi_nat_exit(void)
{
	if (!gather6)
		return;
	symbol_put(nf_defrag_ipv6_disable);
	symbol_put(nf_defrag_ipv6_enable);
}

int sockmi_nat_net_init(struct net *net, struct sockmi_net *sn)
{
	struct sockmi_nat_net *nat = kzalloc(sizeof(*nat), GFP_KERNEL_ACCOUNT);

	if (!nat)
		return -ENOMEM;
	nat->net = net;
	mutex_init(&nat->lock);
	nat->ids = RB_ROOT;
	timerqueue_init_head(&nat->lapses);
	INIT_DELAYED_WORK(&nat->work, sockmi_nat_lapse);
	sn->nat = nat;
	return 0;
}

int sockmi_nat_arm(struct sockmi_nat_net *nat)
{
	int error;

	lockdep_assert_held(&nat->lock);
	if (nat->armed)
		return 0;
	nat->share = sockmi_nat_share_get(nat->net);
	if (!nat->share)
		return -ENOMEM;
	error = rhashtable_init(&nat->tuples, &sockmi_nat_tuple_params);
	if (error)
		goto put_share;
	error = rhashtable_init(&nat->wires, &sockmi_nat_wire_params);
	if (error)
		goto destroy_tuples;
	sockmi_nat_hooks(nat);
	error = nf_register_net_hooks(nat->net, nat->ops, ARRAY_SIZE(nat->ops));
	if (error)
		goto destroy_wires;
	nat->armed = true;
	return 0;

destroy_wires:
	/* Some of the hooks may have been there for a while. */
	synchronize_rcu();
	rhashtable_destroy(&nat->wires);
destroy_tuples:
	rhashtable_destroy(&nat->tuples);
put_share:
	sockmi_nat_share_put(nat->share);
	return error;
}

static void free_flow(void *flow, void *unused)
{
	sockmi_nat_flow_free(flow);
}

/*
 * Before anything of the namespace ends: a packet that waits may have an entry of conntrack's, for which that would wait
 * without end where it ends before us. Nobody has the device open in this namespace any more.
 */
void sockmi_nat_net_pre_exit(struct sockmi_net *sn)
{
	struct sockmi_nat_net *nat = sn->nat;
	struct sockmi_nat_flow *flow;
	u64 after = 0;

	if (!nat)
		return;
	cancel_delayed_work_sync(&nat->work);
	mutex_lock(&nat->lock);
	while ((flow = sockmi_nat_after(nat, after))) {
		after = flow->id;
		WRITE_ONCE(flow->flags, 0);
		sockmi_nat_kept_drop(&flow->count->kept);
		cond_resched();
	}
	mutex_unlock(&nat->lock);
}

void sockmi_nat_net_exit(struct net *net, struct sockmi_net *sn)
{
	struct sockmi_nat_net *nat = sn->nat;

	if (!nat)
		return;
	sn->nat = NULL;
	if (nat->armed) {
		nf_unregister_net_hooks(net, nat->ops, ARRAY_SIZE(nat->ops));
		if (nat->gathers6)
			let_go6(net);
		synchronize_rcu();
		rhashtable_destroy(&nat->wires);
		rhashtable_free_and_destroy(&nat->tuples, free_flow, NULL);
		sockmi_nat_share_put(nat->share);
		if (nat->flows)
			module_put(THIS_MODULE);
	}
	kfree(nat);
}
