"""The six ways a run can stop, each with its exit code.

A message says what was wrong, where (file:line, flag, row, rank) and what to do about it. `train.py` and `eval.py` print the message
without a traceback and exit with the code; anything that is not a `Stop` is a defect of this program and shows its traceback (code 1).

    code  class            meaning
    2     UsageError       a flag, a combination of flags, or a folder in the wrong state
    3     DataError        the text files
    4     CheckpointError  weights, tokenizer or manifest that do not fit or were damaged
    5     NumericalError   a number that is not finite, or a broken invariant of the algorithm
    6     ResourceError    disk, memory, a vanished folder
    130   Interrupted      Ctrl-C; 143 after SIGTERM, 141 where what is printed goes to a pipe that was closed, as shells have it
"""


class Stop(Exception):
    """An expected failure; `str(error)` is the whole message for the user."""

    code = 1


class UsageError(Stop):
    code = 2


class DataError(Stop):
    code = 3


class CheckpointError(Stop):
    code = 4


class NumericalError(Stop):
    code = 5


class ResourceError(Stop):
    code = 6


class Interrupted(Stop):
    code = 130
