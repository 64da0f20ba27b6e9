// SPDX-License-Identifier: GPL-2.0
/* Loading, unloading, parameters, and what is kept for each network namespace. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/capability.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <net/netns/generic.h>

#include "internal.h"

#define CREATE_TRACE_POINTS
#include "trace.h"

unsigned int sockmi_freeze_default_ms = 1000;
module_param_named(freeze_default_ms, sockmi_freeze_default_ms, uint, 0644);
MODULE_PARM_DESC(freeze_default_ms, "Deadline of a freeze whose caller asks for none, in ms (1000)");

unsigned int sockmi_freeze_max_ms = 5000;
module_param_named(freeze_max_ms, sockmi_freeze_max_ms, uint, 0644);
MODULE_PARM_DESC(freeze_max_ms, "Longest deadline of a freeze that may be asked for, in ms (5000)");

unsigned int sockmi_claim_max_ms = 30000;
module_param_named(claim_max_ms, sockmi_claim_max_ms, uint, 0644);
MODULE_PARM_DESC(claim_max_ms, "Longest life of a claim that is not frozen, in ms (30000)");

unsigned int sockmi_dormant_max_ms = 30000;
module_param_named(dormant_max_ms, sockmi_dormant_max_ms, uint, 0644);
MODULE_PARM_DESC(dormant_max_ms, "Longest life of a restored socket that is neither activated nor discarded, in ms (30000)");

unsigned int sockmi_slots_max = 64;
module_param_named(slots_max, sockmi_slots_max, uint, 0444);
MODULE_PARM_DESC(slots_max, "Buffers of each kind that one open device file may have (64, at most 256)");

unsigned int sockmi_slots_max_mb = 256;
module_param_named(slots_max_mb, sockmi_slots_max_mb, uint, 0644);
MODULE_PARM_DESC(slots_max_mb, "Memory of the buffers of one open device file, in MiB (256)");

unsigned int sockmi_memory_max_mb = 1024;
module_param_named(memory_max_mb, sockmi_memory_max_mb, uint, 0644);
MODULE_PARM_DESC(memory_max_mb, "Memory of all buffers, images and events of the module, in MiB (1024)");

unsigned int sockmi_memory_users_max_mb = 512;
module_param_named(memory_users_max_mb, sockmi_memory_users_max_mb, uint, 0644);
MODULE_PARM_DESC(memory_users_max_mb,
		 "Of that, what all who do not administer the host (containers, users' own namespaces) may have together, in MiB (512)");

static unsigned int users_may_hold;
module_param(users_may_hold, uint, 0644);
MODULE_PARM_DESC(users_may_hold,
		 "May they freeze sockets and have dormant copies, who can keep the network configuration of the whole host waiting with that (0)");

unsigned int sockmi_list_max[SOCKMI_LISTS] = { 64, 64, 1024 };
module_param_array_named(list_max, sockmi_list_max, uint, NULL, 0444);
MODULE_PARM_DESC(list_max,
		 "Entries of the lists of bound, listening and connected sockets in a new network namespace (64,64,1024); sysctl sockmi.max_* changes them later");

unsigned int sockmi_sysctl_wait_ms = 10000;
module_param_named(sysctl_wait_ms, sockmi_sysctl_wait_ms, uint, 0644);
MODULE_PARM_DESC(sysctl_wait_ms, "How long a write to the sysctl sockmi.export waits for the result, in ms (10000)");

struct workqueue_struct *sockmi_workqueue;
struct workqueue_struct *sockmi_slow;
static unsigned int sockmi_net_id __read_mostly;
static atomic64_t memory_used = ATOMIC64_INIT(0);
static atomic64_t memory_users_used = ATOMIC64_INIT(0);

static bool add_within(atomic64_t *used, u64 bytes, unsigned int limit_mb)
{
	if ((u64)atomic64_add_return(bytes, used) <= (u64)limit_mb << 20)
		return true;
	atomic64_sub(bytes, used);
	return false;
}

/* Anybody can administer a network namespace of their own; they must leave something for the host's daemon. */
bool sockmi_memory_users(void)
{
	return !ns_capable_noaudit(&init_user_ns, CAP_NET_ADMIN);
}

/*
 * Who has a socket's lock can let a setsockopt() for multicast wait for it, and that has the lock of all network
 * configuration (RTNL), of all namespaces.
 */
bool sockmi_may_hold(const struct sockmi_file *file)
{
	return !file->users || READ_ONCE(users_may_hold);
}

int sockmi_memory_take(struct sockmi_memory *memory, u64 bytes, bool users)
{
	memory->bytes = bytes;
	memory->users = users;
	if (memory->users && !add_within(&memory_users_used, bytes, READ_ONCE(sockmi_memory_users_max_mb)))
		return -EDQUOT;
	if (add_within(&memory_used, bytes, READ_ONCE(sockmi_memory_max_mb)))
		return 0;
	if (memory->users)
		atomic64_sub(bytes, &memory_users_used);
	return -EDQUOT;
}

void sockmi_memory_give(const struct sockmi_memory *memory)
{
	atomic64_sub(memory->bytes, &memory_used);
	if (memory->users)
		atomic64_sub(memory->bytes, &memory_users_used);
}

