"""Processes, the division of a step, and the one order of addition."""
