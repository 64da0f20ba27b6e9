// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * What the sections may say: docs/image.md, "Checks", in its order. First each section by itself, in the
 * order of the types; then the identity's addresses, what belongs to the state, and the sequence numbers.
 */
#include "image_internal.h"

#define FAIL(class, ...) sockmi_image_fail(error, SOCKMI_IMAGE_##class, __VA_ARGS__)
#define MAX_WINDOW 65535u
#define MAX_SCALE 14

static bool has(const struct sockmi_image *image, unsigned int type)
{
	return image->present & SOCKMI_HAS(type);
}

/* ---- Each section by itself ---- */

static int check_identity(const struct sockmi_image *image, char *error)
{
	const struct sockmi_identity *id = &image->identity;

	if (!sockmi_all_zero(id->reserved, sizeof(id->reserved)) || id->local.reserved || id->remote.reserved ||
	    id->origin.reserved)
		return FAIL(RESERVED, "identity: reserved bytes are not zero");
	if (id->bind_locks & ~(SOCKMI_BIND_ADDRESS | SOCKMI_BIND_PORT))
		return FAIL(RESERVED, "identity: bind_locks %#x has unknown bits", id->bind_locks);
	if (id->family != SOCKMI_FAMILY_INET && id->family != SOCKMI_FAMILY_INET6)
		return FAIL(VALUE, "identity: family %u is neither 2 nor 10", id->family);
	if (id->kind < SOCKMI_KIND_BOUND || id->kind > SOCKMI_KIND_UNCONNECTED)
		return FAIL(VALUE, "identity: kind %u is unknown", id->kind);
	if (id->state < SOCKMI_ESTABLISHED || id->state > SOCKMI_CLOSING)
		return FAIL(VALUE, "identity: state %u is unknown", id->state);
	if (id->v6only > 1)
		return FAIL(VALUE, "identity: v6only is %u, not 0 or 1", id->v6only);
	return 0;
}

static int check_sequence_flags(const struct sockmi_image *image, char *error)
{
	if (image->sequence.flags & ~(SOCKMI_OWN_FIN | SOCKMI_OWN_FIN_SENT | SOCKMI_PEER_FIN | SOCKMI_PEER_FIN_READ |
				      SOCKMI_SHUT_RD | SOCKMI_SHUT_WR))
		return FAIL(RESERVED, "sequence: flags %#x has unknown bits", image->sequence.flags);
	return 0;
}

static int check_window_flags(const struct sockmi_image *image, char *error)
{
	const struct sockmi_window *w = &image->window;

	if (w->reserved || w->flags & ~(SOCKMI_WINDOW_HAS_CLAMP | SOCKMI_WINDOW_HAS_SSTHRESH |
					SOCKMI_WINDOW_HAS_RIGHT_EDGE))
		return FAIL(RESERVED, "window: reserved bits are not zero");
	if ((w->window_clamp && !(w->flags & SOCKMI_WINDOW_HAS_CLAMP)) ||
	    (w->rcv_ssthresh && !(w->flags & SOCKMI_WINDOW_HAS_SSTHRESH)) ||
	    (w->rcv_right_edge && !(w->flags & SOCKMI_WINDOW_HAS_RIGHT_EDGE)))
		return FAIL(RESERVED, "window: a field without its flag is not zero");
	return 0;
}

static int check_negotiated(const struct sockmi_image *image, char *error)
{
	const struct sockmi_negotiated *n = &image->negotiated;

	if (!sockmi_all_zero(n->reserved, sizeof(n->reserved)) ||
	    n->flags & ~(SOCKMI_NEGOTIATED_WSCALE | SOCKMI_NEGOTIATED_SACK | SOCKMI_NEGOTIATED_TIMESTAMPS |
			 SOCKMI_NEGOTIATED_ECN | SOCKMI_NEGOTIATED_ACCECN | SOCKMI_NEGOTIATED_FASTOPEN))
		return FAIL(RESERVED, "negotiated: reserved bits are not zero");
	if (n->snd_wscale > MAX_SCALE || n->rcv_wscale > MAX_SCALE)
		return FAIL(VALUE, "negotiated: window scales %u and %u, at most %d is allowed", n->snd_wscale,
			    n->rcv_wscale, MAX_SCALE);
	if (!(n->flags & SOCKMI_NEGOTIATED_WSCALE) && (n->snd_wscale || n->rcv_wscale))
		return FAIL(VALUE, "negotiated: window scales without window scaling");
	if (n->flags & SOCKMI_NEGOTIATED_ACCECN && !(n->flags & SOCKMI_NEGOTIATED_ECN))
		return FAIL(VALUE, "negotiated: accurate ECN without ECN");
	return 0;
}

