"""GPT-2 pretraining whose interruptions leave no trace."""

__version__ = "0.1.0"
