"""Weight normalization in a framework that knows nothing of it: stable-baselines3's quick start, one argument longer.

pip install weightnorm stable-baselines3 and run this: less than a minute on one core; --plain leaves it out.
"""

import argparse

import torch
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy

import weightnorm as wn

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--plain", action="store_true", help="without weight normalization")
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--steps", type=int, default=25_000)
options = parser.parse_args()

optimizer = torch.optim.Adam if options.plain else wn.Adam

model = PPO(
    "MlpPolicy",
    "CartPole-v1",
    policy_kwargs=dict(optimizer_class=optimizer, optimizer_kwargs=dict(eps=1e-5)),  # the one line; the library's eps
    seed=options.seed,
    device="cpu",
)
model.learn(options.steps)
mean, spread = evaluate_policy(model, model.get_env(), n_eval_episodes=20)
print(f"mean return {mean:.0f} ± {spread:.0f} of 500")
