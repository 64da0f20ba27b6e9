/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * The image: the whole state of one TCP socket as bytes. docs/image.md is the specification;
 * the Python package sockmi.image is an independent implementation of it.
 *
 * Every struct below that has "wire" in its comment has the layout of the section's payload
 * (little-endian there, host order here; the codec converts). Times are in microseconds, sizes in
 * bytes, ports are numbers (not network order), sequence numbers are modulo 2^32.
 *
 * Nothing here allocates, reads a clock or does I/O; views point into the caller's buffer.
 */
#ifndef SOCKMI_IMAGE_H
#define SOCKMI_IMAGE_H

#ifdef __KERNEL__
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#endif

#define SOCKMI_EXPORT __attribute__((visibility("default")))

#define SOCKMI_IMAGE_MAGIC "SOCKMI\x1a\n" /* 8 bytes */
#define SOCKMI_IMAGE_MAJOR 1
#define SOCKMI_IMAGE_MINOR 0
#define SOCKMI_IMAGE_HEADER_BYTES 32
#define SOCKMI_SECTION_HEADER_BYTES 8
#define SOCKMI_IMAGE_LIMIT_BYTES ((size_t)64 << 20) /* default of the decoder's limit parameter */
#define SOCKMI_CONTEXT_MAX_BYTES ((size_t)1 << 20)
#define SOCKMI_FIDELITY_MAX_BYTES ((size_t)64 << 10)
#define SOCKMI_OPTIONS_MAX_BYTES ((size_t)64 << 10)
#define SOCKMI_OPTION_BYTES_MAX 4096 /* one option of type BYTES */
#define SOCKMI_CONGESTION_MAX_BYTES 1024
#define SOCKMI_TYPE_MAX 1023 /* section types and option ids are 1..1023 */
#define SOCKMI_ERROR_BYTES 160

/* Section types. Those below 0x40 fit `present`; MANDATORY ones are so flagged by the writer. */
enum sockmi_section {
	SOCKMI_IDENTITY = 1,	       /* mandatory; always the first section */
	SOCKMI_SEQUENCE = 2,	       /* mandatory */
	SOCKMI_WINDOW = 3,	       /* mandatory */
	SOCKMI_NEGOTIATED = 4,	       /* mandatory */
	SOCKMI_TIMESTAMP = 5,	       /* mandatory */
	SOCKMI_RECEIVE_QUEUE = 6,      /* mandatory: bytes received, not yet read */
	SOCKMI_SENT_QUEUE = 7,	       /* mandatory: bytes sent, not yet acknowledged */
	SOCKMI_UNSENT_QUEUE = 8,       /* mandatory: bytes written, not yet sent */
	SOCKMI_SOCKET_OPTIONS = 9,     /* list of struct sockmi_option_header + value */
	SOCKMI_LISTENER = 10,	       /* mandatory */
	SOCKMI_PATH_MODEL = 11,
	SOCKMI_RECEIVE_AUTOTUNE = 12,
	SOCKMI_OUT_OF_ORDER = 13,      /* list of struct sockmi_segment_header + bytes */
	SOCKMI_SACK_SCOREBOARD = 14,   /* array of struct sockmi_sent_range */
	SOCKMI_RECEIVE_SACK = 15,      /* array of struct sockmi_range, most recent first, at most 4 */
	SOCKMI_URGENT = 16,	       /* mandatory */
	SOCKMI_ECN = 17,
	SOCKMI_TIMERS = 18,
	SOCKMI_COUNTERS = 19,
	SOCKMI_CONGESTION_PRIVATE = 20, /* struct sockmi_congestion_header + opaque bytes */
	SOCKMI_KTLS = 21,	       /* mandatory: array of struct sockmi_ktls, at most 2 */
	SOCKMI_CONTEXT = 22,	       /* the application's own bytes */
	SOCKMI_FIDELITY = 23,	       /* list of names: u8 class, u8 length, the name */
	SOCKMI_EARLY_FIN = 24,	       /* the peer's FIN that came out of order */
	SOCKMI_SECTION_END
};

