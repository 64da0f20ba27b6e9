// SPDX-License-Identifier: GPL-2.0
/* Which import request wants which socket. */
#include "../list.c"
#include "cases.h"

struct prefix {
	const char *name;
	u8 a[16];
	u8 b[16];
	unsigned int bits;
	bool same;
};

static const struct prefix prefixes[] = {
	{ "no bit of others", { 0xff }, { 0x00 }, 0, true },
	{ "one bit, the same", { 0x80 }, { 0xff }, 1, true },
	{ "one bit, another", { 0x80 }, { 0x7f }, 1, false },
	{ "the last bit of a byte does not count", { 0xfe }, { 0xff }, 7, true },
	{ "it counts", { 0xfe }, { 0xff }, 8, false },
	{ "a bit of the second byte", { 0x20, 0x80 }, { 0x20, 0x00 }, 9, false },
	{ "what is behind does not count", { 0x20, 0x01, 1 }, { 0x20, 0x01, 2 }, 16, true },
	{ "an IPv4 network", { [10] = 0xff, 0xff, 192, 0, 2, 7 }, { [10] = 0xff, 0xff, 192, 0, 2, 200 }, 120, true },
	{ "another IPv4 network", { [10] = 0xff, 0xff, 192, 0, 2 }, { [10] = 0xff, 0xff, 192, 0, 3 }, 120, false },
	{ "all but the last bit", { [15] = 0x10 }, { [15] = 0x11 }, 127, true },
	{ "all", { [15] = 0x10 }, { [15] = 0x11 }, 128, false },
	{ "all, the same", { [0] = 0xfd, [15] = 0x11 }, { [0] = 0xfd, [15] = 0x11 }, 128, true },
};
SOCKMI_CASES(prefixes);

static void compares_prefixes(struct kunit *test)
{
	const struct prefix *p = test->param_value;

	KUNIT_EXPECT_EQ(test, same_prefix(p->a, p->b, p->bits), p->same);
	KUNIT_EXPECT_EQ(test, same_prefix(p->b, p->a, p->bits), p->same);
}

#define OWNER 1000
#define ANOTHER 1001

/* What differs from a request of OWNER's for connections, which gets a connection of OWNER's from 192.0.2.7. */
struct wish {
	const char *name;
	bool wanted;
	struct sockmi_ioc_request request;
	u8 kind;
	u8 state;
	u8 family;
	bool others;
	bool admin;
	bool any_uid;
};

#define REMOTE(a, b, c, d, number) \
	.remote = { .address = { [10] = 0xff, 0xff, a, b, c, d }, .port = number }

static const struct wish wishes[] = {
	{ "anything", true },
	{ "an entry of the request before", false, { .result = 1 } },
	{ "what has failed", false, { .result = -EISCONN } },
	{ "skipped as poll() does", false, { .fd = -1 } },
	{ "another list", false, { .list = SOCKMI_LIST_LISTENING } },
	{ "a listener", true, { .list = SOCKMI_LIST_LISTENING }, SOCKMI_KIND_LISTENING, SOCKMI_LISTEN },
	{ "a bound one", true, { .list = SOCKMI_LIST_BOUND }, SOCKMI_KIND_BOUND, SOCKMI_CLOSED },
	{ "an unconnected one", true, { .list = SOCKMI_LIST_BOUND }, SOCKMI_KIND_UNCONNECTED, SOCKMI_CLOSED },
	{ "its state", true, { .states = 1 << SOCKMI_ESTABLISHED } },
	{ "one of two states", true, { .states = 1 << SOCKMI_CLOSE_WAIT | 1 << SOCKMI_ESTABLISHED } },
	{ "another state", false, { .states = 1 << SOCKMI_CLOSE_WAIT } },
	{ "its remote port", true, { REMOTE(0, 0, 0, 0, 40000) } },
	{ "another remote port", false, { REMOTE(0, 0, 0, 0, 40001) } },
	{ "its remote address", true, { REMOTE(192, 0, 2, 7, 0), .remote_prefix = 128 } },
	{ "another remote address", false, { REMOTE(192, 0, 2, 8, 0), .remote_prefix = 128 } },
	{ "its network", true, { REMOTE(192, 0, 2, 8, 40000), .remote_prefix = 120 } },
	{ "another local port", false, { .local = { .port = 81 } } },
	{ "its family", true, .family = AF_INET },
	{ "another family", false, .family = AF_INET6 },
	{ "another's", false, .others = true },
	{ "another's, which anybody may have", true, .others = true, .any_uid = true },
	{ "another's, by an administrator", true, .others = true, .admin = true },
};
SOCKMI_CASES(wishes);

static void matches_requests(struct kunit *test)
{
	const struct wish *wish = test->param_value;
	struct sockmi_ioc_request request = wish->request;
	struct sockmi_identity identity = {
		.family = wish->family,
		.kind = wish->kind ?: SOCKMI_KIND_CONNECTED,
		.state = wish->state ?: SOCKMI_ESTABLISHED,
		.local = { .port = 80 },
		.remote = { .address = { [10] = 0xff, 0xff, 192, 0, 2, 7 }, .port = 40000 },
	};
	struct sockmi_waiter waiter = {
		.requests = &request,
		.families = { AF_INET },
		.count = 1,
		.uid = KUIDT_INIT(OWNER),
		.admin = wish->admin,
	};
	kuid_t uid = KUIDT_INIT(wish->others ? ANOTHER : OWNER);

	request.list = request.list ?: SOCKMI_LIST_CONNECTED;
	KUNIT_EXPECT_EQ(test, sockmi_wants(&waiter, 0, &identity, uid, wish->any_uid), wish->wanted);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(compares_prefixes, prefixes_gen_params),
	KUNIT_CASE_PARAM(matches_requests, wishes_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_list",
	.test_cases = cases,
};
kunit_test_suite(suite);