static int check_timestamp(const struct sockmi_image *image, char *error)
{
	const struct sockmi_timestamp *t = &image->timestamp;

	if (!sockmi_all_zero(t->reserved, sizeof(t->reserved)) ||
	    t->flags & ~(SOCKMI_TIMESTAMP_HAS_RECENT | SOCKMI_TIMESTAMP_HAS_SYN))
		return FAIL(RESERVED, "timestamp: reserved bits are not zero");
	if (((t->ts_recent || t->ts_recent_age_us) && !(t->flags & SOCKMI_TIMESTAMP_HAS_RECENT)) ||
	    ((t->syn_first_tsval || t->syn_last_tsval) && !(t->flags & SOCKMI_TIMESTAMP_HAS_SYN)))
		return FAIL(RESERVED, "timestamp: a field without its flag is not zero");
	if (t->unit != SOCKMI_TIMESTAMP_MS && t->unit != SOCKMI_TIMESTAMP_US)
		return FAIL(VALUE, "timestamp: unit %u is neither 1 (ms) nor 2 (us)", t->unit);
	return 0;
}

/* Type of a known option, or 0. */
static int option_type(unsigned int id)
{
	switch (id) {
#define TYPE(name, id, type, level, option, unit_us) \
	case id:                                      \
		return SOCKMI_OPTION_##type;
		SOCKMI_OPTIONS(TYPE)
#undef TYPE
	default:
		return 0;
	}
}

static int check_option(const struct sockmi_option *option, char *error)
{
	int known = option_type(option->id);

	if (option->flags & ~(SOCKMI_FLAG_MANDATORY | SOCKMI_OPTION_LOCKED))
		return FAIL(RESERVED, "socket_options: option %u: reserved flags are set", option->id);
	if (option->id < 1 || option->id > SOCKMI_TYPE_MAX)
		return FAIL(VALUE, "socket_options: id %u is not in 1..%d", option->id, SOCKMI_TYPE_MAX);
	if (option->type != SOCKMI_OPTION_INT && option->type != SOCKMI_OPTION_BYTES)
		return FAIL(VALUE, "socket_options: option %u: type %u is unknown", option->id, option->type);
	if (option->type == SOCKMI_OPTION_INT ? option->bytes.length != 8 :
						option->bytes.length > SOCKMI_OPTION_BYTES_MAX)
		return FAIL(LENGTH, "socket_options: option %u: length %zu", option->id, option->bytes.length);
	if (!known && option->flags & SOCKMI_FLAG_MANDATORY)
		return FAIL(UNKNOWN_MANDATORY,
			    "socket_options: option %u is mandatory and unknown to format version %d.%d: update this host",
			    option->id, SOCKMI_IMAGE_MAJOR, SOCKMI_IMAGE_MINOR);
	if (known && known != option->type)
		return FAIL(VALUE, "socket_options: option %u has type %u, not %d", option->id, option->type, known);
	return 0;
}

/* The next item of a list, with its padding checked. @more: false at the end. */
static int next_item(struct sockmi_view *rest, struct sockmi_item *item, bool *more, const char *list, char *error)
{
	*more = rest->length;
	if (!*more)
		return 0;
	if (!sockmi_item_next(rest, item))
		return FAIL(LENGTH, "%s: the last entry is cut off", list);
	if (!sockmi_all_zero(item->bytes + item->length, (size_t)sockmi_padded(item->length) - item->length))
		return FAIL(RESERVED, "%s: padding is not zero", list);
	return 0;
}

static int check_options(const struct sockmi_image *image, char *error)
{
	uint64_t seen[(SOCKMI_TYPE_MAX + 64) / 64] = { 0 };
	struct sockmi_view rest = image->socket_options;

	for (;;) {
		struct sockmi_view one = rest;
		struct sockmi_option option;
		struct sockmi_item item;
		bool more;
		int result = next_item(&rest, &item, &more, "socket_options", error);

		if (result || !more)
			return result;
		sockmi_option_next(&one, &option);
		result = check_option(&option, error);
		if (result)
			return result;
		if (seen[option.id / 64] >> option.id % 64 & 1)
			return FAIL(DUPLICATE, "socket_options: option %u is there twice", option.id);
		seen[option.id / 64] |= (uint64_t)1 << option.id % 64;
	}
}

static int check_listener(const struct sockmi_image *image, char *error)
{
	if (image->listener.backlog > 0x7fffffffu || image->listener.fastopen_qlen > 0x7fffffffu)
		return FAIL(VALUE, "listener: backlog %u or fastopen_qlen %u is above 2^31-1", image->listener.backlog,
			    image->listener.fastopen_qlen);
	return 0;
}

static int check_path_model(const struct sockmi_image *image, char *error)
{
	const struct sockmi_path_model *p = &image->path_model;

	if (!sockmi_all_zero(p->reserved, sizeof(p->reserved)) ||
	    p->flags & ~(SOCKMI_PATH_HAS_UNDO | SOCKMI_PATH_HAS_RACK | SOCKMI_PATH_HAS_PACING))
		return FAIL(RESERVED, "path_model: reserved bits are not zero");
	if (!p->cwnd || !p->rto_us)
		return FAIL(VALUE, "path_model: cwnd %u, rto_us %u: neither may be 0", p->cwnd, p->rto_us);
	if (p->backoff > 63 || p->congestion_state > SOCKMI_CA_LOSS)
		return FAIL(VALUE, "path_model: backoff %u is above 63 or congestion_state %u above %d", p->backoff,
			    p->congestion_state, SOCKMI_CA_LOSS);
	return 0;
}