#define SOCKMI_FLAG_MANDATORY 1u /* of a section's, and of an option's, flags */

/* `present` bit of a section. */
#define SOCKMI_HAS(type) ((uint64_t)1 << (type))

/* Address families: Linux's numbers by definition of this format. */
enum sockmi_family { SOCKMI_FAMILY_INET = 2, SOCKMI_FAMILY_INET6 = 10 };

enum sockmi_kind {
	SOCKMI_KIND_BOUND = 1,
	SOCKMI_KIND_LISTENING = 2,
	SOCKMI_KIND_CONNECTED = 3,
	SOCKMI_KIND_UNCONNECTED = 4,
};

/* RFC 9293 section 3.3.2 states; the numbers are those of TCP_INFO's tcpi_state. */
enum sockmi_state {
	SOCKMI_ESTABLISHED = 1,
	SOCKMI_SYN_SENT = 2,
	SOCKMI_SYN_RECEIVED = 3, /* known, never in an image */
	SOCKMI_FIN_WAIT_1 = 4,
	SOCKMI_FIN_WAIT_2 = 5,
	SOCKMI_TIME_WAIT = 6, /* known, never in an image */
	SOCKMI_CLOSED = 7,
	SOCKMI_CLOSE_WAIT = 8,
	SOCKMI_LAST_ACK = 9,
	SOCKMI_LISTEN = 10,
	SOCKMI_CLOSING = 11,
};

/* wire, 24 bytes. An IPv4 address is v4-mapped (::ffff:a.b.c.d); all zero: no endpoint. */
struct sockmi_endpoint {
	uint8_t address[16];
	uint16_t port;
	uint16_t reserved;
	uint32_t scope_id; /* interface index, only of a non-mapped IPv6 address */
};

/* wire, 136 bytes. */
struct sockmi_identity {
	uint8_t migration_id[16];
	uint8_t home_id[16];	 /* host to which the peer sends; zero: not yet stamped */
	uint8_t listener_id[16]; /* migration id of the listener of a not yet accepted child, or zero */
	struct sockmi_endpoint local;
	struct sockmi_endpoint remote;
	struct sockmi_endpoint origin; /* what the peer knows the host as; zero: as local */
	uint32_t hop;		       /* how often it has moved */
	uint32_t owner_uid;
	uint16_t family; /* enum sockmi_family */
	uint8_t kind;	 /* enum sockmi_kind */
	uint8_t state;	 /* enum sockmi_state */
	uint8_t v6only;	 /* 0 or 1 */
	uint8_t bind_locks; /* SOCKMI_BIND_*: chosen by the application (zero if unknown) */
	uint8_t reserved[2];
};
#define SOCKMI_BIND_ADDRESS 1u
#define SOCKMI_BIND_PORT 2u

/* Flags of SEQUENCE. A FIN takes one sequence number and no byte of a queue. */
#define SOCKMI_OWN_FIN 1u	/* queued: write_seq counts it */
#define SOCKMI_OWN_FIN_SENT 2u	/* snd_nxt counts it */
#define SOCKMI_PEER_FIN 4u	/* rcv_nxt counts it */
#define SOCKMI_PEER_FIN_READ 8u /* copied_seq counts it (an engine that cannot know leaves this clear) */
#define SOCKMI_SHUT_RD 16u	/* shutdown(SHUT_RD), or as a consequence of the peer's FIN */
#define SOCKMI_SHUT_WR 32u	/* shutdown(SHUT_WR): set exactly if OWN_FIN is */

/* wire, 32 bytes. SYN-SENT: snd_una = iss, snd_nxt = write_seq = iss + 1, rcv_nxt = copied_seq. */
struct sockmi_sequence {
	uint32_t snd_una;
	uint32_t snd_nxt;
	uint32_t write_seq; /* end of the unsent data */
	uint32_t rcv_nxt;
	uint32_t copied_seq; /* start of the unread data */
	uint32_t iss;	     /* valid in SYN-SENT, else 0 or for information */
	uint32_t irs;	     /* for information, or 0 */
	uint32_t flags;
};

