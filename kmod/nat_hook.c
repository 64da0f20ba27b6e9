// SPDX-License-Identifier: GPL-2.0
/*
 * The NAT helper's look at each packet.
 *
 *   on the way in, before conntrack:	HOLD, REDIRECT, UNTRACKED; ICMP errors about what the importer sent
 *   on the way out, before conntrack:	HOLD, MUTE, UNTRACKED
 *   on the way out, after conntrack:	TRANSLATE; ICMP errors about what the peer sent
 *
 * Conntrack of the importer so sees its own address in both directions, and no reply tuple is anybody's but its own.
 */
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/netfilter_ipv4.h>
#include <linux/netfilter_ipv6.h>
#include <linux/tcp.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/tcp.h>

#include "nat_internal.h"

#define AFTER_ALL INT_MAX
#define BEFORE_RAW (NF_IP_PRI_RAW - 1)

static_assert((int)NF_IP_PRI_RAW == (int)NF_IP6_PRI_RAW);

/**
 * struct packet - a TCP packet, parsed
 * @family: AF_INET or AF_INET6
 * @offset: of the TCP header
 * @source: port
 * @dest: port
 * @syn: it has this flag
 * @ack: likewise
 * @fin: likewise
 * @rst: likewise
 */
struct packet {
	int family;
	int offset;
	__be16 source;
	__be16 dest;
	bool syn;
	bool ack;
	bool fin;
	bool rst;
};

static bool read_tcp(const struct sk_buff *skb, int family, int offset, struct packet *packet)
{
	struct tcphdr buffer;
	const struct tcphdr *tcp = skb_header_pointer(skb, offset, sizeof(buffer), &buffer);

	if (!tcp)
		return false;
	packet->family = family;
	packet->offset = offset;
	packet->source = tcp->source;
	packet->dest = tcp->dest;
	packet->syn = tcp->syn;
	packet->ack = tcp->ack;
	packet->fin = tcp->fin;
	packet->rst = tcp->rst;
	return true;
}

/* The key of a packet that comes in or goes out. */
static void key_in(const struct sk_buff *skb, const struct packet *packet, struct sockmi_nat_key *key)
{
	memset(key, 0, sizeof(*key));
	key->kind = packet->family;
	key->local_port = packet->dest;
	key->remote_port = packet->source;
	if (packet->family == AF_INET) {
		key->local[0] = ip_hdr(skb)->daddr;
		key->remote[0] = ip_hdr(skb)->saddr;
	} else {
		memcpy(key->local, &ipv6_hdr(skb)->daddr, sizeof(key->local));
		memcpy(key->remote, &ipv6_hdr(skb)->saddr, sizeof(key->remote));
	}
}

static void key_out(const struct sk_buff *skb, const struct packet *packet, struct sockmi_nat_key *key)
{
	memset(key, 0, sizeof(*key));
	key->kind = packet->family;
	key->local_port = packet->source;
	key->remote_port = packet->dest;
	if (packet->family == AF_INET) {
		key->local[0] = ip_hdr(skb)->saddr;
		key->remote[0] = ip_hdr(skb)->daddr;
	} else {
		memcpy(key->local, &ipv6_hdr(skb)->saddr, sizeof(key->local));
		memcpy(key->remote, &ipv6_hdr(skb)->daddr, sizeof(key->remote));
	}
}

static struct sockmi_nat_flow *look_up(struct sockmi_nat_net *nat, const struct sockmi_nat_key *key)
{
	return rhashtable_lookup(&nat->tuples, key, sockmi_nat_tuple_params);
}

static unsigned int drop(struct sockmi_nat_flow *flow, atomic64_t *why)
{
	atomic64_inc(why);
	sockmi_nat_touch(flow->count);
	return NF_DROP;
}

/*
 * What came in for a connection waits: NF_STOLEN, or NF_DROP for want of room. NF_ACCEPT: it waits no more.
 * The SYNs to a listener are many, and their senders repeat them.
 */
static unsigned int hold(struct sockmi_nat_flow *flow, struct sk_buff *skb, int offset,
			 const struct nf_hook_state *state)
{
	enum sockmi_nat_fate fate = SOCKMI_NAT_LOST;

	if (flow->tuple.remote_port)
		fate = sockmi_nat_keep(&flow->count->kept, skb, offset, state);
	if (fate == SOCKMI_NAT_GOES_ON)
		return NF_ACCEPT;
	drop(flow, &flow->count->held);
	return fate == SOCKMI_NAT_KEPT ? NF_STOLEN : NF_DROP;
}

