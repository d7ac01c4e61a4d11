"""The one exception that is the user's to mend."""


class UserError(ValueError):
    """A mistake in flags, data or files: its text is one line that says what is wrong and what to do.

    The door (`train_gpt2_mod.py`, `python -m unbroken`) prints that line and leaves with exit code 2.
    `everywhere`: every process raises this one, so only rank 0 prints it.
    """

    everywhere = False
