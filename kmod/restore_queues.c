// SPDX-License-Identifier: GPL-2.0
/*
 * The queues of a restored connection. What has been sent goes through the repair queue; what has not been sent is
 * queued behind a send window of zero.
 */
#include <linux/uio.h>

#include "restore.h"

#define CHUNK_BYTES 65536 /* the receive queue gets one buffer for each */
/* Of an out-of-order buffer: with what the kernel puts behind it, just what is allocated; a byte more would be counted twice. */
#define PIECE_BYTES SKB_WITH_OVERHEAD(16384)

/* sendmsg() of all of it to whichever queue is chosen. */
static int queue_bytes(struct restore *r, const struct sockmi_view *queue)
{
	size_t done = 0;

	while (done < queue->length) {
		struct msghdr message = { .msg_flags = MSG_DONTWAIT | MSG_NOSIGNAL };
		struct kvec vec = { (void *)(queue->data + done), min_t(size_t, queue->length - done, CHUNK_BYTES) };
		int taken;

		iov_iter_kvec(&message.msg_iter, WRITE, &vec, 1, vec.iov_len);
		taken = tcp_sendmsg_locked(r->sk, &message, vec.iov_len);
		if (taken <= 0)
			return refuse(r, SOCKMI_REFUSAL_MEMORY);
		done += taken;
		cond_resched();
	}
	return 0;
}

/* A FIN takes a place in the receive queue until it is read. */
static int queue_peer_fin(struct restore *r)
{
	struct tcp_sock *tp = r->tp;

	if (!flag(r, SOCKMI_PEER_FIN_READ)) {
		struct sk_buff *skb = alloc_skb(0, GFP_KERNEL);

		if (!skb)
			return refuse(r, SOCKMI_REFUSAL_MEMORY);
		if (!sk_rmem_schedule(r->sk, skb, skb->truesize)) {
			kfree_skb(skb);
			return refuse(r, SOCKMI_REFUSAL_MEMORY);
		}
		memset(skb->cb, 0, sizeof(skb->cb));
		TCP_SKB_CB(skb)->seq = tp->rcv_nxt;
		TCP_SKB_CB(skb)->end_seq = tp->rcv_nxt + 1;
		TCP_SKB_CB(skb)->ack_seq = tp->snd_una;
		TCP_SKB_CB(skb)->tcp_flags = TCPHDR_ACK | TCPHDR_FIN;
		__skb_queue_tail(&r->sk->sk_receive_queue, skb);
		skb_set_owner_r(skb, r->sk);
	} else {
		WRITE_ONCE(tp->copied_seq, tp->copied_seq + 1);
	}
	WRITE_ONCE(tp->rcv_nxt, tp->rcv_nxt + 1);
	sock_set_flag(r->sk, SOCK_DONE);
	return 0;
}

int sockmi_restore_received(struct restore *r)
{
	int result;

	r->tp->repair_queue = TCP_RECV_QUEUE;
	result = queue_bytes(r, &r->image->receive_queue);
	r->tp->repair_queue = TCP_NO_QUEUE;
	return result || !flag(r, SOCKMI_PEER_FIN) ? result : queue_peer_fin(r);
}

/* What has been sent and not acknowledged, an own FIN included. */
int sockmi_restore_sent(struct restore *r)
{
	int result;

	r->tp->repair_queue = TCP_SEND_QUEUE;
	result = queue_bytes(r, &r->image->sent_queue);
	if (result)
		return result;
	if (flag(r, SOCKMI_OWN_FIN_SENT) && r->id->state != SOCKMI_FIN_WAIT_2)
		r->sk->sk_prot->shutdown(r->sk, SEND_SHUTDOWN);
	r->tp->repair_queue = TCP_NO_QUEUE;
	return r->tp->snd_nxt == r->seq->snd_nxt ? 0 : refuse(r, SOCKMI_REFUSAL_MEMORY);
}

/*
 * What has not been sent. Nothing goes out as long as the send window is closed, which it is since connect(). A
 * limit on unsent data is the application's business, not that of this queue.
 */
int sockmi_restore_unsent(struct restore *r)
{
	struct tcp_sock *tp = r->tp;
	u32 limit = tp->notsent_lowat;
	int result;

	if (r->seq->write_seq == r->seq->snd_nxt)
		return 0;
	tp->repair = 0;
	tp->snd_wnd = 0;
	WRITE_ONCE(tp->notsent_lowat, U32_MAX);
	result = queue_bytes(r, &r->image->unsent_queue);
	WRITE_ONCE(tp->notsent_lowat, limit);
	if (!result && flag(r, SOCKMI_OWN_FIN) && !flag(r, SOCKMI_OWN_FIN_SENT))
		r->sk->sk_prot->shutdown(r->sk, SEND_SHUTDOWN);
	tp->repair = 1;
	if (result)
		return result;
	return tp->write_seq == r->seq->write_seq && tp->snd_nxt == r->seq->snd_nxt ?
		       0 : refuse(r, SOCKMI_REFUSAL_MEMORY);
}

