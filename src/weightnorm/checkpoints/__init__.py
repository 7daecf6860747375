"""Checkpoints: every spelling of a normalised weight read, any written.

spelling  what each way calls g and v, and which keys of a state dict are such
lengths   along which axis g runs, and in what shape it is kept
known     what a model says of its weights
convert   state dicts
nested    the state dicts within a file, whatever lies around them
files     one file: read without running anything, written whole or not at all
shards    several files under one index, likewise
table     what is in a file, for people
command   the command line's inspect, convert and fold
"""

from weightnorm.checkpoints.convert import convert_state_dict

__all__ = ["convert_state_dict"]
