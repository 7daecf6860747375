"""The tables that a step's kernels read, one row a tensor or a param group: which column holds what.

Plain numbers in a module: both compilers, Triton's and numba's, read them as constants.
"""

# int64, one row a tensor: where its parts are, and how its rows lie (``layout.Layout``). FIRST to THIRD are what the
# rule keeps for v, or for a plain parameter; those with G_ what it keeps for g.
WEIGHT = 0
FIRST = 1
SECOND = 2
THIRD = 3
MASTER = 4
SCALE = 5
G_FIRST = 6
G_SECOND = 7
G_THIRD = 8
STEP = 9
G_STEP = 10
GROUP = 11
NORMALIZED = 12
NUMEL = 13
ROWS = 14
LENGTH = 15
ROW_SPLIT = 16
SPLIT = 17
ROW_OUTER = 18
ROW_INNER = 19
COLUMN_OUTER = 20
COLUMN_INNER = 21
GRAD_ROW_OUTER = 22
GRAD_ROW_INNER = 23
GRAD_COLUMN_OUTER = 24
GRAD_COLUMN_INNER = 25
ADDRESSES = 26

# float64, one row a tensor: what is fixed for it.
FACT_V_LENGTH = 0  # ‖v‖ that a fresh scale sets; 0: ‖w‖
FACT_V_DECAY = 1  # multiplies the weight decay of v, or of a plain parameter
FACT_G_RATE = 2  # multiplies the learning rate of g
FACTS = 3

# float64, one row a param group: its options.
OPTION_RATE = 0
OPTION_KEEP1 = 1
OPTION_LOG_KEEP1 = 2
OPTION_KEEP2 = 3
OPTION_LOG_KEEP2 = 4
OPTION_NESTEROV = 5
OPTION_EPS = 6
OPTION_COUPLED = 7  # weight decay added to the gradient
OPTION_DECOUPLED = 8  # weight decay of its own, times the learning rate
OPTION_SIGN = 9  # of the gradient: -1 maximizes
OPTIONS = 10

# float64, one row a tensor: what the clock makes of all these at every step, to move the elements by.
MOVE_ON = 0  # 0: no gradient, or a step to be skipped
MOVE_GRADIENT = 1  # multiplies the gradient: its sign over the loss scale
MOVE_RATE = 2
MOVE_G_RATE = 3
MOVE_COUPLED = 4
MOVE_G_COUPLED = 5
MOVE_DECOUPLED = 6
MOVE_G_DECOUPLED = 7
MOVE_MIX1 = 8
MOVE_KEEP2 = 9
MOVE_MIX2 = 10
MOVE_ROOT = 11
MOVE_EPS = 12
MOVE_V_LENGTH = 13
MOVES = 14
