// SPDX-License-Identifier: MIT
/*
 * The socket options that an application can set and read: one row each. An image names only what
 * differs from a fresh Linux socket (the `fresh` column: the kernel's constants, not this host's
 * sysctls); a copy is given what differs from a fresh socket of the host it comes to. So what
 * nobody has changed costs no system call there, and hosts may differ in their sysctls.
 */
#include <linux/filter.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#include "engine_internal.h"

/* Which sockets a row belongs to. */
#define F4 1u	       /* IPv4 packets are possible */
#define F6 2u	       /* AF_INET6 */
#define ALL (F4 | F6)
#define NOT_CONNECTED 4u /* of a connection the kernel tells something else, or it means nothing any more */
#define NOT_LISTENING 32u /* of a listener LISTENER has it */
#define LISTENING 8u   /* belongs to listen(): fresh sockets cannot be asked */

/*
 * Of a connection hardly any program sets it, or it has no effect on one any more. Reading costs as
 * much as that of all others: a caller in a hurry may leave them out (sockmi_capture_common()).
 */
#define RARE 16u

enum shape { INT, LINGER, TIMEVAL, NUMBER64, TXTIME, TEXT, FILTER, HEADER, KEY };

struct row {
	uint16_t id;
	uint8_t flags;
	uint8_t when;  /* enum sockmi_when */
	uint8_t shape; /* enum shape */
	int64_t fresh; /* in units of the image */
};

#define SECONDS 1000000

