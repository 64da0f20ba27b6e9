/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* Shared by the image codec's own files: the table of sections, byte order, error reports. */
#ifndef SOCKMI_IMAGE_INTERNAL_H
#define SOCKMI_IMAGE_INTERNAL_H

#include "image.h"

#ifdef __KERNEL__
#include <linux/kernel.h>
#include <linux/errno.h>
#include <linux/string.h>
#else
#include <errno.h>
#include <string.h>
#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))
#endif

#define SOCKMI_CRC_OFFSET 28

/* What is known of a section type; the payload's length is min..max and a multiple of `multiple`. */
struct sockmi_section_spec {
	const char *name;
	const char *layout; /* of a fixed payload, for byte order: 'b' 1, 'h' 2, 'i' 4, 'q' 8, each with a count */
	size_t offset;	    /* in struct sockmi_image: of the struct, or of the view if layout is NULL */
	uint32_t min;
	uint32_t max;
	uint32_t multiple;
	uint32_t flags; /* as the writer sets them */
};

/* Indexed by type; [0] is empty. */
extern const struct sockmi_section_spec sockmi_sections[SOCKMI_SECTION_END];

static inline const struct sockmi_view *sockmi_section_view(const struct sockmi_image *image, unsigned int type)
{
	return (const struct sockmi_view *)(const void *)((const char *)image + sockmi_sections[type].offset);
}

static inline bool sockmi_section_fits(unsigned int type, size_t length)
{
	const struct sockmi_section_spec *spec = &sockmi_sections[type];

	return length >= spec->min && length <= spec->max && length % spec->multiple == 0;
}

/* From host order to the wire's, or back, in place; nothing to do on little-endian hosts. */
void sockmi_wire_order(const char *layout, void *payload);

static inline uint16_t sockmi_get16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static inline uint32_t sockmi_get32(const uint8_t *p)
{
	return (uint32_t)p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static inline uint64_t sockmi_get64(const uint8_t *p)
{
	return sockmi_get32(p) | (uint64_t)sockmi_get32(p + 4) << 32;
}

static inline void sockmi_put16(uint8_t *p, uint16_t value)
{
	p[0] = (uint8_t)value;
	p[1] = (uint8_t)(value >> 8);
}

static inline void sockmi_put32(uint8_t *p, uint32_t value)
{
	sockmi_put16(p, (uint16_t)value);
	sockmi_put16(p + 2, (uint16_t)(value >> 16));
}

static inline void sockmi_put64(uint8_t *p, uint64_t value)
{
	sockmi_put32(p, (uint32_t)value);
	sockmi_put32(p + 4, (uint32_t)(value >> 32));
}

static inline uint64_t sockmi_padded(uint64_t length)
{
	return (length + 7) & ~(uint64_t)7;
}

/* True if all of these bytes are zero. */
static inline bool sockmi_all_zero(const void *bytes, size_t length)
{
	const uint8_t *p = bytes;
	uint8_t any = 0;

	while (length--)
		any |= *p++;
	return any == 0;
}

/* Writes the sentence (if @error is not NULL) and returns @error_class. */
int sockmi_image_fail(char *error, int error_class, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Writes an image's header, with its checksum. */
void sockmi_image_seal(uint8_t *image, size_t length, uint32_t sections);

/* The register of a CRC-32 after @zeros more zero bytes (linear part only). */
uint32_t sockmi_crc32_shift(uint32_t crc, uint64_t zeros);

/* First entry of a list whose entries are 8 bytes (the last 4 a length), then bytes padded to 8. */
struct sockmi_item {
	const uint8_t *header;
	const uint8_t *bytes;
	uint32_t length;
};

/* Takes it off @rest; false if the list is empty or the entry is cut off (then @rest is as before). */
bool sockmi_item_next(struct sockmi_view *rest, struct sockmi_item *item);

#endif
