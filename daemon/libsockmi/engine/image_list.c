// SPDX-License-Identifier: MIT OR GPL-2.0-only
/* The entries of the list sections, one at a time. */
#include "image_internal.h"

static const uint8_t *take(struct sockmi_view *rest, size_t length)
{
	const uint8_t *p = rest->data;

	if (rest->length < length)
		return NULL;
	rest->data += length;
	rest->length -= length;
	return p;
}

bool sockmi_item_next(struct sockmi_view *rest, struct sockmi_item *item)
{
	uint64_t padded;

	if (rest->length < 8)
		return false;
	item->header = rest->data;
	item->bytes = rest->data + 8;
	item->length = sockmi_get32(item->header + 4);
	padded = sockmi_padded(item->length);
	if (padded > rest->length - 8)
		return false;
	return take(rest, 8 + (size_t)padded);
}

bool sockmi_option_next(struct sockmi_view *rest, struct sockmi_option *out)
{
	struct sockmi_item item;

	if (!sockmi_item_next(rest, &item))
		return false;
	out->id = sockmi_get16(item.header);
	out->type = item.header[2];
	out->flags = item.header[3];
	out->number = out->type == SOCKMI_OPTION_INT && item.length == 8 ? (int64_t)sockmi_get64(item.bytes) : 0;
	out->bytes = (struct sockmi_view){ item.bytes, item.length };
	return true;
}

bool sockmi_segment_next(struct sockmi_view *rest, uint32_t *seq, struct sockmi_view *bytes)
{
	struct sockmi_item item;

	if (!sockmi_item_next(rest, &item))
		return false;
	*seq = sockmi_get32(item.header);
	*bytes = (struct sockmi_view){ item.bytes, item.length };
	return true;
}

bool sockmi_sent_range_next(struct sockmi_view *rest, struct sockmi_sent_range *out)
{
	const uint8_t *p = take(rest, sizeof(*out));

	if (!p)
		return false;
	memcpy(out, p, sizeof(*out));
	sockmi_wire_order("q1i2h2i1", out);
	return true;
}

bool sockmi_range_next(struct sockmi_view *rest, struct sockmi_range *out)
{
	const uint8_t *p = take(rest, sizeof(*out));

	if (!p)
		return false;
	*out = (struct sockmi_range){ .seq = sockmi_get32(p), .end_seq = sockmi_get32(p + 4) };
	return true;
}

bool sockmi_ktls_next(struct sockmi_view *rest, struct sockmi_ktls *out)
{
	const uint8_t *p = take(rest, sizeof(*out));

	if (!p)
		return false;
	memcpy(out, p, sizeof(*out));
	sockmi_wire_order("b4h2b64i2", out);
	return true;
}

bool sockmi_fidelity_next(struct sockmi_view *rest, enum sockmi_fidelity_class *what, struct sockmi_view *name)
{
	const uint8_t *p = rest->data;

	if (rest->length < 2 || rest->length < 2u + p[1])
		return false;
	*what = (enum sockmi_fidelity_class)p[0];
	*name = (struct sockmi_view){ p + 2, p[1] };
	return take(rest, 2u + p[1]);
}

bool sockmi_congestion(const struct sockmi_image *image, struct sockmi_congestion_header *header,
		       struct sockmi_view *bytes)
{
	*bytes = image->congestion_private;
	if (bytes->length < sizeof(*header))
		return false;
	memcpy(header, take(bytes, sizeof(*header)), sizeof(*header));
	sockmi_wire_order("b16i2", header);
	return true;
}
