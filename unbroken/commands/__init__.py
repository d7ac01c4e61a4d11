"""One file for each tool of `python -m unbroken`: HELP, configure(parser) and run(args) -> exit code."""