#define SOCKMI_WINDOW_HAS_CLAMP 1u
#define SOCKMI_WINDOW_HAS_SSTHRESH 2u
#define SOCKMI_WINDOW_HAS_RIGHT_EDGE 4u

/*
 * wire, 40 bytes. Windows are in bytes, scaled. rcv_wnd is what was advertised: a kernel's value
 * above 65535 << rcv_wscale is written as that maximum (Linux clamps on sending only).
 */
struct sockmi_window {
	uint32_t snd_wl1;
	uint32_t snd_wnd;
	uint32_t max_window;
	uint32_t rcv_wnd;
	uint32_t rcv_wup;
	uint32_t flags;
	uint32_t window_clamp;	 /* HAS_CLAMP, else 0 */
	uint32_t rcv_ssthresh;	 /* HAS_SSTHRESH, else 0 */
	uint32_t rcv_right_edge; /* HAS_RIGHT_EDGE: the highest ever advertised, else 0 */
	uint32_t reserved;
};

#define SOCKMI_NEGOTIATED_WSCALE 1u
#define SOCKMI_NEGOTIATED_SACK 2u
#define SOCKMI_NEGOTIATED_TIMESTAMPS 4u
#define SOCKMI_NEGOTIATED_ECN 8u
#define SOCKMI_NEGOTIATED_ACCECN 16u
#define SOCKMI_NEGOTIATED_FASTOPEN 32u /* data was in the SYN; for information */

/* wire, 16 bytes. In SYN-SENT: what the SYN offered (mss_clamp may be 0, snd_wscale is 0). */
struct sockmi_negotiated {
	uint32_t flags;
	uint16_t mss_clamp; /* the peer's MSS as received, 1..65535 */
	uint16_t advmss;    /* the MSS we advertised; 0: unknown */
	uint16_t rcv_mss;   /* estimate of the peer's segments; 0: unknown */
	uint16_t mss_cache; /* current segment size; 0: unknown */
	uint8_t snd_wscale; /* 0..14, 0 without WSCALE */
	uint8_t rcv_wscale;
	uint8_t reserved[2];
};

#define SOCKMI_TIMESTAMP_MS 1
#define SOCKMI_TIMESTAMP_US 2
#define SOCKMI_TIMESTAMP_HAS_RECENT 1u
#define SOCKMI_TIMESTAMP_HAS_SYN 2u

/* wire, 32 bytes. */
struct sockmi_timestamp {
	uint64_t ts_recent_age_us;
	uint32_t tsval; /* own clock at capture, in units of `unit` */
	uint32_t ts_recent;
	uint32_t syn_first_tsval; /* HAS_SYN (SYN-SENT only): tsval of the first and the last SYN */
	uint32_t syn_last_tsval;
	uint16_t flags;
	uint8_t unit; /* SOCKMI_TIMESTAMP_MS or _US */
	uint8_t reserved[5];
};

/* wire, 16 bytes. */
struct sockmi_listener {
	uint32_t backlog;	/* 0..2^31-1 */
	uint32_t fastopen_qlen; /* 0..2^31-1; 0: off */
	uint64_t defer_accept_us;
};

#define SOCKMI_PATH_HAS_UNDO 1u /* undo_marker, undo_retrans, prior_* */
#define SOCKMI_PATH_HAS_RACK 2u
#define SOCKMI_PATH_HAS_PACING 4u