static void note(struct sockmi_nat_count *count, int seen)
{
	if ((atomic_read(&count->seen) & seen) != seen)
		atomic_or(seen, &count->seen);
}

/*
 * Writes the flow's replacement for the local end into the packet: its destination for REDIRECT, its source for
 * TRANSLATE. Checksums are adjusted by the difference, so that a wrong one stays wrong; the helpers
 * know what hardware will add.
 */
static bool rewrite(struct sk_buff *skb, const struct sockmi_nat_flow *flow, const struct packet *packet, bool dest)
{
	const struct sockmi_nat_key *wire = &flow->wire;
	struct tcphdr *tcp;
	__be16 *port;

	if (skb_ensure_writable(skb, packet->offset + sizeof(*tcp)))
		return false;
	tcp = (struct tcphdr *)(skb->data + packet->offset);
	if (packet->family == AF_INET) {
		struct iphdr *ip = ip_hdr(skb);
		__be32 *address = dest ? &ip->daddr : &ip->saddr;

		inet_proto_csum_replace4(&tcp->check, skb, *address, wire->local[0], true);
		csum_replace4(&ip->check, *address, wire->local[0]);
		*address = wire->local[0];
	} else {
		struct in6_addr *address = dest ? &ipv6_hdr(skb)->daddr : &ipv6_hdr(skb)->saddr;

		inet_proto_csum_replace16(&tcp->check, skb, address->s6_addr32, wire->local, true);
		memcpy(address, wire->local, sizeof(*address));
	}
	port = dest ? &tcp->dest : &tcp->source;
	inet_proto_csum_replace2(&tcp->check, skb, *port, wire->local_port, false);
	*port = wire->local_port;
	atomic64_inc(&flow->count->packets);
	atomic64_add(skb->len, &flow->count->bytes);
	sockmi_nat_touch(flow->count);
	return true;
}

/* Is the port of a listener held, at this address or at any? */
static struct sockmi_nat_flow *held_port(struct sockmi_nat_net *nat, const struct sockmi_nat_key *connection)
{
	struct sockmi_nat_key key = *connection;
	struct sockmi_nat_flow *flow;

	memset(key.remote, 0, sizeof(key.remote));
	key.remote_port = 0;
	flow = look_up(nat, &key);
	if (flow)
		return flow;
	memset(key.local, 0, sizeof(key.local));
	return look_up(nat, &key);
}

static unsigned int tcp_in(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset,
			   const struct nf_hook_state *state)
{
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	unsigned int verdict;
	struct packet packet;
	u32 flags;

	if (!read_tcp(skb, family, offset, &packet))
		return NF_ACCEPT;
	key_in(skb, &packet, &key);
again:
	flow = look_up(nat, &key);
	if (!flow) {
		if (!READ_ONCE(nat->ports) || !packet.syn || packet.ack || packet.rst)
			return NF_ACCEPT;
		flow = held_port(nat, &key);
		if (!flow)
			return NF_ACCEPT;
	}
	flags = READ_ONCE(flow->flags);
	note(flow->count, (packet.syn && !packet.ack ? SOCKMI_NAT_SEEN_SYN_IN : 0) |
			  (packet.fin ? SOCKMI_NAT_SEEN_FIN_IN : 0) | (packet.rst ? SOCKMI_NAT_SEEN_RST_IN : 0));
	if (flags & SOCKMI_NAT_HOLD || (READ_ONCE(flow->count->kept.open) && flow->tuple.remote_port)) {
		verdict = hold(flow, skb, offset, state);
		if (verdict != NF_ACCEPT)
			return verdict;
		if (flags & SOCKMI_NAT_HOLD)
			goto again; /* it has just ended, so there is another rule by now */
	}
	if (flags & SOCKMI_NAT_REDIRECT) {
		if (!rewrite(skb, flow, &packet, true))
			return NF_DROP;
		sockmi_nat_untrack(skb);
	} else if (flags & SOCKMI_NAT_UNTRACKED) {
		sockmi_nat_untrack(skb);
	}
	return NF_ACCEPT;
}

