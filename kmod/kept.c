// SPDX-License-Identifier: GPL-2.0
/* The options that a socket had before an image came into it: a restore that fails or is discarded leaves them. */
#include <linux/slab.h>

#include "internal.h"

#define OPTIONS_BYTES 2560 /* more than all options together */

/**
 * struct sockmi_kept - what a socket was like
 * @image: has its options
 * @v6only: IPV6_V6ONLY
 * @reuse: SO_REUSEADDR
 * @options: @image's
 * @now: room for those that it has when they are put back
 */
struct sockmi_kept {
	struct sockmi_image image;
	bool v6only;
	u8 reuse;
	u8 options[OPTIONS_BYTES];
	u8 now[OPTIONS_BYTES];
};

/* Into @bytes, of which the view is a part. */
static struct sockmi_view options_of(const struct sock *sk, u8 *bytes)
{
	const size_t headers = SOCKMI_IMAGE_HEADER_BYTES + SOCKMI_SECTION_HEADER_BYTES;
	struct sockmi_writer writer;

	sockmi_writer_start(&writer, bytes, OPTIONS_BYTES);
	/* There is no identity before it: as if there were. */
	writer.sections = 1;
	sockmi_writer_open(&writer, SOCKMI_SOCKET_OPTIONS);
	sockmi_options_dump(sk, &writer);
	if (WARN_ON_ONCE(writer.error) || writer.length <= headers)
		return (struct sockmi_view){};
	return (struct sockmi_view){ .data = bytes + headers, .length = writer.length - headers };
}

struct sockmi_kept *sockmi_keep(const struct sock *sk)
{
	struct sockmi_kept *kept = kzalloc(sizeof(*kept), GFP_KERNEL_ACCOUNT);

	if (!kept)
		return NULL;
	kept->image.identity.kind = SOCKMI_KIND_UNCONNECTED;
	kept->image.socket_options = options_of(sk, kept->options);
	kept->v6only = sk->sk_ipv6only;
	kept->reuse = sk->sk_reuse;
	return kept;
}

const struct sockmi_view *sockmi_kept_options(const struct sockmi_kept *kept)
{
	return &kept->image.socket_options;
}

void sockmi_put_back(struct socket *sock, struct sockmi_kept *kept)
{
	struct sockmi_view now = options_of(sock->sk, kept->now);
	struct sockmi_losses losses = {};

	sockmi_options_early(sock, &kept->image, &now, SOCKMI_RESTORE_UNDO, &losses);
	lock_sock(sock->sk);
	sockmi_options_late(sock->sk, &kept->image, &now, SOCKMI_RESTORE_UNDO, &losses);
	sock->sk->sk_ipv6only = kept->v6only;
	sock->sk->sk_reuse = kept->reuse;
	release_sock(sock->sk);
}

void sockmi_kept_free(struct sockmi_kept *kept)
{
	kfree(kept);
}
