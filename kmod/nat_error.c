// SPDX-License-Identifier: GPL-2.0
/*
 * ICMP and ICMPv6 errors about connections that live elsewhere.
 *
 *   in:  an error about what the importer sent under the exporter's name reaches the exporter: on to the importer,
 *	  quoting what that did send
 *   out: an error about what the peer sent, quoting the importer's address, leaves the exporter, passes it, or leaves the
 *	  importer: it must quote what the peer did send
 *
 * Both find their flow by one look-up: the quoted packet names the tuple, or the wire.
 */
#include <linux/icmp.h>
#include <linux/icmpv6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <net/checksum.h>
#include <net/ip.h>
#include <net/ipv6.h>
#include <net/ndisc.h>

#include "nat_internal.h"

/* Both headers have eight bytes, with the checksum at the same place. */
#define ERROR_BYTES 8
#define ERROR_CHECK 2

/**
 * struct quote - the packet that an error quotes
 * @family: AF_INET or AF_INET6
 * @error: offset of the ICMP header
 * @ip: offset of the quoted network header
 * @tcp: offset of the quoted TCP header, of which 8 bytes are there
 * @source: its addresses, in the first word for IPv4
 * @dest: likewise
 * @source_port: its ports
 * @dest_port: likewise
 */
struct quote {
	int family;
	int error;
	int ip;
	int tcp;
	__be32 source[4];
	__be32 dest[4];
	__be16 source_port;
	__be16 dest_port;
};

static bool read_ip4(const struct sk_buff *skb, struct quote *quote)
{
	struct iphdr buffer;
	const struct iphdr *ip = skb_header_pointer(skb, quote->ip, sizeof(buffer), &buffer);

	if (!ip || ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_TCP || ip->frag_off & htons(IP_OFFSET))
		return false;
	quote->source[0] = ip->saddr;
	quote->dest[0] = ip->daddr;
	quote->tcp = quote->ip + ip->ihl * 4;
	return true;
}

static bool read_ip6(const struct sk_buff *skb, struct quote *quote)
{
	struct ipv6hdr buffer;
	const struct ipv6hdr *ip = skb_header_pointer(skb, quote->ip, sizeof(buffer), &buffer);
	__be16 fragment = 0;
	u8 protocol;

	if (!ip || ip->version != 6)
		return false;
	protocol = ip->nexthdr;
	memcpy(quote->source, &ip->saddr, sizeof(quote->source));
	memcpy(quote->dest, &ip->daddr, sizeof(quote->dest));
	quote->tcp = ipv6_skip_exthdr(skb, quote->ip + sizeof(*ip), &protocol, &fragment);
	return quote->tcp >= 0 && protocol == IPPROTO_TCP && !(fragment & htons(IP6_OFFSET));
}

/* Reads the packet quoted at @quote->ip. */
static bool read_quote(const struct sk_buff *skb, struct quote *quote)
{
	struct {
		__be16 source;
		__be16 dest;
		__be32 seq;
	} buffer, *tcp;

	memset(quote->source, 0, sizeof(quote->source));
	memset(quote->dest, 0, sizeof(quote->dest));
	if (!(quote->family == AF_INET ? read_ip4(skb, quote) : read_ip6(skb, quote)))
		return false;
	tcp = skb_header_pointer(skb, quote->tcp, sizeof(buffer), &buffer);
	if (!tcp)
		return false;
	quote->source_port = tcp->source;
	quote->dest_port = tcp->dest;
	return true;
}

/* The type of the ICMP message at @offset, or -1. */
static int read_type(const struct sk_buff *skb, int offset)
{
	u8 buffer[ERROR_BYTES];
	const u8 *header = skb_header_pointer(skb, offset, sizeof(buffer), buffer);

	return header ? header[0] : -1;
}

static bool is_error(int family, int type)
{
	if (family == AF_INET)
		return type == ICMP_DEST_UNREACH || type == ICMP_SOURCE_QUENCH || type == ICMP_TIME_EXCEEDED ||
		       type == ICMP_PARAMETERPROB;
	return type == ICMPV6_DEST_UNREACH || type == ICMPV6_PKT_TOOBIG || type == ICMPV6_TIME_EXCEED ||
	       type == ICMPV6_PARAMPROB;
}

