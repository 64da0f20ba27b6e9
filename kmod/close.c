// SPDX-License-Identifier: GPL-2.0
/* Closes a socket whose connection lives elsewhere, or never lived: without a packet. */
#include <linux/filter.h>
#include <net/inet_hashtables.h>
#include <net/sock_reuseport.h>

#include "internal.h"

static void unbind(struct sock *sk)
{
	sk->sk_userlocks &= ~(SOCK_BINDADDR_LOCK | SOCK_BINDPORT_LOCK);
	if (inet_sk(sk)->inet_num && sk->sk_prot->put_port)
		sk->sk_prot->put_port(sk);
	inet_sk(sk)->inet_sport = 0;
	inet_sk(sk)->inet_daddr = 0;
	inet_sk(sk)->inet_dport = 0;
	inet_reset_saddr(sk);
}

/*
 * Will the kernel hand its accept queue on to another listener of its SO_REUSEPORT group? Who gets there lives on, and must
 * not be mute.
 */
static bool hands_on(const struct sock *sk)
{
	const struct sock_reuseport *group;
	const struct bpf_prog *program;
	bool does = false;

	rcu_read_lock();
	group = rcu_dereference(sk->sk_reuseport_cb);
	if (group && READ_ONCE(group->num_socks) > 1) {
		program = rcu_dereference(group->prog);
		does = READ_ONCE(sock_net(sk)->ipv4.sysctl_tcp_migrate_req) ||
		       (program && program->expected_attach_type == BPF_SK_REUSEPORT_SELECT_OR_MIGRATE);
	}
	rcu_read_unlock();
	return does;
}

/* The one behind @request, or the first. Who has the listener's lock knows that none is taken out. */
static struct request_sock *next_child(struct request_sock_queue *queue, const struct request_sock *request)
{
	struct request_sock *next;

	spin_lock_bh(&queue->rskq_lock);
	next = request ? request->dl_next : queue->rskq_accept_head;
	spin_unlock_bh(&queue->rskq_lock);
	return next;
}

/* Children that nobody has accepted: without this, closing the listener would send each peer a RST. */
static void mute_children(struct sock *sk)
{
	struct request_sock_queue *queue = &inet_csk(sk)->icsk_accept_queue;
	struct request_sock *request = NULL;

	while ((request = next_child(queue, request))) {
		struct sock *child = request->sk;

		if (!child)
			continue;
		/* Its packets are handled meanwhile, and change bits of the same byte. */
		local_bh_disable();
		bh_lock_sock(child);
		tcp_sk(child)->repair = 1;
		bh_unlock_sock(child);
		local_bh_enable();
	}
}

void sockmi_close_silently(struct sock *sk, int error)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (sk->sk_state == TCP_LISTEN && !hands_on(sk))
		mute_children(sk);
	tp->repair = 1;
	sk->sk_userlocks &= ~(SOCK_BINDADDR_LOCK | SOCK_BINDPORT_LOCK);
	if (sk->sk_state != TCP_CLOSE)
		sockmi_disconnect(sk);
	unbind(sk);
	/* disconnect() leaves these to who connects next. */
	tp->snd_cwnd_clamp = ~0;
	tp->reordering = READ_ONCE(sock_net(sk)->ipv4.sysctl_tcp_reordering);
	WRITE_ONCE(sk->sk_pacing_rate, ~0UL);
	tp->repair = 0;
	tp->repair_queue = TCP_NO_QUEUE;
	sk->sk_socket->state = SS_UNCONNECTED;
	WRITE_ONCE(sk->sk_err, error);
	if (!error)
		return;
	/* Not for reading: a recv() that found it shut would take it for the peer's FIN. */
	WRITE_ONCE(sk->sk_shutdown, SEND_SHUTDOWN);
	sk->sk_state_change(sk);
	sk_error_report(sk);
}
