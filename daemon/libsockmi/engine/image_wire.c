// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* What the sections are, the wire's byte order, and the words of errors. */
#include "image_internal.h"

#ifdef __KERNEL__
#include <linux/stdarg.h>
#else
#include <stdarg.h>
#include <stdio.h>
#endif

#define QUEUE_MAX 0x7fffffffu
#define M SOCKMI_FLAG_MANDATORY
#define FIXED(member, layout, flags)                                                            \
	{ #member, layout, offsetof(struct sockmi_image, member),                              \
	  sizeof(((struct sockmi_image *)NULL)->member), sizeof(((struct sockmi_image *)NULL)->member), 1, flags }
#define VIEW(member, min, max, multiple, flags) \
	{ #member, NULL, offsetof(struct sockmi_image, member), min, max, multiple, flags }

const struct sockmi_section_spec sockmi_sections[SOCKMI_SECTION_END] = {
	[SOCKMI_IDENTITY] = FIXED(identity, "b64h2i1b16h2i1b16h2i3h1b6", M),
	[SOCKMI_SEQUENCE] = FIXED(sequence, "i8", M),
	[SOCKMI_WINDOW] = FIXED(window, "i10", M),
	[SOCKMI_NEGOTIATED] = FIXED(negotiated, "i1h4b4", M),
	[SOCKMI_TIMESTAMP] = FIXED(timestamp, "q1i4h1b6", M),
	[SOCKMI_RECEIVE_QUEUE] = VIEW(receive_queue, 0, QUEUE_MAX, 1, M),
	[SOCKMI_SENT_QUEUE] = VIEW(sent_queue, 0, QUEUE_MAX, 1, M),
	[SOCKMI_UNSENT_QUEUE] = VIEW(unsent_queue, 0, QUEUE_MAX, 1, M),
	[SOCKMI_SOCKET_OPTIONS] = VIEW(socket_options, 0, SOCKMI_OPTIONS_MAX_BYTES, 8, 0),
	[SOCKMI_LISTENER] = FIXED(listener, "i2q1", M),
	[SOCKMI_PATH_MODEL] = FIXED(path_model, "q2i22b8", 0),
	[SOCKMI_RECEIVE_AUTOTUNE] = FIXED(receive_autotune, "q2i5b12", 0),
	[SOCKMI_OUT_OF_ORDER] = VIEW(out_of_order, 0, QUEUE_MAX, 8, 0),
	[SOCKMI_SACK_SCOREBOARD] = VIEW(sack_scoreboard, 0, 24 << 16, 24, 0),
	[SOCKMI_RECEIVE_SACK] = VIEW(receive_sack, 0, 32, 8, 0),
	[SOCKMI_URGENT] = FIXED(urgent, "i2h1b6", M),
	[SOCKMI_ECN] = FIXED(ecn, "i10", 0),
	[SOCKMI_TIMERS] = FIXED(timers, "q7", 0),
	[SOCKMI_COUNTERS] = FIXED(counters, "q16", 0),
	[SOCKMI_CONGESTION_PRIVATE] = VIEW(congestion_private, 24, 24 + SOCKMI_CONGESTION_MAX_BYTES, 1, 0),
	[SOCKMI_KTLS] = VIEW(ktls, 80, 160, 80, M),
	[SOCKMI_CONTEXT] = VIEW(context, 0, SOCKMI_CONTEXT_MAX_BYTES, 1, 0),
	[SOCKMI_FIDELITY] = VIEW(fidelity, 0, SOCKMI_FIDELITY_MAX_BYTES, 1, 0),
	[SOCKMI_EARLY_FIN] = FIXED(early_fin, "i2", 0),
};

/* The structs are the wire's payloads: no hidden padding. */
_Static_assert(sizeof(struct sockmi_endpoint) == 24, "endpoint");
_Static_assert(sizeof(struct sockmi_identity) == 136, "identity");
_Static_assert(sizeof(struct sockmi_sequence) == 32, "sequence");
_Static_assert(sizeof(struct sockmi_window) == 40, "window");
_Static_assert(sizeof(struct sockmi_negotiated) == 16, "negotiated");
_Static_assert(sizeof(struct sockmi_timestamp) == 32, "timestamp");
_Static_assert(sizeof(struct sockmi_listener) == 16, "listener");
_Static_assert(sizeof(struct sockmi_path_model) == 112, "path_model");
_Static_assert(sizeof(struct sockmi_receive_autotune) == 48, "receive_autotune");
_Static_assert(sizeof(struct sockmi_sent_range) == 24, "sent_range");
_Static_assert(sizeof(struct sockmi_urgent) == 16, "urgent");
_Static_assert(sizeof(struct sockmi_ecn) == 40, "ecn");
_Static_assert(sizeof(struct sockmi_timers) == 56, "timers");
_Static_assert(sizeof(struct sockmi_counters) == 128, "counters");
_Static_assert(sizeof(struct sockmi_early_fin) == 8, "early_fin");
_Static_assert(sizeof(struct sockmi_congestion_header) == 24, "congestion_header");
_Static_assert(sizeof(struct sockmi_ktls) == 80, "ktls");

void sockmi_wire_order(const char *layout, void *payload)
{
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ && !defined(SOCKMI_TEST_SWAP)
	(void)layout;
	(void)payload;
#else
	uint8_t *p = payload;

	while (*layout) {
		char kind = *layout++;
		size_t width = kind == 'b' ? 1 : kind == 'h' ? 2 : kind == 'i' ? 4 : 8;
		unsigned int count = 0;

		while (*layout >= '0' && *layout <= '9')
			count = count * 10 + (unsigned int)(*layout++ - '0');
		for (; count; count--, p += width)
			for (size_t i = 0; i < width / 2; i++) {
				uint8_t byte = p[i];

				p[i] = p[width - 1 - i];
				p[width - 1 - i] = byte;
			}
	}
#endif
}

int sockmi_image_fail(char *error, int error_class, const char *format, ...)
{
	if (error) {
		va_list arguments;

		va_start(arguments, format);
		vsnprintf(error, SOCKMI_ERROR_BYTES, format, arguments);
		va_end(arguments);
	}
	return error_class;
}

const char *sockmi_image_error_name(int error_class)
{
	static const char *const names[] = {
		[SOCKMI_IMAGE_OK] = "ok",
		[SOCKMI_IMAGE_LIMIT] = "limit",
		[SOCKMI_IMAGE_TRUNCATED] = "truncated",
		[SOCKMI_IMAGE_MAGIC_WRONG] = "magic",
		[SOCKMI_IMAGE_VERSION] = "version",
		[SOCKMI_IMAGE_LENGTH] = "length",
		[SOCKMI_IMAGE_CHECKSUM] = "checksum",
		[SOCKMI_IMAGE_SECTION] = "section",
		[SOCKMI_IMAGE_DUPLICATE] = "duplicate",
		[SOCKMI_IMAGE_UNKNOWN_MANDATORY] = "unknown-mandatory",
		[SOCKMI_IMAGE_RESERVED] = "reserved",
		[SOCKMI_IMAGE_VALUE] = "value",
		[SOCKMI_IMAGE_ADDRESS] = "address",
		[SOCKMI_IMAGE_STATE] = "state",
		[SOCKMI_IMAGE_MISSING] = "missing",
		[SOCKMI_IMAGE_SEQUENCE_WRONG] = "sequence",
		[SOCKMI_IMAGE_QUEUE] = "queue",
		[SOCKMI_IMAGE_WINDOW_WRONG] = "window",
	};

	if (error_class < 0 || (size_t)error_class >= ARRAY_SIZE(names))
		return "unknown";
	return names[error_class];
}
