"""What tries to break the guarantees; docs/reliability.md has the commands and what came of them.

Faults of all kinds: `__main__`, with `trainings` under `faults`, each in a `lane`; `soak`. Power cuts: `powercut`, with
the `courses` that are recorded, the `crash_model` of a disk and the `checks` of each state; `images` of real
filesystems. Both preload `shim.c`, which `storage` compiles.
"""