/* The offset of the packet that an ICMPv6 redirect quotes in its options, or -1. */
static int redirect6_quote(const struct sk_buff *skb, int offset)
{
	u8 buffer[2];
	const u8 *option;

	for (offset += sizeof(struct rd_msg); (option = skb_header_pointer(skb, offset, sizeof(buffer), buffer));
	     offset += option[1] * 8) {
		if (!option[1])
			break;
		if (option[0] == ND_OPT_REDIRECT_HDR)
			return offset + 8;
	}
	return -1;
}

static void patch2(struct sk_buff *skb, __sum16 *check, __be16 *field, __be16 to)
{
	inet_proto_csum_replace2(check, skb, *field, to, false);
	*field = to;
}

/* A checksum inside the message that just changed from @from to @to. */
static void patch_check(struct sk_buff *skb, __sum16 *check, __sum16 from, __sum16 to)
{
	inet_proto_csum_replace2(check, skb, (__force __be16)from, (__force __be16)to, false);
}

/*
 * Replaces the quoted packet's source or destination by @address and @port, and, if @outer, the error's own
 * destination or source by the same address. Every checksum stays as right or wrong as it was.
 */
static bool rewrite(struct sk_buff *skb, const struct quote *quote, bool source, const __be32 *address, __be16 port,
		    bool outer)
{
	bool tcp_check = skb->len >= quote->tcp + offsetofend(struct tcphdr, check);
	struct tcphdr *tcp;
	__sum16 *check, before;
	__be16 *port_field;
	int i;

	if (skb_ensure_writable(skb, quote->tcp + (tcp_check ? offsetofend(struct tcphdr, check) : ERROR_BYTES)))
		return false;
	check = (__sum16 *)(skb->data + quote->error + ERROR_CHECK);
	tcp = (struct tcphdr *)(skb->data + quote->tcp);
	port_field = source ? &tcp->source : &tcp->dest;
	before = tcp_check ? tcp->check : 0;

	if (quote->family == AF_INET) {
		struct iphdr *ip = (struct iphdr *)(skb->data + quote->ip), *own = ip_hdr(skb);
		__be32 *field = source ? &ip->saddr : &ip->daddr, *own_field = source ? &own->daddr : &own->saddr;
		__sum16 ip_before = ip->check;

		csum_replace4(&ip->check, *field, *address);
		patch_check(skb, check, ip_before, ip->check);
		if (tcp_check)
			csum_replace4(&tcp->check, *field, *address);
		inet_proto_csum_replace4(check, skb, *field, *address, false);
		*field = *address;
		if (outer) {
			csum_replace4(&own->check, *own_field, *address);
			*own_field = *address;
		}
	} else {
		struct ipv6hdr *ip = (struct ipv6hdr *)(skb->data + quote->ip), *own = ipv6_hdr(skb);
		struct in6_addr *field = source ? &ip->saddr : &ip->daddr;
		struct in6_addr *own_field = source ? &own->daddr : &own->saddr;

		for (i = 0; i < 4; i++) {
			if (tcp_check)
				csum_replace4(&tcp->check, field->s6_addr32[i], address[i]);
			inet_proto_csum_replace4(check, skb, field->s6_addr32[i], address[i], false);
		}
		memcpy(field, address, sizeof(*field));
		if (outer) {
			inet_proto_csum_replace16(check, skb, own_field->s6_addr32, address, true);
			memcpy(own_field, address, sizeof(*own_field));
		}
	}
	if (tcp_check) {
		csum_replace2(&tcp->check, *port_field, port);
		patch_check(skb, check, before, tcp->check);
	}
	patch2(skb, check, port_field, port);
	return true;
}

static bool same_address(const struct sk_buff *skb, int family, bool dest, const __be32 *address)
{
	if (family == AF_INET)
		return (dest ? ip_hdr(skb)->daddr : ip_hdr(skb)->saddr) == *address;
	return !memcmp(dest ? &ipv6_hdr(skb)->daddr : &ipv6_hdr(skb)->saddr, address, sizeof(struct in6_addr));
}

