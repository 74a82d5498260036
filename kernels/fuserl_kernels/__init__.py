"""fuserl_kernels: the operations of reinforcement learning from human feedback, for PyTorch.

Tensors in, tensors out; needs torch, and Triton for GPUs. Every op is registered with
torch.library, works under torch.compile, and picks its implementation when it runs (see
use_backend).
"""

from fuserl_kernels.advance_rows import advance_rows
from fuserl_kernels.advantages import discounted_returns, gae, rewards_to_advantages
from fuserl_kernels.attention_plan import decode_attention_plan
from fuserl_kernels.backend import use_backend
from fuserl_kernels.decode_attention import decode_attention
from fuserl_kernels.fixed_linear import fixed_linear
from fuserl_kernels.glu import glu
from fuserl_kernels.linear_policy_loss import linear_policy_loss
from fuserl_kernels.linear_token_logprobs import linear_token_logprobs
from fuserl_kernels.norms import layer_norm, rms_norm
from fuserl_kernels.pairwise_loss import pairwise_loss
from fuserl_kernels.policy_loss import policy_loss
from fuserl_kernels.ppo_loss import ppo_loss
from fuserl_kernels.presets import PRESETS
from fuserl_kernels.reward_shaping import kl_penalty, shape_rewards
from fuserl_kernels.rotary import rotary, rotary_kv_write
from fuserl_kernels.sampling import sample_tokens
from fuserl_kernels.token_logprobs import token_logprobs
from fuserl_kernels.value_loss import value_loss
from fuserl_kernels.whitening import masked_moments, masked_whiten

__all__ = [
    "PRESETS",
    "advance_rows",
    "decode_attention",
    "decode_attention_plan",
    "discounted_returns",
    "fixed_linear",
    "gae",
    "glu",
    "kl_penalty",
    "layer_norm",
    "linear_policy_loss",
    "linear_token_logprobs",
    "masked_moments",
    "masked_whiten",
    "pairwise_loss",
    "policy_loss",
    "ppo_loss",
    "rewards_to_advantages",
    "rms_norm",
    "rotary",
    "rotary_kv_write",
    "sample_tokens",
    "shape_rewards",
    "token_logprobs",
    "use_backend",
    "value_loss",
]