/* What this host itself sends; data needs no look-up here unless something is held or untracked. */
static unsigned int tcp_local_out(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset)
{
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	struct packet packet;
	bool ends;
	u32 flags;

	if (!read_tcp(skb, family, offset, &packet))
		return NF_ACCEPT;
	ends = packet.rst || packet.fin;
	if (!READ_ONCE(nat->holds) && !READ_ONCE(nat->untracked) && !((ends || packet.syn) && READ_ONCE(nat->mutes)))
		return NF_ACCEPT;
	key_out(skb, &packet, &key);
	flow = look_up(nat, &key);
	if (!flow)
		return NF_ACCEPT;
	flags = READ_ONCE(flow->flags);
	if (flags & SOCKMI_NAT_HOLD)
		return drop(flow, &flow->count->held);
	/* Of a redirected connection only the importer may speak, so a new one of that name must not begin here. */
	if ((flags & SOCKMI_NAT_REDIRECT && (ends || packet.syn)) || (flags & SOCKMI_NAT_MUTE && ends))
		return drop(flow, &flow->count->muted);
	if (flags & SOCKMI_NAT_UNTRACKED)
		sockmi_nat_untrack(skb);
	return NF_ACCEPT;
}

static unsigned int tcp_post(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset)
{
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	struct packet packet;
	u32 flags;

	if (!read_tcp(skb, family, offset, &packet))
		return NF_ACCEPT;
	key_out(skb, &packet, &key);
	flow = look_up(nat, &key);
	if (!flow)
		return NF_ACCEPT;
	flags = READ_ONCE(flow->flags);
	if (!(flags & SOCKMI_NAT_TRANSLATE))
		return NF_ACCEPT;
	if (flags & SOCKMI_NAT_HOLD)
		return drop(flow, &flow->count->held);
	note(flow->count, (packet.fin ? SOCKMI_NAT_SEEN_FIN_OUT : 0) | (packet.rst ? SOCKMI_NAT_SEEN_RST_OUT : 0));
	return rewrite(skb, flow, &packet, false) ? NF_ACCEPT : NF_DROP;
}

/* Anything to be found by a packet that comes in? */
static bool idle_in(const struct sockmi_nat_net *nat)
{
	return !(READ_ONCE(nat->redirects) | READ_ONCE(nat->holds) | READ_ONCE(nat->ports) |
		 READ_ONCE(nat->untracked) | READ_ONCE(nat->translates));
}

static bool idle_out(const struct sockmi_nat_net *nat)
{
	return !(READ_ONCE(nat->mutes) | READ_ONCE(nat->holds) | READ_ONCE(nat->untracked));
}

/* The transport header of an IPv4 packet, or -1: the packet is odd, or not its first fragment. */
static int transport4(const struct sk_buff *skb)
{
	const struct iphdr *ip = ip_hdr(skb);

	/* Raw sockets send what they like. */
	if (skb->len < sizeof(*ip) || ip->ihl < 5 || ip->frag_off & htons(IP_OFFSET))
		return -1;
	return skb_network_offset(skb) + ip->ihl * 4;
}

/* The same for IPv6; @protocol gets that of the transport header. */
static int transport6(const struct sk_buff *skb, u8 *protocol)
{
	const struct ipv6hdr *ip = ipv6_hdr(skb);
	__be16 fragment = 0;
	int offset = skb_network_offset(skb) + sizeof(*ip);

	*protocol = ip->nexthdr;
	if (likely(*protocol == IPPROTO_TCP))
		return offset;
	offset = ipv6_skip_exthdr(skb, offset, protocol, &fragment);
	return fragment & htons(IP6_OFFSET) ? -1 : offset;
}

/*
 * Fragments of a connection that is held or redirected must be put together, since only the first has ports. Where
 * conntrack is at work it has done so already, and its queues are otherwise unused. For IPv6 a module of the kernel's does
 * it, before these hooks (sockmi_nat_gather6()). False: the packet is gone, for now or for ever.
 */
static bool gathered(struct net *net, struct sk_buff *skb)
{
	int error;

	local_bh_disable();
	error = ip_defrag(net, skb, IP_DEFRAG_CONNTRACK_IN);
	local_bh_enable();
	if (error)
		return false;
	skb->ignore_df = 1;
	return true;
}

static unsigned int in4(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct sockmi_nat_net *nat = priv;
	int offset;

	if (idle_in(nat))
		return NF_ACCEPT;
	if (unlikely(ip_is_fragment(ip_hdr(skb))) && ip_hdr(skb)->protocol == IPPROTO_TCP) {
		if ((READ_ONCE(nat->redirects) | READ_ONCE(nat->holds)) && !gathered(state->net, skb))
			return NF_STOLEN;
	}
	offset = transport4(skb);
	if (offset < 0)
		return NF_ACCEPT;
	if (likely(ip_hdr(skb)->protocol == IPPROTO_TCP))
		return tcp_in(nat, skb, AF_INET, offset, state);
	if (ip_hdr(skb)->protocol == IPPROTO_ICMP)
		return sockmi_nat_error_in(nat, skb, AF_INET, offset);
	return NF_ACCEPT;
}

