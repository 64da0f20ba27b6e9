// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The container of an image: header, sections, checksum. What the sections say: image_check.c. */
#include "image_internal.h"

#define FAIL(class, ...) sockmi_image_fail(error, SOCKMI_IMAGE_##class, __VA_ARGS__)

/* Of all but the checksum itself. */
static uint32_t checksum(const uint8_t *image, size_t length)
{
	uint32_t crc = sockmi_crc32(0, image, SOCKMI_CRC_OFFSET);

	return sockmi_crc32(crc, image + SOCKMI_CRC_OFFSET + 4, length - SOCKMI_CRC_OFFSET - 4);
}

void sockmi_image_seal(uint8_t *image, size_t length, uint32_t sections)
{
	memcpy(image, SOCKMI_IMAGE_MAGIC, 8);
	sockmi_put16(image + 8, SOCKMI_IMAGE_MAJOR);
	sockmi_put16(image + 10, SOCKMI_IMAGE_MINOR);
	sockmi_put32(image + 12, SOCKMI_IMAGE_HEADER_BYTES);
	sockmi_put64(image + 16, length);
	sockmi_put32(image + 24, sections);
	sockmi_put32(image + SOCKMI_CRC_OFFSET, checksum(image, length));
}

/* Checks all of the header but the checksum. */
static int check_header(const uint8_t *image, size_t length, char *error)
{
	uint32_t header_length;
	uint64_t total;

	if (length < SOCKMI_IMAGE_HEADER_BYTES)
		return FAIL(TRUNCATED, "%zu bytes are less than a header of %d", length, SOCKMI_IMAGE_HEADER_BYTES);
	if (memcmp(image, SOCKMI_IMAGE_MAGIC, 8) != 0)
		return FAIL(MAGIC_WRONG, "the first 8 bytes are not those of an image");
	if (sockmi_get16(image + 8) != SOCKMI_IMAGE_MAJOR)
		return FAIL(VERSION, "format version %u.%u, this host reads %d.x: update the older host",
			    sockmi_get16(image + 8), sockmi_get16(image + 10), SOCKMI_IMAGE_MAJOR);
	header_length = sockmi_get32(image + 12);
	total = sockmi_get64(image + 16);
	if (total != length)
		return FAIL(LENGTH, "header: total length %llu, but there are %zu bytes", (unsigned long long)total,
			    length);
	if (header_length < SOCKMI_IMAGE_HEADER_BYTES || header_length % 8 != 0 || header_length > length)
		return FAIL(LENGTH, "header: header length %u is not a multiple of 8 from %d to %zu", header_length,
			    SOCKMI_IMAGE_HEADER_BYTES, length);
	return 0;
}

/* One section's header and payload. */
struct section {
	uint16_t type;
	uint16_t flags;
	uint32_t length;
	const uint8_t *payload;
};

/* Takes the first section off @rest, checked as far as its type does not matter. */
static int next_section(struct sockmi_view *rest, struct section *out, char *error)
{
	uint64_t padded;

	if (rest->length < SOCKMI_SECTION_HEADER_BYTES)
		return FAIL(LENGTH, "%zu bytes after the last section are less than a section header", rest->length);
	out->type = sockmi_get16(rest->data);
	out->flags = sockmi_get16(rest->data + 2);
	out->length = sockmi_get32(rest->data + 4);
	out->payload = rest->data + SOCKMI_SECTION_HEADER_BYTES;
	padded = sockmi_padded(out->length);
	if (out->type < 1 || out->type > SOCKMI_TYPE_MAX)
		return FAIL(SECTION, "section type %u is not in 1..%d", out->type, SOCKMI_TYPE_MAX);
	if (out->flags & ~SOCKMI_FLAG_MANDATORY)
		return FAIL(RESERVED, "section %u: reserved flags %#x are set", out->type, out->flags);
	if (padded > rest->length - SOCKMI_SECTION_HEADER_BYTES)
		return FAIL(LENGTH, "section %u: length %u exceeds the %zu bytes that are left", out->type,
			    out->length, rest->length - SOCKMI_SECTION_HEADER_BYTES);
	if (!sockmi_all_zero(out->payload + out->length, (size_t)padded - out->length))
		return FAIL(RESERVED, "section %u: padding is not zero", out->type);
	rest->data = out->payload + padded;
	rest->length -= SOCKMI_SECTION_HEADER_BYTES + (size_t)padded;
	return 0;
}

