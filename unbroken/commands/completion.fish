function _unbroken_runs  # of the folder behind --logs_dir, if that is typed
    set -l words (commandline -opc)
    set -l dir logs (string replace -rf -- '^--logs_dir=' '' $words)
    if set -l at (contains -i -- --logs_dir $words)
        set dir $words[(math $at + 1)]
    end
    ls (string replace -r '^~/' "$HOME/" $dir[-1]) 2>/dev/null
end