/* wire, 112 bytes. Windows in segments; zero: unknown, unless the specification says else. */
struct sockmi_path_model {
	uint64_t pacing_rate_bytes_s;
	uint64_t rack_age_us; /* since the most recently sent delivered segment was sent */
	uint32_t flags;
	uint32_t cwnd;	   /* >= 1 */
	uint32_t ssthresh; /* 2^31-1: infinite */
	uint32_t cwnd_cnt;
	uint32_t cwnd_clamp;
	uint32_t prior_cwnd;
	uint32_t prior_ssthresh;
	uint32_t srtt_us; /* plain, not times 8 */
	uint32_t mdev_us;
	uint32_t mdev_max_us;
	uint32_t rttvar_us;
	uint32_t rtt_min_us;
	uint32_t rto_us; /* >= 1 */
	uint32_t reordering; /* segments */
	uint32_t reord_seen;
	uint32_t undo_marker;
	uint32_t undo_retrans;
	uint32_t high_seq; /* recovery point */
	uint32_t rtt_seq;
	uint32_t rack_rtt_us;
	uint32_t rack_reo_wnd_us;
	uint32_t rack_end_seq;
	uint8_t backoff;     /* RTO doublings, 0..63 */
	uint8_t retransmits; /* of the head */
	uint8_t congestion_state; /* enum sockmi_congestion_state */
	uint8_t reserved[5];
};

enum sockmi_congestion_state {
	SOCKMI_CA_OPEN = 0,
	SOCKMI_CA_DISORDER = 1,
	SOCKMI_CA_CWR = 2,
	SOCKMI_CA_RECOVERY = 3,
	SOCKMI_CA_LOSS = 4,
};

/* wire, 48 bytes. */
struct sockmi_receive_autotune {
	uint64_t space_age_us;
	uint64_t rtt_age_us;
	uint32_t space_bytes;
	uint32_t space_seq;
	uint32_t rtt_us;
	uint32_t rtt_seq;
	uint32_t ato_us; /* delayed-ACK timeout */
	uint8_t quick;	 /* ACKs to send at once */
	uint8_t pingpong;
	uint8_t scaling_ratio; /* payload share of buffer space, of 256; 0: unknown */
	uint8_t reserved[9];
};

/* wire, 8 bytes, then `length` bytes, padded to 8. */
struct sockmi_segment_header {
	uint32_t seq;
	uint32_t length; /* >= 1 */
};

/* wire, 8 bytes. */
struct sockmi_early_fin {
	uint32_t seq; /* of the FIN, after all that OUT_OF_ORDER has */
	uint32_t reserved;
};

#define SOCKMI_RANGE_SACKED 1u
#define SOCKMI_RANGE_LOST 2u
#define SOCKMI_RANGE_RETRANSMITTED 4u
#define SOCKMI_RANGE_EVER_RETRANSMITTED 8u

/* wire, 24 bytes. One range of the sent queue; ascending, without overlap. */
struct sockmi_sent_range {
	uint64_t sent_age_us;
	uint32_t seq;
	uint32_t end_seq;
	uint16_t flags;
	uint16_t retransmissions;
	uint32_t reserved;
};

/* wire, 8 bytes. */
struct sockmi_range {
	uint32_t seq;
	uint32_t end_seq;
};

#define SOCKMI_URGENT_SEND 1u	     /* snd_up is valid */
#define SOCKMI_URGENT_RECEIVED 2u    /* the byte at urg_seq has not been read */
#define SOCKMI_URGENT_READ 4u	     /* it was read out of band, and is still in the queue */
#define SOCKMI_URGENT_ANNOUNCED 8u   /* the byte has not come yet */

/* wire, 16 bytes. */
struct sockmi_urgent {
	uint32_t snd_up;
	uint32_t urg_seq;
	uint16_t flags;
	uint8_t urg_byte;
	uint8_t reserved[5];
};

#define SOCKMI_ECN_QUEUE_CWR 1u
#define SOCKMI_ECN_DEMAND_CWR 2u
#define SOCKMI_ECN_SEEN 4u

