function _unbroken_runs  # of the folder behind --logs_dir, if that is typed
    set -l words (commandline -opc)
    set -l dir logs (string replace -rf -- '^--logs_dir=' '' $words)
    if set -l at (contains -i -- --logs_dir $words)
        set dir $words[(math $at + 1)]
    end
    set dir (string replace -r '^~/' "$HOME/" $dir[-1])
    begin; ls $dir/by-name; ls $dir; end 2>/dev/null | grep -vx by-name
end
