// SPDX-License-Identifier: GPL-2.0
/*
 * What the peer sends while its connection is held: kept, and received anew when the hold is over, under whatever rule
 * has come in its place. So a redirect leads it to the copy, and a connection that is thawed gets it itself. For the
 * peer it was a slow network. What finds no room is lost, like on any network.
 */
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/skbuff.h>
#include <linux/tcp.h>
#include <net/dst.h>
#include <net/tcp.h>

#include "nat_internal.h"
#include "trace.h"

/* Of one flow. Large packets are what the network card or the stack has coalesced. */
#define KEPT_PACKETS_MAX 256
#define KEPT_BYTES_MAX (1U << 20)

static unsigned int kept_max_mb = 32;
module_param_named(nat_kept_max_mb, kept_max_mb, uint, 0644);
MODULE_PARM_DESC(nat_kept_max_mb, "NAT helper: memory of packets that wait for the end of a hold, in MiB (32)");

static atomic_long_t kept_bytes = ATOMIC_LONG_INIT(0);

/**
 * struct kept - what skb->cb says of a packet that is kept
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

static struct kept *kept_of(struct sk_buff *skb)
{
	BUILD_BUG_ON(sizeof(struct kept) > sizeof(skb->cb));
	return (struct kept *)skb->cb;
}

/* A bridge's packets have a way of their own, which cannot be begun anew. */
static bool is_bridged(const struct sk_buff *skb)
{
#if IS_ENABLED(CONFIG_BRIDGE_NETFILTER)
	return skb_ext_exist(skb, SKB_EXT_BRIDGE_NF);
#else
	return false;
#endif
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

static void forget(struct sockmi_nat_kept *all, struct sk_buff *skb)
{
	__skb_unlink(skb, &all->packets);
	all->bytes -= kept_of(skb)->bytes;
	atomic_long_sub(kept_of(skb)->bytes, &kept_bytes);
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
	long most = (long)READ_ONCE(kept_max_mb) << 20;

	while (!skb_queue_empty(&all->packets) &&
	       (all->packets.qlen >= KEPT_PACKETS_MAX || all->bytes + bytes > KEPT_BYTES_MAX ||
		atomic_long_read(&kept_bytes) + bytes > most))
		forget(all, skb_peek(&all->packets));
	if (bytes > KEPT_BYTES_MAX)
		return false;
	if (atomic_long_add_return(bytes, &kept_bytes) <= most)
		return true;
	atomic_long_sub(bytes, &kept_bytes);
	return false;
}

bool sockmi_nat_keep(struct sockmi_nat_kept *all, struct sk_buff *skb, int offset)
{
	struct kept kept = { .ifindex = skb->dev->ifindex, .bytes = skb->truesize };
	struct sk_buff *last;
	bool room = false;

	if (is_bridged(skb) || (skb_dst(skb) && !skb_dst_force(skb)))
		return false;
	look(skb, offset, &kept);
	spin_lock_bh(&all->packets.lock);
	if (all->open) {
		last = skb_peek_tail(&all->packets);
		if (last && supersedes(&kept, kept_of(last)))
			forget(all, last);
		room = make_room(all, kept.bytes);
	}
	if (room) {
		*kept_of(skb) = kept;
		skb->dev = NULL;
		__skb_queue_tail(&all->packets, skb);
		all->bytes += kept.bytes;
	}
	spin_unlock_bh(&all->packets.lock);
	return room;
}

void sockmi_nat_kept_init(struct sockmi_nat_kept *all, bool open)
{
	skb_queue_head_init(&all->packets);
	all->bytes = 0;
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
	atomic_long_sub(all->bytes, &kept_bytes);
	all->bytes = 0;
	spin_unlock_bh(&all->packets.lock);
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

	close_kept(&flow->count->kept, &list);
	if (skb_queue_empty(&list))
		return;
	rcu_read_lock();
	while ((skb = __skb_dequeue(&list))) {
		struct net_device *device = dev_get_by_index_rcu(nat->net, kept_of(skb)->ifindex);

		if (!device) {
			kfree_skb(skb);
			continue;
		}
		packets++;
		bytes += skb->len;
		skb->dev = device;
		memset(skb->cb, 0, sizeof(skb->cb));
		netif_rx(skb);
	}
	rcu_read_unlock();
	trace_sockmi_nat_hand_on(NULL, flow->id, bytes, packets, 0);
}
