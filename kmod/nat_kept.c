// SPDX-License-Identifier: GPL-2.0
/*
 * What the peer sends while its connection is held: kept, and given back to netfilter when the hold is over, under
 * whatever rule has come in its place. So a redirect leads it to the copy, and a connection that is thawed gets it itself.
 * For the peer it was a slow network. What finds no room is lost, like on any network.
 *
 * Order is kept: until the last of it has passed, whatever comes is kept too, and passes in its turn.
 */
#include <linux/ip.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/netdevice.h>
#include <linux/sched.h>
#include <linux/skbuff.h>
#include <linux/slab.h>
#include <linux/tcp.h>
#include <linux/user_namespace.h>
#include <net/dst.h>
#include <net/l3mdev.h>
#include <net/net_namespace.h>
#include <net/tcp.h>

#include "nat_internal.h"
#include "trace.h"

/* Of one flow. Large packets are what the network card or the stack has coalesced. */
#define KEPT_PACKETS_MAX 256
#define KEPT_BYTES_MAX (1U << 20)

/* What the end of one hold passes on in turn with what comes meanwhile; more than that comes faster than it goes. */
#define IN_TURN_MAX 2048

static unsigned int kept_max_mb = 64;
module_param_named(nat_kept_max_mb, kept_max_mb, uint, 0644);
MODULE_PARM_DESC(nat_kept_max_mb,
		 "NAT helper: memory of packets that wait for the end of a hold, in MiB (64); nobody gets more of it than is still free");

/**
 * struct sockmi_nat_share - what those who answer for each other have of the memory for packets
 * @node: in shares
 * @of: the network namespace, or user namespace, or NULL: @uid decides
 * @uid: who made the user namespace
 * @nets: network namespaces that use it
 * @bytes: taken
 *
 * Anybody can have network namespaces of their own, and as many as they like.
 */
struct sockmi_nat_share {
	struct list_head node;
	const void *of;
	kuid_t uid;
	unsigned int nets;
	atomic_long_t bytes;
};

static LIST_HEAD(shares);
static DEFINE_MUTEX(shares_lock); /* guards the list; innermost */
static atomic_long_t kept_bytes = ATOMIC_LONG_INIT(0);

struct sockmi_nat_share *sockmi_nat_share_get(const struct net *net)
{
	const struct user_namespace *top = net->user_ns;
	kuid_t uid = GLOBAL_ROOT_UID;
	struct sockmi_nat_share *share;
	const void *of = net; /* the host's administrator makes no namespaces to get more */

	if (top != &init_user_ns) {
		while (top->parent != &init_user_ns)
			top = top->parent;
		/* Containers that a service of the host makes do not answer for each other. */
		uid = top->owner;
		of = uid_eq(uid, GLOBAL_ROOT_UID) ? top : NULL;
	}
	mutex_lock(&shares_lock);
	list_for_each_entry(share, &shares, node)
		if (share->of == of && uid_eq(share->uid, uid))
			goto found;
	share = kzalloc(sizeof(*share), GFP_KERNEL_ACCOUNT);
	if (!share)
		goto unlock;
	share->of = of;
	share->uid = uid;
	list_add(&share->node, &shares);
found:
	share->nets++;
unlock:
	mutex_unlock(&shares_lock);
	return share;
}

void sockmi_nat_share_put(struct sockmi_nat_share *share)
{
	mutex_lock(&shares_lock);
	if (!--share->nets) {
		list_del(&share->node);
		kfree(share);
	}
	mutex_unlock(&shares_lock);
}

static void give(struct sockmi_nat_share *share, long bytes)
{
	atomic_long_sub(bytes, &share->bytes);
	atomic_long_sub(bytes, &kept_bytes);
}

/* Nobody gets more than is left for others: one alone half of it, each of two a third. */
static bool take(struct sockmi_nat_share *share, long bytes)
{
	long most = (long)READ_ONCE(kept_max_mb) << 20;

	if (atomic_long_add_return(bytes, &share->bytes) + atomic_long_add_return(bytes, &kept_bytes) <= most)
		return true;
	give(share, bytes);
	return false;
}

