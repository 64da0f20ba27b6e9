/* SPDX-License-Identifier: MIT */
/*
 * An echo server that can hand its connection over to a successor on another host.
 *
 *	handover serve PORT HOST	accept one connection, echo one chunk, export it to HOST
 *	handover resume			import a connection and go on echoing until it ends
 *
 * What the server knows of the session (here: bytes echoed so far) travels with the connection.
 * Build: cc handover.c $(pkg-config --cflags --libs sockmi)
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <sockmi.h>

static int explain(const char *what)
{
	const struct sockmi_error *error = sockmi_last_error();

	fprintf(stderr, "%s: %s%s%s\n", what, error->code, *error->code ? ": " : "", error->message);
	return EXIT_FAILURE;
}

/* Bytes echoed, 0 at the end of the connection, -1 on failure. */
static long echo_chunk(int connection)
{
	char chunk[4096];
	ssize_t n = recv(connection, chunk, sizeof(chunk), 0);
	ssize_t done = 0;

	while (done < n) {
		ssize_t sent = send(connection, chunk + done, (size_t)(n - done), MSG_NOSIGNAL);

		if (sent < 0)
			return -1;
		done += sent;
	}
	return (long)n;
}

static int serve(unsigned short port, const char *host)
{
	struct sockaddr_in6 address;
	struct sockmi_export_options options;
	int listener = socket(AF_INET6, SOCK_STREAM, 0);
	int connection;
	long echoed;

	memset(&address, 0, sizeof(address));
	address.sin6_family = AF_INET6;
	address.sin6_port = htons(port);
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1)) {
		perror("listen");
		return EXIT_FAILURE;
	}
	connection = accept(listener, NULL, NULL);
	close(listener);
	echoed = echo_chunk(connection);

	memset(&options, 0, sizeof(options));
	options.size = sizeof(options);
	options.host = host;
	options.context = &echoed;
	options.context_bytes = sizeof(echoed);
	if (export_socket_ex(-1, connection, 0, NULL, &options, NULL))
		return explain("export");
	close(connection);	/* a dead descriptor now: the peer sees nothing of this */
	return EXIT_SUCCESS;
}

static int resume(void)
{
	struct import_req irq = SOCKMI_IMPORT(socket(AF_INET6, SOCK_STREAM, 0), SOCKMI_CONNECTED);
	struct sockmi_context context;
	struct sockmi_import_options options;
	long echoed = 0, n;

	memset(&options, 0, sizeof(options));
	options.size = sizeof(options);
	options.contexts = &context;
	if (import_socket_ex(&irq, 1, -1, &options) < 0)
		return explain("import");
	if (context.bytes == sizeof(echoed))
		memcpy(&echoed, context.data, sizeof(echoed));
	free(context.data);
	while ((n = echo_chunk(irq.fd)) > 0)
		echoed += n;
	printf("%ld bytes echoed, here and before\n", echoed);
	return n ? EXIT_FAILURE : EXIT_SUCCESS;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "serve"))
		return serve((unsigned short)atoi(argv[2]), argv[3]);
	if (argc == 2 && !strcmp(argv[1], "resume"))
		return resume();
	fprintf(stderr, "usage: %s serve PORT HOST | resume\n", argv[0]);
	return 2;
}
