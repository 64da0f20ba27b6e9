// SPDX-License-Identifier: GPL-2.0
/*
 * The image's codec, as it is compiled for the kernel. Its every sentence and its mutated images are tested in user
 * space and by the device; these are the checks that stand between a caller's bytes and the rest of the module.
 */
#include <linux/slab.h>
#include "image_internal.h"
#include "cases.h"

#define PAYLOAD "what was received"
#define IMAGE_MAX 4096

/* One change of a good image, at @at; @sealed: with the right checksum again. */
struct damage {
	const char *name;
	int error;
	unsigned int at;
	u8 value;
	bool sealed;
	int longer;
};

#define FIRST SOCKMI_IMAGE_HEADER_BYTES /* the first section's header: type, flags, length */

static const struct damage damages[] = {
	{ "none", SOCKMI_IMAGE_OK, 8, SOCKMI_IMAGE_MAJOR },
	{ "the magic", SOCKMI_IMAGE_MAGIC_WRONG, 0, 's' },
	{ "another major", SOCKMI_IMAGE_VERSION, 8, SOCKMI_IMAGE_MAJOR + 1, true },
	{ "a later minor", SOCKMI_IMAGE_OK, 10, SOCKMI_IMAGE_MINOR + 1, true },
	{ "a bit of a payload", SOCKMI_IMAGE_CHECKSUM, FIRST + 8, 0x80 },
	{ "the checksum", SOCKMI_IMAGE_CHECKSUM, 28, 0xaa },
	{ "a length that is not its own", SOCKMI_IMAGE_LENGTH, 16, 0xff, true },
	{ "a byte too many", SOCKMI_IMAGE_LENGTH, 8, SOCKMI_IMAGE_MAJOR, .longer = 1 },
	{ "a byte too few", SOCKMI_IMAGE_LENGTH, 8, SOCKMI_IMAGE_MAJOR, .longer = -1 },
	{ "a header beyond the end", SOCKMI_IMAGE_LENGTH, 14, 0xff, true },
	{ "a header that is not aligned", SOCKMI_IMAGE_LENGTH, 12, SOCKMI_IMAGE_HEADER_BYTES + 4, true },
	{ "another section first", SOCKMI_IMAGE_SECTION, FIRST, SOCKMI_SEQUENCE, true },
	{ "section 0", SOCKMI_IMAGE_SECTION, FIRST, 0, true },
	{ "a section beyond the end", SOCKMI_IMAGE_LENGTH, FIRST + 7, 0x7f, true },
	{ "a section's reserved flag", SOCKMI_IMAGE_RESERVED, FIRST + 2, 3, true },
	{ "a family that is none", SOCKMI_IMAGE_VALUE, FIRST + 8 + offsetof(struct sockmi_identity, family), 3, true },
	{ "a state that is none", SOCKMI_IMAGE_VALUE, FIRST + 8 + offsetof(struct sockmi_identity, state), 99, true },
	{ "a state without a connection", SOCKMI_IMAGE_STATE,
	  FIRST + 8 + offsetof(struct sockmi_identity, state), SOCKMI_LISTEN, true },
};
SOCKMI_CASES(damages);

/* A connection with bytes to read, and its length. */
static size_t good_image(struct kunit *test, u8 *buffer)
{
	struct sockmi_image *image = kunit_kzalloc(test, sizeof(*image), GFP_KERNEL);
	ssize_t length;

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, image);
	image->present = SOCKMI_HAS(SOCKMI_IDENTITY) | SOCKMI_HAS(SOCKMI_SEQUENCE) | SOCKMI_HAS(SOCKMI_WINDOW) |
			 SOCKMI_HAS(SOCKMI_NEGOTIATED);
	image->identity = (struct sockmi_identity){
		.local = { .address = { [10] = 0xff, 0xff, 192, 0, 2, 1 }, .port = 80 },
		.remote = { .address = { [10] = 0xff, 0xff, 198, 51, 100, 9 }, .port = 40000 },
		.migration_id = { 1 },
		.family = SOCKMI_FAMILY_INET,
		.kind = SOCKMI_KIND_CONNECTED,
		.state = SOCKMI_ESTABLISHED,
	};
	/* What was received goes over the wrap of its sequence numbers. */
	image->sequence = (struct sockmi_sequence){
		.snd_una = 1000, .snd_nxt = 1000, .write_seq = 1000,
		.copied_seq = -5u, .rcv_nxt = -5u + strlen(PAYLOAD),
	};
	image->window = (struct sockmi_window){
		.snd_wl1 = image->sequence.rcv_nxt, .snd_wnd = 65535, .max_window = 65535,
		.rcv_wnd = 65535, .rcv_wup = image->sequence.rcv_nxt,
	};
	image->negotiated = (struct sockmi_negotiated){ .mss_clamp = 1460 };
	image->receive_queue = (struct sockmi_view){ PAYLOAD, strlen(PAYLOAD) };
	KUNIT_ASSERT_EQ(test, sockmi_image_check(image, NULL), SOCKMI_IMAGE_OK);
	length = sockmi_image_encode(image, buffer, IMAGE_MAX);
	KUNIT_ASSERT_GT(test, length, 0L);
	return length;
}

