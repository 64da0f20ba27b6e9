# SPDX-License-Identifier: MIT
# bash completion for sockmi(1) and sockmid(8); install as /usr/share/bash-completion/completions/sockmi, and link sockmid to it.

# `cur` is completed, the value of `prev`. Of --to=b readline makes three words, unless COMP_WORDBREAKS lacks "=":
# then `joined` stands before what completes it.
_sockmi_word() {
	cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} joined=
	if [[ $cur == = ]]; then
		cur=
	elif [[ $prev == = ]]; then
		prev=${COMP_WORDS[COMP_CWORD - 2]}
	elif [[ $cur == --*=* ]]; then
		prev=${cur%%=*} joined=${cur%%=*}= cur=${cur#*=}
	fi
}

_sockmi() {
	local cur prev joined command= words= at=1
	local common="--json --control"
	local select="--pid --fd --process --unit --kind --state --local-address --local-port --port --remote-address --remote-port --idle-s"
	local moving="--to --timeout --dry-run"

	_sockmi_word
	# The command is the first word that is neither an option nor the value of --control.
	while ((at < COMP_CWORD)) && [[ ${COMP_WORDS[at]} == -* ]]; do
		[[ ${COMP_WORDS[at]} != --control ]] || ((at++))
		[[ ${COMP_WORDS[at]} != = ]] || ((at++))
		((at++))
	done
	((at >= COMP_CWORD)) || command=${COMP_WORDS[at]}
	case $prev in
	--control | --key-file)
		mapfile -t COMPREPLY < <(compgen -P "$joined" -f -- "$cur")
		return
		;;
	--exec)
		mapfile -t COMPREPLY < <(compgen -P "$joined" -c -- "$cur")
		return
		;;
	--kind) words="bound listening connected" ;;
	--outcome) words="moved refused aborted failed planned" ;;
	--direction) words="export import" ;;
	--state) words="ESTABLISHED SYN-SENT SYN-RECEIVED FIN-WAIT-1 FIN-WAIT-2 TIME-WAIT CLOSED CLOSE-WAIT LAST-ACK LISTEN CLOSING" ;;
	--interface) words=$(command ls /sys/class/net) ;;
	--to | --host) words=$(_sockmi_hosts) ;;
	--pid | --fd | --listed | --process | --unit | --count | --limit | --timeout | --rate | --since | --until | --peer | \
		--address | --port | --local-address | --local-port | --remote-address | --remote-port | --idle-s) return ;;
	esac
	if [ -z "$words" ]; then
		case $command in
		export) words="$common $moving --pid --fd --listed" ;;
		import) words="$common --kind --count --timeout --exec --local-address --local-port --port --remote-address --remote-port" ;;
		list) words="$common $select sockets imports redirects" ;;
		status) words=$common ;;
		history) words="$common --limit --outcome --direction --host --since --until" ;;
		groups) words="$common --address --peer --port --interface --key-file --force list join leave forget" ;;
		drain) words="$common $select $moving --all --rate" ;;
		doctor) words=$common ;;
		reload) words="$common --check" ;;
		"") words="$common export import list status history groups drain doctor reload key --version --help" ;;
		key)
			words=$common
			[[ $cur == -* ]] || words=$(compgen -f -- "$cur")
			;;
		esac
	fi
	mapfile -t COMPREPLY < <(compgen -P "$joined" -W "$words" -- "$cur")
}

# Names of the hosts that the daemon hears.
_sockmi_hosts() {
	sockmi groups --json 2>/dev/null | sed -n 's/^ *"host": "\([^"]*\)".*/\1/p' | sort -u
}

complete -F _sockmi sockmi

_sockmid() {
	local cur prev joined words="--config --check --remove-redirects --force --version --help"
	_sockmi_word
	[[ $prev == --config ]] && words=$(compgen -f -- "$cur")
	mapfile -t COMPREPLY < <(compgen -P "$joined" -W "$words" -- "$cur")
}

complete -F _sockmid sockmid
