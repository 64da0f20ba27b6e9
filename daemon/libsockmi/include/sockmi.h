/* SPDX-License-Identifier: MIT */
/*
 * SockMi: import and export live TCP sockets. See import_socket(3), export_socket(3), sockmi(3).
 *
 * All calls are thread-safe, restart interrupted system calls, raise no signal and open every
 * descriptor close-on-exec. They speak to the SockMi daemon of this host over the unix socket
 * $SOCKMI_CONTROL (ignored in set-user-id programs) or SOCKMI_CONTROL_PATH.
 */
#ifndef SOCKMI_H
#define SOCKMI_H

#include <netinet/in.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#ifdef __GNUC__
#define SOCKMI_API __attribute__((visibility("default")))
#else
#define SOCKMI_API
#endif

#define SOCKMI_CONTROL_PATH "/run/sockmi/control.sock"
#define SOCKMI_CONTEXT_MAX 1048576u	/* bytes of application context */
#define SOCKMI_REQUESTS_MAX 4096u	/* requests of one import */

/* States of a socket, and masks of them. */
#define SOCKMI_BOUND 1u		/* bound or unconnected */
#define SOCKMI_LISTENING 2u
#define SOCKMI_CONNECTED 4u
#define SOCKMI_ANY_STATE 7u

/* One end of a socket. All zero: any (criteria), none (results). */
struct sockmi_endpoint {
	int af;			/* of the address: 0 (any), AF_INET, AF_INET6 */
	unsigned int port;	/* host byte order; 0: any */
	union {
		struct in_addr in4;
		struct in6_addr in6;
	} address;
};

/*
 * An import request. Only fd and states are mandatory; start from SOCKMI_IMPORT(fd, states), or
 * from zeroes. The criteria are compared with the ends that the peer knows.
 */
struct import_req {
	int fd;				/* an unconnected TCP socket, to be replaced; < 0: entry ignored */
	unsigned int states;		/* mask of the states allowed */
	unsigned int preferred;		/* mask of those taken first, a subset; 0: none */
	struct sockmi_endpoint local;
	struct sockmi_endpoint remote;
	unsigned char listener[16];	/* only connections accepted from this migrated listener */

	/* Results. */
	unsigned int returned;		/* state of the imported socket; 0: not satisfied */
	struct sockmi_endpoint returned_local;
	struct sockmi_endpoint returned_remote;
	struct sockmi_endpoint returned_origin;		/* local end as the peer knows it */
	unsigned char returned_listener[16];
	unsigned char migration[16];			/* id (UUID) of the migration */
	unsigned char reserved[32];			/* must be zero */
};

#ifdef __cplusplus
static inline struct import_req SOCKMI_IMPORT(int fd, unsigned int states)
{
	struct import_req irq = import_req();

	irq.fd = fd;
	irq.states = states;
	return irq;
}
#else
#define SOCKMI_IMPORT(FD, STATES) ((struct import_req){ .fd = (FD), .states = (STATES) })
#endif

/*
 * Wait until at least one request can be satisfied, satisfy as many as can be, and replace
 * their descriptors. timeout as in poll(2): milliseconds, 0 not at all, negative for ever.
 * Returns the number of requests satisfied, 0 after a timeout, or -1 with errno.
 */
SOCKMI_API int import_socket(struct import_req *irqs, unsigned int nirqs, int timeout);

/*
 * Move the socket fd of process pid (negative: of the caller) to the host with the address
 * to (struct in_addr or in6_addr, by af), or to any host (to NULL).
 * Returns 0, or -1 with errno; then the socket goes on as before (but for EREMOTEIO and
 * ECONNRESET: see export_socket(3)).
 */
SOCKMI_API int export_socket(int pid, int fd, int af, const void *to);

/* Opaque bytes that travel with a socket; data from malloc(3). */
struct sockmi_context {
	void *data;
	size_t bytes;
};

/*
 * Options of the extended calls. Set size to sizeof(the struct) and the rest to zero; later versions
 * of the library append members. A library that does not know a member that is set fails with E2BIG.
 */
struct sockmi_import_options {
	size_t size;
	const char *control;			/* path of the control socket; NULL: default */
	struct sockmi_context *contexts;	/* array[nirqs] for the contexts (results), or NULL */
};

#define SOCKMI_DRY_RUN 1u	/* find out whether it could be moved, and where to; move nothing */

struct sockmi_export_options {
	size_t size;
	const char *control;
	const char *host;		/* name or id of the importer, instead of an address */
	const void *context;
	size_t context_bytes;
	int timeout;			/* milliseconds; 0: the daemon's */
	unsigned int flags;
	unsigned char migration[16];	/* id (UUID) that makes the call idempotent; zeroes: a new one */
};

/* What became of an export. Set size to sizeof(struct sockmi_result). */
struct sockmi_result {
	size_t size;
	unsigned char migration[16];
	char host[256];			/* the importer, "" if none was chosen */
	char mode[16];			/* the redirect, "" if none was chosen */
	uint64_t blackout_us;
	uint64_t receive_queue_bytes;
	uint64_t sent_bytes;
	uint64_t unsent_bytes;
	unsigned int hop;
};

/* import_socket() with options (NULL: none). */
SOCKMI_API int import_socket_ex(struct import_req *irqs, unsigned int nirqs, int timeout,
				const struct sockmi_import_options *options);

/* export_socket() with options (NULL: none) and a result (NULL: not wanted; filled on failure too). */
SOCKMI_API int export_socket_ex(int pid, int fd, int af, const void *to,
				const struct sockmi_export_options *options,
				struct sockmi_result *result);

/*
 * Move on what waits in an import list of this host, because no application has asked for it, as
 * export_socket_ex() does a descriptor. listed: the id (UUID) of the migration that brought it, as in
 * sockmi_result of who exported it. It keeps its context: options have none.
 */
SOCKMI_API int export_listed(const unsigned char listed[16], int af, const void *to,
			     const struct sockmi_export_options *options,
			     struct sockmi_result *result);

/* Why the last call of this thread failed; strings that last until its next call. */
struct sockmi_error {
	int errnum;		/* errno, 0: it did not fail */
	const char *code;	/* refusal code (docs/control.md) or "", if the library failed by itself */
	const char *message;	/* a sentence: what, where, what to do next */
};

SOCKMI_API const struct sockmi_error *sockmi_last_error(void);

/* "0.1.0" */
SOCKMI_API const char *sockmi_version(void);

#ifdef __cplusplus
}
#endif

#endif /* SOCKMI_H */