static u8 *room(struct kunit *test)
{
	u8 *buffer = kunit_kzalloc(test, IMAGE_MAX, GFP_KERNEL);

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, buffer);
	return buffer;
}

static void refuses_what_is_damaged(struct kunit *test)
{
	const struct damage *damage = test->param_value;
	struct sockmi_image *decoded = kunit_kzalloc(test, sizeof(*decoded), GFP_KERNEL);
	u8 *buffer = room(test);
	size_t length = good_image(test, buffer);
	u32 crc;

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, decoded);
	buffer[damage->at] = damage->value;
	if (damage->sealed) {
		crc = sockmi_crc32(0, buffer, SOCKMI_CRC_OFFSET);
		crc = sockmi_crc32(crc, buffer + SOCKMI_CRC_OFFSET + 4, length - SOCKMI_CRC_OFFSET - 4);
		sockmi_put32(buffer + SOCKMI_CRC_OFFSET, crc);
	}
	KUNIT_EXPECT_EQ(test, sockmi_image_decode(buffer, length + damage->longer, IMAGE_MAX, decoded, NULL),
			damage->error);
}

static void reads_what_it_wrote(struct kunit *test)
{
	struct sockmi_image *decoded = kunit_kzalloc(test, sizeof(*decoded), GFP_KERNEL);
	u8 *buffer = room(test);
	size_t length = good_image(test, buffer);

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, decoded);
	KUNIT_ASSERT_EQ(test, sockmi_image_decode(buffer, length, length, decoded, NULL), SOCKMI_IMAGE_OK);
	KUNIT_EXPECT_EQ(test, decoded->sequence.copied_seq, -5u);
	KUNIT_EXPECT_EQ(test, decoded->receive_queue.length, strlen(PAYLOAD));
	KUNIT_EXPECT_EQ(test, memcmp(decoded->receive_queue.data, PAYLOAD, strlen(PAYLOAD)), 0);
	KUNIT_EXPECT_EQ(test, sockmi_image_decode(buffer, length, length - 1, decoded, NULL), SOCKMI_IMAGE_LIMIT);
}

/* Nothing behind its end is read: KASAN sees it. */
static void refuses_each_beginning(struct kunit *test)
{
	struct sockmi_image *decoded = kunit_kzalloc(test, sizeof(*decoded), GFP_KERNEL);
	size_t length, part;
	u8 *buffer = room(test);

	KUNIT_ASSERT_NOT_ERR_OR_NULL(test, decoded);
	length = good_image(test, buffer);
	for (part = 0; part < length; part++) {
		u8 *copy = kmemdup(buffer, part, GFP_KERNEL);

		KUNIT_EXPECT_NE(test, sockmi_image_decode(copy, part, IMAGE_MAX, decoded, NULL), SOCKMI_IMAGE_OK);
		kfree(part ? copy : NULL);
	}
}

struct order {
	const char *name;
	u32 a;
	u32 b;
	bool before;
};

static const struct order orders[] = {
	{ "the next", 1, 2, true },
	{ "the same", 2, 2, false },
	{ "the one before", 2, 1, false },
	{ "over the wrap", 0xffffffff, 0, true },
	{ "back over the wrap", 0, 0xffffffff, false },
	{ "just less than half", 0, 0x7fffffff, true },
	{ "just more than half", 0, 0x80000001, false },
	{ "over the sign", 0x7fffffff, 0x80000000, true },
};
SOCKMI_CASES(orders);

static void orders_sequence_numbers(struct kunit *test)
{
	const struct order *order = test->param_value;

	KUNIT_EXPECT_EQ(test, sockmi_seq_before(order->a, order->b), order->before);
}

static struct kunit_case cases[] = {
	KUNIT_CASE_PARAM(refuses_what_is_damaged, damages_gen_params),
	KUNIT_CASE(reads_what_it_wrote),
	KUNIT_CASE(refuses_each_beginning),
	KUNIT_CASE_PARAM(orders_sequence_numbers, orders_gen_params),
	{}
};

static struct kunit_suite suite = {
	.name = "sockmi_image",
	.test_cases = cases,
};
kunit_test_suite(suite);
