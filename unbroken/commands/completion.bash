_unbroken_runs() {  # of the folder behind --logs_dir, if that is typed
    local i dir=logs
    for ((i = 0; i < COMP_CWORD; i++)); do [[ ${COMP_WORDS[i]} == --logs_dir ]] && dir=${COMP_WORDS[i + 1]}; done
    dir=${dir/#\~\//$HOME/}
    { ls "$dir/by-name"; ls "$dir"; } 2>/dev/null | grep -vx by-name
}
# Where the names follow python or torchrun, call what shtab made for them.
_unbroken_files() {
    compgen -W "latest best auto $(_unbroken_runs)" -- "$1"; compgen -f -X '!*.pt' -- "$1"; compgen -d -- "$1"
}
_unbroken_line() {
    local i word cut=()
    for ((i = 0; i <= COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if (( ${#cut[@]} )); then [[ $word == = ]] || cut+=("$word")  # bash takes `--flag=value` apart
        elif [[ ${word##*/} == train_gpt2_mod.py || $word == unbroken ]]; then cut=("${word##*/}"); fi
    done
    [[ ${COMP_WORDS[COMP_CWORD]} == = ]] && cut+=("")
    if (( ${#cut[@]} > 1 )); then
        COMP_WORDS=("${cut[@]}") COMP_CWORD=$(( ${#cut[@]} - 1 ))
        "_shtab_${cut[0]//./_}"
    elif [[ -n $_unbroken_before ]]; then "$_unbroken_before" "$@"; fi
}
declare -F _completion_loader >/dev/null && _completion_loader python 2>/dev/null
[[ $(complete -p python 2>/dev/null) =~ -F\ ([^ ]*) && ${BASH_REMATCH[1]} != _unbroken_line ]] &&
    _unbroken_before=${BASH_REMATCH[1]}
complete -o bashdefault -o default -F _unbroken_line python python3 torchrun unbroken train_gpt2_mod.py