static void fill_key(struct sockmi_nat_key *key, const struct quote *quote, bool source_is_local, u32 kind)
{
	memcpy(key->local, source_is_local ? quote->source : quote->dest, sizeof(key->local));
	memcpy(key->remote, source_is_local ? quote->dest : quote->source, sizeof(key->remote));
	key->local_port = source_is_local ? quote->source_port : quote->dest_port;
	key->remote_port = source_is_local ? quote->dest_port : quote->source_port;
	key->kind = kind;
}

unsigned int sockmi_nat_error_in(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset)
{
	struct quote quote = { .family = family, .error = offset, .ip = offset + ERROR_BYTES };
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;
	u32 flags;

	if (!is_error(family, read_type(skb, offset)) || !read_quote(skb, &quote) ||
	    !same_address(skb, family, true, quote.source))
		return NF_ACCEPT;
	fill_key(&key, &quote, true, family);
	flow = rhashtable_lookup(&nat->tuples, &key, sockmi_nat_tuple_params);
	if (!flow)
		return NF_ACCEPT;
	flags = READ_ONCE(flow->flags);
	if (flags & SOCKMI_NAT_HOLD) {
		atomic64_inc(&flow->count->held);
		return NF_DROP;
	}
	if (flags & SOCKMI_NAT_REDIRECT) {
		if (!rewrite(skb, &quote, true, flow->wire.local, flow->wire.local_port, true))
			return NF_DROP;
		atomic64_inc(&flow->count->errors);
		sockmi_nat_untrack(skb);
	} else if (flags & SOCKMI_NAT_UNTRACKED) {
		sockmi_nat_untrack(skb);
	}
	return NF_ACCEPT;
}

/* A router's advice for the importer's address would be taken for one about the exporter's: it is not passed on. */
static unsigned int redirect_out(struct sockmi_nat_net *nat, struct sk_buff *skb, struct quote *quote)
{
	struct sockmi_nat_key key;

	if (quote->ip < 0 || !read_quote(skb, quote))
		return NF_ACCEPT;
	fill_key(&key, quote, false, quote->family | SOCKMI_NAT_REDIRECT << 16);
	return rhashtable_lookup(&nat->wires, &key, sockmi_nat_wire_params) ? NF_DROP : NF_ACCEPT;
}

unsigned int sockmi_nat_error_out(struct sockmi_nat_net *nat, struct sk_buff *skb, int family, int offset)
{
	struct quote quote = { .family = family, .error = offset, .ip = offset + ERROR_BYTES };
	int type = read_type(skb, offset);
	const struct sockmi_nat_key *shown;
	struct sockmi_nat_flow *flow;
	struct sockmi_nat_key key;

	if (family == AF_INET && type == ICMP_REDIRECT)
		return redirect_out(nat, skb, &quote);
	if (family == AF_INET6 && type == NDISC_REDIRECT) {
		quote.ip = redirect6_quote(skb, offset);
		return redirect_out(nat, skb, &quote);
	}
	if (!is_error(family, type) || !read_quote(skb, &quote))
		return NF_ACCEPT;

	/* The exporter shows the peer its own end; the importer what it writes into packets. */
	fill_key(&key, &quote, false, family | SOCKMI_NAT_REDIRECT << 16);
	flow = rhashtable_lookup(&nat->wires, &key, sockmi_nat_wire_params);
	if (flow) {
		shown = &flow->tuple;
	} else {
		key.kind = family;
		flow = rhashtable_lookup(&nat->tuples, &key, sockmi_nat_tuple_params);
		if (!flow || !(flow->flags & SOCKMI_NAT_TRANSLATE))
			return NF_ACCEPT;
		shown = &flow->wire;
	}
	if (!rewrite(skb, &quote, false, shown->local, shown->local_port,
		     same_address(skb, family, false, quote.dest)))
		return NF_DROP;
	atomic64_inc(&flow->count->errors);
	return NF_ACCEPT;
}
