"""What a person runs: supervised fine-tuning, the reward model, reinforcement learning."""