static int check_receive_autotune(const struct sockmi_image *image, char *error)
{
	if (!sockmi_all_zero(image->receive_autotune.reserved, sizeof(image->receive_autotune.reserved)))
		return FAIL(RESERVED, "receive_autotune: reserved bytes are not zero");
	return 0;
}

static int check_out_of_order(const struct sockmi_image *image, char *error)
{
	struct sockmi_view rest = image->out_of_order;

	for (;;) {
		struct sockmi_item item;
		bool more;
		int result = next_item(&rest, &item, &more, "out_of_order", error);

		if (result || !more)
			return result;
		if (!item.length)
			return FAIL(VALUE, "out_of_order: an empty segment");
	}
}

static int check_sack_scoreboard(const struct sockmi_image *image, char *error)
{
	struct sockmi_view rest = image->sack_scoreboard;
	struct sockmi_sent_range range;

	while (sockmi_sent_range_next(&rest, &range))
		if (range.reserved || range.flags & ~(SOCKMI_RANGE_SACKED | SOCKMI_RANGE_LOST |
						      SOCKMI_RANGE_RETRANSMITTED | SOCKMI_RANGE_EVER_RETRANSMITTED))
			return FAIL(RESERVED, "sack_scoreboard: reserved bits are not zero");
	return 0;
}

#define URGENT_IN (SOCKMI_URGENT_RECEIVED | SOCKMI_URGENT_READ | SOCKMI_URGENT_ANNOUNCED)

static int check_urgent_flags(const struct sockmi_image *image, char *error)
{
	const struct sockmi_urgent *u = &image->urgent;
	unsigned int in = u->flags & URGENT_IN;

	if (!sockmi_all_zero(u->reserved, sizeof(u->reserved)) || u->flags & ~(SOCKMI_URGENT_SEND | URGENT_IN))
		return FAIL(RESERVED, "urgent: reserved bits are not zero");
	if ((u->snd_up && !(u->flags & SOCKMI_URGENT_SEND)) || ((u->urg_seq || u->urg_byte) && !in))
		return FAIL(RESERVED, "urgent: a field without its flag is not zero");
	if (in & (in - 1))
		return FAIL(VALUE, "urgent: flags %#x exclude each other", u->flags);
	return 0;
}

static int check_ecn(const struct sockmi_image *image, char *error)
{
	if (image->ecn.reserved ||
	    image->ecn.flags & ~(SOCKMI_ECN_QUEUE_CWR | SOCKMI_ECN_DEMAND_CWR | SOCKMI_ECN_SEEN))
		return FAIL(RESERVED, "ecn: reserved bits are not zero");
	return 0;
}

static bool printable(const uint8_t *text, size_t length)
{
	for (size_t i = 0; i < length; i++)
		if (text[i] < 0x21 || text[i] > 0x7e)
			return false;
	return true;
}

static int check_congestion_private(const struct sockmi_image *image, char *error)
{
	struct sockmi_congestion_header header;
	struct sockmi_view bytes;
	size_t length = 0;

	if (!sockmi_congestion(image, &header, &bytes))
		return 0;
	while (length < sizeof(header.name) && header.name[length])
		length++;
	if (header.reserved)
		return FAIL(RESERVED, "congestion_private: reserved bytes are not zero");
	if (length == 0 || length == sizeof(header.name) || !printable((const uint8_t *)header.name, length) ||
	    !sockmi_all_zero(header.name + length, sizeof(header.name) - length))
		return FAIL(VALUE, "congestion_private: the name is not 1..15 printable characters and zeros");
	return 0;
}

static int check_ktls(const struct sockmi_image *image, char *error)
{
	struct sockmi_view rest = image->ktls;
	struct sockmi_ktls k;
	int seen = 0;

	while (sockmi_ktls_next(&rest, &k)) {
		if (k.reserved || k.flags & ~1u)
			return FAIL(RESERVED, "ktls: reserved bits are not zero");
		if (k.direction != SOCKMI_KTLS_TX && k.direction != SOCKMI_KTLS_RX)
			return FAIL(VALUE, "ktls: direction %u is neither 1 nor 2", k.direction);
		if ((k.key_length != 16 && k.key_length != 24 && k.key_length != 32) || k.iv_length < 8 ||
		    k.iv_length > 16 || k.salt_length > 8)
			return FAIL(VALUE, "ktls: key, iv and salt of %u, %u and %u bytes", k.key_length, k.iv_length,
				    k.salt_length);
		if ((k.version != 0x0303 && k.version != 0x0304) || !k.cipher)
			return FAIL(VALUE, "ktls: version %#x or cipher suite %#x is unknown", k.version, k.cipher);
		if (!sockmi_all_zero(k.key + k.key_length, sizeof(k.key) - k.key_length) ||
		    !sockmi_all_zero(k.iv + k.iv_length, sizeof(k.iv) - k.iv_length) ||
		    !sockmi_all_zero(k.salt + k.salt_length, sizeof(k.salt) - k.salt_length))
			return FAIL(RESERVED, "ktls: unused bytes are not zero");
		if (seen & 1 << k.direction)
			return FAIL(DUPLICATE, "ktls: direction %u is there twice", k.direction);
		seen |= 1 << k.direction;
	}
	return 0;
}