/* Behind the last of the out-of-order queue: data, or the peer's FIN. */
static bool append_early(struct restore *r, u32 seq, const u8 *data, u32 length, bool fin)
{
	struct tcp_sock *tp = r->tp;
	struct rb_node **place = &tp->out_of_order_queue.rb_node, *parent = NULL;
	struct sk_buff *skb = alloc_skb(length, GFP_KERNEL | __GFP_NOWARN);

	if (!skb)
		return false;
	/* What exceeds the buffer would be the first to be dropped: reneging, but no harm (RFC 2018). */
	if (atomic_read(&r->sk->sk_rmem_alloc) > r->sk->sk_rcvbuf || !sk_rmem_schedule(r->sk, skb, skb->truesize)) {
		kfree_skb(skb);
		return false;
	}
	if (length)
		skb_put_data(skb, data, length);
	memset(skb->cb, 0, sizeof(skb->cb));
	TCP_SKB_CB(skb)->seq = seq;
	TCP_SKB_CB(skb)->end_seq = seq + length + fin;
	TCP_SKB_CB(skb)->ack_seq = tp->snd_una;
	TCP_SKB_CB(skb)->tcp_flags = TCPHDR_ACK | (fin ? TCPHDR_FIN : 0);
	if (!RB_EMPTY_ROOT(&tp->out_of_order_queue)) {
		parent = &tp->ooo_last_skb->rbnode;
		place = &parent->rb_right;
	}
	rb_link_node(&skb->rbnode, parent, place);
	rb_insert_color(&skb->rbnode, &tp->out_of_order_queue);
	tp->ooo_last_skb = skb;
	skb_set_owner_r(skb, r->sk);
	return true;
}

/* Does the image's list of blocks speak of data that is here, from @start to @end? */
static bool have_early(const struct restore *r, u32 start, u32 end)
{
	struct sk_buff *skb;

	for (skb = skb_rb_first(&r->tp->out_of_order_queue); skb && before(start, end); skb = skb_rb_next(skb))
		if (!after(TCP_SKB_CB(skb)->seq, start) && after(TCP_SKB_CB(skb)->end_seq, start))
			start = TCP_SKB_CB(skb)->end_seq;
	return !before(start, end);
}

static void set_sack_blocks(struct restore *r)
{
	struct sockmi_view rest = r->image->receive_sack;
	struct tcp_sock *tp = r->tp;
	struct sockmi_range range;
	unsigned int n = 0;

	while (n < TCP_NUM_SACKS && sockmi_range_next(&rest, &range)) {
		if (!have_early(r, range.seq, range.end_seq))
			continue;
		tp->selective_acks[n].start_seq = range.seq;
		tp->selective_acks[n].end_seq = range.end_seq;
		n++;
	}
	if (!n && !RB_EMPTY_ROOT(&tp->out_of_order_queue)) {
		struct sk_buff *skb = skb_rb_first(&tp->out_of_order_queue), *next;

		tp->selective_acks[0].start_seq = TCP_SKB_CB(skb)->seq;
		while ((next = skb_rb_next(skb)) && TCP_SKB_CB(next)->seq == TCP_SKB_CB(skb)->end_seq)
			skb = next;
		tp->selective_acks[0].end_seq = TCP_SKB_CB(skb)->end_seq;
		n = 1;
	}
	tp->rx_opt.num_sacks = n;
}

void sockmi_restore_out_of_order(struct restore *r)
{
	struct sockmi_view rest = r->image->out_of_order, bytes;
	bool room = true;
	u32 seq, done;

	if (!rest.length && !has(r, SOCKMI_EARLY_FIN))
		return;
	while (room && sockmi_segment_next(&rest, &seq, &bytes))
		for (done = 0; room && done < bytes.length; done += PIECE_BYTES)
			room = append_early(r, seq + done, bytes.data + done,
					    min_t(size_t, bytes.length - done, PIECE_BYTES), false);
	if (room && has(r, SOCKMI_EARLY_FIN))
		room = append_early(r, r->image->early_fin.seq, NULL, 0, true);
	if (!room)
		r->losses->approximated |= SOCKMI_LOSS_OUT_OF_ORDER;
	if (r->image->negotiated.flags & SOCKMI_NEGOTIATED_SACK)
		set_sack_blocks(r);
}