/* wire, 40 bytes. Counters of RFC 9768; zero for classic ECN. */
struct sockmi_ecn {
	uint32_t flags;
	uint32_t delivered_ce;
	uint32_t received_ce;
	uint32_t received_bytes[3]; /* CE, ECT(0), ECT(1) */
	uint32_t delivered_bytes[3];
	uint32_t reserved;
};

/* wire, 56 bytes. Microseconds until the timer expires (1 if due); 0: not armed. */
struct sockmi_timers {
	uint64_t retransmit_us;
	uint64_t probe_us;	/* zero-window probe */
	uint64_t loss_probe_us;
	uint64_t reorder_us;
	uint64_t delayed_ack_us;
	uint64_t keepalive_us;
	uint64_t fin_wait_2_us;
};

/* wire, 128 bytes. TCP_INFO's counters (RFC 4898 names in the specification). */
struct sockmi_counters {
	uint64_t bytes_acked;
	uint64_t bytes_received;
	uint64_t bytes_sent;
	uint64_t bytes_retransmitted;
	uint64_t segments_out;
	uint64_t segments_in;
	uint64_t data_segments_out;
	uint64_t data_segments_in;
	uint64_t delivered;
	uint64_t lost;
	uint64_t total_retransmissions;
	uint64_t duplicate_sacks;
	uint64_t busy_us;
	uint64_t receive_window_limited_us;
	uint64_t send_buffer_limited_us;
	uint64_t app_limited; /* delivered count at which it ends; 0: not limited */
};

/* wire, 24 bytes, then opaque bytes (at most SOCKMI_CONGESTION_MAX_BYTES). */
struct sockmi_congestion_header {
	char name[16]; /* padded with zeros, at least one */
	uint32_t version;
	uint32_t reserved;
};

#define SOCKMI_KTLS_TX 1
#define SOCKMI_KTLS_RX 2

/* wire, 80 bytes. Unused bytes of key, iv and salt are zero. */
struct sockmi_ktls {
	uint8_t direction;
	uint8_t key_length;  /* 16, 24 or 32 */
	uint8_t iv_length;   /* 8 or 12..16 */
	uint8_t salt_length; /* 0..8 */
	uint16_t version;    /* 0x0303 or 0x0304 */
	uint16_t cipher;     /* TLS cipher suite (IANA), e.g. 0x1301 */
	uint8_t key[32];
	uint8_t iv[16];
	uint8_t salt[8];
	uint8_t record_sequence[8]; /* big-endian, as in the TLS nonce */
	uint32_t flags;		    /* 1: expect no padding (RX) / zero copy (TX) */
	uint32_t reserved;
};

enum sockmi_fidelity_class {
	SOCKMI_CARRIED = 1,
	SOCKMI_APPROXIMATED = 2,
	SOCKMI_RESET = 3,
};

/* Values of socket options. */
#define SOCKMI_OPTION_INT 1   /* int64, 8 bytes */
#define SOCKMI_OPTION_BYTES 2 /* at most SOCKMI_OPTION_BYTES_MAX */
#define SOCKMI_OPTION_LOCKED 2u /* flag: the application fixed this buffer size (SO_BUF_LOCK) */

/* wire, 8 bytes, then the value padded to 8 bytes. Ids: image_options.h. */
struct sockmi_option_header {
	uint16_t id;
	uint8_t type;
	uint8_t flags;
	uint32_t length;
};

/* Bytes in somebody else's buffer. */
struct sockmi_view {
	const uint8_t *data;
	size_t length;
};

/*
 * A decoded image. What `present` (SOCKMI_HAS) does not name is zero. For encoding, a fixed section
 * is there if its bit is set, and a view (queue, list, opaque bytes) if it is not empty.
 */
