// SPDX-License-Identifier: GPL-2.0
/* Closes a socket whose connection lives elsewhere, or never lived: without a packet. */
#include <net/inet_hashtables.h>

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

/* Children that nobody has accepted: without this, closing the listener would send each peer a RST. */
static void mute_children(struct sock *sk)
{
	struct request_sock_queue *queue = &inet_csk(sk)->icsk_accept_queue;
	struct request_sock *request;

	spin_lock_bh(&queue->rskq_lock);
	for (request = queue->rskq_accept_head; request; request = request->dl_next)
		if (request->sk)
			tcp_sk(request->sk)->repair = 1;
	spin_unlock_bh(&queue->rskq_lock);
}

void sockmi_close_silently(struct sock *sk, int error)
{
	struct tcp_sock *tp = tcp_sk(sk);

	if (sk->sk_state == TCP_LISTEN)
		mute_children(sk);
	tp->repair = 1;
	sk->sk_userlocks &= ~(SOCK_BINDADDR_LOCK | SOCK_BINDPORT_LOCK);
	if (sk->sk_state != TCP_CLOSE)
		sk->sk_prot->disconnect(sk, 0);
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
