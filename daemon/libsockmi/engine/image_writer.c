// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* Writes an image section by section into the caller's buffer. */
#include "image_internal.h"

static int fail(struct sockmi_writer *w, int error)
{
	if (!w->error)
		w->error = error;
	return w->error;
}

/* @bytes of room at the end, counted as written and zeroed up to its padding; NULL: no room. */
static uint8_t *append(struct sockmi_writer *w, size_t bytes)
{
	size_t padded = (size_t)sockmi_padded(bytes);
	uint8_t *place = w->buffer + w->length;

	if (w->error)
		return NULL;
	if (padded < bytes || padded > w->capacity - w->length) {
		fail(w, -ENOSPC);
		return NULL;
	}
	memset(place + bytes, 0, padded - bytes);
	w->length += padded;
	return place;
}

static bool begin(struct sockmi_writer *w, uint16_t type)
{
	uint8_t *header;

	if (w->error)
		return false;
	if (w->open || type < 1 || type > SOCKMI_TYPE_MAX || (type == SOCKMI_IDENTITY) != (w->sections == 0)) {
		fail(w, -EINVAL);
		return false;
	}
	header = append(w, SOCKMI_SECTION_HEADER_BYTES);
	if (!header)
		return false;
	sockmi_put16(header, type);
	sockmi_put16(header + 2, (uint16_t)(type < SOCKMI_SECTION_END ? sockmi_sections[type].flags : 0));
	w->open = (size_t)(header - w->buffer);
	return true;
}

/* Ends the open section, whose payload is @length bytes; takes it back if that is none. */
static void end(struct sockmi_writer *w, size_t length)
{
	if (length == 0) {
		w->length = w->open;
	} else {
		sockmi_put32(w->buffer + w->open + 4, (uint32_t)length);
		w->sections++;
	}
	w->open = 0;
}

void sockmi_writer_start(struct sockmi_writer *w, void *buffer, size_t capacity)
{
	*w = (struct sockmi_writer){ .buffer = buffer, .capacity = capacity };
	if (capacity < SOCKMI_IMAGE_HEADER_BYTES)
		w->error = -ENOSPC;
	else
		w->length = SOCKMI_IMAGE_HEADER_BYTES;
}

int sockmi_writer_put(struct sockmi_writer *w, uint16_t type, const void *payload, size_t length)
{
	void *place = sockmi_writer_reserve(w, type, length);

	if (!place)
		return w->error;
	if (length)
		memcpy(place, payload, length);
	if (type < SOCKMI_SECTION_END && sockmi_sections[type].layout) {
		if (length != sockmi_sections[type].min)
			return fail(w, -EINVAL);
		sockmi_wire_order(sockmi_sections[type].layout, place);
	}
	return sockmi_writer_commit(w, length);
}

void *sockmi_writer_reserve(struct sockmi_writer *w, uint16_t type, size_t bytes)
{
	if (!begin(w, type))
		return NULL;
	/* Room for the padding too, so that commit cannot fail for lack of it. */
	if (bytes > 0xffffffffu - 7 || sockmi_padded(bytes) > w->capacity - w->length) {
		fail(w, -ENOSPC);
		return NULL;
	}
	w->reserved = bytes;
	return w->buffer + w->length;
}

int sockmi_writer_commit(struct sockmi_writer *w, size_t bytes)
{
	if (w->error)
		return w->error;
	if (!w->open || bytes > w->reserved)
		return fail(w, -EINVAL);
	if (append(w, bytes))
		end(w, bytes);
	w->reserved = 0;
	return w->error;
}

int sockmi_writer_open(struct sockmi_writer *w, uint16_t type)
{
	begin(w, type);
	return w->error;
}

/* An entry of 8 bytes of header and @length bytes; NULL on error. */
static uint8_t *append_item(struct sockmi_writer *w, uint16_t type, uint32_t length)
{
	uint8_t *item;

	if (w->error)
		return NULL;
	if (!w->open || sockmi_get16(w->buffer + w->open) != type) {
		fail(w, -EINVAL);
		return NULL;
	}
	item = append(w, (size_t)8 + length);
	if (item)
		sockmi_put32(item + 4, length);
	return item;
}

static uint8_t *append_option(struct sockmi_writer *w, uint16_t id, uint8_t type, uint8_t flags, uint32_t length)
{
	uint8_t *item = append_item(w, SOCKMI_SOCKET_OPTIONS, length);

	if (item) {
		sockmi_put16(item, id);
		item[2] = type;
		item[3] = flags;
	}
	return item;
}

int sockmi_writer_option_int(struct sockmi_writer *w, uint16_t id, uint8_t flags, int64_t value)
{
	uint8_t *item = append_option(w, id, SOCKMI_OPTION_INT, flags, 8);

	if (item)
		sockmi_put64(item + 8, (uint64_t)value);
	return w->error;
}