/* In the order in which they are set: IP_TOS before SO_PRIORITY, a filter before its lock. */
static const struct row rows[] = {
	{ SOCKMI_OPT_REUSEPORT, ALL, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_BINDTODEVICE, ALL, SOCKMI_BEFORE_BIND, TEXT, 0 },
	{ SOCKMI_OPT_MARK, ALL, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_DONTROUTE, ALL | RARE, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IP_FREEBIND, F4, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IP_TRANSPARENT, F4, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IP_BIND_ADDRESS_NO_PORT, ALL | RARE, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IP_LOCAL_PORT_RANGE, ALL | RARE, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IPV6_FREEBIND, F6, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IPV6_TRANSPARENT, F6, SOCKMI_BEFORE_BIND, INT, 0 },
	{ SOCKMI_OPT_IPV6_ADDR_PREFERENCES, F6 | RARE, SOCKMI_BEFORE_BIND, INT, 0x500 },
	{ SOCKMI_OPT_IP_TOS, F4, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_IP_MTU_DISCOVER, F4, SOCKMI_BEFORE_CONNECT, INT, 1 },
	{ SOCKMI_OPT_IP_UNICAST_IF, F4 | RARE, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_IP_OPTIONS, F4 | RARE, SOCKMI_BEFORE_CONNECT, HEADER, 0 },
	{ SOCKMI_OPT_IPV6_TCLASS, F6, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_IPV6_MTU_DISCOVER, F6, SOCKMI_BEFORE_CONNECT, INT, 1 },
	{ SOCKMI_OPT_IPV6_UNICAST_IF, F6 | RARE, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_IPV6_HOPOPTS, F6 | RARE, SOCKMI_BEFORE_CONNECT, HEADER, 0 },
	{ SOCKMI_OPT_IPV6_RTHDRDSTOPTS, F6 | RARE, SOCKMI_BEFORE_CONNECT, HEADER, 0 },
	{ SOCKMI_OPT_IPV6_RTHDR, F6 | RARE, SOCKMI_BEFORE_CONNECT, HEADER, 0 },
	{ SOCKMI_OPT_IPV6_DSTOPTS, F6 | RARE, SOCKMI_BEFORE_CONNECT, HEADER, 0 },
	{ SOCKMI_OPT_IPV6_AUTOFLOWLABEL, F6 | RARE, SOCKMI_BEFORE_CONNECT, INT, 1 },
	{ SOCKMI_OPT_MAXSEG, ALL | NOT_CONNECTED, SOCKMI_BEFORE_CONNECT, INT, 536 },
	{ SOCKMI_OPT_CONGESTION, ALL, SOCKMI_BEFORE_CONNECT, TEXT, 0 },
	{ SOCKMI_OPT_SYNCNT, ALL | RARE, SOCKMI_BEFORE_CONNECT, INT, 6 },
	{ SOCKMI_OPT_FASTOPEN_CONNECT, ALL | NOT_CONNECTED, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_FASTOPEN_NO_COOKIE, ALL | RARE, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_FASTOPEN_KEY, ALL | LISTENING, SOCKMI_BEFORE_CONNECT, KEY, 0 },
	{ SOCKMI_OPT_SAVE_SYN, ALL | NOT_CONNECTED, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_FASTOPEN, ALL | NOT_CONNECTED | NOT_LISTENING, SOCKMI_BEFORE_CONNECT, INT, 0 },
	{ SOCKMI_OPT_PRIORITY, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_KEEPALIVE, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_BROADCAST, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_OOBINLINE, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_LINGER, ALL, SOCKMI_LATE, LINGER, 0 },
	{ SOCKMI_OPT_RCVLOWAT, ALL, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_RCVTIMEO_US, ALL, SOCKMI_LATE, TIMEVAL, 0 },
	{ SOCKMI_OPT_SNDTIMEO_US, ALL, SOCKMI_LATE, TIMEVAL, 0 },
	{ SOCKMI_OPT_MAX_PACING_RATE, ALL, SOCKMI_LATE, NUMBER64, -1 },
	{ SOCKMI_OPT_TIMESTAMP, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TIMESTAMPNS, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TIMESTAMPING, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TIMESTAMP_NEW, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TIMESTAMPNS_NEW, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TIMESTAMPING_NEW, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_BUSY_POLL_US, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_PREFER_BUSY_POLL, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_BUSY_POLL_BUDGET, ALL | RARE, SOCKMI_LATE, INT, 8 },
	{ SOCKMI_OPT_INCOMING_CPU, ALL | NOT_CONNECTED, SOCKMI_LATE, INT, -1 },
	{ SOCKMI_OPT_ZEROCOPY, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TXTIME, ALL | RARE, SOCKMI_LATE, TXTIME, 0 },
	{ SOCKMI_OPT_NO_CHECK, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_RXQ_OVFL, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_WIFI_STATUS, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_NOFCS, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_FILTER, ALL | RARE, SOCKMI_LATE, FILTER, 0 },
	{ SOCKMI_OPT_LOCK_FILTER, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_SELECT_ERR_QUEUE, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_PEEK_OFF, ALL, SOCKMI_LATE, INT, -1 },
	{ SOCKMI_OPT_TXREHASH, ALL | RARE, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_RCVMARK, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_RCVPRIORITY, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_RESERVE_MEM, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_DEBUG, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_NODELAY, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_CORK, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_KEEPIDLE_US, ALL, SOCKMI_LATE, INT, 7200LL * SECONDS },
	{ SOCKMI_OPT_KEEPINTVL_US, ALL, SOCKMI_LATE, INT, 75LL * SECONDS },
	{ SOCKMI_OPT_KEEPCNT, ALL, SOCKMI_LATE, INT, 9 },
	{ SOCKMI_OPT_LINGER2_US, ALL, SOCKMI_LATE, INT, 60LL * SECONDS },
	{ SOCKMI_OPT_DEFER_ACCEPT_US, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_WINDOW_CLAMP, ALL | NOT_CONNECTED, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_QUICKACK, ALL, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_THIN_LINEAR_TIMEOUTS, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_THIN_DUPACK, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_USER_TIMEOUT_US, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_NOTSENT_LOWAT, ALL, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_INQ, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_TX_DELAY_US, ALL | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_RTO_MAX_US, ALL | RARE, SOCKMI_LATE, INT, 120LL * SECONDS },
	{ SOCKMI_OPT_RTO_MIN_US, ALL | RARE, SOCKMI_LATE, INT, 200000 },
	{ SOCKMI_OPT_DELACK_MAX_US, ALL | RARE, SOCKMI_LATE, INT, 200000 },
	{ SOCKMI_OPT_IP_TTL, F4, SOCKMI_LATE, INT, 64 },
	{ SOCKMI_OPT_IP_RECVTOS, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RECVTTL, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RECVERR, F4, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_PKTINFO, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RECVOPTS, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RETOPTS, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_MINTTL, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RECVORIGDSTADDR, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RECVFRAGSIZE, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_RECVERR_RFC4884, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_PASSSEC, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_CHECKSUM, F4 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IP_MULTICAST_LOOP, F4 | RARE, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_IP_MULTICAST_ALL, F4 | RARE, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_IPV6_UNICAST_HOPS, F6, SOCKMI_LATE, INT, 64 },
	{ SOCKMI_OPT_IPV6_RECVERR, F6, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVPKTINFO, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVHOPLIMIT, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVTCLASS, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVRTHDR, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVHOPOPTS, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVDSTOPTS, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVPATHMTU, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_FLOWINFO, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_FLOWINFO_SEND, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_DONTFRAG, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_MINHOPCOUNT, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVORIGDSTADDR, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_RECVFRAGSIZE, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_MULTICAST_LOOP, F6 | RARE, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_IPV6_MULTICAST_ALL, F6 | RARE, SOCKMI_LATE, INT, 1 },
	{ SOCKMI_OPT_IPV6_RECVERR_RFC4884, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_2292PKTINFO, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_2292HOPOPTS, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_2292DSTOPTS, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_2292RTHDR, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_2292HOPLIMIT, F6 | RARE, SOCKMI_LATE, INT, 0 },
	{ SOCKMI_OPT_IPV6_ROUTER_ALERT_ISOLATE, F6 | RARE, SOCKMI_LATE, INT, 0 },
};