/* Puts a section's content into @out. */
static int store(const struct section *section, struct sockmi_image *out, char *error)
{
	const struct sockmi_section_spec *spec;
	char *place;

	if (section->type >= SOCKMI_SECTION_END) {
		if (section->flags & SOCKMI_FLAG_MANDATORY)
			return FAIL(UNKNOWN_MANDATORY,
				    "section %u is mandatory and unknown to format version %d.%d: update this host",
				    section->type, SOCKMI_IMAGE_MAJOR, SOCKMI_IMAGE_MINOR);
		out->unknown_sections++;
		return 0;
	}
	spec = &sockmi_sections[section->type];
	if (!sockmi_section_fits(section->type, section->length))
		return FAIL(LENGTH, "section %s: length %u is not in %u..%u or not a multiple of %u", spec->name,
			    section->length, spec->min, spec->max, spec->multiple);
	place = (char *)out + spec->offset;
	if (spec->layout) {
		memcpy(place, section->payload, section->length);
		sockmi_wire_order(spec->layout, place);
	} else {
		*(struct sockmi_view *)(void *)place = (struct sockmi_view){ section->payload, section->length };
	}
	out->present |= SOCKMI_HAS(section->type);
	return 0;
}

int sockmi_image_decode(const void *image, size_t length, size_t limit, struct sockmi_image *out,
			char error[SOCKMI_ERROR_BYTES])
{
	const uint8_t *p = image;
	uint64_t seen[(SOCKMI_TYPE_MAX + 64) / 64] = { 0 };
	struct sockmi_view rest;
	uint32_t count = 0;
	int result;

	if (length > limit)
		return FAIL(LIMIT, "%zu bytes are more than the limit of %zu", length, limit);
	result = check_header(p, length, error);
	if (result)
		return result;
	if (checksum(p, length) != sockmi_get32(p + SOCKMI_CRC_OFFSET))
		return FAIL(CHECKSUM, "the checksum is wrong: the image was damaged");

	memset(out, 0, sizeof(*out));
	out->major = sockmi_get16(p + 8);
	out->minor = sockmi_get16(p + 10);
	rest.data = p + sockmi_get32(p + 12);
	rest.length = length - sockmi_get32(p + 12);
	for (; rest.length; count++) {
		struct section section;

		result = next_section(&rest, &section, error);
		if (result)
			return result;
		if (count == 0 && section.type != SOCKMI_IDENTITY)
			return FAIL(SECTION, "the first section is %u, not identity (%d)", section.type,
				    SOCKMI_IDENTITY);
		if (seen[section.type / 64] >> section.type % 64 & 1)
			return FAIL(DUPLICATE, "section %u is there twice", section.type);
		seen[section.type / 64] |= (uint64_t)1 << section.type % 64;
		result = store(&section, out, error);
		if (result)
			return result;
	}
	if (count != sockmi_get32(p + 24))
		return FAIL(LENGTH, "header: %u sections, but there are %u", sockmi_get32(p + 24), count);
	return sockmi_image_check(out, error);
}

#ifndef __KERNEL__ /* whose stack is too small for what is decoded */
int sockmi_image_validate(const void *image, size_t length, size_t limit, char error[SOCKMI_ERROR_BYTES])
{
	struct sockmi_image out;

	return sockmi_image_decode(image, length, limit, &out, error);
}

int sockmi_image_examine(const void *image, size_t length, size_t limit, struct sockmi_summary *summary,
			 char error[SOCKMI_ERROR_BYTES])
{
	struct sockmi_image out;
	int result = sockmi_image_decode(image, length, limit, &out, error);

	if (result)
		return result;
	summary->identity = out.identity;
	summary->receive_length = sockmi_section_view(&out, SOCKMI_RECEIVE_QUEUE)->length;
	summary->sent_length = sockmi_section_view(&out, SOCKMI_SENT_QUEUE)->length;
	summary->unsent_length = sockmi_section_view(&out, SOCKMI_UNSENT_QUEUE)->length;
	summary->context_length = sockmi_section_view(&out, SOCKMI_CONTEXT)->length;
	return 0;
}
#endif

/* Length of a section's payload as it will be written; 0: it will not. */
static size_t payload_length(const struct sockmi_image *image, unsigned int type)
{
	if (sockmi_sections[type].layout)
		return image->present & SOCKMI_HAS(type) ? sockmi_sections[type].min : 0;
	return sockmi_section_view(image, type)->length;
}

size_t sockmi_image_size(const struct sockmi_image *image)
{
	uint64_t total = SOCKMI_IMAGE_HEADER_BYTES;

	for (unsigned int type = 1; type < SOCKMI_SECTION_END; type++) {
		uint64_t length = payload_length(image, type);

		if (length > 0xffffffffu)
			return 0;
		if (length)
			total += SOCKMI_SECTION_HEADER_BYTES + sockmi_padded(length);
	}
	return total > SIZE_MAX ? 0 : (size_t)total;
}

