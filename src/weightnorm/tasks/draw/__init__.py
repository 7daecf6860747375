"""DRAW, a recurrent network that paints images glimpse by glimpse: the model of the paper's experiment 5.3."""