#define N_ROWS (sizeof(rows) / sizeof(rows[0]))
#define ID_END SOCKMI_OPTION_ID_END

/* What image_options.h says of each id. */
struct number {
	const char *name;
	int level, option, unit_us;
};

static const struct number numbers[ID_END] = {
#define NUMBER(NAME, id, type, level, option, unit_us) [id] = { #NAME, level, option, unit_us },
	SOCKMI_OPTIONS(NUMBER)
#undef NUMBER
};

const char *sockmi_option_name(unsigned int id)
{
	return id < ID_END ? numbers[id].name : NULL;
}

/* An IPv6 socket's IPv4 half is not initialized as inet_create() does it. */
static int64_t fresh_constant(const struct row *row, int family)
{
	return row->id == SOCKMI_OPT_IP_MULTICAST_ALL && family == AF_INET6 ? 0 : row->fresh;
}

/* ---- One option ---- */

static int64_t to_image(const struct number *n, int value)
{
	return n->unit_us && value >= 0 ? (int64_t)value * n->unit_us : value;
}

static int from_image(const struct number *n, int64_t value)
{
	return (int)(n->unit_us && value >= 0 ? (value + n->unit_us - 1) / n->unit_us : value);
}

/* The number of an option whose shape is not bytes. 0, or -1 with errno. */
static int get_number(int fd, const struct row *row, int64_t *value)
{
	const struct number *n = &numbers[row->id];
	union {
		int number;
		uint64_t number64;
		struct linger linger;
		struct timeval time;
		struct {
			int32_t clockid;
			uint32_t flags;
		} txtime;
	} u = { 0 };
	socklen_t length = row->shape == INT ? sizeof(u.number) : row->shape == NUMBER64 ? sizeof(u.number64) :
			   row->shape == LINGER ? sizeof(u.linger) : row->shape == TIMEVAL ? sizeof(u.time) :
						  sizeof(u.txtime);

	if (getsockopt(fd, n->level, n->option, &u, &length) < 0)
		return -1;
	switch (row->shape) {
	case LINGER:
		*value = (int64_t)u.linger.l_linger * SECONDS | (u.linger.l_onoff ? SOCKMI_LINGER_ON : 0);
		return 0;
	case TIMEVAL:
		*value = (int64_t)u.time.tv_sec * SECONDS + u.time.tv_usec;
		return 0;
	case NUMBER64:
		*value = length == 4 ? (u.number == -1 ? -1 : (int64_t)(uint32_t)u.number) : (int64_t)u.number64;
		return 0;
	case TXTIME:
		*value = (int64_t)((uint64_t)u.txtime.flags << 32 | (uint32_t)u.txtime.clockid);
		return 0;
	default:
		*value = to_image(n, u.number);
		return 0;
	}
}

static int set_number(int fd, const struct row *row, int64_t value)
{
	const struct number *n = &numbers[row->id];

	switch (row->shape) {
	case LINGER: {
		struct linger linger = { .l_onoff = (value & SOCKMI_LINGER_ON) != 0,
					 .l_linger = (int)((value & ~SOCKMI_LINGER_ON) / SECONDS) };

		return setsockopt(fd, n->level, n->option, &linger, sizeof(linger));
	}
	case TIMEVAL: {
		struct timeval time = { .tv_sec = value / SECONDS, .tv_usec = value % SECONDS };

		return setsockopt(fd, n->level, n->option, &time, sizeof(time));
	}
	case NUMBER64:
		return setsockopt(fd, n->level, n->option, &value, sizeof(value));
	case TXTIME: {
		uint32_t txtime[2] = { (uint32_t)value, (uint32_t)((uint64_t)value >> 32) };

		return setsockopt(fd, n->level, n->option, txtime, sizeof(txtime));
	}
	default:
		break;
	}
	if (row->id == SOCKMI_OPT_DEFER_ACCEPT_US || !n->unit_us)
		return sockmi_set_int(fd, n->level, n->option, from_image(n, value));
	/* An int in the option's unit; what does not fit is no value of this option. */
	if (value / n->unit_us > INT32_MAX || value < INT32_MIN) {
		errno = EINVAL;
		return -1;
	}
	return sockmi_set_int(fd, n->level, n->option, from_image(n, value));
}