static int check_fidelity(const struct sockmi_image *image, char *error)
{
	struct sockmi_view rest = image->fidelity;

	while (rest.length) {
		enum sockmi_fidelity_class what;
		struct sockmi_view name;

		if (!sockmi_fidelity_next(&rest, &what, &name))
			return FAIL(LENGTH, "fidelity: the last entry is cut off");
		if ((int)what < SOCKMI_CARRIED || (int)what > SOCKMI_RESET)
			return FAIL(VALUE, "fidelity: class %d is not in 1..3", (int)what);
		if (!name.length || !printable(name.data, name.length))
			return FAIL(VALUE, "fidelity: a name is empty or not printable");
	}
	return 0;
}

static int check_early_fin(const struct sockmi_image *image, char *error)
{
	if (image->early_fin.reserved)
		return FAIL(RESERVED, "early_fin: reserved bytes are not zero");
	return 0;
}

static int (*const section_checks[SOCKMI_SECTION_END])(const struct sockmi_image *image, char *error) = {
	[SOCKMI_IDENTITY] = check_identity,
	[SOCKMI_SEQUENCE] = check_sequence_flags,
	[SOCKMI_WINDOW] = check_window_flags,
	[SOCKMI_NEGOTIATED] = check_negotiated,
	[SOCKMI_TIMESTAMP] = check_timestamp,
	[SOCKMI_SOCKET_OPTIONS] = check_options,
	[SOCKMI_LISTENER] = check_listener,
	[SOCKMI_PATH_MODEL] = check_path_model,
	[SOCKMI_RECEIVE_AUTOTUNE] = check_receive_autotune,
	[SOCKMI_OUT_OF_ORDER] = check_out_of_order,
	[SOCKMI_SACK_SCOREBOARD] = check_sack_scoreboard,
	[SOCKMI_URGENT] = check_urgent_flags,
	[SOCKMI_ECN] = check_ecn,
	[SOCKMI_CONGESTION_PRIVATE] = check_congestion_private,
	[SOCKMI_KTLS] = check_ktls,
	[SOCKMI_FIDELITY] = check_fidelity,
	[SOCKMI_EARLY_FIN] = check_early_fin,
};

static int check_sections(const struct sockmi_image *image, char *error)
{
	for (unsigned int type = 1; type < SOCKMI_SECTION_END; type++) {
		bool view = !sockmi_sections[type].layout;
		size_t length = view ? sockmi_section_view(image, type)->length : 0;
		int result;

		/* decode() has checked the lengths; images made by hand for encode() come here too. */
		if (view && length && !sockmi_section_fits(type, length))
			return FAIL(LENGTH, "section %s: length %zu", sockmi_sections[type].name, length);
		if (!section_checks[type] || !(view ? length != 0 : has(image, type)))
			continue;
		result = section_checks[type](image, error);
		if (result)
			return result;
	}
	return 0;
}

/* ---- Addresses ---- */

static bool is_mapped(const struct sockmi_endpoint *end)
{
	static const uint8_t prefix[12] = { [10] = 0xff, [11] = 0xff };

	return memcmp(end->address, prefix, sizeof(prefix)) == 0;
}

static bool is_none(const struct sockmi_endpoint *end)
{
	return sockmi_all_zero(end, sizeof(*end));
}

/* A unicast address and a port. */
static bool is_definite(const struct sockmi_endpoint *end)
{
	size_t start = is_mapped(end) ? 12 : 0;
	bool multicast = start ? (end->address[12] & 0xf0) == 0xe0 : end->address[0] == 0xff;

	return end->port && !multicast && !sockmi_all_zero(end->address + start, 16 - start);
}

static int check_endpoint(const struct sockmi_identity *id, const struct sockmi_endpoint *end, const char *name,
			  char *error)
{
	if (is_none(end))
		return 0;
	if (id->family == SOCKMI_FAMILY_INET && !is_mapped(end))
		return FAIL(ADDRESS, "identity: the %s address of an IPv4 socket is not v4-mapped", name);
	if (id->v6only && is_mapped(end))
		return FAIL(ADDRESS, "identity: the %s address of a v6only socket is v4-mapped", name);
	if (is_mapped(end) && end->scope_id)
		return FAIL(ADDRESS, "identity: the %s IPv4 address has a scope", name);
	return 0;
}