struct sockmi_image {
	uint64_t present;
	uint16_t major;
	uint16_t minor;
	uint32_t unknown_sections; /* optional ones that the decoder skipped */
	struct sockmi_identity identity;
	struct sockmi_sequence sequence;
	struct sockmi_window window;
	struct sockmi_negotiated negotiated;
	struct sockmi_timestamp timestamp;
	struct sockmi_listener listener;
	struct sockmi_path_model path_model;
	struct sockmi_receive_autotune receive_autotune;
	struct sockmi_urgent urgent;
	struct sockmi_ecn ecn;
	struct sockmi_timers timers;
	struct sockmi_counters counters;
	struct sockmi_early_fin early_fin;
	/* Views of payloads as they are on the wire. */
	struct sockmi_view receive_queue;
	struct sockmi_view sent_queue;
	struct sockmi_view unsent_queue;
	struct sockmi_view socket_options;     /* sockmi_option_next() */
	struct sockmi_view out_of_order;       /* sockmi_segment_next() */
	struct sockmi_view sack_scoreboard;    /* sockmi_sent_range_next() */
	struct sockmi_view receive_sack;       /* sockmi_range_next() */
	struct sockmi_view congestion_private; /* sockmi_congestion() */
	struct sockmi_view ktls;	       /* sockmi_ktls_next() */
	struct sockmi_view context;
	struct sockmi_view fidelity; /* sockmi_fidelity_next() */
};

/* Why an image is refused; docs/image.md has the order of the checks. */
enum sockmi_image_error {
	SOCKMI_IMAGE_OK = 0,
	SOCKMI_IMAGE_LIMIT,		/* longer than the caller's limit */
	SOCKMI_IMAGE_TRUNCATED,		/* shorter than a header */
	SOCKMI_IMAGE_MAGIC_WRONG,
	SOCKMI_IMAGE_VERSION,		/* another major version */
	SOCKMI_IMAGE_LENGTH,		/* lengths that do not add up */
	SOCKMI_IMAGE_CHECKSUM,
	SOCKMI_IMAGE_SECTION,		/* type out of range, IDENTITY not first */
	SOCKMI_IMAGE_DUPLICATE,		/* section or option twice */
	SOCKMI_IMAGE_UNKNOWN_MANDATORY, /* section or option */
	SOCKMI_IMAGE_RESERVED,		/* reserved bits or padding not zero */
	SOCKMI_IMAGE_VALUE,		/* a field outside its range */
	SOCKMI_IMAGE_ADDRESS,
	SOCKMI_IMAGE_STATE,		/* kind, state, sections and flags do not fit each other */
	SOCKMI_IMAGE_MISSING,		/* a section that this kind and state needs */
	SOCKMI_IMAGE_SEQUENCE_WRONG,
	SOCKMI_IMAGE_QUEUE,		/* queue lengths do not equal the sequence numbers' differences */
	SOCKMI_IMAGE_WINDOW_WRONG,
};

/* "truncated", "magic", ...: the same words as sockmi.image.ErrorClass. */
SOCKMI_EXPORT const char *sockmi_image_error_name(int error_class);

/*
 * Reads and checks an image. Touches nothing but the @length bytes at @image; refuses more than
 * @limit bytes before it looks at any of them. Returns 0, or an enum sockmi_image_error with a sentence in
 * @error (may be NULL); *@out is then undefined.
 */
SOCKMI_EXPORT int sockmi_image_decode(const void *image, size_t length, size_t limit,
				      struct sockmi_image *out, char error[SOCKMI_ERROR_BYTES]);

/* sockmi_image_decode() for its verdict only. */
SOCKMI_EXPORT int sockmi_image_validate(const void *image, size_t length, size_t limit,
					char error[SOCKMI_ERROR_BYTES]);

/* Who an image is, and how large. Of a valid image; lengths are in bytes. */
struct sockmi_summary {
	struct sockmi_identity identity; /* host order */
	uint64_t receive_length;
	uint64_t sent_length;
	uint64_t unsent_length;
	uint64_t context_length;
};

/* sockmi_image_decode() for its verdict and, if that is 0, the summary. */
SOCKMI_EXPORT int sockmi_image_examine(const void *image, size_t length, size_t limit, struct sockmi_summary *summary,
				       char error[SOCKMI_ERROR_BYTES]);

