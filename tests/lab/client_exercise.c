/* SPDX-License-Identifier: MIT */
/*
 * Imports in many threads while signals interrupt everything; exports; failures. For sanitizers.
 *	client_exercise IMPORTS THREADS		prints "imported N exported N failed N"
 */
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <sockmi.h>

static int wanted;
static int imported, exported, failed;

static void on_signal(int number)
{
	(void)number;
}

static void *run(void *unused)
{
	(void)unused;
	for (int i = 0; i < wanted; i++) {
		struct import_req irqs[2] = {
			SOCKMI_IMPORT(socket(AF_INET, SOCK_STREAM, 0), SOCKMI_CONNECTED),
			SOCKMI_IMPORT(-1, 0),
		};
		struct sockmi_context contexts[2];
		struct sockmi_import_options options = { .size = sizeof(options), .contexts = contexts };
		struct sockmi_result result = { .size = sizeof(result) };
		struct import_req bad = SOCKMI_IMPORT(irqs[0].fd, 0);

		if (import_socket(&bad, 1, 0) == -1 && errno == EINVAL && sockmi_last_error()->errnum == EINVAL)
			__atomic_add_fetch(&failed, 1, __ATOMIC_RELAXED);
		if (import_socket_ex(irqs, 2, -1, &options) == 1 && irqs[0].returned == SOCKMI_CONNECTED &&
		    sockmi_last_error()->errnum == 0)
			__atomic_add_fetch(&imported, 1, __ATOMIC_RELAXED);
		else
			fprintf(stderr, "import: %s\n", sockmi_last_error()->message);
		free(contexts[0].data);
		if (!export_socket_ex(-1, irqs[0].fd, 0, NULL, NULL, &result) && !strcmp(result.host, "b"))
			__atomic_add_fetch(&exported, 1, __ATOMIC_RELAXED);
		else
			fprintf(stderr, "export: %s\n", sockmi_last_error()->message);
		close(irqs[0].fd);
	}
	return NULL;
}

int main(int argc, char **argv)
{
	const struct itimerval tick = { { 0, 2000 }, { 0, 2000 } };
	struct sigaction action;
	pthread_t threads[64];
	int nthreads = argc == 3 ? atoi(argv[2]) : 0;

	if (nthreads < 1 || nthreads > 64)
		return 2;
	wanted = atoi(argv[1]);
	memset(&action, 0, sizeof(action));
	action.sa_handler = on_signal;	/* without SA_RESTART */
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &tick, NULL);
	for (int i = 0; i < nthreads; i++)
		pthread_create(&threads[i], NULL, run, NULL);
	for (int i = 0; i < nthreads; i++)
		pthread_join(threads[i], NULL);
	printf("imported %d exported %d failed %d\n", imported, exported, failed);
	return 0;
}
