"""Reads and writes the checkpoints of runs. It knows trees of `Leaf` and plain values, nothing of models or
training.

A tensor's way to the disk: snapshot -> archive (where it lies in the file) -> plan (which bytes are written
by whom) -> writer; and back: listing (is this file what it claims to be?) -> unpickle (plain values only) ->
reader.
"""
