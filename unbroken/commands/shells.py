"""Completion scripts for bash, zsh and fish.

Each script finds the context from the words before, then looks it up in its tables. Without `-m unbroken` or
train_gpt2_mod.py in the line, `python` is completed as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# What follows a flag or stands without one. SWITCH: a flag that nothing follows.
SWITCH, NOTHING, WORDS, CHECKPOINT, RUN, FILE = "switch", "nothing", "words", "checkpoint", "run", "file"


@dataclass(frozen=True)
class Flag:
    """A flag and what follows it; `takes` is one of the kinds above."""

    name: str
    text: str
    takes: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """The flags of one command, and what may stand without a flag."""

    name: str
    flags: tuple[Flag, ...]
    takes: str
    words: tuple[str, ...]


COMMANDS = ("python", "python3", "torchrun", "train_gpt2_mod.py")
RUNS = "logs/*-*-*-*-*"
HOW = (
    'bash: eval "$(python -m unbroken completion bash)"',
    'zsh:  eval "$(python -m unbroken completion zsh)"',
    "fish: python -m unbroken completion fish | source",
)
TITLE = "# Completion of `python -m unbroken` and train_gpt2_mod.py; made by `python -m unbroken completion {}`.\n"

# The same walk in bash and zsh; @FIRST@ is the index of a line's first word.
WALK = """    for ((i = @FIRST@; i < @LAST@; i++)); do
        word=${@WORDS@[i]}
        if [[ -z $context ]]; then
            if [[ $word == *train_gpt2_mod.py ]]; then context=train
            elif [[ $word == unbroken && $before == -m ]]; then context=unbroken; fi
        elif [[ $word != -* && $before != -* ]]; then
            case "$context" in
            unbroken) context=$word ;;
@NESTED@
            esac
        fi
        before=$word
    done
"""

BASH = """
_unbroken_takes() {
    case "$1" in
@TAKES@
    esac
}

_unbroken_flags() {
    case "$1" in
@FLAGS@
    esac
}

_unbroken_runs() {
    local run
    for run in @RUNS@/; do [[ -d $run ]] && run=${run#logs/} && echo "${run%/}"; done
}

# shellcheck disable=SC2207  # mapfile is not in the bash of macOS; IFS keeps spaces in names
_unbroken() {
    local IFS=$'\\n' context='' before='' word i kind
    local cur=${COMP_WORDS[COMP_CWORD]} flag=${COMP_WORDS[COMP_CWORD-1]}
    COMPREPLY=()
@WALK@
    if [[ -z $context ]]; then
        word=${1##*/}
        word=_unbroken_before_${word//[^a-z0-9]/_}
        [[ -n ${!word} ]] && "${!word}" "$@"
        return
    fi
    # bash takes `--flag=value` apart, into three words
    if [[ $cur == = ]]; then cur=; elif [[ $flag == = ]]; then flag=${COMP_WORDS[COMP_CWORD-2]}; fi
    if [[ $cur == -* ]]; then
        COMPREPLY=($(compgen -W "$(_unbroken_flags "$context")" -- "$cur"))
        return
    fi
    kind=$(_unbroken_takes "$context $flag")
    [[ -z $kind ]] && kind=$(_unbroken_takes "$context")
    word=${kind#* }
    COMPREPLY=($(compgen -W "${word// /$'\\n'}" -- "$cur"))
    case "$kind" in
    checkpoint*)
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -W "$(_unbroken_runs)" -- "$cur") $(compgen -f -X '!*.pt' -- "$cur") \\
            $(compgen -d -- "$cur")) ;;
    run*) COMPREPLY+=($(compgen -W "$(_unbroken_runs)" -- "$cur")) ;;
    file*)
        compopt -o filenames 2>/dev/null
        COMPREPLY+=($(compgen -f -- "$cur")) ;;
    esac
}

for _unbroken_name in @COMMANDS@; do
    declare -F _completion_loader >/dev/null && _completion_loader "$_unbroken_name" 2>/dev/null
    _unbroken_old=$(complete -p "$_unbroken_name" 2>/dev/null | sed -n 's/.* -F \\([^ ]*\\) .*/\\1/p')
    if [[ -n $_unbroken_old && $_unbroken_old != _unbroken ]]; then
        printf -v "_unbroken_before_${_unbroken_name//[^a-z0-9]/_}" %s "$_unbroken_old"
    fi
    if [[ $_unbroken_old == _unbroken ]]; then :
    elif [[ -n $_unbroken_old ]]; then complete -F _unbroken "$_unbroken_name"
    else complete -o bashdefault -o default -F _unbroken "$_unbroken_name"; fi
done
unset _unbroken_name _unbroken_old
"""

ZSH = """
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }

_unbroken_takes() {
    case "$1" in
@TAKES@
    esac
}

_unbroken_flags() {
    case "$1" in
@FLAGS@
    esac
}