static int check_addresses(const struct sockmi_identity *id, char *error)
{
	int result = check_endpoint(id, &id->local, "local", error);

	if (!result)
		result = check_endpoint(id, &id->remote, "remote", error);
	if (!result)
		result = check_endpoint(id, &id->origin, "origin", error);
	if (result)
		return result;
	if (id->v6only && id->family == SOCKMI_FAMILY_INET)
		return FAIL(ADDRESS, "identity: v6only on an IPv4 socket");
	if (id->kind == SOCKMI_KIND_CONNECTED) {
		if (!is_definite(&id->local) || !is_definite(&id->remote))
			return FAIL(ADDRESS, "identity: a connected socket needs unicast addresses and ports at both ends");
		if (is_mapped(&id->local) != is_mapped(&id->remote))
			return FAIL(ADDRESS, "identity: one end is IPv4, the other IPv6");
		if (!is_none(&id->origin) &&
		    (!is_definite(&id->origin) || is_mapped(&id->origin) != is_mapped(&id->local)))
			return FAIL(ADDRESS, "identity: origin is not an address and port of the connection's IP version");
		return 0;
	}
	if (!is_none(&id->remote))
		return FAIL(ADDRESS, "identity: a socket that is not connected has a remote endpoint");
	if (id->kind == SOCKMI_KIND_UNCONNECTED && (!is_none(&id->local) || !is_none(&id->origin)))
		return FAIL(ADDRESS, "identity: an unconnected socket has a local endpoint");
	if (id->kind == SOCKMI_KIND_BOUND && is_none(&id->local))
		return FAIL(ADDRESS, "identity: a bound socket has no local endpoint");
	if (id->kind == SOCKMI_KIND_LISTENING && !id->local.port)
		return FAIL(ADDRESS, "identity: a listening socket has no local port");
	return 0;
}

/* ---- What belongs to kind and state ---- */

#define SECTIONS_ANY                                                                      \
	(SOCKMI_HAS(SOCKMI_IDENTITY) | SOCKMI_HAS(SOCKMI_SOCKET_OPTIONS) | SOCKMI_HAS(SOCKMI_CONTEXT) | \
	 SOCKMI_HAS(SOCKMI_FIDELITY))
#define SECTIONS_LISTENING (SECTIONS_ANY | SOCKMI_HAS(SOCKMI_LISTENER))
#define SECTIONS_CONNECTED ((SOCKMI_HAS(SOCKMI_SECTION_END) - 1) & ~SOCKMI_HAS(SOCKMI_LISTENER))
#define SECTIONS_SYN_SENT                                                                       \
	(SECTIONS_CONNECTED & ~(SOCKMI_HAS(SOCKMI_OUT_OF_ORDER) | SOCKMI_HAS(SOCKMI_SACK_SCOREBOARD) | \
				SOCKMI_HAS(SOCKMI_RECEIVE_SACK) | SOCKMI_HAS(SOCKMI_URGENT) | SOCKMI_HAS(SOCKMI_KTLS) | \
				SOCKMI_HAS(SOCKMI_EARLY_FIN)))

/* Sections that say something: views that are not empty, fixed ones that are there. */
static uint64_t filled(const struct sockmi_image *image)
{
	uint64_t mask = 0;

	for (unsigned int type = 1; type < SOCKMI_SECTION_END; type++)
		if (sockmi_sections[type].layout ? has(image, type) : sockmi_section_view(image, type)->length != 0)
			mask |= SOCKMI_HAS(type);
	return mask;
}

static bool state_fits_kind(const struct sockmi_identity *id)
{
	switch (id->kind) {
	case SOCKMI_KIND_LISTENING:
		return id->state == SOCKMI_LISTEN;
	case SOCKMI_KIND_CONNECTED:
		return id->state != SOCKMI_SYN_RECEIVED && id->state != SOCKMI_TIME_WAIT &&
		       id->state != SOCKMI_CLOSED && id->state != SOCKMI_LISTEN;
	default:
		return id->state == SOCKMI_CLOSED;
	}
}

static int check_belonging(const struct sockmi_image *image, char *error)
{
	const struct sockmi_identity *id = &image->identity;
	uint64_t allowed = id->kind == SOCKMI_KIND_LISTENING ? SECTIONS_LISTENING :
			   id->kind != SOCKMI_KIND_CONNECTED ? SECTIONS_ANY :
			   id->state == SOCKMI_SYN_SENT	     ? SECTIONS_SYN_SENT :
							       SECTIONS_CONNECTED;
	uint64_t wrong = filled(image) & ~allowed;

	if (!state_fits_kind(id))
		return FAIL(STATE, "identity: state %u does not fit kind %u", id->state, id->kind);
	if (id->kind != SOCKMI_KIND_CONNECTED && !sockmi_all_zero(id->listener_id, sizeof(id->listener_id)))
		return FAIL(STATE, "identity: only a connected socket can belong to a listener");
	for (unsigned int type = 1; wrong && type < SOCKMI_SECTION_END; type++)
		if (wrong & SOCKMI_HAS(type))
			return FAIL(STATE, "section %s does not belong to kind %u in state %u",
				    sockmi_sections[type].name, id->kind, id->state);
	return 0;
}