/* The checks of sockmi_image_decode() on the content alone. Same return value. */
SOCKMI_EXPORT int sockmi_image_check(const struct sockmi_image *image, char error[SOCKMI_ERROR_BYTES]);

/* Bytes that sockmi_image_encode() will write; 0 if they exceed SIZE_MAX. */
SOCKMI_EXPORT size_t sockmi_image_size(const struct sockmi_image *image);

/*
 * Checks @image and writes it. Bytes written, -EINVAL (ask sockmi_image_check() why) or -ENOSPC.
 * Empty queues are left out; @buffer must not overlap the views.
 */
SOCKMI_EXPORT ssize_t sockmi_image_encode(const struct sockmi_image *image, void *buffer, size_t capacity);

/*
 * Writing piece by piece, so that queue bytes can be received straight into their final place:
 *
 *	struct sockmi_writer w;
 *
 *	sockmi_writer_start(&w, buffer, capacity);
 *	sockmi_writer_put(&w, SOCKMI_IDENTITY, &identity, sizeof(identity));   (must be the first)
 *	place = sockmi_writer_reserve(&w, SOCKMI_RECEIVE_QUEUE, bytes);       (NULL: no room)
 *	got = recv(fd, place, bytes, MSG_PEEK | MSG_DONTWAIT);
 *	sockmi_writer_commit(&w, got);                                        (<= bytes; 0: no section)
 *	sockmi_writer_open(&w, SOCKMI_SOCKET_OPTIONS);
 *	sockmi_writer_option_int(&w, SOCKMI_OPT_NODELAY, 0, 1); ...
 *	sockmi_writer_close(&w);                                  (leaves an empty section out)
 *	length = sockmi_writer_finish(&w);                        (length, or the first error: -ENOSPC, -EINVAL)
 *
 * Errors stick: only the result of reserve (NULL) and of finish need be looked at. Nothing is
 * checked against the specification but what this interface itself needs;
 * sockmi_image_decode() on the result does that.
 */
struct sockmi_writer {
	uint8_t *buffer;
	size_t capacity;
	size_t length;	 /* so far, without an open section's payload that is only reserved */
	size_t open;	 /* offset of the open section's header, or 0 */
	size_t reserved; /* bytes that commit may claim */
	uint32_t sections;
	int error; /* 0 or the first negative errno */
};

SOCKMI_EXPORT void sockmi_writer_start(struct sockmi_writer *writer, void *buffer, size_t capacity);
/* A whole section; a struct in host order for fixed sections, wire bytes for the others. */
SOCKMI_EXPORT int sockmi_writer_put(struct sockmi_writer *writer, uint16_t type, const void *payload,
				    size_t length);
SOCKMI_EXPORT void *sockmi_writer_reserve(struct sockmi_writer *writer, uint16_t type, size_t bytes);
SOCKMI_EXPORT int sockmi_writer_commit(struct sockmi_writer *writer, size_t bytes);
/* Lists: open, any number of one kind of entry, close. */
SOCKMI_EXPORT int sockmi_writer_open(struct sockmi_writer *writer, uint16_t type);
SOCKMI_EXPORT int sockmi_writer_option_int(struct sockmi_writer *writer, uint16_t id, uint8_t flags,
					   int64_t value);
SOCKMI_EXPORT int sockmi_writer_option_bytes(struct sockmi_writer *writer, uint16_t id, uint8_t flags,
					     const void *value, size_t length);
SOCKMI_EXPORT int sockmi_writer_segment(struct sockmi_writer *writer, uint32_t seq, const void *bytes,
					uint32_t length);
SOCKMI_EXPORT int sockmi_writer_sent_range(struct sockmi_writer *writer, const struct sockmi_sent_range *range);
SOCKMI_EXPORT int sockmi_writer_range(struct sockmi_writer *writer, uint32_t seq, uint32_t end_seq);
SOCKMI_EXPORT int sockmi_writer_ktls(struct sockmi_writer *writer, const struct sockmi_ktls *ktls);
SOCKMI_EXPORT int sockmi_writer_fidelity(struct sockmi_writer *writer, enum sockmi_fidelity_class what,
					 const char *name);
