// SPDX-License-Identifier: GPL-2.0
/* Packets: whose they are, and what a rewritten one's checksums are, computed anew. */
#include "../nat_hook.c"
#include <net/ip6_checksum.h>
#include "cases.h"

#define SOURCE_PORT 40000
#define DEST_PORT 80
#define NEW_PORT 50001
#define PAYLOAD_MAX 64
#define HEADROOM 64

/* IPv4 addresses are the first word. */
static const __be32 source[] = { htonl(0xc0000207), htonl(1), htonl(2), htonl(3) };
static const __be32 dest[] = { htonl(0xc6336409), htonl(4), htonl(5), htonl(6) };
static const __be32 replacement[] = { htonl(0xcb007101), htonl(0xffffffff), htonl(0), htonl(9) };

struct rewriting {
	const char *name;
	int family;
	bool dest;
	unsigned int payload;
	u8 ip_summed;
	u16 damage; /* of the TCP checksum */
};

static const struct rewriting rewritings[] = {
	{ "IPv4, destination", AF_INET, true },
	{ "IPv4, source", AF_INET, false },
	{ "IPv4, an even payload", AF_INET, true, 20 },
	{ "IPv4, an odd payload", AF_INET, false, 21 },
	{ "IPv4, a wrong one stays wrong", AF_INET, true, 20, .damage = 1 },
	{ "IPv4, the card adds the rest", AF_INET, false, 21, CHECKSUM_PARTIAL },
	{ "IPv6, destination", AF_INET6, true },
	{ "IPv6, source", AF_INET6, false },
	{ "IPv6, an even payload", AF_INET6, true, 20 },
	{ "IPv6, an odd payload", AF_INET6, false, 21 },
	{ "IPv6, a wrong one stays wrong", AF_INET6, true, 20, .damage = 1 },
	{ "IPv6, the card adds the rest", AF_INET6, true, 20, CHECKSUM_PARTIAL },
};
SOCKMI_CASES(rewritings);

static unsigned int header_bytes(int family)
{
	return family == AF_INET ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* The checksum that the TCP header in @skb would get if @sum were that of its bytes: 0 of right ones. */
static __sum16 over_pseudo_header(const struct sk_buff *skb, int family, __wsum sum)
{
	unsigned int length = skb->len - header_bytes(family);

	if (family == AF_INET)
		return csum_tcpudp_magic(ip_hdr(skb)->saddr, ip_hdr(skb)->daddr, length, IPPROTO_TCP, sum);
	return csum_ipv6_magic(&ipv6_hdr(skb)->saddr, &ipv6_hdr(skb)->daddr, length, IPPROTO_TCP, sum);
}

/* What is wrong with the checksum of TCP: 0 if it is right. */
static u16 wrong(const struct sk_buff *skb, int family)
{
	unsigned int offset = header_bytes(family);
	const struct tcphdr *tcp = (const struct tcphdr *)(skb->data + offset);

	if (skb->ip_summed == CHECKSUM_PARTIAL) /* the pseudo header's alone is there */
		return (__force u16)tcp->check ^ (__force u16)~over_pseudo_header(skb, family, 0);
	return (__force u16)over_pseudo_header(skb, family, csum_partial(tcp, skb->len - offset, 0));
}

static void free_packet(struct kunit_resource *resource)
{
	kfree_skb(resource->data);
}

/* A packet from @source to @dest. It ends with the test. */
static struct sk_buff *packet_of(struct kunit *test, int family, unsigned int payload, u8 ip_summed)
{
	struct sk_buff *skb = alloc_skb(HEADROOM + sizeof(struct ipv6hdr) + sizeof(struct tcphdr) + PAYLOAD_MAX,
					GFP_KERNEL);
	struct tcphdr *tcp;
	unsigned int i;
	u8 *data;

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, skb);
	kunit_alloc_resource(test, NULL, free_packet, GFP_KERNEL, skb);
	skb_reserve(skb, HEADROOM);
	skb_reset_network_header(skb);
	skb_put_zero(skb, header_bytes(family));
	tcp = skb_put_zero(skb, sizeof(*tcp));
	tcp->source = htons(SOURCE_PORT);
	tcp->dest = htons(DEST_PORT);
	tcp->doff = sizeof(*tcp) / 4;
	tcp->ack = 1;
	data = skb_put(skb, payload);
	for (i = 0; i < payload; i++)
		data[i] = 0xa5 + i;
	if (family == AF_INET) {
		struct iphdr *ip = ip_hdr(skb);

		*ip = (struct iphdr){ .version = 4, .ihl = 5, .ttl = 64, .protocol = IPPROTO_TCP,
				      .tot_len = htons(skb->len), .saddr = source[0], .daddr = dest[0] };
		ip->check = ip_fast_csum(ip, ip->ihl);
	} else {
		struct ipv6hdr *ip = ipv6_hdr(skb);

		*ip = (struct ipv6hdr){ .version = 6, .hop_limit = 64, .nexthdr = IPPROTO_TCP,
					.payload_len = htons(skb->len - sizeof(*ip)) };
		memcpy(&ip->saddr, source, sizeof(source));
		memcpy(&ip->daddr, dest, sizeof(dest));
	}
	skb->ip_summed = ip_summed;
	tcp->check = ip_summed == CHECKSUM_PARTIAL ?
		     ~over_pseudo_header(skb, family, 0) :
		     over_pseudo_header(skb, family, csum_partial(tcp, skb->len - header_bytes(family), 0));
	return skb;
}

