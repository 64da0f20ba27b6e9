// SPDX-License-Identifier: MIT
/*
 * Fuzzes the C image codec: image_fuzz SEED SECONDS CORPUS_FILE...
 * Each input lies in a heap block of just its size, so that a sanitizer sees every byte read beyond it.
 * An image that decodes must be written again as the same image, by encode() and after stamp()
 * and replace(). Prints the counts; an error aborts. With -fsanitize=fuzzer, libFuzzer drives it.
 */
#include "image.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define EXPECT(condition)                                                        \
	do {                                                                      \
		if (!(condition)) {                                               \
			fprintf(stderr, "line %d: %s\n", __LINE__, #condition); \
			abort();                                                  \
		}                                                                 \
	} while (0)

#define LIMIT ((size_t)1 << 20)

static unsigned long accepted;
static volatile unsigned char sink;

static void touch(struct sockmi_view view)
{
	for (size_t i = 0; i < view.length; i++)
		sink = (unsigned char)(sink ^ view.data[i]);
}

/* Every list, entry by entry. */
static void read_lists(const struct sockmi_image *image)
{
	struct sockmi_view rest, bytes;
	struct sockmi_option option;
	struct sockmi_sent_range sent;
	struct sockmi_range range;
	struct sockmi_ktls ktls;
	struct sockmi_congestion_header congestion;
	enum sockmi_fidelity_class what;
	uint32_t seq;

	for (rest = image->socket_options; sockmi_option_next(&rest, &option);)
		touch(option.bytes);
	EXPECT(rest.length == 0);
	for (rest = image->out_of_order; sockmi_segment_next(&rest, &seq, &bytes);)
		touch(bytes);
	EXPECT(rest.length == 0);
	for (rest = image->fidelity; sockmi_fidelity_next(&rest, &what, &bytes);)
		touch(bytes);
	EXPECT(rest.length == 0);
	for (rest = image->sack_scoreboard; sockmi_sent_range_next(&rest, &sent);)
		EXPECT(sent.seq != sent.end_seq);
	for (rest = image->receive_sack; sockmi_range_next(&rest, &range);)
		EXPECT(range.seq != range.end_seq);
	for (rest = image->ktls; sockmi_ktls_next(&rest, &ktls);)
		EXPECT(ktls.key_length <= 32);
	if (sockmi_congestion(image, &congestion, &bytes))
		touch(bytes);
	touch(image->receive_queue);
	touch(image->sent_queue);
	touch(image->unsent_queue);
	touch(image->context);
}

static bool same_view(struct sockmi_view a, struct sockmi_view b)
{
	return a.length == b.length && (!a.length || !memcmp(a.data, b.data, a.length));
}

/* The fixed sections lie between `identity` and the first view. */
static bool same(const struct sockmi_image *a, const struct sockmi_image *b)
{
	size_t start = offsetof(struct sockmi_image, identity), end = offsetof(struct sockmi_image, receive_queue);

	return !memcmp((const char *)a + start, (const char *)b + start, end - start) &&
	       same_view(a->receive_queue, b->receive_queue) && same_view(a->sent_queue, b->sent_queue) &&
	       same_view(a->unsent_queue, b->unsent_queue) && same_view(a->socket_options, b->socket_options) &&
	       same_view(a->out_of_order, b->out_of_order) && same_view(a->sack_scoreboard, b->sack_scoreboard) &&
	       same_view(a->receive_sack, b->receive_sack) &&
	       same_view(a->congestion_private, b->congestion_private) && same_view(a->ktls, b->ktls) &&
	       same_view(a->context, b->context) && same_view(a->fidelity, b->fidelity);
}

static void write_again(const uint8_t *data, size_t length, const struct sockmi_image *image)
{
	size_t size = sockmi_image_size(image);
	uint8_t *copy = malloc(size), *replaced = malloc(length + 24);
	struct sockmi_image again;
	struct sockmi_stamp stamp = { .fields = SOCKMI_STAMP_HOP | SOCKMI_STAMP_HOME_ID, .hop = 77 };
	ssize_t written;

	EXPECT(size && size <= length && copy && replaced);
	EXPECT(sockmi_image_encode(image, copy, size) == (ssize_t)size);
	EXPECT(sockmi_image_encode(image, copy, size - 1) < 0);
	EXPECT(sockmi_image_encode(image, copy, size) == (ssize_t)size);
	EXPECT(sockmi_image_decode(copy, size, size, &again, NULL) == SOCKMI_IMAGE_OK && same(image, &again));
	EXPECT(sockmi_image_decode(copy, size, size - 1, &again, NULL) == SOCKMI_IMAGE_LIMIT);

	EXPECT(sockmi_image_stamp(copy, size, &stamp) == 0);
	EXPECT(sockmi_image_decode(copy, size, size, &again, NULL) == SOCKMI_IMAGE_OK && again.identity.hop == 77);

	written = sockmi_image_replace(data, length, SOCKMI_CONTEXT, "context", 7, replaced, length + 24);
	EXPECT(written > 0);
	EXPECT(sockmi_image_decode(replaced, (size_t)written, LIMIT, &again, NULL) == SOCKMI_IMAGE_OK);
	EXPECT(again.context.length == 7 && !memcmp(again.context.data, "context", 7));
	EXPECT(sockmi_image_replace(data, length, SOCKMI_CONTEXT, "context", 7, replaced, 31) == -28);
	free(copy);
	free(replaced);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t length)
{
	char error[SOCKMI_ERROR_BYTES];
	struct sockmi_image image;
	uint8_t *room = malloc(length + 24);
	int result;

	memset(error, 'x', sizeof(error));
	result = sockmi_image_decode(data, length, LIMIT, &image, error);
	EXPECT(result >= 0 && strcmp(sockmi_image_error_name(result), "unknown"));
	if (result) {
		struct sockmi_stamp stamp = { .fields = SOCKMI_STAMP_HOP, .hop = 1 };

		EXPECT(memchr(error, 0, sizeof(error)) && error[0]);
		/* Neither may these read or write beyond it. */
		EXPECT(room);
		sockmi_image_replace(data, length, SOCKMI_FIDELITY, "\1\1x", 3, room, length + 24);
		memcpy(room, data, length);
		sockmi_image_stamp(room, length, &stamp);
	} else {
		accepted++;
		read_lists(&image);
		write_again(data, length, &image);
	}
	free(room);
	return 0;
}

#ifndef SOCKMI_LIBFUZZER
static uint64_t state;

static uint32_t number(void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return (uint32_t)(state >> 16);
}

static void put(uint8_t *p, uint64_t value, size_t bytes)
{
	for (size_t i = 0; i < bytes; i++)
		p[i] = (uint8_t)(value >> 8 * i);
}

/* A few changes of bytes, words or length, then (mostly) a header that fits. */
static size_t mutate(uint8_t *p, size_t length, size_t capacity)
{
	static const uint32_t edges[] = { 0, 1, 2, 7, 8, 0x7f, 0xff, 0xffff, 0x7fffffff, 0x80000000, 0xffffffff };
	int changes = 1 + (int)(number() % 4);

	while (changes--) {
		size_t at = length ? number() % length : 0;

		switch (number() % 8) {
		case 0:
			if (length)
				p[at] ^= (uint8_t)(1u << number() % 8);
			break;
		case 1:
			if (length)
				p[at] = (uint8_t)number();
			break;
		case 2:
		case 3:
			at &= ~(size_t)3;
			if (at + 4 <= length)
				put(p + at, edges[number() % (sizeof(edges) / sizeof(edges[0]))], 4);
			break;
		case 4:
			at &= ~(size_t)1;
			if (at + 2 <= length)
				put(p + at, number() % 40, 2);
			break;
		case 5:
			length = at;
			break;
		case 6: { /* repeat a part */
			size_t part = number() % 64 & ~7u;

			at &= ~(size_t)7;
			if (at + part <= length && length + part <= capacity) {
				memmove(p + at + part, p + at, length - at);
				length += part;
			}
			break;
		}
		default: /* cut out a part */
			at &= ~(size_t)7;
			if (at + 8 <= length) {
				memmove(p + at, p + at + 8, length - at - 8);
				length -= 8;
			}
		}
	}
	if (length >= SOCKMI_IMAGE_HEADER_BYTES && number() % 16) {
		if (number() % 8) {
			memcpy(p, SOCKMI_IMAGE_MAGIC, 8);
			put(p + 8, SOCKMI_IMAGE_MAJOR, 2);
			put(p + 12, SOCKMI_IMAGE_HEADER_BYTES, 4);
			put(p + 16, length, 8);
		}
		put(p + 28, sockmi_crc32(sockmi_crc32(0, p, 28), p + 32, length - 32), 4);
	}
	return length;
}

int main(int argc, char **argv)
{
	enum { CAPACITY = 1 << 16 };
	static uint8_t work[CAPACITY];
	time_t end;
	unsigned long runs = 0;

	if (argc < 4) {
		fprintf(stderr, "usage: image_fuzz SEED SECONDS CORPUS_FILE...\n");
		return 2;
	}
	state = strtoull(argv[1], NULL, 10) | 1;
	end = time(NULL) + atoi(argv[2]);
	while (runs % 64 || time(NULL) < end) {
		FILE *file = runs % 16 ? NULL : fopen(argv[3 + number() % (uint32_t)(argc - 3)], "rb");
		static uint8_t sample[CAPACITY];
		static size_t sample_length;
		uint8_t *exact;
		size_t length;

		if (file) {
			sample_length = fread(sample, 1, sizeof(sample), file);
			fclose(file);
		}
		memcpy(work, sample, sample_length);
		length = runs % 16 ? mutate(work, sample_length, CAPACITY) : sample_length;
		exact = malloc(length ? length : 1);
		EXPECT(exact);
		memcpy(exact, work, length);
		LLVMFuzzerTestOneInput(exact, length);
		free(exact);
		runs++;
	}
	printf("runs %lu accepted %lu\n", runs, accepted);
	return 0;
}
#endif
