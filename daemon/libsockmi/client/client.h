/* SPDX-License-Identifier: MIT */
/* What the parts of the client library share. Functions return -1 with errno and the error text set. */
#ifndef SOCKMI_CLIENT_H
#define SOCKMI_CLIENT_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "sockmi.h"

#define LINE_MAX_BYTES ((size_t)1 << 20)
#define DESCRIPTORS_MAX 253
#define GRACE_MS 2000	/* how much later than asked the daemon may answer */

/* error.c */
int fail(int errnum, const char *format, ...) __attribute__((format(printf, 2, 3)));
int fail_code(const char *code, const char *message);
void no_error(void);

/* deadline.c: milliseconds of CLOCK_MONOTONIC; negative: never */
long long deadline_after(int timeout_ms);
int deadline_left(long long deadline);
int wait_for(int fd, short events, long long deadline);

/* connection.c: a connection to the daemon; descriptors that came wait in a queue */
struct connection {
	int fd;
	char *line;		/* received bytes */
	size_t used;
	size_t taken;		/* of these, belong to lines already returned */
	size_t size;
	int descriptors[2 * DESCRIPTORS_MAX];
	unsigned int ndescriptors;
};

int connection_open(struct connection *connection, const char *control, long long deadline);
void connection_close(struct connection *connection);
int connection_send(struct connection *connection, const json_t *message, const int *fds,
		    unsigned int nfds, long long deadline);
json_t *connection_receive(struct connection *connection, long long deadline);
int connection_take(struct connection *connection, const json_t *message, int *fds,
		    unsigned int nfds);

/* values.c: endpoints, ids and states as JSON has them */
json_t *endpoint_address(const struct sockmi_endpoint *endpoint);
int endpoint_parse(const json_t *text, struct sockmi_endpoint *endpoint);
void id_new(unsigned char id[16]);
bool id_is_zero(const unsigned char id[16]);
json_t *id_text(const unsigned char id[16]);
int id_parse(const json_t *text, unsigned char id[16]);
json_t *states_list(unsigned int states);
unsigned int state_parse(const json_t *text);

/* context.c */
int context_seal(const void *data, size_t bytes);
int context_read(int fd, struct sockmi_context *context);

/* options.c */
int options_copy(void *own, size_t own_size, const void *given, const char *what);

void close_all(const int *fds, unsigned int nfds);

#endif /* SOCKMI_CLIENT_H */