static int check_missing(const struct sockmi_image *image, char *error)
{
	const struct sockmi_identity *id = &image->identity;
	uint64_t needed = 0;

	if (id->kind == SOCKMI_KIND_LISTENING)
		needed = SOCKMI_HAS(SOCKMI_LISTENER);
	if (id->kind == SOCKMI_KIND_CONNECTED) {
		needed = SOCKMI_HAS(SOCKMI_SEQUENCE) | SOCKMI_HAS(SOCKMI_NEGOTIATED);
		if (id->state != SOCKMI_SYN_SENT)
			needed |= SOCKMI_HAS(SOCKMI_WINDOW);
		if (image->negotiated.flags & SOCKMI_NEGOTIATED_TIMESTAMPS)
			needed |= SOCKMI_HAS(SOCKMI_TIMESTAMP);
	}
	for (unsigned int type = 1; type < SOCKMI_SECTION_END; type++)
		if (needed & ~image->present & SOCKMI_HAS(type))
			return FAIL(MISSING, "section %s is missing", sockmi_sections[type].name);
	return 0;
}

/* FIN flags that a state allows: those that must be set, and those that may. */
static bool fins_fit_state(uint8_t state, uint32_t flags)
{
	uint32_t must = 0, may = 0;

	switch (state) {
	case SOCKMI_FIN_WAIT_1:
		must = SOCKMI_OWN_FIN;
		may = SOCKMI_OWN_FIN_SENT;
		break;
	case SOCKMI_FIN_WAIT_2:
		must = SOCKMI_OWN_FIN | SOCKMI_OWN_FIN_SENT;
		break;
	case SOCKMI_CLOSE_WAIT:
		must = SOCKMI_PEER_FIN;
		may = SOCKMI_PEER_FIN_READ;
		break;
	case SOCKMI_CLOSING:
	case SOCKMI_LAST_ACK:
		must = SOCKMI_OWN_FIN | SOCKMI_PEER_FIN;
		may = SOCKMI_OWN_FIN_SENT | SOCKMI_PEER_FIN_READ;
		break;
	default: /* SYN-SENT, ESTABLISHED */
		break;
	}
	flags &= SOCKMI_OWN_FIN | SOCKMI_OWN_FIN_SENT | SOCKMI_PEER_FIN | SOCKMI_PEER_FIN_READ;
	return (flags & must) == must && !(flags & ~(must | may));
}

static int check_connection_flags(const struct sockmi_image *image, char *error)
{
	uint32_t flags = image->sequence.flags, negotiated = image->negotiated.flags;
	uint8_t state = image->identity.state;
	struct sockmi_view rest = image->sack_scoreboard;
	struct sockmi_sent_range range;

	if (!fins_fit_state(state, flags))
		return FAIL(STATE, "sequence: flags %#x do not fit state %u", flags, state);
	if (!(flags & SOCKMI_SHUT_WR) != !(flags & SOCKMI_OWN_FIN))
		return FAIL(STATE, "sequence: shut for writing and an own FIN go together");
	if (state == SOCKMI_SYN_SENT && flags)
		return FAIL(STATE, "sequence: flags %#x in SYN-SENT", flags);
	if (has(image, SOCKMI_TIMESTAMP) && !(negotiated & SOCKMI_NEGOTIATED_TIMESTAMPS))
		return FAIL(STATE, "section timestamp, but timestamps were not negotiated");
	if (image->timestamp.flags & SOCKMI_TIMESTAMP_HAS_SYN && state != SOCKMI_SYN_SENT)
		return FAIL(STATE, "timestamp: SYN values outside SYN-SENT");
	if (has(image, SOCKMI_ECN) && !(negotiated & SOCKMI_NEGOTIATED_ECN))
		return FAIL(STATE, "section ecn, but ECN was not negotiated");
	if (image->receive_sack.length && !(negotiated & SOCKMI_NEGOTIATED_SACK))
		return FAIL(STATE, "section receive_sack, but SACK was not negotiated");
	while (sockmi_sent_range_next(&rest, &range))
		if (range.flags & SOCKMI_RANGE_SACKED && !(negotiated & SOCKMI_NEGOTIATED_SACK))
			return FAIL(STATE, "sack_scoreboard: a range is sacked, but SACK was not negotiated");
	if (image->out_of_order.length && flags & SOCKMI_PEER_FIN)
		return FAIL(STATE, "section out_of_order after the peer's FIN");
	if (has(image, SOCKMI_EARLY_FIN) && flags & SOCKMI_PEER_FIN)
		return FAIL(STATE, "section early_fin after the peer's FIN");
	if (state != SOCKMI_SYN_SENT && !image->negotiated.mss_clamp)
		return FAIL(VALUE, "negotiated: mss_clamp is 0");
	if (state == SOCKMI_SYN_SENT && image->negotiated.snd_wscale)
		return FAIL(VALUE, "negotiated: snd_wscale %u in SYN-SENT", image->negotiated.snd_wscale);
	return 0;
}

/* ---- Sequence numbers, queues, windows ---- */

