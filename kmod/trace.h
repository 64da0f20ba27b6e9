/* SPDX-License-Identifier: GPL-2.0 */
/* Tracepoints: each step of a move, whatever its outcome (result: 0 or -errno; refusal: enum sockmi_refusal). */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM sockmi

#if !defined(SOCKMI_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define SOCKMI_TRACE_H

#include <linux/tracepoint.h>
#include <net/sock.h>

DECLARE_EVENT_CLASS(sockmi_step,
	TP_PROTO(const struct sock *sk, u64 id, u64 bytes, long result, u32 refusal),
	TP_ARGS(sk, id, bytes, result, refusal),
	TP_STRUCT__entry(
		__field(u64, id)
		__field(u64, bytes)
		__field(long, result)
		__field(u32, refusal)
		__field(u16, family)
		__field(u16, sport)
		__field(u16, dport)
		__field(u8, state)
	),
	TP_fast_assign(
		__entry->id = id;
		__entry->bytes = bytes;
		__entry->result = result;
		__entry->refusal = refusal;
		__entry->family = sk ? sk->sk_family : 0;
		__entry->sport = sk ? inet_sk(sk)->inet_num : 0;
		__entry->dport = sk ? ntohs(inet_sk(sk)->inet_dport) : 0;
		__entry->state = sk ? sk->sk_state : 0;
	),
	TP_printk("id=%llu family=%u sport=%u dport=%u state=%u bytes=%llu result=%ld refusal=%u",
		  __entry->id, __entry->family, __entry->sport, __entry->dport, __entry->state, __entry->bytes,
		  __entry->result, __entry->refusal)
);

#define SOCKMI_STEP(name)                                                                         \
	DEFINE_EVENT(sockmi_step, name,                                                           \
		     TP_PROTO(const struct sock *sk, u64 id, u64 bytes, long result, u32 refusal), \
		     TP_ARGS(sk, id, bytes, result, refusal))

SOCKMI_STEP(sockmi_call); /* every ioctl, after its step. id: its ordinal; bytes: the size of its argument */
SOCKMI_STEP(sockmi_claim);
SOCKMI_STEP(sockmi_unclaim);
SOCKMI_STEP(sockmi_freeze);
SOCKMI_STEP(sockmi_thaw); /* result: -ETIMEDOUT if the deadline did it; bytes: microseconds frozen */
SOCKMI_STEP(sockmi_commit);
SOCKMI_STEP(sockmi_abort);
SOCKMI_STEP(sockmi_release);
SOCKMI_STEP(sockmi_restore);
SOCKMI_STEP(sockmi_activate);
SOCKMI_STEP(sockmi_discard);
SOCKMI_STEP(sockmi_deliver); /* id: how many the accept queue has */
SOCKMI_STEP(sockmi_list_add);
SOCKMI_STEP(sockmi_publish);
SOCKMI_STEP(sockmi_remove);
SOCKMI_STEP(sockmi_import);
SOCKMI_STEP(sockmi_sysctl);
SOCKMI_STEP(sockmi_serve);
SOCKMI_STEP(sockmi_answer); /* bytes: the error that the daemon gives, 0 for success */
SOCKMI_STEP(sockmi_forget); /* id: how many flows are gone; bytes: how many entries */
SOCKMI_STEP(sockmi_nat_change); /* id: enum sockmi_nat_action; bytes: how many flows were changed */
SOCKMI_STEP(sockmi_nat_flush); /* id: the flags that were asked for; bytes: how many flows are gone */
SOCKMI_STEP(sockmi_nat_hand_on); /* id: the flow's; result: how many packets; bytes: their length */

#endif

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