_unbroken_value() {
    local kind=$1
    local -a known runs
    known=(${=${kind#* }})
    runs=(@RUNS@(N/:t))
    case "$kind" in
    checkpoint*) (( $#known + $#runs )) && compadd -- $known $runs; _files -g '*.pt' ;;
    run*) (( $#runs )) && compadd -- $runs ;;
    file*) _files ;;
    words*) compadd -- $known ;;
    *) return 1 ;;
    esac
}

_unbroken() {
    local context='' before='' word flag=$words[CURRENT-1]
    local -i i
    local -a found
@WALK@
    if [[ -z $context ]]; then
        ${_unbroken_before[$service]:-_default} "$@"
        return
    fi
    if [[ $PREFIX == --*=* ]]; then
        flag=${PREFIX%%=*}
        compset -P '*='
    elif [[ $PREFIX == -* ]]; then
        found=("${(@f)$(_unbroken_flags "$context")}")
        _describe -o flag found
        return
    fi
    word=$(_unbroken_takes "$context $flag")
    [[ -z $word ]] && word=$(_unbroken_takes "$context")
    _unbroken_value "$word"
}

typeset -gA _unbroken_before
for _unbroken_name in @COMMANDS@; do
    if [[ ${_comps[$_unbroken_name]} != _unbroken ]]; then
        _unbroken_before[$_unbroken_name]=${_comps[$_unbroken_name]}
    fi
    compdef _unbroken $_unbroken_name
done
unset _unbroken_name
"""

FISH = """
function __unbroken_context
    set -l context
    set -l before
    for word in (commandline -opc)
        if test -z "$context"
            if string match -q '*train_gpt2_mod.py' -- $word
                set context train
            else if test "$word" = unbroken -a "$before" = -m
                set context unbroken
            end
        else if not string match -q -- '-*' $word; and not string match -q -- '-*' "$before"
            switch "$context"
                case unbroken
                    set context $word
@NESTED@
            end
        end
        set before $word
    end
    echo $context
end

function __unbroken_in
    test (__unbroken_context) = "$argv"
end

function __unbroken_runs
    for run in @RUNS@/
        string replace -r '^logs/(.*)/$' '$1' -- $run
    end
end

for name in @COMMANDS@
@FLAGS@
end
"""


def _quoted(text: str) -> str:
    """A word in single quotes, which bash and zsh leave alone."""
    return "'" + text.replace("'", "'\\''") + "'"


def _rows(contexts: Sequence[Context]) -> Iterator[tuple[str, str]]:
    """Yield (what is completed, its kind and words), as in ("train --model", "words d2 d4 …")."""
    for context in contexts:
        yield context.name, f"{context.takes} {' '.join(context.words)}"
        for flag in context.flags:
            if flag.takes != SWITCH:
                yield f"{context.name} {flag.name}", f"{flag.takes} {' '.join(flag.words)}"


def _nested(contexts: Sequence[Context]) -> list[str]:
    """Return the commands that have commands of their own."""
    return list(dict.fromkeys(context.name.split()[0] for context in contexts if " " in context.name))


def _script(template: str, shell: str, contexts: Sequence[Context], flags: str) -> str:
    """A template of bash or zsh with its tables filled in."""
    takes = "\n".join(f"    {_quoted(asked)}) echo {_quoted(kind)} ;;" for asked, kind in _rows(contexts))
    nested = "\n".join(f'            {name}) context="{name} $word" ;;' for name in _nested(contexts))
    first, last, words = ("0", "COMP_CWORD", "COMP_WORDS") if shell == "bash" else ("1", "CURRENT", "words")
    walk = WALK.replace("@FIRST@", first).replace("@LAST@", last).replace("@WORDS@", words)
    filled = template.replace("@TAKES@", takes).replace("@FLAGS@", flags).replace("@WALK@", walk.rstrip("\n"))
    filled = filled.replace("@NESTED@", nested).replace("@RUNS@", RUNS).replace("@COMMANDS@", " ".join(COMMANDS))
    return TITLE.format(shell) + filled


def bash(contexts: Sequence[Context]) -> str:
    """Return the script for bash, 3.2 on."""
    rows = []
    for context in contexts:
        names = "\\n".join(flag.name for flag in context.flags)
        if names:
            rows.append(f"    {_quoted(context.name)}) printf -- '{names}\\n' ;;")
    return _script(BASH, "bash", contexts, "\n".join(rows))


def zsh(contexts: Sequence[Context]) -> str:
    """Return the script for zsh, with a few words beside each flag."""
    rows = []
    for context in contexts:
        described = [_quoted(f"{flag.name}:{flag.text}") for flag in context.flags]
        if described:
            rows.append(f"    {_quoted(context.name)}) print -rl -- {' '.join(described)} ;;")
    return _script(ZSH, "zsh", contexts, "\n".join(rows))


def fish(contexts: Sequence[Context]) -> str:
    """Return the script for fish, with a few words beside each flag."""
    rows = []
    for context in contexts:
        where = f"complete -c $name -n '__unbroken_in {context.name}'"
        rows.append(where + (" -F" if context.takes == FILE else f" -f{_fish_values(context.takes, context.words)}"))
        rows += [f"{where} -l {flag.name[2:]}{_fish_flag(flag)}" for flag in context.flags]
    case = '                case {0}\n                    set context "{0} $word"'
    nested = "\n".join(case.format(name) for name in _nested(contexts))
    filled = FISH.replace("@FLAGS@", "\n".join(f"    {row}" for row in rows)).replace("@NESTED@", nested)
    return TITLE.format("fish") + filled.replace("@RUNS@", RUNS).replace("@COMMANDS@", " ".join(COMMANDS))


def _fish_flag(flag: Flag) -> str:
    text = flag.text.replace("\\", "\\\\").replace("'", "\\'")
    described = f" -d '{text}'"
    if flag.takes == SWITCH:
        return described
    return (" -r -F" if flag.takes == FILE else f" -x{_fish_values(flag.takes, flag.words)}") + described


def _fish_values(takes: str, words: Sequence[str]) -> str:
    values = list(words)
    if takes in (CHECKPOINT, RUN):
        values.append("(__unbroken_runs)")
    if takes == CHECKPOINT:
        values.append("(__fish_complete_suffix .pt)")
    return f" -a '{' '.join(values)}'" if values else ""


SCRIPTS: dict[str, Callable[[Sequence[Context]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
