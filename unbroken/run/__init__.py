"""A run: its state, its lock, where it resumes and when it saves."""