/* Bytes of an option, with none if it is not set. -1 with errno. */
static ssize_t get_bytes(int fd, const struct row *row, uint8_t buffer[SOCKMI_OPTION_BYTES_MAX])
{
	const struct number *n = &numbers[row->id];
	socklen_t length = row->shape == FILTER ? 0 : row->id == SOCKMI_OPT_CONGESTION ? 16 : 256;

	/* SO_GET_FILTER: lengths are numbers of instructions; 0 asks for how many there are. */
	if (row->shape == FILTER) {
		if (getsockopt(fd, n->level, n->option, NULL, &length) < 0)
			return -1;
		if (!length)
			return 0;
		if (length * sizeof(struct sock_filter) > SOCKMI_OPTION_BYTES_MAX) {
			errno = E2BIG;
			return -1;
		}
	}
	if (getsockopt(fd, n->level, n->option, buffer, &length) < 0)
		return -1;
	if (row->shape == FILTER)
		return (ssize_t)(length * sizeof(struct sock_filter));
	return row->shape == TEXT ? (ssize_t)strnlen((const char *)buffer, length) : (ssize_t)length;
}

static int set_bytes(int fd, const struct row *row, struct sockmi_view bytes)
{
	const struct number *n = &numbers[row->id];

	if (row->shape == FILTER) {
		struct sock_filter code[SOCKMI_OPTION_BYTES_MAX / sizeof(struct sock_filter)];
		struct sock_fprog program = { .len = (unsigned short)(bytes.length / sizeof(code[0])),
					      .filter = code };

		memcpy(code, bytes.data, bytes.length);
		return setsockopt(fd, n->level, n->option, &program, sizeof(program));
	}
	return setsockopt(fd, n->level, n->option, bytes.data, (socklen_t)bytes.length);
}

static bool is_bytes(const struct row *row)
{
	return row->shape >= TEXT;
}

/* ---- What a fresh socket of this host has ---- */

struct sockmi_fresh {
	uint64_t netns; /* cookie of the network namespace */
	int64_t read_ms;
	bool valid;
	bool known[N_ROWS]; /* this kernel has the option */
	int64_t number[N_ROWS];
	char congestion[16];
	int64_t buffer[2]; /* SO_RCVBUF, SO_SNDBUF */
};

#define FRESH_MS 1000 /* how late a change of a sysctl may be noticed */

static struct sockmi_fresh cache[2];
static pthread_mutex_t cache_lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t row_of_id[ID_END]; /* index + 1 */
static pthread_once_t rows_once = PTHREAD_ONCE_INIT;

static void index_rows(void)
{
	for (size_t i = 0; i < N_ROWS; i++)
		row_of_id[rows[i].id] = (uint8_t)(i + 1);
}