static int check_sequence(const struct sockmi_image *image, char *error)
{
	const struct sockmi_sequence *s = &image->sequence;
	uint8_t state = image->identity.state;

	if (sockmi_seq_after(s->snd_una, s->snd_nxt) || sockmi_seq_after(s->snd_nxt, s->write_seq) ||
	    sockmi_seq_after(s->snd_una, s->write_seq))
		return FAIL(SEQUENCE_WRONG, "sequence: snd_una %u, snd_nxt %u, write_seq %u are not in order",
			    s->snd_una, s->snd_nxt, s->write_seq);
	if (sockmi_seq_after(s->copied_seq, s->rcv_nxt))
		return FAIL(SEQUENCE_WRONG, "sequence: copied_seq %u is after rcv_nxt %u", s->copied_seq, s->rcv_nxt);
	if (state == SOCKMI_SYN_SENT && (s->snd_una != s->iss || s->snd_nxt != s->iss + 1 ||
					 s->write_seq != s->snd_nxt || s->copied_seq != s->rcv_nxt))
		return FAIL(SEQUENCE_WRONG, "sequence: not that of SYN-SENT with iss %u", s->iss);
	if (state == SOCKMI_FIN_WAIT_2 && s->snd_una != s->write_seq)
		return FAIL(SEQUENCE_WRONG, "sequence: snd_una %u is not write_seq %u in FIN-WAIT-2", s->snd_una,
			    s->write_seq);
	if (s->flags & SOCKMI_OWN_FIN_SENT && s->snd_nxt != s->write_seq)
		return FAIL(SEQUENCE_WRONG, "sequence: snd_nxt %u is not write_seq %u after the own FIN", s->snd_nxt,
			    s->write_seq);
	if (s->flags & SOCKMI_PEER_FIN_READ && s->copied_seq != s->rcv_nxt)
		return FAIL(SEQUENCE_WRONG, "sequence: copied_seq %u is not rcv_nxt %u, but the peer's FIN has been read",
			    s->copied_seq, s->rcv_nxt);
	return 0;
}

static int check_queue(const char *name, size_t length, uint32_t from, uint32_t to, bool more, char *error)
{
	if ((uint64_t)length + more != to - from)
		return FAIL(QUEUE, "%s: %zu bytes%s, but %u sequence numbers from %u to %u", name, length,
			    more ? " and a SYN or FIN" : "", to - from, from, to);
	return 0;
}

static int check_queues(const struct sockmi_image *image, char *error)
{
	const struct sockmi_sequence *s = &image->sequence;
	uint8_t state = image->identity.state;
	bool fin_sent = s->flags & SOCKMI_OWN_FIN_SENT;
	int result;

	result = check_queue("receive_queue", image->receive_queue.length, s->copied_seq, s->rcv_nxt,
			     s->flags & SOCKMI_PEER_FIN && !(s->flags & SOCKMI_PEER_FIN_READ), error);
	if (!result)
		result = check_queue("sent_queue", image->sent_queue.length, s->snd_una, s->snd_nxt,
				     state == SOCKMI_SYN_SENT || (fin_sent && state != SOCKMI_FIN_WAIT_2), error);
	if (!result)
		result = check_queue("unsent_queue", image->unsent_queue.length, s->snd_nxt, s->write_seq,
				     s->flags & SOCKMI_OWN_FIN && !fin_sent, error);
	return result;
}

/* End of what the peer may send: rcv_wup + rcv_wnd, or the highest edge ever advertised. */
static uint32_t right_edge(const struct sockmi_window *w)
{
	return w->flags & SOCKMI_WINDOW_HAS_RIGHT_EDGE ? w->rcv_right_edge : w->rcv_wup + w->rcv_wnd;
}

static int check_window(const struct sockmi_image *image, char *error)
{
	const struct sockmi_window *w = &image->window;
	uint32_t snd_max = MAX_WINDOW << image->negotiated.snd_wscale;
	uint32_t rcv_max = MAX_WINDOW << image->negotiated.rcv_wscale;
	uint32_t edge = w->rcv_right_edge - w->rcv_wup;

	if (w->snd_wnd > snd_max || w->max_window > snd_max || w->rcv_wnd > rcv_max)
		return FAIL(WINDOW_WRONG, "window: snd_wnd %u, max_window %u (at most %u) or rcv_wnd %u (%u) is too large",
			    w->snd_wnd, w->max_window, snd_max, w->rcv_wnd, rcv_max);
	if (w->max_window < w->snd_wnd)
		return FAIL(WINDOW_WRONG, "window: max_window %u is below snd_wnd %u", w->max_window, w->snd_wnd);
	if (sockmi_seq_after(w->snd_wl1, image->sequence.rcv_nxt + w->rcv_wnd))
		return FAIL(WINDOW_WRONG, "window: snd_wl1 %u is outside the receive window", w->snd_wl1);
	if (sockmi_seq_after(w->rcv_wup, image->sequence.rcv_nxt))
		return FAIL(WINDOW_WRONG, "window: rcv_wup %u is after rcv_nxt %u", w->rcv_wup,
			    image->sequence.rcv_nxt);
	if (w->flags & SOCKMI_WINDOW_HAS_RIGHT_EDGE && (edge < w->rcv_wnd || edge > 1u << 30))
		return FAIL(WINDOW_WRONG, "window: rcv_right_edge %u does not fit rcv_wup %u and rcv_wnd %u",
			    w->rcv_right_edge, w->rcv_wup, w->rcv_wnd);
	return 0;
}

