"""Reinforcement learning from rewards: the parts that PPO, GRPO and RLOO share, in the order in which they are used.

    rollout.py      one phase: sample responses, score them, and look up what the frozen networks say about them
    sampling.py     sampling whose random numbers follow from (seed, phase, prompt)
    rewards.py      reward models and reward functions, and how they are mixed to one score per response
    advantages.py   KL estimators, rewards of tokens, GAE, whitening, group baselines
    losses.py       clipped losses and their diagnostics

Everything is a function or holds settings; what must survive a restart is in `RolloutState`.
"""