static void keeps_checksums(struct kunit *test)
{
	const struct rewriting *r = test->param_value;
	struct sockmi_nat_flow *flow = kunit_kzalloc(test, sizeof(*flow), GFP_KERNEL);
	struct sk_buff *skb = packet_of(test, r->family, r->payload, r->ip_summed);
	unsigned int offset = header_bytes(r->family);
	struct tcphdr *tcp = (struct tcphdr *)(skb->data + offset);
	struct packet packet;
	u16 before;

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, flow);
	flow->count = kunit_kzalloc(test, sizeof(*flow->count), GFP_KERNEL);
	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, flow->count);
	memcpy(flow->wire.local, replacement, sizeof(replacement));
	flow->wire.local_port = htons(NEW_PORT);
	tcp->check = (__force __sum16)((__force u16)tcp->check + r->damage);
	before = wrong(skb, r->family);
	KUNIT_ASSERT_EQ(test, before != 0, r->damage != 0);
	KUNIT_ASSERT_TRUE(test, read_tcp(skb, r->family, offset, &packet));

	KUNIT_ASSERT_TRUE(test, rewrite(skb, flow, &packet, r->dest));

	KUNIT_EXPECT_EQ(test, wrong(skb, r->family), before);
	tcp = (struct tcphdr *)(skb->data + offset);
	KUNIT_EXPECT_EQ(test, ntohs(tcp->source), r->dest ? SOURCE_PORT : NEW_PORT);
	KUNIT_EXPECT_EQ(test, ntohs(tcp->dest), r->dest ? NEW_PORT : DEST_PORT);
	if (r->family == AF_INET) {
		KUNIT_EXPECT_EQ(test, (__force u16)ip_fast_csum(ip_hdr(skb), ip_hdr(skb)->ihl), 0);
		KUNIT_EXPECT_EQ(test, ntohl(ip_hdr(skb)->saddr), ntohl(r->dest ? source[0] : replacement[0]));
		KUNIT_EXPECT_EQ(test, ntohl(ip_hdr(skb)->daddr), ntohl(r->dest ? replacement[0] : dest[0]));
	} else {
		const struct ipv6hdr *ip = ipv6_hdr(skb);

		KUNIT_EXPECT_EQ(test, memcmp(&ip->saddr, r->dest ? source : replacement, sizeof(source)), 0);
		KUNIT_EXPECT_EQ(test, memcmp(&ip->daddr, r->dest ? replacement : dest, sizeof(dest)), 0);
	}
	KUNIT_EXPECT_EQ(test, atomic64_read(&flow->count->packets), 1);
	KUNIT_EXPECT_EQ(test, atomic64_read(&flow->count->bytes), skb->len);
}

struct family {
	const char *name;
	int family;
};

static const struct family families[] = {
	{ "IPv4", AF_INET },
	{ "IPv6", AF_INET6 },
};
SOCKMI_CASES(families);

/* Both directions of a connection have one key, of which each byte is hashed. */
static void names_both_directions_alike(struct kunit *test)
{
	const struct family *f = test->param_value;
	struct sk_buff *skb = packet_of(test, f->family, 0, CHECKSUM_NONE);
	struct sockmi_nat_key in, out, expected = {
		.kind = f->family, .local_port = htons(DEST_PORT), .remote_port = htons(SOURCE_PORT),
	};
	size_t bytes = f->family == AF_INET ? sizeof(__be32) : sizeof(expected.local);
	struct packet packet;

	memcpy(expected.local, dest, bytes);
	memcpy(expected.remote, source, bytes);
	memset(&in, 0xff, sizeof(in));
	memset(&out, 0xff, sizeof(out));
	KUNIT_ASSERT_TRUE(test, read_tcp(skb, f->family, header_bytes(f->family), &packet));

	key_in(skb, &packet, &in);
	key_out(skb, &packet, &out);

	KUNIT_EXPECT_EQ(test, memcmp(&in, &expected, sizeof(in)), 0);
	KUNIT_EXPECT_EQ(test, memcmp(out.local, expected.remote, sizeof(out.local)), 0);
	KUNIT_EXPECT_EQ(test, memcmp(out.remote, expected.local, sizeof(out.remote)), 0);
	KUNIT_EXPECT_EQ(test, ntohs(out.local_port), SOURCE_PORT);
	KUNIT_EXPECT_EQ(test, ntohs(out.remote_port), DEST_PORT);
	KUNIT_EXPECT_EQ(test, out.kind, expected.kind);
}

static void leaves_half_a_header_alone(struct kunit *test)
{
	struct sk_buff *skb = packet_of(test, AF_INET, 0, CHECKSUM_NONE);
	struct packet packet;

	skb_trim(skb, skb->len - 1);
	KUNIT_EXPECT_FALSE(test, read_tcp(skb, AF_INET, header_bytes(AF_INET), &packet));
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(keeps_checksums, rewritings_gen_params),
	KUNIT_CASE_PARAM(names_both_directions_alike, families_gen_params),
	KUNIT_CASE(leaves_half_a_header_alone),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_nat_hook",
	.test_cases = cases,
};
kunit_test_suite(suite);
