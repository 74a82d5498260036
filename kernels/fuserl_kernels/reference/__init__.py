"""Every op in plain PyTorch: the definition the fast implementations are tested against.

Each function computes in max(float32, input dtype), so float64 in gives float64 out. The files
import torch and each other only: logprobs.py (log-softmax of a chosen token, with and without the
projection in front), policy.py, value.py and pairwise.py (losses with their gradients), rewards.py
(KL, shaping, GAE, whitening), sampling.py, norms.py, rotary.py and glu.py (inside a decoder
layer), and sequences.py (sums over ragged sequences).
"""