struct sockmi_net *sockmi_net(const struct net *net)
{
	return net_generic(net, sockmi_net_id);
}

static LIST_HEAD(nets);
static DEFINE_MUTEX(nets_lock); /* guards the list; outermost */

static void list_net(struct sockmi_net *sn)
{
	mutex_lock(&nets_lock);
	list_add_tail(&sn->node, &nets);
	mutex_unlock(&nets_lock);
}

static void unlist_net(struct sockmi_net *sn)
{
	mutex_lock(&nets_lock);
	list_del(&sn->node);
	mutex_unlock(&nets_lock);
}

long sockmi_ioctl_forget(struct sockmi_file *file, void __user *arg, size_t size)
{
	struct sockmi_ioc_forget a;
	struct sockmi_net *sn;
	int result = sockmi_arg_in(&a, sizeof(a), arg, size);

	if (result)
		return result;
	if (a.flags || a.reserved)
		return -EINVAL;
	if (!capable(CAP_NET_ADMIN))
		return -EPERM;
	a.flows = 0;
	a.entries = 0;
	result = mutex_lock_killable(&nets_lock);
	if (result)
		return result;
	list_for_each_entry(sn, &nets, node) {
		a.entries += sockmi_lists_forget(sn);
		result = sockmi_nat_forget(sn, &a.flows);
		if (result)
			break;
	}
	mutex_unlock(&nets_lock);
	trace_sockmi_forget(NULL, a.flows, a.entries, result, 0);
	return sockmi_arg_out(arg, size, &a, sizeof(a)) ?: result;
}

static int __net_init net_init(struct net *net)
{
	struct sockmi_net *sn = sockmi_net(net);
	int result;

	sockmi_lists_init(sn);
	result = sockmi_nat_net_init(net, sn);
	if (result)
		return result;
	result = sockmi_sysctl_net_init(net, sn);
	if (result)
		sockmi_nat_net_exit(net, sn);
	else
		list_net(sn);
	return result;
}

static void __net_exit net_pre_exit(struct net *net)
{
	struct sockmi_net *sn = sockmi_net(net);

	unlist_net(sn);
	sockmi_nat_net_pre_exit(sn);
}

static void __net_exit net_exit(struct net *net)
{
	struct sockmi_net *sn = sockmi_net(net);

	sockmi_sysctl_net_exit(sn);
	sockmi_lists_exit(sn);
	sockmi_nat_net_exit(net, sn);
}

static struct pernet_operations net_operations = {
	.init = net_init,
	.pre_exit = net_pre_exit,
	.exit = net_exit,
	.id = &sockmi_net_id,
	.size = sizeof(struct sockmi_net),
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "sockmi",
	.fops = &sockmi_fops,
	.mode = 0666,
};

static int __init sockmi_init(void)
{
	int result;

	if (sockmi_slots_max > 256)
		sockmi_slots_max = 256;
	/* A freeze ends in time also when memory is short. */
	sockmi_workqueue = alloc_workqueue("sockmi", WQ_UNBOUND | WQ_HIGHPRI | WQ_MEM_RECLAIM, 0);
	if (!sockmi_workqueue)
		return -ENOMEM;
	sockmi_slow = alloc_workqueue("sockmi_slow", WQ_UNBOUND, 0);
	if (!sockmi_slow) {
		result = -ENOMEM;
		goto no_discards;
	}
	result = sockmi_claims_init();
	if (result)
		goto no_claims;
	result = sockmi_nat_init();
	if (result)
		goto no_nat;
	result = sockmi_sysctl_init();
	if (result)
		goto no_sysctl;
	result = register_pernet_subsys(&net_operations);
	if (result)
		goto no_pernet;
	result = misc_register(&device);
	if (result)
		goto no_device;
	pr_info("device interface %d.%d, images %d.%d\n", SOCKMI_DEV_ABI_MAJOR, SOCKMI_DEV_ABI_MINOR,
		SOCKMI_IMAGE_MAJOR, SOCKMI_IMAGE_MINOR);
	return 0;

no_device:
	unregister_pernet_subsys(&net_operations);
no_pernet:
	sockmi_sysctl_exit();
no_sysctl:
	sockmi_nat_exit();
no_nat:
	sockmi_claims_exit();
no_claims:
	destroy_workqueue(sockmi_slow);
no_discards:
	destroy_workqueue(sockmi_workqueue);
	return result;
}

static void __exit sockmi_exit(void)
{
	misc_deregister(&device);
	/* Whoever still writes to a sysctl may claim a socket of a daemon that has just ended: its work needs the queues. */
	unregister_pernet_subsys(&net_operations);
	sockmi_sysctl_exit();
	/* The last claim's work may still be on its way out. */
	destroy_workqueue(sockmi_slow);
	destroy_workqueue(sockmi_workqueue);
	sockmi_claims_exit();
	sockmi_nat_exit();
	rcu_barrier();
}

module_init(sockmi_init);
module_exit(sockmi_exit);

MODULE_DESCRIPTION("Moves live TCP sockets between hosts: freeze, dump, restore, redirect");
MODULE_AUTHOR("SockMi");
MODULE_LICENSE("GPL");
MODULE_VERSION("1.0");