/**
 * struct kept - what skb->cb says of a packet that is kept, behind what IP says there
 * @ifindex: the device it came in by, which may go meanwhile
 * @bytes: counted for it
 * @seq: of a bare ACK
 * @ack_seq: likewise
 * @bare: it is one
 */
struct kept {
	int ifindex;
	unsigned int bytes;
	u32 seq;
	u32 ack_seq;
	bool bare;
};

#define KEPT_OFFSET (sizeof(struct inet_skb_parm) > sizeof(struct inet6_skb_parm) ? \
		     sizeof(struct inet_skb_parm) : sizeof(struct inet6_skb_parm))

static struct kept *kept_of(struct sk_buff *skb)
{
	BUILD_BUG_ON(KEPT_OFFSET + sizeof(struct kept) > sizeof(skb->cb));
	BUILD_BUG_ON(KEPT_OFFSET % __alignof__(struct kept));
	return (struct kept *)(skb->cb + KEPT_OFFSET);
}

/* A bridge's packets, and those that VRF shows a second time, are nothing that their okfn takes on. */
static bool is_borrowed(const struct sk_buff *skb)
{
#if IS_ENABLED(CONFIG_BRIDGE_NETFILTER)
	if (skb_ext_exist(skb, SKB_EXT_BRIDGE_NF))
		return true;
#endif
	return netif_is_l3_master(skb->dev);
}

/* Is it an ACK and nothing else, its TCP header at @offset? */
static void look(const struct sk_buff *skb, int offset, struct kept *kept)
{
	struct tcphdr buffer;
	const struct tcphdr *tcp = skb_header_pointer(skb, offset, sizeof(buffer), &buffer);

	kept->bare = tcp && tcp->ack && !tcp->syn && !tcp->fin && !tcp->rst && !tcp->urg &&
		     skb->len == offset + tcp->doff * 4;
	kept->seq = kept->bare ? ntohl(tcp->seq) : 0;
	kept->ack_seq = kept->bare ? ntohl(tcp->ack_seq) : 0;
}

static void unlink(struct sockmi_nat_kept *all, struct sk_buff *skb)
{
	__skb_unlink(skb, &all->packets);
	all->bytes -= kept_of(skb)->bytes;
	give(all->share, kept_of(skb)->bytes);
}

static void forget(struct sockmi_nat_kept *all, struct sk_buff *skb)
{
	unlink(all, skb);
	kfree_skb(skb);
}

/* A bare ACK that acknowledges more says all that the one before it said. Repeated ones mean something: they stay. */
static bool supersedes(const struct kept *kept, const struct kept *last)
{
	return kept->bare && last->bare && after(kept->ack_seq, last->ack_seq) && !before(kept->seq, last->seq);
}

/* Room for @bytes more; the oldest packets make place. */
static bool make_room(struct sockmi_nat_kept *all, unsigned int bytes)
{
	if (bytes > KEPT_BYTES_MAX)
		return false;
	while (all->packets.qlen >= KEPT_PACKETS_MAX || all->bytes + bytes > KEPT_BYTES_MAX)
		forget(all, skb_peek(&all->packets));
	while (!take(all->share, bytes)) {
		if (skb_queue_empty(&all->packets))
			return false;
		forget(all, skb_peek(&all->packets));
	}
	return true;
}

