/* SPDX-License-Identifier: MIT */
#include "restart.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <unistd.h>

#include "stop.h"

#define ERESTARTNOHAND 514	/* include/linux/errno.h: restart if no handler runs, else EINTR */

/* Is the struct timespec at @address at most SOCKMI_EPOLL_RESTART_MAX_MS? NULL: no timeout. */
static bool timespec_short(pid_t tid, unsigned long address)
{
	if (!address)
		return true;
	errno = 0;
	long seconds = ptrace(PTRACE_PEEKDATA, tid, address, NULL);
	long nanoseconds = ptrace(PTRACE_PEEKDATA, tid, address + sizeof(long), NULL);

	return !errno && seconds >= 0 && seconds <= SOCKMI_EPOLL_RESTART_MAX_MS / 1000 &&
	       seconds * 1000 + nanoseconds / 1000000 <= SOCKMI_EPOLL_RESTART_MAX_MS;
}

/* Must this interrupted system call be restarted? */
static bool restartable(pid_t tid, unsigned long number, const unsigned long argument[6])
{
	(void)tid;	/* not needed if the headers are older than epoll_pwait2 */
	switch (number) {
#ifdef SYS_epoll_wait
	case SYS_epoll_wait:
#endif
	case SYS_epoll_pwait:
		return (int)argument[3] <= SOCKMI_EPOLL_RESTART_MAX_MS;
#ifdef SYS_epoll_pwait2
	case SYS_epoll_pwait2:
		return timespec_short(tid, argument[3]);
#endif
	case SYS_read: case SYS_readv: case SYS_recvfrom: case SYS_recvmsg: case SYS_recvmmsg:
	case SYS_write: case SYS_writev: case SYS_sendto: case SYS_sendmsg: case SYS_sendmmsg:
	case SYS_accept: case SYS_accept4: case SYS_connect: case SYS_semop:
	case SYS_sendfile: case SYS_splice:
		return true;
	case SYS_io_getevents: case SYS_io_pgetevents:
		return !argument[4];
	case SYS_semtimedop:
		return !argument[3];
	case SYS_rt_sigtimedwait:
		return !argument[2];
	default:
		return false;
	}
}

#if defined(__x86_64__)

/* Layout of NT_PRSTATUS for a 32-bit thread (arch/x86 user_regs_struct32). */
struct regs32 {
	uint32_t bx, cx, dx, si, di, bp, ax, ds, es, fs, gs, orig_ax, ip, cs, flags, sp, ss;
};

/* The same for the i386 numbers (arch/x86/entry/syscalls/syscall_32.tbl). */
static bool restartable32(const struct regs32 *r)
{
	switch (r->orig_ax) {
	case 256: case 319:			/* epoll_wait, epoll_pwait */
		return (int32_t)r->si <= SOCKMI_EPOLL_RESTART_MAX_MS;
	case 441:				/* epoll_pwait2 */
		return !r->si;
	case 3: case 4: case 145: case 146:	/* read, write, readv, writev */
	case 102:				/* socketcall */
	case 337: case 345:			/* recvmmsg, sendmmsg */
	case 362: case 364:			/* connect, accept4 */
	case 369: case 370: case 371: case 372:	/* sendto, sendmsg, recvfrom, recvmsg */
	case 187: case 239: case 313:		/* sendfile, sendfile64, splice */
		return true;
	case 247: case 385:			/* io_getevents, io_pgetevents */
		return !r->di;
	default:
		return false;
	}
}

void sockmi_restart_note(pid_t pid, pid_t tid, struct sockmi_restart *note)
{
	(void)pid;
	(void)tid;
	(void)note;
}

/*
 * The stop is inside get_signal(), before the kernel looks at the result to decide about a
 * restart. After rt_sigreturn, and outside system calls, orig_rax is -1.
 */