int sockmi_writer_option_bytes(struct sockmi_writer *w, uint16_t id, uint8_t flags, const void *value, size_t length)
{
	uint8_t *item;

	if (length > SOCKMI_OPTION_BYTES_MAX)
		return fail(w, -EINVAL);
	item = append_option(w, id, SOCKMI_OPTION_BYTES, flags, (uint32_t)length);
	if (item && length)
		memcpy(item + 8, value, length);
	return w->error;
}

int sockmi_writer_segment(struct sockmi_writer *w, uint32_t seq, const void *bytes, uint32_t length)
{
	uint8_t *item = append_item(w, SOCKMI_OUT_OF_ORDER, length);

	if (item) {
		sockmi_put32(item, seq);
		memcpy(item + 8, bytes, length);
	}
	return w->error;
}

/* An entry without a header of its own. */
static uint8_t *append_entry(struct sockmi_writer *w, uint16_t type, const void *entry, size_t length)
{
	uint8_t *place;

	if (w->error)
		return NULL;
	if (!w->open || sockmi_get16(w->buffer + w->open) != type) {
		fail(w, -EINVAL);
		return NULL;
	}
	place = append(w, length);
	if (place)
		memcpy(place, entry, length);
	return place;
}

int sockmi_writer_sent_range(struct sockmi_writer *w, const struct sockmi_sent_range *range)
{
	uint8_t *place = append_entry(w, SOCKMI_SACK_SCOREBOARD, range, sizeof(*range));

	if (place)
		sockmi_wire_order("q1i2h2i1", place);
	return w->error;
}

int sockmi_writer_range(struct sockmi_writer *w, uint32_t seq, uint32_t end_seq)
{
	uint8_t wire[8];

	sockmi_put32(wire, seq);
	sockmi_put32(wire + 4, end_seq);
	append_entry(w, SOCKMI_RECEIVE_SACK, wire, sizeof(wire));
	return w->error;
}

int sockmi_writer_ktls(struct sockmi_writer *w, const struct sockmi_ktls *ktls)
{
	uint8_t *place = append_entry(w, SOCKMI_KTLS, ktls, sizeof(*ktls));

	if (place)
		sockmi_wire_order("b4h2b64i2", place);
	return w->error;
}

int sockmi_writer_fidelity(struct sockmi_writer *w, enum sockmi_fidelity_class what, const char *name)
{
	size_t length = strlen(name);

	if (w->error)
		return w->error;
	if (!w->open || sockmi_get16(w->buffer + w->open) != SOCKMI_FIDELITY || length > 255)
		return fail(w, -EINVAL);
	/* The only list without padding between entries; close() adds that of the section. */
	if (w->capacity - w->length < length + 2)
		return fail(w, -ENOSPC);
	w->buffer[w->length++] = (uint8_t)what;
	w->buffer[w->length++] = (uint8_t)length;
	memcpy(w->buffer + w->length, name, length);
	w->length += length;
	return 0;
}

int sockmi_writer_close(struct sockmi_writer *w)
{
	size_t length;

	if (w->error)
		return w->error;
	if (!w->open || w->reserved)
		return fail(w, -EINVAL);
	length = w->length - w->open - SOCKMI_SECTION_HEADER_BYTES;
	if (length > 0xffffffffu - 7)
		return fail(w, -ENOSPC);
	w->length -= length; /* append() counts it again, and pads */
	if (append(w, length))
		end(w, length);
	return w->error;
}

int sockmi_writer_congestion(struct sockmi_writer *w, const char *name, uint32_t version, const void *bytes,
			     size_t length)
{
	struct sockmi_congestion_header header = { .version = version };
	uint8_t *place;

	if (strlen(name) >= sizeof(header.name) || length > SOCKMI_CONGESTION_MAX_BYTES)
		return fail(w, -EINVAL);
	memcpy(header.name, name, strlen(name));
	place = sockmi_writer_reserve(w, SOCKMI_CONGESTION_PRIVATE, sizeof(header) + length);
	if (!place)
		return w->error;
	sockmi_wire_order("b16i2", &header);
	memcpy(place, &header, sizeof(header));
	if (length)
		memcpy(place + sizeof(header), bytes, length);
	return sockmi_writer_commit(w, sizeof(header) + length);
}

ssize_t sockmi_writer_finish(struct sockmi_writer *w)
{
	if (!w->error && (w->open || !w->sections))
		fail(w, -EINVAL);
	if (w->error)
		return w->error;
	sockmi_image_seal(w->buffer, w->length, w->sections);
	return (ssize_t)w->length;
}