enum sockmi_nat_fate sockmi_nat_keep(struct sockmi_nat_kept *all, struct sk_buff *skb, int offset,
				     const struct nf_hook_state *state)
{
	struct kept kept = { .ifindex = skb->dev->ifindex, .bytes = skb->truesize };
	enum sockmi_nat_fate fate = SOCKMI_NAT_LOST;
	struct sk_buff *last;

	/* Softirqs are off while it passes, so whoever is this task is that packet. */
	if (READ_ONCE(all->passer) == current)
		return SOCKMI_NAT_GOES_ON;
	look(skb, offset, &kept);
	spin_lock_bh(&all->packets.lock);
	if (!all->open) {
		fate = SOCKMI_NAT_GOES_ON;
	} else if (!is_borrowed(skb) && (!skb_dst(skb) || skb_dst_force(skb))) {
		last = skb_peek_tail(&all->packets);
		if (last && supersedes(&kept, kept_of(last)))
			forget(all, last);
		if (make_room(all, kept.bytes))
			fate = SOCKMI_NAT_KEPT;
	}
	if (fate == SOCKMI_NAT_KEPT) {
		skb_orphan(skb); /* a socket that a BPF program has chosen for it need not wait */
		*kept_of(skb) = kept;
		skb->dev = NULL;
		__skb_queue_tail(&all->packets, skb);
		all->bytes += kept.bytes;
		all->okfn = state->okfn;
	}
	spin_unlock_bh(&all->packets.lock);
	return fate;
}

void sockmi_nat_kept_init(struct sockmi_nat_kept *all, bool open)
{
	skb_queue_head_init(&all->packets);
	all->open = open;
}

void sockmi_nat_kept_open(struct sockmi_nat_kept *all)
{
	spin_lock_bh(&all->packets.lock);
	all->open = true;
	spin_unlock_bh(&all->packets.lock);
}

/* Nothing more is kept; what has been is @list's, and no longer counted. */
static void close_kept(struct sockmi_nat_kept *all, struct sk_buff_head *list)
{
	__skb_queue_head_init(list);
	spin_lock_bh(&all->packets.lock);
	all->open = false;
	skb_queue_splice_init(&all->packets, list);
	if (all->bytes)
		give(all->share, all->bytes);
	all->bytes = 0;
	spin_unlock_bh(&all->packets.lock);
}

/* The next packet, no longer counted; NULL: there is none, and from now on none is kept. */
static struct sk_buff *next_or_close(struct sockmi_nat_kept *all)
{
	struct sk_buff *skb;

	spin_lock_bh(&all->packets.lock);
	skb = skb_peek(&all->packets);
	if (skb)
		unlink(all, skb);
	else
		all->open = false;
	spin_unlock_bh(&all->packets.lock);
	return skb;
}

/* To the end of its way before this returns, unless somebody else queues it. */
static void pass(struct sockmi_nat_net *nat, const struct sockmi_nat_flow *flow, struct sk_buff *skb)
{
	struct sockmi_nat_kept *all = &flow->count->kept;
	struct net_device *device;

	local_bh_disable();
	rcu_read_lock();
	device = dev_get_by_index_rcu(nat->net, kept_of(skb)->ifindex);
	if (device && device->flags & IFF_UP) {
		skb->dev = device;
		WRITE_ONCE(all->passer, current);
		NF_HOOK(flow->tuple.kind, NF_INET_PRE_ROUTING, nat->net, NULL, skb, device, NULL, all->okfn);
		WRITE_ONCE(all->passer, NULL);
	} else {
		kfree_skb(skb);
	}
	rcu_read_unlock();
	local_bh_enable();
	cond_resched();
}

void sockmi_nat_kept_drop(struct sockmi_nat_kept *all)
{
	struct sk_buff_head list;

	close_kept(all, &list);
	__skb_queue_purge(&list);
}

void sockmi_nat_kept_hand_on(struct sockmi_nat_net *nat, const struct sockmi_nat_flow *flow)
{
	unsigned int packets = 0, bytes = 0;
	struct sk_buff_head list;
	struct sk_buff *skb;

	while (packets < IN_TURN_MAX && (skb = next_or_close(&flow->count->kept))) {
		packets++;
		bytes += skb->len;
		pass(nat, flow, skb);
	}
	close_kept(&flow->count->kept, &list);
	while ((skb = __skb_dequeue(&list))) {
		packets++;
		bytes += skb->len;
		pass(nat, flow, skb);
	}
	if (packets)
		trace_sockmi_nat_hand_on(NULL, flow->id, bytes, packets, 0);
}