ssize_t sockmi_image_encode(const struct sockmi_image *image, void *buffer, size_t capacity)
{
	struct sockmi_writer writer;

	if (sockmi_image_check(image, NULL))
		return -EINVAL;
	sockmi_writer_start(&writer, buffer, capacity);
	for (uint16_t type = 1; type < SOCKMI_SECTION_END; type++) {
		const struct sockmi_section_spec *spec = &sockmi_sections[type];
		size_t length = payload_length(image, type);

		if (length)
			sockmi_writer_put(&writer, type,
					  spec->layout ? (const void *)((const char *)image + spec->offset) :
							 sockmi_section_view(image, type)->data,
					  length);
	}
	return sockmi_writer_finish(&writer);
}

int sockmi_image_stamp(void *image, size_t length, const struct sockmi_stamp *stamp)
{
	enum { BYTES = sizeof(struct sockmi_identity) };
	uint8_t *p = image, *wire, before[BYTES];
	struct sockmi_identity identity;
	uint32_t change;
	size_t start;
	int result = check_header(p, length, NULL);

	if (result)
		return result;
	start = sockmi_get32(p + 12);
	if (length - start < SOCKMI_SECTION_HEADER_BYTES + BYTES)
		return SOCKMI_IMAGE_LENGTH;
	if (sockmi_get16(p + start) != SOCKMI_IDENTITY || sockmi_get32(p + start + 4) != BYTES)
		return SOCKMI_IMAGE_SECTION;

	start += SOCKMI_SECTION_HEADER_BYTES;
	wire = p + start;
	memcpy(before, wire, BYTES);
	memcpy(&identity, wire, BYTES);
	sockmi_wire_order(sockmi_sections[SOCKMI_IDENTITY].layout, &identity);
	if (stamp->fields & SOCKMI_STAMP_MIGRATION_ID)
		memcpy(identity.migration_id, stamp->migration_id, 16);
	if (stamp->fields & SOCKMI_STAMP_HOME_ID)
		memcpy(identity.home_id, stamp->home_id, 16);
	if (stamp->fields & SOCKMI_STAMP_LISTENER_ID)
		memcpy(identity.listener_id, stamp->listener_id, 16);
	if (stamp->fields & SOCKMI_STAMP_ORIGIN)
		identity.origin = stamp->origin;
	if (stamp->fields & SOCKMI_STAMP_HOP)
		identity.hop = stamp->hop;
	sockmi_wire_order(sockmi_sections[SOCKMI_IDENTITY].layout, &identity);
	memcpy(wire, &identity, BYTES);

	/* A CRC is linear: the change of it is the CRC of the change, followed by as many zeros. */
	for (size_t i = 0; i < BYTES; i++)
		before[i] ^= wire[i];
	change = sockmi_crc32(0xffffffffu, before, BYTES) ^ 0xffffffffu;
	change = sockmi_crc32_shift(change, length - start - BYTES);
	sockmi_put32(p + SOCKMI_CRC_OFFSET, sockmi_get32(p + SOCKMI_CRC_OFFSET) ^ change);
	return 0;
}

ssize_t sockmi_image_replace(const void *image, size_t length, uint16_t type, const void *payload,
			     size_t new_length, void *buffer, size_t capacity)
{
	const uint8_t *p = image;
	struct sockmi_writer writer;
	struct sockmi_view rest;
	struct section section;
	bool done = false;

	if (type == SOCKMI_IDENTITY || check_header(p, length, NULL))
		return -EINVAL;
	if (type < SOCKMI_SECTION_END && new_length && !sockmi_section_fits(type, new_length))
		return -EINVAL;
	rest.data = p + sockmi_get32(p + 12);
	rest.length = length - sockmi_get32(p + 12);
	sockmi_writer_start(&writer, buffer, capacity);
	while (rest.length && !writer.error) {
		const uint8_t *start = rest.data;

		if (next_section(&rest, &section, NULL))
			return -EINVAL;
		if (section.type != type) {
			/* As it is, be it known or not. */
			size_t bytes = (size_t)(rest.data - start);

			if (bytes > capacity - writer.length)
				return -ENOSPC;
			memcpy(writer.buffer + writer.length, start, bytes);
			writer.length += bytes;
			writer.sections++;
		} else if (!done) {
			sockmi_writer_put(&writer, type, payload, new_length);
			done = true;
		}
	}
	if (!done)
		sockmi_writer_put(&writer, type, payload, new_length);
	return sockmi_writer_finish(&writer);
}
