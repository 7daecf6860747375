"""The comparison of the paper's section 5.4: agents that learn a game, scored by the games they play."""