/* Ranges of received data: all are offsets from rcv_nxt. */
static int check_received(const struct sockmi_image *image, char *error)
{
	uint32_t rcv_nxt = image->sequence.rcv_nxt;
	uint32_t room = right_edge(&image->window) - rcv_nxt; /* may be "negative": then none */
	uint64_t edge = (int32_t)room > 0 ? room : 0, previous = 1;
	struct sockmi_view rest = image->out_of_order, bytes;
	struct sockmi_range range;
	uint32_t seq;

	while (sockmi_segment_next(&rest, &seq, &bytes)) {
		uint64_t start = seq - rcv_nxt, end = start + bytes.length;

		if (start < previous)
			return FAIL(SEQUENCE_WRONG, "out_of_order: segment %u is not after the one before", seq);
		if (end > edge)
			return FAIL(WINDOW_WRONG, "out_of_order: segment %u of %zu bytes is outside the window", seq,
				    bytes.length);
		previous = end;
	}
	if (has(image, SOCKMI_EARLY_FIN)) {
		uint64_t fin = image->early_fin.seq - rcv_nxt;

		if (fin < previous)
			return FAIL(SEQUENCE_WRONG, "early_fin: %u is not after all out-of-order data", image->early_fin.seq);
		if (fin >= edge)
			return FAIL(WINDOW_WRONG, "early_fin: %u is outside the window", image->early_fin.seq);
	}
	rest = image->receive_sack;
	while (sockmi_range_next(&rest, &range)) {
		uint32_t start = range.seq - rcv_nxt, end = range.end_seq - rcv_nxt;

		if (start < 1 || start >= end)
			return FAIL(SEQUENCE_WRONG, "receive_sack: %u to %u is no range after rcv_nxt", range.seq,
				    range.end_seq);
		if (end > edge)
			return FAIL(WINDOW_WRONG, "receive_sack: %u to %u is outside the window", range.seq,
				    range.end_seq);
	}
	return 0;
}

static int check_sent(const struct sockmi_image *image, char *error)
{
	const struct sockmi_sequence *s = &image->sequence;
	struct sockmi_view rest = image->sack_scoreboard;
	struct sockmi_sent_range range;
	uint32_t previous = 0;

	while (sockmi_sent_range_next(&rest, &range)) {
		uint32_t start = range.seq - s->snd_una, end = range.end_seq - s->snd_una;

		if (start < previous || start >= end || end > s->snd_nxt - s->snd_una)
			return FAIL(SEQUENCE_WRONG, "sack_scoreboard: %u to %u is not a range of the sent data, in order",
				    range.seq, range.end_seq);
		previous = end;
	}
	return 0;
}

static int check_urgent(const struct sockmi_image *image, char *error)
{
	const struct sockmi_sequence *s = &image->sequence;
	const struct sockmi_urgent *u = &image->urgent;

	if (u->flags & SOCKMI_URGENT_SEND && u->snd_up - s->snd_una > s->write_seq - s->snd_una)
		return FAIL(SEQUENCE_WRONG, "urgent: snd_up %u is outside the queues", u->snd_up);
	if (u->flags & (SOCKMI_URGENT_RECEIVED | SOCKMI_URGENT_READ) &&
	    u->urg_seq - s->copied_seq >= image->receive_queue.length)
		return FAIL(SEQUENCE_WRONG, "urgent: urg_seq %u is outside the receive queue", u->urg_seq);
	if (u->flags & SOCKMI_URGENT_ANNOUNCED && u->urg_seq - s->rcv_nxt > MAX_WINDOW)
		return FAIL(SEQUENCE_WRONG, "urgent: urg_seq %u is not within 65535 after rcv_nxt", u->urg_seq);
	return 0;
}

int sockmi_image_check(const struct sockmi_image *image, char error[SOCKMI_ERROR_BYTES])
{
	static int (*const connection_checks[])(const struct sockmi_image *, char *) = {
		check_connection_flags, check_sequence, check_queues,
	};
	static int (*const window_checks[])(const struct sockmi_image *, char *) = {
		check_window, check_received, check_sent, check_urgent,
	};
	int result;

	if (!has(image, SOCKMI_IDENTITY))
		return FAIL(MISSING, "section identity is missing");
	result = check_sections(image, error);
	if (!result)
		result = check_addresses(&image->identity, error);
	if (!result)
		result = check_belonging(image, error);
	if (!result)
		result = check_missing(image, error);
	if (result || image->identity.kind != SOCKMI_KIND_CONNECTED)
		return result;
	for (size_t i = 0; !result && i < ARRAY_SIZE(connection_checks); i++)
		result = connection_checks[i](image, error);
	/* SYN-SENT may have no windows yet; what needs them is not allowed there. */
	for (size_t i = 0; !result && has(image, SOCKMI_WINDOW) && i < ARRAY_SIZE(window_checks); i++)
		result = window_checks[i](image, error);
	return result;
}