static unsigned int local_out4(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct sockmi_nat_net *nat = priv;
	int offset;

	if (idle_out(nat) || ip_hdr(skb)->protocol != IPPROTO_TCP)
		return NF_ACCEPT;
	offset = transport4(skb);
	return offset < 0 ? NF_ACCEPT : tcp_local_out(nat, skb, AF_INET, offset);
}

static unsigned int post4(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct sockmi_nat_net *nat = priv;
	u8 protocol = ip_hdr(skb)->protocol;
	int offset;

	if (protocol == IPPROTO_TCP ? !READ_ONCE(nat->translates) :
	    protocol != IPPROTO_ICMP || !(READ_ONCE(nat->translates) | READ_ONCE(nat->redirects)))
		return NF_ACCEPT;
	offset = transport4(skb);
	if (offset < 0)
		return NF_ACCEPT;
	return protocol == IPPROTO_TCP ? tcp_post(nat, skb, AF_INET, offset) :
	       sockmi_nat_error_out(nat, skb, AF_INET, offset);
}

static unsigned int in6(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct sockmi_nat_net *nat = priv;
	u8 protocol;
	int offset;

	if (idle_in(nat))
		return NF_ACCEPT;
	offset = transport6(skb, &protocol);
	if (offset < 0)
		return NF_ACCEPT;
	if (likely(protocol == IPPROTO_TCP))
		return tcp_in(nat, skb, AF_INET6, offset, state);
	if (protocol == IPPROTO_ICMPV6)
		return sockmi_nat_error_in(nat, skb, AF_INET6, offset);
	return NF_ACCEPT;
}

static unsigned int local_out6(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct sockmi_nat_net *nat = priv;
	u8 protocol;
	int offset;

	if (idle_out(nat))
		return NF_ACCEPT;
	offset = transport6(skb, &protocol);
	return offset < 0 || protocol != IPPROTO_TCP ? NF_ACCEPT : tcp_local_out(nat, skb, AF_INET6, offset);
}

static unsigned int post6(void *priv, struct sk_buff *skb, const struct nf_hook_state *state)
{
	struct sockmi_nat_net *nat = priv;
	u8 protocol;
	int offset;

	if (!(READ_ONCE(nat->translates) | READ_ONCE(nat->redirects)))
		return NF_ACCEPT;
	offset = transport6(skb, &protocol);
	if (offset < 0)
		return NF_ACCEPT;
	if (protocol == IPPROTO_TCP)
		return READ_ONCE(nat->translates) ? tcp_post(nat, skb, AF_INET6, offset) : NF_ACCEPT;
	if (protocol == IPPROTO_ICMPV6)
		return sockmi_nat_error_out(nat, skb, AF_INET6, offset);
	return NF_ACCEPT;
}

void sockmi_nat_hooks(struct sockmi_nat_net *nat)
{
	static const struct {
		nf_hookfn *hook;
		u8 family;
		u8 number;
		int priority;
	} places[] = {
		{ in4, NFPROTO_IPV4, NF_INET_PRE_ROUTING, BEFORE_RAW },
		{ local_out4, NFPROTO_IPV4, NF_INET_LOCAL_OUT, BEFORE_RAW },
		{ post4, NFPROTO_IPV4, NF_INET_POST_ROUTING, AFTER_ALL },
		{ in6, NFPROTO_IPV6, NF_INET_PRE_ROUTING, BEFORE_RAW },
		{ local_out6, NFPROTO_IPV6, NF_INET_LOCAL_OUT, BEFORE_RAW },
		{ post6, NFPROTO_IPV6, NF_INET_POST_ROUTING, AFTER_ALL },
	};
	unsigned int i;

	static_assert(ARRAY_SIZE(places) == SOCKMI_NAT_HOOKS);
	memset(nat->ops, 0, sizeof(nat->ops));
	for (i = 0; i < ARRAY_SIZE(places); i++) {
		nat->ops[i].hook = places[i].hook;
		nat->ops[i].pf = places[i].family;
		nat->ops[i].hooknum = places[i].number;
		nat->ops[i].priority = places[i].priority;
		nat->ops[i].priv = nat;
	}
}
