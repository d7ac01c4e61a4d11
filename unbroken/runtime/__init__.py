"""The process and the machine that a run trains on."""