void sockmi_restart_stopped(pid_t tid)
{
	union {
		struct user_regs_struct wide;
		struct regs32 narrow;
	} regs;
	struct iovec all = { &regs, sizeof(regs) };

	if (ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &all))
		return;
	if (all.iov_len == sizeof(regs.wide)) {
		unsigned long argument[6] = { regs.wide.rdi, regs.wide.rsi, regs.wide.rdx,
					      regs.wide.r10, regs.wide.r8, regs.wide.r9 };

		if ((long)regs.wide.rax != -EINTR || !restartable(tid, regs.wide.orig_rax, argument))
			return;
		regs.wide.rax = (unsigned long)-ERESTARTNOHAND;
	} else {
		if ((int32_t)regs.narrow.ax != -EINTR || !restartable32(&regs.narrow))
			return;
		regs.narrow.ax = (uint32_t)-ERESTARTNOHAND;
	}
	ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &all);
}

void sockmi_restart_release(pid_t tid, const struct sockmi_restart *note)
{
	(void)tid;
	(void)note;
}

#elif defined(__aarch64__)

static bool read_task_file(pid_t pid, pid_t tid, const char *name, char *text, size_t size)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/%d/task/%d/%s", pid, tid, name);
	int fd = open(path, O_RDONLY | O_CLOEXEC);

	if (fd < 0)
		return false;
	ssize_t length = read(fd, text, size - 1);

	close(fd);
	text[length < 0 ? 0 : length] = 0;
	return length > 0;
}

static bool status_number(const char *status, const char *label, int base, unsigned long *value)
{
	const char *at = strstr(status, label);

	if (at)
		*value = strtoul(at + strlen(label), NULL, base);
	return at;
}

/*
 * arch/arm64 do_signal() decides about a restart before the stop, and by then the first argument
 * (overwritten by the result) and the number are out of reach: the call is restarted by hand, from
 * what /proc said while the thread slept. The count of voluntary context switches proves that it
 * is still the same sleep.
 */
void sockmi_restart_note(pid_t pid, pid_t tid, struct sockmi_restart *note)
{
	char text[4096];

	note->known = read_task_file(pid, tid, "status", text, sizeof(text)) &&
		      status_number(text, "\nvoluntary_ctxt_switches:\t", 10, &note->switches) &&
		      read_task_file(pid, tid, "syscall", text, sizeof(text)) &&
		      sscanf(text, "%lu %lx %lx %lx %lx %lx %lx %lx %lx", &note->number, &note->argument[0],
			     &note->argument[1], &note->argument[2], &note->argument[3], &note->argument[4],
			     &note->argument[5], &note->stack, &note->pc) == 9;
}

void sockmi_restart_stopped(pid_t tid)
{
	(void)tid;
}

void sockmi_restart_release(pid_t tid, const struct sockmi_restart *note)
{
	struct user_regs_struct regs;
	struct iovec all = { &regs, sizeof(regs) };
	unsigned long switches, own, shared, blocked, caught;
	char text[4096];

	if (!note->known || ptrace(PTRACE_GETREGSET, tid, NT_PRSTATUS, &all) || all.iov_len != sizeof(regs))
		return;
	if ((long)regs.regs[0] != -EINTR || regs.regs[8] != note->number || regs.pc != note->pc ||
	    regs.sp != note->stack || !restartable(tid, note->number, note->argument))
		return;
	if (!read_task_file(tid, tid, "status", text, sizeof(text)) ||
	    !status_number(text, "\nvoluntary_ctxt_switches:\t", 10, &switches) ||
	    !status_number(text, "\nSigPnd:\t", 16, &own) || !status_number(text, "\nShdPnd:\t", 16, &shared) ||
	    !status_number(text, "\nSigBlk:\t", 16, &blocked) || !status_number(text, "\nSigCgt:\t", 16, &caught))
		return;
	if (switches != note->switches + 1 || ((own | shared) & ~blocked & caught))
		return;		/* another sleep; or a handler is about to run, and EINTR is right */
	regs.regs[0] = note->argument[0];
	regs.pc -= 4;
	ptrace(PTRACE_SETREGSET, tid, NT_PRSTATUS, &all);
}

#else
#error "sockmi: the repair engine knows x86_64 and aarch64"
#endif
