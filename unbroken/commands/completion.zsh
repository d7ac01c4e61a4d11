_unbroken_runs() {  # of the folder behind --logs_dir, if that is typed
    local dir=${words[$words[(I)--logs_dir] + 1]}
    (( $words[(I)--logs_dir] )) || dir=${${words[(r)--logs_dir=*]}#*=}
    { ls ${~dir:-logs}/by-name; ls ${~dir:-logs} } 2>/dev/null | grep -vx by-name
}
# Where the names follow python or torchrun, call what shtab made for them.
_unbroken_files() { compadd latest best auto $(_unbroken_runs); _files -g '*.pt' }
_unbroken_line() {
    local i
    for ((i = 2; i < CURRENT; i++)); do
        if [[ $words[i] == (*/|)train_gpt2_mod.py || $words[i] == unbroken ]]; then
            words=("${(@)words[i,-1]}"); (( CURRENT -= i - 1 )); _shtab_${${words[1]:t}//./_}; return
        fi
    done
    ${_unbroken_before:-_default} "$@"
}
[[ $_comps[python] == _unbroken_line ]] || _unbroken_before=$_comps[python]
compdef _unbroken_line python python3 torchrun
