"""The paper's experiment 5.4: DQN on Atari games; the agent is stable-baselines3's."""

from weightnorm.extras import require

require("atari", "ale_py", "gymnasium", "stable_baselines3")
