"""Reinforcement learning from rewards: the parts that PPO, GRPO and RLOO share, in the order in which they are used.

    rollout.py       what all ranks do together in a phase: sample responses, and ask networks about their tokens
    sampling.py      sampling whose random numbers follow from (seed, phase, prompt)
    scoring.py       the rewards of a recipe, and one score for each response
    reward_model.py  frozen networks that score a response
    rewards.py       reward functions, and how rewards become a score
    advantages.py    KL estimators, rewards of tokens, GAE, whitening, group baselines
    losses.py        clipped losses and their diagnostics

tasks/common/rollouts.py puts them together; tasks/ppo/ is the shortest whole example.
"""