SOCKMI_EXPORT int sockmi_writer_close(struct sockmi_writer *writer);
/* Congestion control's private state, as a whole section. */
SOCKMI_EXPORT int sockmi_writer_congestion(struct sockmi_writer *writer, const char *name, uint32_t version,
					   const void *bytes, size_t length);
SOCKMI_EXPORT ssize_t sockmi_writer_finish(struct sockmi_writer *writer);

/* One entry of a list. Iterate on a copy of the view of a *checked* image until false. */
struct sockmi_option {
	uint16_t id;
	uint8_t type;
	uint8_t flags;
	int64_t number;		  /* type INT */
	struct sockmi_view bytes; /* type BYTES */
};

SOCKMI_EXPORT bool sockmi_option_next(struct sockmi_view *rest, struct sockmi_option *out);
SOCKMI_EXPORT bool sockmi_segment_next(struct sockmi_view *rest, uint32_t *seq, struct sockmi_view *bytes);
SOCKMI_EXPORT bool sockmi_sent_range_next(struct sockmi_view *rest, struct sockmi_sent_range *out);
SOCKMI_EXPORT bool sockmi_range_next(struct sockmi_view *rest, struct sockmi_range *out);
SOCKMI_EXPORT bool sockmi_ktls_next(struct sockmi_view *rest, struct sockmi_ktls *out);
SOCKMI_EXPORT bool sockmi_fidelity_next(struct sockmi_view *rest, enum sockmi_fidelity_class *what,
					struct sockmi_view *name);
SOCKMI_EXPORT bool sockmi_congestion(const struct sockmi_image *image, struct sockmi_congestion_header *header,
				     struct sockmi_view *bytes);

/* What a daemon fills in; `fields` says which of them. */
#define SOCKMI_STAMP_MIGRATION_ID 1u
#define SOCKMI_STAMP_HOME_ID 2u
#define SOCKMI_STAMP_LISTENER_ID 4u
#define SOCKMI_STAMP_ORIGIN 8u
#define SOCKMI_STAMP_HOP 16u

struct sockmi_stamp {
	uint32_t fields;
	uint32_t hop;
	uint8_t migration_id[16];
	uint8_t home_id[16];
	uint8_t listener_id[16];
	struct sockmi_endpoint origin;
};

/*
 * Changes the identity of an image in place, in constant time. Of the image only the lengths and the place
 * of IDENTITY are checked; a wrong checksum stays wrong. Returns 0 or an enum sockmi_image_error.
 */
SOCKMI_EXPORT int sockmi_image_stamp(void *image, size_t length, const struct sockmi_stamp *stamp);

/*
 * Copies @image to @buffer with section @type replaced by, or added with, @payload (wire bytes);
 * removed if @payload_length is 0. IDENTITY cannot be replaced. Bytes written, -EINVAL or -ENOSPC
 * (@length + @payload_length + 16 bytes are always enough).
 */
SOCKMI_EXPORT ssize_t sockmi_image_replace(const void *image, size_t length, uint16_t type, const void *payload,
					   size_t payload_length, void *buffer, size_t capacity);

/* zlib's CRC-32; start with @crc 0. */
SOCKMI_EXPORT uint32_t sockmi_crc32(uint32_t crc, const void *bytes, size_t length);

/* Sequence arithmetic modulo 2^32 (RFC 9293 section 3.4). */
static inline bool sockmi_seq_before(uint32_t a, uint32_t b)
{
	return (int32_t)(a - b) < 0;
}

static inline bool sockmi_seq_after(uint32_t a, uint32_t b)
{
	return sockmi_seq_before(b, a);
}

#include "image_options.h"

#endif