static int64_t now_ms(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
	return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void read_fresh(int fd, int family, struct sockmi_fresh *fresh)
{
	uint8_t bytes[SOCKMI_OPTION_BYTES_MAX];
	int value = 0;

	memset(fresh->congestion, 0, sizeof(fresh->congestion));
	for (size_t i = 0; i < N_ROWS; i++) {
		const struct row *row = &rows[i];

		fresh->known[i] = row->flags & LISTENING;
		fresh->number[i] = fresh_constant(row, family);
		if (row->flags & LISTENING || !(row->flags & (family == AF_INET ? F4 : ALL)))
			continue;
		if (is_bytes(row)) {
			ssize_t length = get_bytes(fd, row, bytes);

			fresh->known[i] = length >= 0;
			if (length > 0 && row->id == SOCKMI_OPT_CONGESTION)
				memcpy(fresh->congestion, bytes, (size_t)length);
			continue;
		}
		fresh->known[i] = get_number(fd, row, &fresh->number[i]) == 0;
	}
	fresh->buffer[0] = sockmi_get_int(fd, SOL_SOCKET, SO_RCVBUF, &value) < 0 ? 0 : value;
	fresh->buffer[1] = sockmi_get_int(fd, SOL_SOCKET, SO_SNDBUF, &value) < 0 ? 0 : value;
}

const struct sockmi_fresh *sockmi_fresh(struct sockmi_host *host, int family, int fd)
{
	bool six = family == AF_INET6;
	struct sockmi_fresh *fresh = &cache[six];
	socklen_t length = sizeof(fresh->netns);
	uint64_t netns = 0;
	int64_t now;
	int probe;

	if (host->fresh[six])
		return host->fresh[six];
	pthread_once(&rows_once, index_rows);
	getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &netns, &length);
	now = now_ms();
	pthread_mutex_lock(&cache_lock);
	if (!fresh->valid || fresh->netns != netns || now - fresh->read_ms > FRESH_MS) {
		probe = socket(family, SOCK_STREAM | SOCK_CLOEXEC, 0);
		if (probe < 0) {
			pthread_mutex_unlock(&cache_lock);
			return NULL;
		}
		read_fresh(probe, family, fresh);
		close(probe);
		fresh->netns = netns;
		fresh->read_ms = now;
		fresh->valid = true;
	}
	host->copy[six] = malloc(sizeof(*fresh));
	if (host->copy[six])
		memcpy(host->copy[six], fresh, sizeof(*fresh));
	host->fresh[six] = host->copy[six];
	pthread_mutex_unlock(&cache_lock);
	return host->fresh[six];
}

void sockmi_host_end(struct sockmi_host *host)
{
	free(host->copy[0]);
	free(host->copy[1]);
}

void sockmi_fresh_buffers(const struct sockmi_fresh *fresh, int64_t *receive, int64_t *send)
{
	*receive = fresh->buffer[0];
	*send = fresh->buffer[1];
}

int64_t sockmi_fresh_number(const struct sockmi_fresh *fresh, uint16_t id, int64_t otherwise)
{
	unsigned int row = row_of_id[id];

	return row && fresh->known[row - 1] ? fresh->number[row - 1] : otherwise;
}

/* ---- All options of a socket ---- */

static bool applies(const struct row *row, const struct sockmi_option_scope *scope)
{
	uint32_t family = (scope->inet ? F4 : 0) | (scope->family == AF_INET6 ? F6 : 0);

	return (row->flags & family) && !(row->flags & NOT_CONNECTED && scope->connected) &&
	       !(row->flags & LISTENING && !scope->listening) && !(row->flags & NOT_LISTENING && scope->listening);
}

/* The label of its packets that the socket has leased, or that it repeats; none: automatic labels. */
static bool has_flow_label(int fd)
{
	struct {
		uint8_t destination[16];
		uint32_t label;
		uint8_t action, share; /* 0: IPV6_FL_A_GET */
		uint16_t flags, expires, linger;
		uint32_t pad;
	} request = { 0 }; /* struct in6_flowlabel_req */
	const struct number *n = &numbers[SOCKMI_OPT_IPV6_FLOWLABEL];
	socklen_t length = sizeof(request);

	return getsockopt(fd, n->level, n->option, &request, &length) == 0 && request.label;
}

int sockmi_options_read(int fd, const struct sockmi_option_scope *scope, const struct sockmi_fresh *fresh,
			struct sockmi_writer *writer, int *peek_offset, struct sockmi_result *result)
{
	uint8_t bytes[SOCKMI_OPTION_BYTES_MAX];
	int64_t number;

	*peek_offset = -1;
	if (scope->family == AF_INET6 && !scope->common && has_flow_label(fd))
		sockmi_lost_option(result, SOCKMI_OPT_IPV6_FLOWLABEL);
	for (size_t i = 0; i < N_ROWS; i++) {
		const struct row *row = &rows[i];

		if (!fresh->known[i] || !applies(row, scope) || (row->flags & RARE && scope->common))
			continue;
		if (is_bytes(row)) {
			ssize_t length = get_bytes(fd, row, bytes);

			if (length > 0)
				sockmi_writer_option_bytes(writer, row->id, 0, bytes, (size_t)length);
			else if (length < 0 && row->shape == FILTER && errno == EACCES)
				result->reset |= SOCKMI_FIDELITY_BIT(FILTER); /* eBPF */
			else if (length < 0)
				goto failed;
			continue;
		}
		if (get_number(fd, row, &number) < 0)
			goto failed;
		if (row->id == SOCKMI_OPT_PEEK_OFF)
			*peek_offset = (int)number;
		if (number != fresh_constant(row, scope->family))
			sockmi_writer_option_int(writer, row->id, 0, number);
		continue;
failed:
		result->detail = row->id;
		return sockmi_fail(result, SOCKMI_RESULT_FAILED, SOCKMI_STEP_OPTION, errno);
	}
	return 0;
}

