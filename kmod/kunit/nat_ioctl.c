// SPDX-License-Identifier: GPL-2.0
/* What a program may say of a flow. */
#include "../nat_ioctl.c"
#include "cases.h"

#define V4(a, b, c, d, number) { .address = { [10] = 0xff, 0xff, a, b, c, d }, .port = number }
#define V6(first, last, number) { .address = { [0] = 0x20, 0x01, 0x0d, 0xb8, first, [15] = last }, .port = number }
#define LOCAL V4(192, 0, 2, 1, 80)
#define REMOTE V4(198, 51, 100, 9, 40000)
#define OTHER V4(203, 0, 113, 5, 8080)
#define HOLD SOCKMI_NAT_HOLD
#define REDIRECT SOCKMI_NAT_REDIRECT

struct record {
	const char *name;
	struct sockmi_ioc_nat_flow flow;
	int error;
};

static const struct record records[] = {
	{ "held", { LOCAL, REMOTE, .flags = HOLD } },
	{ "held for a time", { LOCAL, REMOTE, .flags = HOLD, .hold_ms = 5 } },
	{ "held and muted", { LOCAL, REMOTE, .flags = HOLD | SOCKMI_NAT_MUTE } },
	{ "a listener's port", { LOCAL, .flags = HOLD } },
	{ "a listener's port at any address", { { .port = 80 }, .flags = HOLD } },
	{ "redirected", { LOCAL, REMOTE, OTHER, REDIRECT } },
	{ "translated", { LOCAL, REMOTE, OTHER, SOCKMI_NAT_TRANSLATE } },
	{ "redirected to another port", { LOCAL, REMOTE, V4(192, 0, 2, 1, 81), REDIRECT } },
	{ "IPv6", { V6(1, 1, 80), V6(2, 1, 40000), V6(3, 1, 80), REDIRECT } },
	{ "nothing to do", { LOCAL, REMOTE }, -EINVAL },
	{ "an unknown flag", { LOCAL, REMOTE, .flags = HOLD | 1 << 30 }, -EINVAL },
	{ "redirected and translated", { LOCAL, REMOTE, OTHER, REDIRECT | SOCKMI_NAT_TRANSLATE }, -EINVAL },
	{ "a time without a hold", { LOCAL, REMOTE, .flags = SOCKMI_NAT_MUTE, .hold_ms = 5 }, -EINVAL },
	{ "no local port", { V4(192, 0, 2, 1, 0), REMOTE, .flags = HOLD }, -EINVAL },
	{ "no remote port", { LOCAL, V4(198, 51, 100, 9, 0), .flags = HOLD }, -EINVAL },
	{ "a reserved member", { { .port = 80, .reserved = 1 }, REMOTE, .flags = HOLD }, -EINVAL },
	{ "two families", { LOCAL, V6(2, 1, 40000), .flags = HOLD }, -EAFNOSUPPORT },
	{ "a listener's port, muted", { LOCAL, .flags = HOLD | SOCKMI_NAT_MUTE }, -EINVAL },
	{ "a listener's port, redirected", { LOCAL, .to = OTHER, .flags = REDIRECT }, -EINVAL },
	{ "a target, but no rewriting", { LOCAL, REMOTE, OTHER, HOLD }, -EINVAL },
	{ "no target", { LOCAL, REMOTE, .flags = REDIRECT }, -EINVAL },
	{ "a target without a port", { LOCAL, REMOTE, V4(203, 0, 113, 5, 0), REDIRECT }, -EINVAL },
	{ "a target of another family", { LOCAL, REMOTE, V6(3, 1, 80), REDIRECT }, -EAFNOSUPPORT },
	{ "to itself", { LOCAL, REMOTE, LOCAL, REDIRECT }, -EINVAL },
	{ "to a loopback address", { LOCAL, REMOTE, V4(127, 0, 0, 1, 80), REDIRECT }, -EADDRNOTAVAIL },
	{ "to a multicast address", { LOCAL, REMOTE, V4(224, 0, 0, 1, 80), REDIRECT }, -EADDRNOTAVAIL },
	{ "to the broadcast address", { LOCAL, REMOTE, V4(255, 255, 255, 255, 80), REDIRECT }, -EADDRNOTAVAIL },
	{ "to no address", { LOCAL, REMOTE, V4(0, 0, 0, 0, 80), REDIRECT }, -EADDRNOTAVAIL },
	{ "of a peer on this host", { LOCAL, V4(127, 0, 0, 1, 40000), OTHER, REDIRECT }, -EADDRNOTAVAIL },
};
SOCKMI_CASES(records);

static void reads_flows(struct kunit *test)
{
	const struct record *record = test->param_value;
	struct sockmi_nat_flow *flow = read_flow(&record->flow);

	KUNIT_EXPECT_EQ(test, PTR_ERR_OR_ZERO(flow), record->error);
	if (IS_ERR(flow))
		return;
	KUNIT_EXPECT_EQ(test, flow->flags, record->flow.flags);
	KUNIT_EXPECT_EQ(test, ntohs(flow->tuple.local_port), record->flow.local.port);
	KUNIT_EXPECT_EQ(test, ntohs(flow->tuple.remote_port), record->flow.remote.port);
	sockmi_nat_flow_free(flow);
}

/* Whoever lists flows gets each end as it was said. */
static void gives_back_each_end(struct kunit *test)
{
	static const struct sockmi_dev_endpoint ends[] = { LOCAL, REMOTE, V6(1, 1, 80), V6(0xff, 0xff, 65535) };
	struct sockmi_dev_endpoint given;
	__be32 address[4];
	unsigned int i;
	__be16 port;

	for (i = 0; i < ARRAY_SIZE(ends); i++) {
		u32 family = is_mapped(&ends[i]) ? AF_INET : AF_INET6;

		memset(&given, 0xff, sizeof(given));
		take_end(&ends[i], family, address, &port);
		give_end(&given, family, address, port);
		KUNIT_EXPECT_EQ(test, memcmp(&given, &ends[i], sizeof(given)), 0);
	}
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(reads_flows, records_gen_params),
	KUNIT_CASE(gives_back_each_end),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_nat_ioctl",
	.test_cases = cases,
};
kunit_test_suite(suite);