void sockmi_lost_option(struct sockmi_result *result, uint16_t id)
{
	if (result->lost < SOCKMI_LOST_OPTIONS)
		result->lost_options[result->lost] = id;
	result->lost++;
	result->reset |= SOCKMI_FIDELITY_BIT(OPTIONS);
}

/* Set by other parts of the engine. */
static bool is_handled_elsewhere(uint16_t id)
{
	return id == SOCKMI_OPT_REUSEADDR || id == SOCKMI_OPT_RCVBUF || id == SOCKMI_OPT_SNDBUF;
}

void sockmi_options_plan(struct sockmi_view options, const struct sockmi_option_scope *scope,
			 const struct sockmi_fresh *fresh, struct sockmi_option_plan *plan,
			 struct sockmi_result *result)
{
	struct sockmi_option all[N_ROWS], option;
	uint64_t present[(N_ROWS + 63) / 64] = { 0 };
	bool has_tos = false;

	memset(plan, 0, sizeof(*plan));
	while (sockmi_option_next(&options, &option)) {
		unsigned int row = option.id < ID_END ? row_of_id[option.id] : 0;

		if (is_handled_elsewhere(option.id))
			continue;
		if (!row || !applies(&rows[row - 1], scope)) {
			sockmi_lost_option(result, option.id);
			continue;
		}
		all[row - 1] = option;
		present[(row - 1) / 64] |= (uint64_t)1 << (row - 1) % 64;
	}
	for (size_t i = 0; i < N_ROWS; i++) {
		const struct row *row = &rows[i];
		bool named = present[i / 64] >> i % 64 & 1;
		struct sockmi_planned *p = &plan->options[plan->n];

		if (!applies(row, scope))
			continue;
		p->row = (uint8_t)i;
		p->when = row->when;
		p->number = named ? all[i].number : fresh_constant(row, scope->family);
		p->bytes = named ? all[i].bytes : (struct sockmi_view){ NULL, 0 };
		/* An interface's index means another interface on another host. */
		if (named && (row->id == SOCKMI_OPT_IP_UNICAST_IF || row->id == SOCKMI_OPT_IPV6_UNICAST_IF)) {
			sockmi_lost_option(result, row->id);
			continue;
		}
		if (is_bytes(row)) {
			if (!named || (row->id == SOCKMI_OPT_CONGESTION && p->bytes.length < 16 &&
				       p->bytes.length == strnlen(fresh->congestion, 16) &&
				       !memcmp(p->bytes.data, fresh->congestion, p->bytes.length)))
				continue;
			if (row->shape == FILTER && p->bytes.length % sizeof(struct sock_filter)) {
				sockmi_lost_option(result, row->id);
				continue;
			}
		} else if (!fresh->known[i]) {
			if (named)
				sockmi_lost_option(result, row->id);
			continue;
		} else if (p->number == fresh->number[i] && !(row->id == SOCKMI_OPT_PRIORITY && has_tos)) {
			continue;
		}
		has_tos |= row->id == SOCKMI_OPT_IP_TOS; /* which sets SO_PRIORITY, too */
		plan->n++;
	}
}

void sockmi_options_write(int fd, const struct sockmi_option_plan *plan, enum sockmi_when when,
			  struct sockmi_result *result)
{
	for (unsigned int i = 0; i < plan->n; i++) {
		const struct sockmi_planned *p = &plan->options[i];
		const struct row *row = &rows[p->row];

		if (p->when == when && (is_bytes(row) ? set_bytes(fd, row, p->bytes) : set_number(fd, row, p->number)) < 0)
			sockmi_lost_option(result, row->id);
	}
}

int64_t sockmi_options_find(struct sockmi_view options, uint16_t id, int64_t otherwise, uint8_t *flags)
{
	struct sockmi_option option;

	while (sockmi_option_next(&options, &option))
		if (option.id == id) {
			if (flags)
				*flags = option.flags;
			return option.number;
		}
	return otherwise;
}
